"""The digits, a classifier trained on them, and small published networks."""

import json
from pathlib import Path

import pytest
import torch

from diffusion_cli.data import Digits
from diffusion_cli.metrics import ClassifierFeatures
from helpers.metrics import option

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def digits() -> Digits:
    return Digits("", val_fraction=0.2, flip=False)


@pytest.fixture(scope="session")
def trained(digits, tmp_path_factory) -> tuple[ClassifierFeatures, Path]:
    cache_dir = tmp_path_factory.mktemp("cache")
    return ClassifierFeatures(digits, cache_dir, CPU, **option("classifier")).prepare(), cache_dir


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Small networks with random weights, saved as transformers publishes them."""
    transformers = pytest.importorskip("transformers")
    layers = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dino = transformers.Dinov2Model(transformers.Dinov2Config(**layers, patch_size=14, image_size=224))
        torch.nn.init.normal_(dino.embeddings.position_embeddings)
        vision = {**layers, "intermediate_size": 64, "patch_size": 14, "image_size": 56, "projection_dim": 16}
        text = {
            **layers,
            "intermediate_size": 64,
            "vocab_size": 28,
            "max_position_embeddings": 8,
            "projection_dim": 16,
        }
        ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
        clip = transformers.CLIPModel(
            transformers.CLIPConfig(vision_config=vision, text_config=text | ends, projection_dim=16)
        )
    found = {"dinov2": tmp_path_factory.mktemp("dinov2"), "clip": tmp_path_factory.mktemp("clip")}
    dino.save_pretrained(found["dinov2"])
    clip.save_pretrained(found["clip"])
    words = [
        "<|startoftext|>",
        "<|endoftext|>",
        *(f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz"),
    ]
    (found["clip"] / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    (found["clip"] / "merges.txt").write_text("#version: 0.2\n")
    (found["clip"] / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    return found
