"""Train, sample and evaluate diffusion models from one configured command line."""

__version__ = "0.1.0"
