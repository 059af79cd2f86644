"""The CLIP network, which sees images and reads prompts."""

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
from diffusion_cli.runs.weights import digest

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class CLIPFeatures(Features):
    """The image embeddings of CLIP, projected and of length 1, as in CMMD: 768 features of ViT-L/14 at 336 pixels.

    `weights` is a folder or a name on the hub, as transformers has them; the network's own image size is taken. Of
    images that are not square the centre is seen: the short side is resized to that size, the long side is cropped.
    One channel is repeated to three.

    Raises UsageError if transformers or the weights are missing, or images have neither 1 nor 3 channels.

    Source: Radford et al. 2021 (CLIP); Jayasumana et al. 2024 (CMMD, whose code normalises the embeddings).
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
        network = hub.load(self.name, "CLIPModel", weights)
        self.weights = weights
        self.digest = digest(network.state_dict())
        self.dim = network.config.projection_dim
        self.size = network.config.vision_config.image_size
        _, height, width = dataset.shape
        kept = "" if height == width else ", short side first, then centre crop"
        self.resize = f"PIL bicubic to {self.size}x{self.size}, antialiased, 8 bits{kept}"
        self.device = device
        self.network = network.to(device, torch.float32)

    def extract(self, images: Tensor) -> FeatureBatch:
        pixels = hub.prepared(images, self.size, MEAN, STD, crop=True)
        seen = self.network.vision_model(pixels).pooler_output
        return FeatureBatch(normalize(self.network.visual_projection(seen), dim=1), None)

    @torch.inference_mode()
    def text(self, prompts: list[str]) -> Tensor:
        """The embeddings of prompts, float32 [B, dim] of length 1; a product with those of images is the cosine.

        Longer prompts are truncated to 77 tokens. Raises UsageError if the weights come without a tokenizer.
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
        """What cuts prompts into tokens; it lies beside the weights, and only prompts need it."""
        try:
            tokenizer = hub.pretrained(hub.imported(self.name).AutoTokenizer, self.weights)
            if (
                len(tokenizer) != self.network.config.text_config.vocab_size
            ):  # transformers makes up an empty one
                raise FormatError("holds no tokenizer of this network")
        except (OSError, ValueError) as error:
            raise hub.missing(self.weights, "vocab.json and merges.txt", error) from error
        return tokenizer
