"""Low-rank adapters: the function of the network, what is trained and stored, and the merged weights."""

import copy
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffusion_cli.errors import FormatError, UsageError
from diffusion_cli.networks import DiT, UNet
from diffusion_cli.runs.lora import DOWN, UP, merged
from diffusion_cli.runs.schema import InitInfo, LoraInfo
from diffusion_cli.training.ema import EMA, ExponentialAverage
from diffusion_cli.training.lora import add_adapters, frozen_weights
from helpers.networks import SMALL, randomised

pytestmark = [pytest.mark.usefixtures("one_thread")]
EMBEDDING = "class_embedding.weight"
DIT: dict[str, Any] = {"hidden_size": 12, "depth": 1, "num_heads": 2}


def network(name: str = "unet") -> nn.Module:
    made = (
        UNet((1, 8, 8), 2, **SMALL, class_conditional=True) if name == "unet" else DiT((1, 8, 8), None, **DIT)
    )
    return randomised(made).eval()


def output(of: nn.Module) -> Tensor:
    """The output for two fixed images, in the precision of the network."""
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(5)).to(next(of.parameters()).dtype)
    with torch.no_grad():
        return of(x, torch.tensor([3.0, 700.0], dtype=x.dtype))


def trained(of: nn.Module) -> set[str]:
    return {name for name, weight in of.named_parameters() if weight.requires_grad}


def adapted(
    of: nn.Module, *, rank: int = 2, alpha: float | None = None, targets: Any = "auto", new=()
) -> LoraInfo:
    info = add_adapters(of, rank, alpha, targets, {*new})
    for name, weight in of.named_parameters():
        if name.endswith(UP):
            assert not weight.any()
    return info


def after_training(of: nn.Module) -> None:
    """Change all that is trained."""
    with torch.no_grad():
        for weight in of.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight), alpha=0.3)


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_new_adapters_change_no_bit_and_are_all_that_is_trained(name):
    of = network(name)
    before, plain = output(of), of.state_dict()
    info = adapted(of)
    assert torch.equal(output(of), before)
    layers = {name for name, layer in network(name).named_modules() if isinstance(layer, nn.Linear)}
    assert trained(of) == {layer + end for layer in layers for end in (DOWN, UP)} == of.state_dict().keys()
    frozen = frozen_weights(of)
    assert frozen.keys() == plain.keys()
    assert all(torch.equal(weight, plain[key]) for key, weight in frozen.items())
    assert info.frozen == sum(weight.numel() for weight in plain.values())


@pytest.mark.parametrize(("rank", "alpha"), [(2, None), (3, 12.0)])
@pytest.mark.parametrize("name", ["unet", "dit"])
def test_merged_weights_compute_the_same_as_peft(name, rank, alpha):
    of = network(name)
    info = adapted(of, rank=rank, alpha=alpha)
    after_training(of)
    whole = network(name)
    whole.load_state_dict(merged(of.state_dict(), frozen_weights(of), info))
    expected = output(of.double())
    assert (output(network(name).double()) - expected).norm() > 1e-2 * expected.norm()
    assert (output(whole.double()) - expected).norm() < 1e-6 * expected.norm()


def test_new_layers_are_trained_as_a_whole_and_stored():
    of = network()
    adapted(of, targets=["middle"], new=[EMBEDDING, "time_mlp.2.bias"])
    middle = {f"middle.{layer}{end}" for layer in ("0.emb", "1.qkv", "1.proj", "2.emb") for end in (DOWN, UP)}
    assert trained(of) == middle | {EMBEDDING, "time_mlp.2.bias"} == of.state_dict().keys()
    assert EMBEDDING not in frozen_weights(of)
    of = network()
    adapted(of, new=["time_mlp.2.bias"])
    assert f"time_mlp.2{DOWN}" not in of.state_dict()


def test_tensors_that_come_in_part_from_the_source_count_as_new():
    info = InitInfo(
        source="a", kind="run", step=1, weights="ema", sha256="0", taken=2, total=4,
        fresh=["head.bias", f"{EMBEDDING} (1 of 3 classes taken by name: 3)"], adapted=["stem.weight"],
    )  # fmt: skip
    assert info.new == {"head.bias", EMBEDDING, "stem.weight"}


