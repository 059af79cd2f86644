"""Datasets: images and labels from files, memory or closed-form distributions, and training batches of them."""

from diffusion_cli.data.array import Array
from diffusion_cli.data.augmentation import EDMAugmentation, NoAugmentation
from diffusion_cli.data.base import FEW_VAL, Dataset, Images, NoDataset, PixelDigest, spread
from diffusion_cli.data.batches import Batch, Batches, UnreadableError, to_model_range
from diffusion_cli.data.captioned_digits import CaptionedDigits
from diffusion_cli.data.decoding import (
    NoResize,
    center_crop_resize,
    central_part,
    resized_region,
)
from diffusion_cli.data.digits import Digits
from diffusion_cli.data.external import ExternalImages, given_images, relabelled, sample_files
from diffusion_cli.data.fetching import Fetch, FilesAction, ListFiles
from diffusion_cli.data.file_names import file_names
from diffusion_cli.data.folder import Folder, with_rules
from diffusion_cli.data.frozen_text import FrozenEncoder, FrozenText
from diffusion_cli.data.gaussian_mixture import GaussianMixture
from diffusion_cli.data.huggingface import HuggingFace
from diffusion_cli.data.image_sources import with_image_condition
from diffusion_cli.data.labels import LABEL_COLUMNS, LABELS_CSV, composed
from diffusion_cli.data.listing import manifests, visible_name
from diffusion_cli.data.memory import to_device
from diffusion_cli.data.meshes import Meshes
from diffusion_cli.data.packing import Pack
from diffusion_cli.data.pairs import Pairs
from diffusion_cli.data.points import Points
from diffusion_cli.data.previews import (
    PicturedImages,
    has_signals,
    pictured,
    pictured_as,
    quantized,
    shows_signals,
)
from diffusion_cli.data.progressive import ProgressiveBatches, ResolutionSchedule, at_size, reduced
from diffusion_cli.data.signals import Signals
from diffusion_cli.data.text import LearnedText, NoText, TextCondition, TextEncoder, TokenEncoder
from diffusion_cli.data.torch_sets import TorchDataset
from diffusion_cli.data.torchvision_sets import CIFAR10, MNIST, FashionMNIST
from diffusion_cli.data.volume_decoder import VolumeDecoder, placement

__all__ = [
    "CIFAR10",
    "FEW_VAL",
    "LABELS_CSV",
    "LABEL_COLUMNS",
    "MNIST",
    "Array",
    "Batch",
    "Batches",
    "CaptionedDigits",
    "Dataset",
    "Digits",
    "EDMAugmentation",
    "ExternalImages",
    "FashionMNIST",
    "Fetch",
    "FilesAction",
    "Folder",
    "FrozenEncoder",
    "FrozenText",
    "GaussianMixture",
    "HuggingFace",
    "Images",
    "LearnedText",
    "ListFiles",
    "Meshes",
    "NoAugmentation",
    "NoDataset",
    "NoResize",
    "NoText",
    "Pack",
    "Pairs",
    "PicturedImages",
    "PixelDigest",
    "Points",
    "ProgressiveBatches",
    "ResolutionSchedule",
    "Signals",
    "TextCondition",
    "TextEncoder",
    "TokenEncoder",
    "TorchDataset",
    "UnreadableError",
    "VolumeDecoder",
    "at_size",
    "center_crop_resize",
    "central_part",
    "composed",
    "file_names",
    "given_images",
    "has_signals",
    "manifests",
    "pictured",
    "pictured_as",
    "placement",
    "quantized",
    "reduced",
    "relabelled",
    "resized_region",
    "sample_files",
    "shows_signals",
    "spread",
    "to_device",
    "to_model_range",
    "visible_name",
    "with_image_condition",
    "with_rules",
]
