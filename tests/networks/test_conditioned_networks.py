"""U-Nets and DiTs that are conditioned on attributes, an image and a text."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_cli.conditions import AttributeDescription, Condition, Conditions, TextDescription
from diffusion_cli.errors import UsageError
from diffusion_cli.networks import DiT, UNet
from diffusion_cli.networks.token_layers import FOURIER_FEATURES, PixelCrossAttention, pixel_positions
from helpers.networks import NCSNPP, SKIPS, SMALL, close, inputs, randomised

AGE = AttributeDescription(name="age", kind="number", low=0.0, high=96.0)
GLASSES = AttributeDescription(name="glasses", kind="yes_no", values=("no", "yes"))
TEXT = TextDescription(length=5, vocabulary=9, width=8, depth=1, heads=2)
LABEL = Conditions.of(3).attributes
ALL = Conditions(attributes=(*LABEL, AGE, GLASSES), image=1, text=TEXT)
NAN = float("nan")
DIT: dict[str, Any] = {"hidden_size": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
OPTIONS: dict[str, tuple[type, dict[str, Any]]] = {
    "unet": (UNet, SMALL),
    "patches": (UNet, SMALL | {"patch_size": 2}),
    "ncsnpp": (UNet, SMALL | NCSNPP),
    "skips": (UNet, SMALL | SKIPS),
    "dit": (DiT, DIT),
}


def made(name: str, given: Conditions | int | None, **changes: Any) -> Any:
    network, options = OPTIONS[name]
    return network((2, 8, 8), given, **(options | changes))


KINDS: dict[str, Callable[..., Any]] = {name: partial(made, name) for name in OPTIONS}


@pytest.fixture(params=KINDS)
def kind(request) -> Callable[..., Any]:
    return KINDS[request.param]


def trained(kind: Callable[..., Any], given: Conditions | int | None = ALL, **changes) -> Any:
    changes = {"class_conditional": True} | changes
    torch.manual_seed(0)  # of Fourier frequencies
    return randomised(kind(given, **changes)).double().eval()


def condition(batch: int = 3, size: int = 8) -> Condition:
    image = torch.rand(batch, 1, size, size, generator=torch.Generator().manual_seed(2))
    return Condition({
        "label": torch.arange(batch) % 3,
        "age": torch.linspace(10, 90, batch),
        "glasses": torch.arange(batch) % 2,
        "image": 2 * image - 1,
        "text": torch.tensor([[1, 2, 3, 4, 5], [6, 7, -1, -1, -1], [8, -1, -1, -1, -1]])[:batch],
    })  # fmt: skip


def test_every_condition_changes_the_output_of_its_image_only(kind):
    network, (x, c_noise), given = trained(kind), inputs(), condition()
    whole = network(x, c_noise, given)
    for name in ALL.names:
        changed = network(x, c_noise, given.dropped([name], torch.tensor([False, True, False])))
        difference = (changed - whole).abs().flatten(1).amax(1)
        assert difference[1] > 1e-3, name
        assert difference[[0, 2]].max() < 1e-10, name


def test_a_mixed_batch_equals_single_images(kind):
    network, (x, c_noise) = trained(kind), inputs()
    mixed = condition()
    for row, names in enumerate([["text", "age"], ["image", "label"], ALL.names]):
        mixed = mixed.dropped(names, torch.arange(3) == row)
    together = network(x, c_noise, mixed)
    for i in range(3):
        row = torch.tensor([i])
        close(network(x[row], c_noise[row], mixed.rows(row)), together[row])
    close(network(x[2:], c_noise[2:], None), together[2:])
    given = {name: value for name, value in mixed.values.items() if name not in ("text", "age")}
    close(network(x[:1], c_noise[:1], Condition(given).rows(torch.tensor([0]))), together[:1])


def test_padding_of_texts_changes_nothing(kind):
    network, (x, c_noise), given = trained(kind), inputs(), condition()
    short = given.replaced({"text": given.values["text"][:, :2]}).rows(torch.tensor([1, 2]))
    close(network(x[1:], c_noise[1:], short), network(x, c_noise, given)[1:])


def test_texts_of_other_lengths_in_one_batch_equal_single_ones(kind):
    """A text alone has only its own tokens; a missing one has a single missing token."""
    network, (x, c_noise), given = trained(kind), inputs(), condition()
    text = torch.tensor([[1, 2, 3, 4, 5], [6, 7, -1, -1, -1], [-1, -1, -1, -1, -1]])
    together = network(x, c_noise, given.replaced({"text": text}))
    for i, length in enumerate([5, 2, 1]):
        row = torch.tensor([i])
        alone = given.rows(row).replaced({"text": text[row, :length]})
        close(network(x[row], c_noise[row], alone), together[row])


def test_the_conditions_change_nothing_at_first(kind):
    torch.manual_seed(0)
    plain = kind(3, class_conditional=True)
    rich = kind(ALL, class_conditional=True)
    randomised(plain)
    missing, unexpected = rich.load_state_dict(
        {
            name: value
            for name, value in plain.state_dict().items()
            if name.split(".")[0] not in rich.outer_layers
        },
        strict=False,
    )
    assert not unexpected
    outer = {name for name in plain.state_dict() if name.split(".")[0] in rich.outer_layers}
    added = {name for name in missing if "text" in name or name.startswith("condition_embedding.")}
    assert {*missing} - added == outer
    attentions = [layer for layer in rich.modules() if isinstance(layer, PixelCrossAttention)]
    assert all(layer.attn.proj.weight.abs().max() == 0 for layer in attentions)


def test_condition_images_of_another_size_are_refused(kind):
    (x, c_noise), given = inputs(), condition(size=4)
    with pytest.raises(ValueError, match=r"condition images of shape \[3, 1, 4, 4\]"):
        trained(kind)(x, c_noise, given)


@pytest.mark.parametrize("size", [(6, 10), (16, 8)])
def test_other_sizes_work_with_condition_images_of_their_size(kind, size):
    x, c_noise = inputs(3, *size)
    given = condition().replaced({"image": torch.zeros(3, 1, *size)})
    assert trained(kind)(x, c_noise, given).shape == x.shape


def test_checkpointing_changes_no_gradient(kind):
    (x, c_noise), gradients = inputs(), []
    for recompute in (False, True):
        network = trained(kind, gradient_checkpointing=recompute).train()
        network(x, c_noise, condition()).square().mean().backward()
        gradients.append([weight.grad for weight in network.parameters()])
    assert all(gradient is not None for gradient in gradients[0])
    for plain, recomputed in zip(*gradients, strict=True):
        close(recomputed, plain, 1e-10)


def test_bfloat16_autocast_stays_close(kind):
    network, (x, c_noise) = trained(kind).float(), inputs()
    plain = network(x.float(), c_noise.float(), condition())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = network(x.float(), c_noise.float(), condition())
    assert (rounded - plain).norm() < 0.1 * plain.norm()


def test_progressive_input_is_the_noised_image_alone():
    network = trained(KINDS["skips"], Conditions(image=1), class_conditional=False)
    seen: list[Tensor] = []
    joins = [block for block in network.down if type(block).__name__ == "InputSkip"]
    joins[0].register_forward_hook(lambda module, args, output: seen.append(args[1]))
    (x, c_noise), given = inputs(), condition()
    network(x, c_noise, given)
    network(x, c_noise, None)
    assert seen[0].shape[1] == 2
    assert torch.equal(seen[0], seen[1])


def attended(**changes) -> list[str]:
    """Names of the blocks of a U-Net of two levels that attend to a text."""
    network = KINDS["unet"](Conditions(text=TEXT), **({"attention_resolutions": [8]} | changes))
    return [
        name
        for name, block in network.named_modules()
        if isinstance(getattr(block, "text", None), PixelCrossAttention)
    ]


def test_cross_attention_is_at_the_named_levels_and_in_the_middle():
    assert attended() == ["down.0", "middle", "up.2", "up.3"]
    assert attended(cross_attention_resolutions=[4]) == ["down.2", "middle", "up.0", "up.1"]
    assert attended(cross_attention_resolutions=[]) == ["middle"]
    assert attended(up_attention="last") == ["down.0", "middle", "up.3"]
    with pytest.raises(
        UsageError, match=r"cross_attention_resolutions=\[3\]: \[3\] not among the resolutions"
    ):
        attended(cross_attention_resolutions=[3])


def test_a_text_alone_needs_no_classes(kind):
    (x, c_noise), text = inputs(), Condition({"text": condition().values["text"]})
    network = trained(kind, Conditions(attributes=(AGE,), text=TEXT), class_conditional=False)
    assert network.conditions.names == ("text",)
    assert (network(x, c_noise, text) - network(x, c_noise, None)).abs().flatten(1).amax(1).min() > 1e-3
    assert torch.equal(network(x, c_noise, text.replaced({"age": torch.ones(3)})), network(x, c_noise, text))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unet", "dit"])
def test_a_conditioned_network_compiles_as_one_graph(name):
    torch._dynamo.reset()
    network = KINDS[name](ALL, class_conditional=True).train()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    (x, c_noise), given = inputs(), condition()
    output = compiled(x.float(), c_noise.float(), given)
    torch.testing.assert_close(output, network(x.float(), c_noise.float(), given))
    output.square().sum().backward()
    assert all(weight.grad is not None for weight in network.parameters())


@pytest.mark.parametrize("sizes", [(6,), (4, 6), (2, 3, 4)])
def test_equal_pixels_read_the_text_by_their_position(sizes):
    """Words such as "left of" need the position, which convolutions know by the padding of the border alone."""
    torch.manual_seed(0)
    layer = PixelCrossAttention(8, 6, ndim=len(sizes), num_heads=2, norm_groups=4)
    randomised(layer)
    tokens, given = torch.randn(1, 5, 6), torch.ones(1, 5, dtype=torch.bool)
    out = layer(torch.ones(1, 8, *sizes), tokens, given).flatten(2)[0].T
    apart = torch.cdist(out, out) + torch.eye(len(out))
    assert apart.min() > 1e-4


def test_positions_are_those_of_the_centres_of_pixels_from_edge_to_edge():
    s = pixel_positions((2, 4), torch.device("cpu")).view(2, 4, 2, FOURIER_FEATURES)[..., 0]
    assert s[:, 0, 0].tolist() == [-0.5, 0.5]
    assert s[0, :, 1].tolist() == [-0.75, -0.25, 0.25, 0.75]
