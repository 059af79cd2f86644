"""CLIP features of images and prompts."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from diffusion_cli.data import Dataset
from diffusion_cli.errors import FormatError
from diffusion_cli.metrics.features import hub
from diffusion_cli.metrics.features.base import FeatureBatch, Features, check_channels, exact_convolutions
from diffusion_cli.system import pretrained
from diffusion_cli.system.tensors import digest

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class CLIPFeatures(Features):
    """Normalized image embeddings of CLIP, as in CMMD: 768 features for ViT-L/14 at 336 pixels.

    Images are resized to the network's input size on their short side and cropped to the centre. One channel is
    repeated to three.

    Args:
        dataset: dataset with the shape of the images.
        cache_dir: unused.
        device: device of the network.
        weights: a folder or a name on the Hugging Face hub.

    Raises:
        UsageError: transformers or the weights are missing, or images have neither 1 nor 3 channels.

    Source: Radford et al. 2021 (CLIP); Jayasumana et al. 2024 (CMMD).
    """

    name = "clip"
    classes = 0
    note = ""
    chunk = 32

    def __init__(
        self,
        dataset: Dataset,
        cache_dir: Path,
        device: torch.device,
        *,
        weights: str = "openai/clip-vit-large-patch14-336",
    ) -> None:
        check_channels(self.name, dataset)
        self.weights = hub.weights_of(self.name, weights)
        network = self.weights.network("CLIPModel")
        self.digest = digest(network.state_dict())
        self.dim = network.config.projection_dim
        self.size = network.config.vision_config.image_size
        _, height, width = dataset.shape
        kept = "" if height == width else ", short side first, then centre crop"
        self.resize = f"PIL bicubic to {self.size}x{self.size}, antialiased, 8 bits{kept}"
        self.device = device
        self.network = network.to(device, torch.float32)

    @classmethod
    def downloads(cls, settings: Mapping[str, Any]) -> list[pretrained.HubFile]:
        return pretrained.files(settings["weights"], pretrained.NETWORK)

    def extract(self, images: Tensor) -> FeatureBatch:
        pixels = hub.prepared(images, self.size, MEAN, STD, crop=True)
        seen = self.network.vision_model(pixels).pooler_output
        return FeatureBatch(normalize(self.network.visual_projection(seen), dim=1), None)

    @torch.inference_mode()
    def text(self, prompts: list[str]) -> Tensor:
        """Return the normalized embeddings of prompts, float32 [B, dim]; products with image embeddings are cosines.

        Prompts are truncated to 77 tokens. Raises UsageError if the weights have no tokenizer.
        """
        longest = self.network.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            prompts, padding=True, truncation=True, max_length=longest, return_tensors="pt"
        )
        with exact_convolutions():
            read = self.network.text_model(**tokens.to(self.device)).pooler_output
            return normalize(self.network.text_projection(read), dim=1)

    @cached_property
    def tokenizer(self) -> Any:
        """Tokenizer, loaded only for prompts."""
        try:
            tokenizer = self.weights.read(self.weights.transformers().AutoTokenizer)
            if (
                len(tokenizer) != self.network.config.text_config.vocab_size
            ):  # transformers creates an empty one if the files are missing
                raise FormatError("has no tokenizer for this network")
        except (OSError, ValueError) as error:
            raise self.weights.missing("vocab.json and merges.txt", error, "metric=clip_score") from error
        return tokenizer
