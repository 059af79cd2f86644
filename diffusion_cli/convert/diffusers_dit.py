"""The transformer DiT of diffusers, DiTTransformer2DModel. This module imports torch only to change tensors.

diffusers computes the timestep features with the frequencies of DDPM, unlike the published code, repeats the
embedding of time and class in each block, and separates queries, keys and values.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from diffusion_cli.convert.base import Network, Node, Weights, parse
from diffusion_cli.errors import FormatError, format_value

if TYPE_CHECKING:
    from torch import Tensor

DIT = "diffusion_cli.networks.DiT"
POSITIONS = "pos_embed.pos_embed"
"""Table of positions, which early versions of diffusers stored."""
LAYOUT = "cos_sin_inclusive"
"""Layout of the timestep features in diffusers."""
CLASSES = "y_embedder.embedding_table.weight"
EMBEDDER = {
    "timestep_embedder.linear_1": "t_embedder.mlp.0",
    "timestep_embedder.linear_2": "t_embedder.mlp.2",
}
BLOCK = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
OUTER = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
PROJECTIONS = ("to_q", "to_k", "to_v")

Count = Annotated[int, Field(gt=0, le=1024)]

Width = Annotated[int, Field(gt=0, le=2**14)]


class _Config(BaseModel):
    """Fields of config.json that the network depends on, with the defaults of diffusers."""

    model_config = ConfigDict(strict=True, extra="ignore")
    class_name: Literal["DiTTransformer2DModel", "Transformer2DModel"] = Field(alias="_class_name")
    norm_type: Literal["ada_norm_zero"] = "ada_norm_zero"
    num_attention_heads: Count = 16
    attention_head_dim: Width = 72
    in_channels: Count = 4
    out_channels: Annotated[int, Field(gt=0, le=2048)] | None = None
    num_layers: Count = 28
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    attention_bias: Literal[True] = True
    sample_size: Width = 32
    patch_size: Count = 2
    activation_fn: Literal["gelu-approximate"] = "gelu-approximate"
    num_embeds_ada_norm: Annotated[int, Field(ge=0, le=2**20)] = 1000
    norm_elementwise_affine: Literal[False] = False
    norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-5


def read(config: Node) -> Network:
    """Return the network of a config.json; FormatError, naming the key, for one without an equivalent.

    The last row of the class embedding, number `num_embeds_ada_norm`, is the null class; without any other row the
    network is unconditional.
    """
    fields = parse(_Config, config)
    channels, width = fields.in_channels, fields.num_attention_heads * fields.attention_head_dim
    outputs = channels if fields.out_channels is None else fields.out_channels
    if outputs not in (channels, 2 * channels):
        raise FormatError(f"out_channels={outputs} must be {channels} or {2 * channels}")
    if width > 2**14 or width % 4:
        raise FormatError(f"the hidden size {width} must be a multiple of 4, at most {2**14}")
    if fields.sample_size % fields.patch_size:
        raise FormatError(f"patch_size={fields.patch_size} does not divide sample_size={fields.sample_size}")
    num_classes = fields.num_embeds_ada_norm or None
    node = {
        "_target_": DIT,
        "hidden_size": width,
        "depth": fields.num_layers,
        "num_heads": fields.num_attention_heads,
        "mlp_ratio": 4.0,
        "patch_size": fields.patch_size,
        "embedding_layout": LAYOUT,
        "mlp_norm_eps": fields.norm_eps,
        "dropout": fields.dropout,
        "class_conditional": num_classes is not None,
        "learn_variance": outputs == 2 * channels,
        "gradient_checkpointing": False,
    }
    return Network(node=node, shape=(channels, *[fields.sample_size] * 2), num_classes=num_classes)


def weights(network: Network, state: Weights) -> Weights:
    """Return the weights of a file by the names of the network.

    Raises FormatError for other tensors than those of the network, for embeddings of time and class that differ
    between blocks, and for a stored table of positions that differs from the computed one.
    """
    import torch

    left = dict(state)

    def take(name: str) -> "Tensor":
        if name not in left:
            raise FormatError(f"{name} is missing")
        return left.pop(name)

    if POSITIONS in left:
        _check_positions(network, take(POSITIONS))
    found = {ours: take(theirs) for theirs, ours in _renamed(network)}
    for block in range(network.node["depth"]):
        for kind in ("weight", "bias"):
            parts = [take(f"transformer_blocks.{block}.attn1.{name}.{kind}") for name in PROJECTIONS]
            if len({part.shape for part in parts}) > 1 or not parts[0].ndim:
                shapes = ", ".join(str(list(part.shape)) for part in parts)
                raise FormatError(f"transformer_blocks.{block}.attn1: to_q, to_k, to_v have shapes {shapes}")
            found[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(parts)
    for theirs, ours in _embedder(network):
        for block in range(network.node["depth"]):
            copy = take(f"transformer_blocks.{block}.norm1.emb.{theirs}")
            if not torch.equal(found.setdefault(ours, copy), copy):
                raise FormatError(f"transformer_blocks.{block}.norm1.emb.{theirs} differs between blocks")
    for name in left:
        raise FormatError(f"{name} is not part of the network")
    if network.num_classes is None:
        # The only class is always given, so that its embedding is constant.
        constant = found.pop(CLASSES).flatten()
        if constant.shape != found["t_embedder.mlp.2.bias"].shape:
            raise FormatError(f"the class embedding has {len(constant)} values, not one row")
        found["t_embedder.mlp.2.bias"] = found["t_embedder.mlp.2.bias"] + constant
    return found


def write(network: Network) -> Node:
    """Return the config.json of a network; FormatError, with the reason, for one that diffusers cannot express."""
    node, (channels, *sizes) = network.node, network.shape
    width, patch = node["hidden_size"], node["patch_size"]
    if len(sizes) != 2 or len(set(sizes)) > 1:
        raise FormatError(f"shape={list(network.shape)}: DiT in diffusers needs square images")
    if sizes[0] % patch:
        raise FormatError(f"patch_size={patch} does not divide the image size {sizes[0]}")
    if node["embedding_layout"] != LAYOUT:
        given = node["embedding_layout"]
        raise FormatError(
            f"embedding_layout={given} is not that of DiT in diffusers: train with model.embedding_layout={LAYOUT}"
        )
    if round(node["mlp_ratio"] * width) != 4 * width:
        raise FormatError(f"mlp_ratio={format_value(node['mlp_ratio'])}: DiT in diffusers has mlp_ratio=4")
    if width % 4:
        raise FormatError(f"hidden_size={width}: DiT in diffusers needs a multiple of 4")
    return {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": node["num_heads"],
        "attention_head_dim": width // node["num_heads"],
        "in_channels": channels,
        "out_channels": (2 if node["learn_variance"] else 1) * channels,
        "num_layers": node["depth"],
        "dropout": node["dropout"],
        "attention_bias": True,
        "sample_size": sizes[0],
        "patch_size": patch,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": network.num_classes or 0,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": node["mlp_norm_eps"],
    }


def state(network: Network, weights: Weights) -> Weights:
    """Return weights by the names of diffusers, without common memory, as safetensors requires it.

    An unconditional network gets a single class with a zero embedding.
    """
    import torch

    written = {theirs: weights[ours] for theirs, ours in _renamed(network)}
    embedder = dict(weights)
    if network.num_classes is None:
        embedder[CLASSES] = torch.zeros_like(weights["t_embedder.mlp.2.bias"])[None]
    for block in range(network.node["depth"]):
        name = f"transformer_blocks.{block}"
        for kind in ("weight", "bias"):
            parts = weights[f"blocks.{block}.attn.qkv.{kind}"].chunk(3)
            for projection, part in zip(PROJECTIONS, parts, strict=True):
                written[f"{name}.attn1.{projection}.{kind}"] = part.clone()
        for theirs, ours in _embedder(network):
            written[f"{name}.norm1.emb.{theirs}"] = embedder[ours].clone()
    return written


def _renamed(network: Network) -> Iterator[tuple[str, str]]:
    """Yield the names of equal tensors, in diffusers and here."""
    for kind in ("weight", "bias"):
        for theirs, ours in OUTER.items():
            yield f"{theirs}.{kind}", f"{ours}.{kind}"
        for block in range(network.node["depth"]):
            for theirs, ours in BLOCK.items():
                yield f"transformer_blocks.{block}.{theirs}.{kind}", f"blocks.{block}.{ours}.{kind}"


def _embedder(network: Network) -> Iterator[tuple[str, str]]:
    """Yield the names of tensors that each block of diffusers repeats, there within the block and here."""
    for theirs, ours in EMBEDDER.items():
        for kind in ("weight", "bias"):
            yield f"{theirs}.{kind}", f"{ours}.{kind}"
    yield "class_embedder.embedding_table.weight", CLASSES


def _check_positions(network: Network, stored: "Tensor") -> None:
    """Raise FormatError unless a table [1, N, width] has the sines and cosines of columns, then of rows."""
    import torch

    width, side = network.node["hidden_size"], network.shape[1] // network.node["patch_size"]
    if stored.shape != (1, side**2, width):
        raise FormatError(f"{POSITIONS} has shape {list(stored.shape)}, not {[1, side**2, width]}")
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    table = torch.cat([axis.repeat(side, 1), axis.repeat_interleave(side, dim=0)], dim=1)
    if not torch.allclose(stored[0].double(), table, rtol=0, atol=1e-3):  # half precision may be stored
        raise FormatError(f"{POSITIONS} differs from the sinusoidal table, so that positions were trained")
