"""Data: a source becomes images as stored with labels, and those become batches in [-1, 1]."""

from diffusion_cli.data.array import Array
from diffusion_cli.data.base import Dataset, Images, NoDataset, PixelDigest, spread
from diffusion_cli.data.batches import Batch, Batches, UnreadableError, normalised
from diffusion_cli.data.decoding import Exact, fitted
from diffusion_cli.data.digits import Digits
from diffusion_cli.data.folder import Folder, as_begun, file_names
from diffusion_cli.data.gaussian_mixture import GaussianMixture
from diffusion_cli.data.given import Given, given_images, relabelled, sample_files
from diffusion_cli.data.labels import LABEL_COLUMNS, LABELS_CSV, composed
from diffusion_cli.data.listing import manifests, visible_name
from diffusion_cli.data.memory import hold
from diffusion_cli.data.packing import Pack
from diffusion_cli.data.pictured import PicturedImages, pictured, stored
from diffusion_cli.data.points import Points
from diffusion_cli.data.published import CIFAR10, MNIST, FashionMNIST
from diffusion_cli.data.stages import Growing, Stages, reduced

__all__ = [
    "CIFAR10",
    "LABELS_CSV",
    "LABEL_COLUMNS",
    "MNIST",
    "Array",
    "Batch",
    "Batches",
    "Dataset",
    "Digits",
    "Exact",
    "FashionMNIST",
    "Folder",
    "GaussianMixture",
    "Given",
    "Growing",
    "Images",
    "NoDataset",
    "Pack",
    "PicturedImages",
    "PixelDigest",
    "Points",
    "Stages",
    "UnreadableError",
    "as_begun",
    "composed",
    "file_names",
    "fitted",
    "given_images",
    "hold",
    "manifests",
    "normalised",
    "pictured",
    "reduced",
    "relabelled",
    "sample_files",
    "spread",
    "stored",
    "visible_name",
]
