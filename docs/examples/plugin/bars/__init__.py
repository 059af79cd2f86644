"""A dataset and a network for diffuse."""
