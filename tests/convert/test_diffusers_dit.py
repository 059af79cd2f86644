"""DiT of diffusers, both ways."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_cli.config import build
from diffusion_cli.convert import diffusers_dit as convert
from diffusion_cli.convert.base import Network
from diffusion_cli.errors import FormatError
from helpers.convert import agree, built, same_bytes
from helpers.networks import randomised

diffusers = pytest.importorskip("diffusers")

OPTIONS: dict[str, Any] = {
    "_class_name": "DiTTransformer2DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 2,
    "num_layers": 2,
    "sample_size": 4,
    "num_embeds_ada_norm": 3,
}
LAYOUTS: list[dict[str, Any]] = [
    {"out_channels": 4},
    {"norm_eps": 0.1, "sample_size": 8, "patch_size": 4, "num_attention_heads": 4},
    {"num_embeds_ada_norm": 0, "num_layers": 1},
]


def dit(**options: Any) -> Any:
    """A DiT of diffusers with random weights, whose blocks share their embedding of time and class."""
    network = diffusers.DiTTransformer2DModel.from_config(OPTIONS | options)
    randomised(network).eval().requires_grad_(False)
    for block in network.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(network.transformer_blocks[0].norm1.emb.state_dict())
    return network


def config_of(network: Any) -> dict[str, Any]:
    return dict(network.config) | {"_class_name": "DiTTransformer2DModel"}


def outputs(network: Any, theirs: Any, times: Sequence[int] = (0, 1, 3, 9)) -> tuple[Tensor, Tensor]:
    """F of both networks for random images and classes, at small times where angles in float32 are accurate."""
    classes, side = theirs.config.num_embeds_ada_norm, theirs.config.sample_size
    x, t = torch.randn(4, 2, side, side), torch.tensor(times)
    labels = torch.arange(4).clamp(max=classes)
    with torch.no_grad():
        return network(x, t.float(), labels), theirs(x, timestep=t, class_labels=labels).sample


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_network_of_diffusers(layout):
    theirs = dit(**layout)
    network = convert.read(config_of(theirs))
    module = built(network, convert.weights(network, theirs.state_dict()))
    agree(*outputs(module, theirs))
    agree(*outputs(module, theirs, (20, 300, 700, 999)), 1e-4)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_returns_to_diffusers_unchanged(layout, tmp_path):
    theirs = dit(**layout)
    network = convert.read(config_of(theirs))
    written = convert.write(network)
    assert config_of(theirs) | written == config_of(theirs) | {"out_channels": theirs.out_channels}
    assert convert.read(written) == network
    state = convert.state(network, convert.weights(network, theirs.state_dict()))
    same_bytes(state, theirs.state_dict())
    assert len({tensor.untyped_storage().data_ptr() for tensor in state.values()}) == len(state)
    exported = diffusers.DiTTransformer2DModel.from_config(written)
    exported.load_state_dict(state)
    exported.save_pretrained(tmp_path)
    diffusers.DiTTransformer2DModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("conditional", [True, False])
def test_a_network_of_this_package_is_written(conditional):
    node = convert.read(OPTIONS).node | {"class_conditional": conditional, "dropout": 0.1}
    network = Network(node=node, shape=(2, 4, 4), num_classes=3 if conditional else None)
    module = randomised(build(node, network.shape, network.num_classes)).eval()
    theirs = diffusers.DiTTransformer2DModel.from_config(convert.write(network)).eval()
    theirs.load_state_dict(convert.state(network, module.state_dict()))
    agree(*outputs(module, theirs))
    same_bytes(convert.weights(network, theirs.state_dict()), module.state_dict())


def test_early_class_names_are_read():
    assert convert.read(OPTIONS | {"_class_name": "Transformer2DModel"}) == convert.read(OPTIONS)


def test_a_stored_table_of_positions_must_be_the_computed_one():
    theirs = dit()
    network, positions = convert.read(config_of(theirs)), theirs.pos_embed.pos_embed
    state = theirs.state_dict() | {convert.POSITIONS: positions.half()}
    same_bytes(convert.weights(network, state), convert.weights(network, theirs.state_dict()))
    for wrong in (positions.flip(1), positions[:, :3]):
        with pytest.raises(FormatError, match=r"^pos_embed\.pos_embed"):
            convert.weights(network, theirs.state_dict() | {convert.POSITIONS: wrong})


# --- refusals ---


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"norm_type": "ada_norm_single"}, "norm_type=ada_norm_single: must be 'ada_norm_zero'"),
        ({"activation_fn": "geglu"}, "activation_fn=geglu: must be 'gelu-approximate'"),
        ({"out_channels": 3}, "out_channels=3 must be 2 or 4"),
        ({"attention_bias": False}, "attention_bias=false: must be True"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine=true: must be False"),
        ({"attention_head_dim": 3}, "hidden size 6 must be a multiple of 4"),
        ({"num_attention_heads": 1000, "attention_head_dim": 1000}, "hidden size 1000000 must"),
        ({"patch_size": 3}, "patch_size=3 does not divide sample_size=4"),
        ({"num_layers": 10**9}, "num_layers=1000000000: must be less than"),
        ({"num_embeds_ada_norm": "3"}, "num_embeds_ada_norm=3: must be a valid integer"),
    ],
)
def test_other_networks_are_refused(fields, words):
    with pytest.raises(FormatError, match=words):
        convert.read(OPTIONS | fields)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("proj_out_1.bias"), "proj_out_1.bias is missing"),
        (lambda state: state.update(other=torch.zeros(1)), "other is not part of the network"),
        (
            lambda state: state.update({"transformer_blocks.1.attn1.to_k.bias": torch.zeros(1)}),
            r"transformer_blocks\.1\.attn1: to_q, to_k, to_v have shapes \[16\], \[1\], \[16\]",
        ),
        (
            lambda state: state["transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"].add_(1),
            r"transformer_blocks\.1\.norm1\.emb\.timestep_embedder\.linear_1\.bias differs between blocks",
        ),
        (
            lambda state: state.update(
                {
                    f"transformer_blocks.1.attn1.{name}.bias": torch.zeros(())
                    for name in ("to_q", "to_k", "to_v")
                }
            ),
            r"transformer_blocks\.1\.attn1: to_q, to_k, to_v have shapes \[\], \[\], \[\]",
        ),
    ],
)
def test_other_weights_are_refused(change, words):
    theirs = dit()
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    change(state)
    with pytest.raises(FormatError, match=words):
        convert.weights(convert.read(config_of(theirs)), state)


@pytest.mark.parametrize(
    ("changes", "shape", "words"),
    [
        ({"embedding_layout": "cos_sin"}, (2, 4, 4), "train with model.embedding_layout=cos_sin_inclusive$"),
        ({"mlp_ratio": 2.0}, (2, 4, 4), "mlp_ratio=2.0: DiT in diffusers has mlp_ratio=4"),
        ({"patch_size": 3}, (2, 4, 4), "patch_size=3 does not divide the image size 4"),
        ({"hidden_size": 6}, (2, 4, 4), "hidden_size=6: DiT in diffusers needs a multiple of 4"),
        ({}, (2, 4, 8), r"shape=\[2, 4, 8\]: DiT in diffusers needs square images"),
        ({}, (2, 4), r"shape=\[2, 4\]: DiT in diffusers needs square images"),
    ],
)
def test_networks_that_diffusers_cannot_express_are_refused(changes, shape, words):
    network = Network(node=convert.read(OPTIONS).node | changes, shape=shape, num_classes=3)
    with pytest.raises(FormatError, match=words):
        convert.write(network)