def test_buffers_are_stored_because_training_may_change_them():
    of = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    adapted(of)
    assert {"1.running_mean", "1.running_var", f"0{UP}"} < of.state_dict().keys()
    assert "1.weight" not in of.state_dict()


def test_what_is_stored_restores_the_network_inside_another():
    of = network()
    adapted(of, new=[EMBEDDING])
    other = copy.deepcopy(of)
    after_training(of)
    outer = nn.ModuleDict({"network": other})
    stored = {f"network.{name}": value for name, value in of.state_dict().items()}
    assert outer.state_dict().keys() == stored.keys()
    outer.load_state_dict(stored)
    assert torch.equal(output(other), output(of))
    del stored[f"network.{EMBEDDING}"]
    with pytest.raises(RuntimeError, match=EMBEDDING):
        outer.load_state_dict(stored)


def test_the_average_is_of_what_is_trained_and_shares_the_rest():
    of = network()
    adapted(of)
    ema = EMA(of, ExponentialAverage(0.75, warm_up=False))
    shared = {name for name, weight in ema.network.named_parameters() if weight is of.get_parameter(name)}
    assert shared == {name for name, weight in of.named_parameters() if not weight.requires_grad}
    before = {name: weight.clone() for name, weight in of.named_parameters()}
    after_training(of)
    ema.update(of)
    for name, weight in ema.network.named_parameters():
        now = of.get_parameter(name)
        torch.testing.assert_close(weight, before[name].lerp(now, 0.25))
        assert not weight.requires_grad
    assert ema.state_dict()["network"].keys() == of.state_dict().keys()


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        (["*.qkv", "*.proj"], {"middle.1.qkv", "middle.1.proj"}),
        (["time_mlp"], {"time_mlp.0", "time_mlp.2"}),
        (["middle.0.emb"], {"middle.0.emb"}),
    ],
)
def test_targets_name_layers(targets, layers):
    of = UNet((1, 8, 8), None, **{**SMALL, "attention_resolutions": []})
    adapted(of, targets=targets)
    assert {name.removesuffix(UP) for name in trained(of) if name.endswith(UP)} == layers


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            {"targets": ["stem"]},
            "lora.targets=stem: matches no linear layer with trained weights; choose from time_mlp, down, middle, up",
        ),
        (
            {"targets": ["qkv"]},
            "lora.targets=qkv: matches no linear layer with trained weights; write *.qkv, because a pattern is for",
        ),
        ({"targets": ["midle"]}, "did you mean middle or "),
        ({"rank": 33}, "lora.rank=33: is larger than the rank of each layer; use at most 32"),
        ({"rank": 17, "targets": ["*.qkv"]}, "use at most 16"),
    ],
)
def test_what_fits_no_layer_is_refused(options, line):
    with pytest.raises(UsageError, match=r"lora\.") as caught:
        adapted(network(), **options)
    assert line in str(caught.value)


def test_a_network_of_convolutions_has_no_adapters():
    with pytest.raises(UsageError, match=r"lora\.rank=2: the network has no trained linear layers"):
        adapted(nn.Sequential(nn.Conv2d(1, 1, 1)))


def test_training_needs_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match=r"lora\.rank=2: needs peft; install it: .*diffuse-cli\[lora\]"):
        adapted(network())


def test_merging_needs_no_peft_and_refuses_what_does_not_fit(monkeypatch):
    of = network()
    info = adapted(of)
    monkeypatch.setitem(sys.modules, "peft", None)
    state, base = of.state_dict(), frozen_weights(of)
    assert merged(state, base, info).keys() == base.keys()
    layer = "middle.1.qkv"
    for changes, problem in [
        ({layer + UP: torch.zeros(48, 3)}, "does not fit"),
        ({layer + DOWN: torch.zeros(2, 16, dtype=torch.int64)}, "does not fit"),
        ({f"stem{DOWN}": torch.zeros(2, 9), f"stem{UP}": torch.zeros(8, 2)}, "does not fit"),
        ({f"steam{DOWN}": torch.zeros(2, 9)}, "incomplete"),
    ]:
        with pytest.raises(FormatError, match=problem):
            merged({**state, **changes}, base, info)
    del state[layer + UP]
    with pytest.raises(FormatError, match="incomplete"):
        merged(state, base, info)
