"""EDM2's U-Net: layers that preserve the variance, and weights with a length of no effect."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffusion_cli import option
from diffusion_cli.conditions import AttributeDescription, Condition, Conditions, TextDescription
from diffusion_cli.diffusion.denoiser import Denoiser
from diffusion_cli.diffusion.latents import Pixels
from diffusion_cli.diffusion.objectives import EDM2Objective
from diffusion_cli.diffusion.parameterizations import EDMPreconditioning, Eps
from diffusion_cli.diffusion.schedules import EDMSchedule, Linear
from diffusion_cli.diffusion.time_sampling import LogNormal
from diffusion_cli.errors import UsageError
from diffusion_cli.networks import EDM2UNet
from diffusion_cli.networks.edm2 import MPConditionEmbedding
from diffusion_cli.networks.magnitude import (
    CosineAttention,
    FourierFeatures,
    MPBlock,
    MPConv,
    MPLinear,
    mp_cat,
    mp_silu,
    mp_sum,
    normalize_weights,
    normalized,
    normalized_layers,
)
from diffusion_cli.training.initialization import InitialWeights, fit
from diffusion_cli.training.lora import add_adapters
from diffusion_cli.training.module import DenoisingModule
from diffusion_cli.training.optimizers import Optimization
from helpers.networks import close, inputs

SMALL: dict[str, Any] = {
    "channels": 8, "channel_mult": [1, 2], "attention_resolutions": [8], "head_channels": 4, "class_conditional": True,
}  # fmt: skip
AGE = AttributeDescription(name="age", kind="number", low=0.0, high=96.0)
GLASSES = AttributeDescription(name="glasses", kind="yes_no", values=("no", "yes"))
SPECIES = AttributeDescription(name="species", kind="category", values=("cat", "dog"))
ALL = Conditions(attributes=(*Conditions.of(3).attributes, AGE, GLASSES, SPECIES), image=1)
GIVEN = Condition({
    "label": torch.tensor([0, 2, 1]), "age": torch.tensor([10.0, 50.0, 90.0]), "glasses": torch.tensor([0, 1, 1]),
    "species": torch.tensor([1, 1, 0]), "image": torch.linspace(-1, 1, 192).view(3, 1, 8, 8),
})  # fmt: skip


def network(
    conditions: Conditions | int | None = 3, shape: tuple[int, ...] = (2, 8, 8), **changes
) -> EDM2UNet:
    """A network with gains as of a trained one."""
    torch.manual_seed(0)
    made = EDM2UNet(shape, conditions, **(SMALL | changes)).double().eval()
    for name, gain in made.named_parameters():
        if name.endswith("gain"):
            nn.init.constant_(gain, 0.5)
    return made


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def size(x: Tensor) -> float:
    """Root mean square."""
    return x.detach().square().mean().sqrt().item()


# --- Magnitudes ------------------------------------------------------------


def test_operations_return_unit_variance_for_inputs_of_unit_variance():
    torch.manual_seed(0)
    a, b = normal(64, 40, 12, 12), torch.randn(64, 10, 12, 12)
    conv = MPConv(40, 32)(a)[..., 1:-1, 1:-1]  # zeros are padded at the border
    vectors = normal(4096, 48)
    outputs = {
        "silu": mp_silu(a), "sum": mp_sum(a, a.flip(0)), "residual": mp_sum(a, a.flip(0), 0.3), "cat": mp_cat(a, b),
        "normalized": normalized(7 * a, 1), "conv": conv, "linear": MPLinear(48, 64)(vectors),
        "fourier": FourierFeatures(512)(torch.linspace(-2, 2, 2048)),
    }  # fmt: skip
    assert {name: size(output) for name, output in outputs.items()} == pytest.approx(
        dict.fromkeys(outputs, 1.0), abs=0.03
    )


def test_both_parts_of_a_concatenation_contribute_equally():
    joined = mp_cat(normal(64, 40, 4, 4), normal(64, 10, 4, 4))
    shares = [part.square().sum().item() for part in joined.split([40, 10], dim=1)]
    assert shares[0] == pytest.approx(shares[1], rel=0.03)


def test_attention_depends_on_directions_only():
    """Queries and keys of any length give the same weights: twice the input is the same attention."""
    torch.manual_seed(0)
    attention, x = CosineAttention(16, 2, ndim=2), normal(2, 16, 4, 4)
    branch = [(attention(scale * x) * math.hypot(0.7, 0.3) - 0.7 * scale * x) / 0.3 for scale in (1.0, 50.0)]
    torch.testing.assert_close(*branch, rtol=0, atol=2e-3)


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_activations_of_all_blocks_have_unit_variance(scale):
    made = network(channels=32, channel_mult=[1, 2, 2]).float()
    sizes = {}
    for name, block in made.named_modules():
        if isinstance(block, MPBlock):

            def record(block, x, y, name=name):
                sizes[name] = size(y)

            block.register_forward_hook(record)
    for layer in normalized_layers(made):
        nn.init.normal_(layer.weight, std=scale)
    made(normal(32, 2, 8, 8), torch.linspace(-1, 1, 32), torch.arange(32) % 3)
    assert len(sizes) == 3 + 2 + 2 + 2 + 6
    assert {name: value for name, value in sizes.items() if not 0.7 < value < 1.4} == {}


# --- Normalized weights ------------------------------------------------------------


def test_the_length_of_weights_has_no_effect():
    made, (x, _) = network(ALL), inputs()
    whole, c = made(x, torch.linspace(-1, 1, 3).double(), GIVEN), torch.linspace(-1, 1, 3).double()
    with torch.no_grad():
        for layer in normalized_layers(made):
            layer.weight.mul_(10 * torch.rand_like(layer.norm()) + 0.1)
    close(made(x, c, GIVEN), whole)
    normalize_weights(normalized_layers(made))
    close(made(x, c, GIVEN), whole)


def test_gradients_are_orthogonal_to_weights():
    made, (x, _) = network(ALL), inputs()
    made(x, torch.linspace(-1, 1, 3).double(), GIVEN).square().sum().backward()
    for name, layer in made.named_modules():
        if isinstance(layer, MPConv | MPLinear):
            weight, gradient = layer.weight.detach().flatten(1), layer.weight.grad
            assert gradient is not None
            along = (weight * gradient.flatten(1)).sum(1)
            assert gradient.norm() > 1e-6, name
            assert along.abs().max() < 1e-12 * weight[0].norm() * gradient.norm(), name


@pytest.mark.parametrize("optimizer", ["AdamW", "Muon"])
def test_an_optimizer_step_leaves_rows_of_unit_size(optimizer):
    made = network(ALL).float()
    model = Denoiser(made, EDMSchedule(), EDMPreconditioning())
    steps = Optimization(
        {"_target_": f"diffusion_cli.training.{optimizer}", "lr": 0.1},
        {"_target_": "diffusion_cli.training.ConstantRate"},
        None,
    )
    space = Pixels((2, 8, 8))
    module = DenoisingModule(model, EDM2Objective(), LogNormal(), space, steps, seed=0, info=None)  # pyright: ignore
    module.trainer = SimpleNamespace(precision_plugin=SimpleNamespace(precision="32-true"))  # pyright: ignore
    frozen = made.stem.weight.requires_grad_(False)
    nn.init.constant_(frozen, 3.0)
    before = {name: weight.detach().clone() for name, weight in made.named_parameters() if "conv" in name}
    step = module.configure_optimizers()["optimizer"]
    model(normal(3, 2, 8, 8), torch.full((3,), 0.5), GIVEN).x0.square().sum().backward()
    step.step()
    for layer in normalized_layers(made):
        size_of_rows = layer.weight.detach().flatten(1).square().mean(1)
        torch.testing.assert_close(size_of_rows, torch.ones_like(size_of_rows))
    assert not any(torch.equal(weight, made.get_parameter(name)) for name, weight in before.items())
    assert (frozen == 3.0).all()


# --- The network ------------------------------------------------------------


@pytest.mark.parametrize(("name", "millions"), [("edm2_xs", 124.7), ("edm2_s", 280.2)])
def test_published_sizes_have_the_published_number_of_weights(name, millions):
    """125 and 280 millions in Table 6, with latents of four channels and 1000 classes."""
    with torch.device("meta"):
        made = option("model", name, (4, 64, 64), 1000)
    assert sum(weight.numel() for weight in made.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_the_output_is_zero_before_training():
    made = EDM2UNet((2, 8, 8), 3, **SMALL)
    assert not made(normal(3, 2, 8, 8), torch.zeros(3)).any()


@pytest.mark.parametrize("shape", [(1, 13), (2, 7, 10), (1, 4, 6, 5)])
def test_signals_images_and_volumes_of_any_size(shape):
    """Padded at the end by repeating pixels: as an image that has these pixels itself."""
    made, x = (
        network(None, shape, attention_resolutions=[], class_conditional=False),
        normal(2, *shape).double(),
    )
    pads = [end for n in reversed(shape[1:]) for end in (0, n % 2)]
    larger = nn.functional.pad(x, pads, mode="replicate")
    c = torch.linspace(-1, 1, 2).double()
    assert made(x, c).shape == x.shape
    close(made(x, c), made(larger, c)[(..., *(slice(n) for n in shape[1:]))])


def test_every_condition_changes_the_output_of_its_image_only():
    made, (x, _), c = network(ALL), inputs(), torch.linspace(-1, 1, 3).double()
    whole = made(x, c, GIVEN)
    for name in ALL.names:
        changed = made(x, c, GIVEN.dropped([name], torch.tensor([False, True, False])))
        difference = (changed - whole).abs().flatten(1).amax(1)
        assert difference[1] > 1e-4, name
        assert difference[[0, 2]].max() < 1e-12, name


def test_missing_conditions_have_an_embedding_of_zero():
    made, (x, _), c = network(), inputs(), torch.linspace(-1, 1, 3).double()
    assert isinstance(made.condition_embedding, MPConditionEmbedding)
    null = made(x, c, torch.full((3,), 3))
    close(made(x, c), null)
    close(made(x, c, torch.full((3,), -1)), null)
    assert not made.condition_embedding(Condition(), c).any()


def test_augmentations_change_the_output_of_their_image_only():
    made, plain = (
        network(Conditions(augmentation=2), class_conditional=False),
        network(class_conditional=False),
    )
    assert made.augmentation is not None
    nn.init.ones_(made.augmentation.weight)
    (x, _), c = inputs(), torch.linspace(-1, 1, 3).double()
    difference = made(x, c, Condition({"augmentation": torch.tensor([[0, 0], [1, 2], [0, 0.0]])})) - plain(
        x, c
    )
    assert difference[1].abs().max() > 1e-4
    assert not difference[[0, 2]].any()
    close(made(x, c), plain(x, c))


def test_embeddings_of_conditions_have_unit_variance():
    torch.manual_seed(0)
    for given in (3, ALL):
        embedding = MPConditionEmbedding(Conditions.of(given), 4096)
        assert size(embedding(GIVEN, torch.zeros(3))) == pytest.approx(1, abs=0.05)


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for recompute in (False, True):
        made, (x, _) = network(gradient_checkpointing=recompute), inputs()
        made(x, torch.linspace(-1, 1, 3).double()).square().sum().backward()
        gradients.append(made.stem.weight.grad)
    close(*gradients)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"attention_resolutions": [5]}, r"attention_resolutions=\[5\]: \[5\] not among the resolutions"),
        ({"head_channels": 3}, "head_channels=3: does not divide the 8 channels of an attention layer"),
        ({"channel_mult": []}, "must have at least one level"),
    ],
)
def test_contradictions_are_refused(changes, problem):
    with pytest.raises(UsageError, match=problem):
        network(**changes)


def test_texts_adapters_and_timesteps_are_refused():
    text = Conditions(text=TextDescription(length=5, vocabulary=9, width=8, depth=1, heads=2))
    with pytest.raises(UsageError, match="text: EDM2UNet reads no texts"):
        network(text, class_conditional=False)
    with pytest.raises(UsageError, match="no trained linear layers"):
        add_adapters(network(), 2, None, "auto", ())
    problem = "parameterization=eps: gives the network timesteps up to 999, .* use parameterization=edm"
    with pytest.raises(UsageError, match=problem):
        Denoiser(network(), Linear(), Eps())


# --- First weights of another run ------------------------------------------------------------


def fitted(target: EDM2UNet, source: EDM2UNet, channels: tuple[int, int], **names: Any):
    weights = InitialWeights(
        state=source.state_dict(), channels=channels[0], learns_variance=False, num_classes=source.num_classes,
        class_names=names["theirs"], conditions=source.conditions,
    )  # fmt: skip
    return fit(target, weights, channels[1], names["ours"])


def test_first_weights_give_the_same_network():
    source, target, (x, _) = network(ALL), network(ALL), inputs()
    with torch.no_grad():
        for weight in source.parameters():
            weight.copy_(torch.rand_like(weight) + 0.1)
    names = ["0", "1", "2"]
    result = fitted(target, source, (2, 2), theirs=names, ours=names)
    assert (result.fresh, result.adapted) == ([], [])
    c = torch.linspace(-1, 1, 3).double()
    close(target(x, c, GIVEN), source(x, c, GIVEN))
    assert all(layer.weight.square().mean().item() == pytest.approx(1) for layer in normalized_layers(target))


def test_first_weights_take_classes_by_name_and_no_layer_of_other_channels():
    source, target = network(3), network(4, (1, 8, 8))
    nn.init.zeros_(target.out_gain)
    column = "condition_embedding.attributes.category_label.linear.weight"
    with torch.no_grad():
        source.state_dict()[column].copy_(torch.tensor([1.0, 2.0, 3.0]).expand(16, 3))
        target.state_dict()[column].fill_(4.0)
    names = {"theirs": ["cat", "dog", "owl"], "ours": ["owl", "newt", "cat", "eel"]}
    result = fitted(target, source, (2, 1), **names)
    assert result.fresh == [
        "out_gain",
        "stem.weight",
        f"{column} (2 of 4 classes taken by name: owl, cat)",
        "out_conv.weight",
    ]
    assert source.out_gain != 0 == target.out_gain  # else the random weights of the last layer would act
    taken = target.state_dict()[column]
    torch.testing.assert_close(
        taken / taken[:, 1:2], torch.tensor([3 / 4, 1, 1 / 4, 1]).double().expand(16, 4)
    )
