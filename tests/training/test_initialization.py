"""First weights from another network: each rule by the function that it keeps; frozen weights."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffusion_cli.errors import UsageError
from diffusion_cli.networks import AutoencoderKL, Classifier, DiT, SetTransformer, UNet
from diffusion_cli.training.initialization import InitialWeights, fit, freeze
from helpers.networks import SMALL, close, randomised

pytestmark = pytest.mark.usefixtures("one_thread")

TRANSFORMER: dict[str, Any] = {"hidden_size": 12, "depth": 1, "num_heads": 2}
NETWORKS = {
    "unet": (UNet, SMALL),
    "unet_patch2": (UNet, {**SMALL, "attention_resolutions": [], "patch_size": 2}),
    "dit": (DiT, TRANSFORMER),
}
NCSNPP = {"ncsnpp": (UNet, {**SMALL, "progressive_output": "output_skip"})}


def network(name: str, channels: int, classes: int | None = None, seed: int = 0, **changes) -> nn.Module:
    kind, options = (NETWORKS | NCSNPP)[name]
    options = {**options, "class_conditional": classes is not None, **changes}
    return randomised(kind((channels, 8, 8), classes, **options), seed).double().eval()


def fitted(target: nn.Module, source: nn.Module, channels: tuple[int, int], names=(None, None)):
    weights = InitialWeights(
        state=source.state_dict(), channels=channels[0],
        learns_variance=bool(getattr(source, "learn_variance", False)),
        num_classes=len(names[0]) if names[0] else getattr(source, "num_classes", None), class_names=names[0],
    )  # fmt: skip
    return fit(target, weights, channels[1], names[1])


def output(of: nn.Module, x: Tensor, y: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return of(x, torch.linspace(3, 700, len(x), dtype=x.dtype), *(() if y is None else (y,)))


def images(channels: int, seed: int = 5) -> Tensor:
    return torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("name", NETWORKS)
def test_equal_networks_compute_the_same_to_the_bit(name):
    source, target = network(name, 2), network(name, 2, seed=1)
    result = fitted(target, source, (2, 2))
    assert result == (len(source.state_dict()), len(source.state_dict()), 1.0, [], [])
    assert torch.equal(output(target, images(2)), output(source, images(2)))


@pytest.mark.parametrize("variance", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_gray_networks_treat_gray_images_in_colour_alike(name, variance):
    source = network(name, 1, learn_variance=variance)
    target = network(name, 3, seed=1, learn_variance=variance)
    assert fitted(target, source, (1, 3)).fresh == []
    expected = output(source, images(1)).unflatten(1, (-1, 1)).expand(-1, -1, 3, 8, 8).flatten(1, 2)
    close(output(target, images(1).expand(2, 3, 8, 8)), expected)


@pytest.mark.parametrize("variance", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_colour_networks_average_their_outputs_for_gray_images(name, variance):
    source = network(name, 3, learn_variance=variance)
    target = network(name, 1, seed=1, learn_variance=variance)
    assert fitted(target, source, (3, 1)).fresh == []
    expected = output(source, images(1).expand(2, 3, 8, 8)).unflatten(1, (-1, 3)).mean(2)
    close(output(target, images(1)), expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_more_channels_change_nothing_for_the_first_ones(name):
    source, target = network(name, 2), network(name, 4, seed=1)
    result = fitted(target, source, (2, 4))
    assert result.fresh == []
    first, last = {"dit": ("x_embedder.proj", "final_layer.linear")}.get(name, ("stem", "out_conv"))
    assert {*result.adapted} == {f"{first}.weight", f"{last}.weight", f"{last}.bias"}
    outputs = output(target, images(4))
    close(outputs[:, :2], output(source, images(4)[:, :2]))
    assert not outputs[:, 2:].any()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_variance_is_added_as_zero_and_removed(name):
    plain, learned = network(name, 2, seed=1), network(name, 2, seed=2, learn_variance=True)
    assert fitted(learned, plain, (2, 2)).fresh == []
    close(output(learned, images(2)), torch.cat([output(plain, images(2)), torch.zeros(2, 2, 8, 8)], 1))
    learned = network(name, 2, seed=3, learn_variance=True)
    assert fitted(plain, learned, (2, 2)).fresh == []
    close(output(plain, images(2)), output(learned, images(2))[:, :2])


@pytest.mark.parametrize("name", [*NETWORKS, *NCSNPP])
def test_a_variance_is_not_taken_for_more_channels(name):
    """The output layers of 2 channels with a variance, and of 4 channels without, have the same shape."""
    source, target = network(name, 2, learn_variance=True), network(name, 4, seed=1)
    assert fitted(target, source, (2, 4)).fresh == []
    outputs = output(target, images(4))
    close(outputs[:, :2], output(source, images(4)[:, :2])[:, :2])
    assert not outputs[:, 2:].any()
    last = {"dit": "final_layer.linear"}.get(name, "out_conv")
    fresh = fitted(network(name, 2, seed=1, learn_variance=True), network(name, 4), (4, 2)).fresh
    assert {f"{last}.weight", f"{last}.bias"} < {*fresh}


@pytest.mark.parametrize("name", NETWORKS)
def test_fewer_channels_are_new_layers(name):
    fresh = fitted(network(name, 2, seed=1), network(name, 4), (4, 2)).fresh
    first, last = {"dit": ("x_embedder.proj", "final_layer.linear")}.get(name, ("stem", "out_conv"))
    assert fresh == sorted([f"{first}.weight", f"{last}.weight", f"{last}.bias"], key=fresh.index)


@pytest.mark.parametrize("name", NETWORKS)
def test_classes_are_matched_by_name(name):
    source, target = network(name, 2, classes=3), network(name, 2, classes=4, seed=1)
    embedding = {"dit": "y_embedder.embedding_table"}.get(name, "class_embedding")
    row = target.state_dict()[f"{embedding}.weight"][1].clone()
    result = fitted(target, source, (2, 2), (["cat", "dog", "owl"], ["owl", "newt", "cat", "eel"]))
    assert result.fresh == [f"{embedding}.weight (2 of 4 classes taken by name: owl, cat)"]
    assert result.taken == result.total
    theirs = torch.tensor([2, 0])
    assert torch.equal(output(target, images(2), torch.tensor([0, 2])), output(source, images(2), theirs))
    assert torch.equal(output(target, images(2)), output(source, images(2)))  # the null class
    assert torch.equal(target.state_dict()[f"{embedding}.weight"][1], row)


def test_classes_without_names_are_matched_by_number():
    source, target = network("unet", 2, classes=3), network("unet", 2, classes=3, seed=1)
    assert fitted(target, source, (2, 2), (None, ["a", "b", "c"])).fresh == []
    assert torch.equal(
        target.get_parameter("class_embedding.weight"), source.get_parameter("class_embedding.weight")
    )
    target = network("unet", 2, classes=4, seed=1)
    result = fitted(target, source, (2, 2), (None, list("abcd")))
    assert result.fresh == ["class_embedding.weight (0 of 4 classes taken by name)"]
    assert torch.equal(output(target, images(2)), output(source, images(2)))


def test_a_last_class_is_not_taken_for_the_null_class():
    """4 classes without a null class have as many rows as 3 classes with one."""
    target, name = network("unet", 2, classes=3), "class_embedding.weight"
    before = target.state_dict()[name].clone()
    weights = InitialWeights(
        state={name: torch.ones_like(before)},
        channels=2,
        learns_variance=False,
        num_classes=4,
        class_names=None,
    )
    assert name in fit(target, weights, 2, list("abc")).fresh
    assert torch.equal(target.state_dict()[name], before)


def test_an_unconditional_source_leaves_classes_new():
    result = fitted(
        network("unet", 2, classes=3, seed=1), network("unet", 2), (2, 2), (None, ["a", "b", "c"])
    )
    assert result.fresh == ["class_embedding.weight"]
    assert result.taken == result.total - 1


def test_classifiers_keep_the_scores_of_known_classes():
    options = {**SMALL, "dropout": 0.0}
    source = randomised(Classifier((2, 8, 8), 3, **options)).double().eval()
    target = randomised(Classifier((2, 8, 8), 2, **options), 1).double().eval()
    result = fitted(target, source, (2, 2), (["cat", "dog", "owl"], ["owl", "eel"]))
    assert result.fresh == [f"head.{part} (1 of 2 classes taken by name: owl)" for part in ("weight", "bias")]
    close(output(target, images(2))[:, 0], output(source, images(2))[:, 2])


def test_autoencoders_of_gray_images_encode_them_in_colour_alike():
    options = {"channels": 8, "channel_mult": (1, 2), "latent_channels": 3, "norm_groups": 4}
    gray, colour = (randomised(AutoencoderKL((c, 8, 8), None, **options), c).double() for c in (1, 3))
    assert fitted(colour, gray, (1, 3)).fresh == []
    with torch.no_grad():
        close(colour.moments(images(1).expand(2, 3, 8, 8)), gray.moments(images(1)))
        z = torch.randn(2, 3, 4, 4, dtype=torch.float64)
        close(colour.decode(z), gray.decode(z).expand(2, 3, 8, 8))


def test_point_clouds_with_more_coordinates_keep_the_first():
    source, target = (
        randomised(SetTransformer((c, 5), None, **TRANSFORMER, inducing_points=None), c).double()
        for c in (2, 3)
    )
    assert fitted(target, source, (2, 3)).fresh == []
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    close(output(target, x)[:, :2], output(source, x[:, :2]))


def test_layers_of_other_widths_are_new():
    result = fitted(network("unet", 2, seed=1, channel_mult=[1, 3]), network("unet", 2), (2, 2))
    assert "stem.weight" not in result.fresh
    assert "middle.0.conv1.weight" in result.fresh
    assert result.taken + len(result.fresh) == result.total


# --- Frozen weights ---------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "parts"),
    [(["time_mlp"], {"time_mlp"}), (["down", "up.*"], {"down", "up"}), (["st*"], {"stem"})],
)
def test_patterns_name_modules_and_all_within(patterns, parts):
    of = network("unet", 2)
    freeze(of, patterns)
    frozen = {name for name, parameter in of.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in of.named_parameters() if name.partition(".")[0] in parts}


def test_patterns_name_single_parameters():
    of = network("unet", 2)
    freeze(of, ["stem.bias", "*.0.norm1.weight"])
    frozen = [name for name, parameter in of.named_parameters() if not parameter.requires_grad]
    assert "stem.bias" in frozen
    assert "stem.weight" not in frozen
    assert "middle.0.norm1.weight" in frozen


@pytest.mark.parametrize(
    ("patterns", "line"),
    [
        (["time_mpl"], "init.freeze=time_mpl: matches no parameter; did you mean time_mlp"),
        (
            ["encoder"],
            "init.freeze=encoder: matches no parameter; choose from time_mlp, stem, down, middle, up",
        ),
        (["norm1.bias"], "init.freeze=norm1.bias: matches no parameter; write *.norm1.bias, because "),
        (["*"], "init.freeze=[*]: leaves nothing to train; freeze less"),
    ],
)
def test_patterns_without_sense_are_refused(patterns, line):
    with pytest.raises(UsageError) as error:
        freeze(network("unet", 2), patterns)
    assert str(error.value).startswith(line)
    assert len(error.value.lines) == 1
