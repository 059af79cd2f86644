"""The files of a run: checkpoints, weights, curves and manifests."""
