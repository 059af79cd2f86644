"""Optimizers: their updates, any optimizer of torch or a plugin, and the exact continuation of each."""

import csv
import sys
from itertools import pairwise
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from diffusion_cli.cli import run
from diffusion_cli.config import CONF, build, load
from diffusion_cli.config.libraries import exported
from diffusion_cli.config.recipe import learning_rate
from diffusion_cli.errors import UsageError
from diffusion_cli.training import Adam, AdamW, Lion, Muon
from diffusion_cli.training.optimizers import Optimization, orthogonalized
from helpers import TINY, assert_same, state, train

CONSTANT = {"_target_": "diffusion_cli.training.ConstantRate"}
NETWORK = nn.Sequential(nn.Linear(3, 4), nn.Conv2d(4, 5, 3), nn.Linear(5, 2))


def weights(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    """Parameters with a gradient each."""
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]
    for weight in made:
        weight.grad = torch.randn(weight.shape, generator=generator, dtype=dtype)
    return made


def test_adam_and_adamw_make_their_first_step():
    """Of size lr along the sign of the gradient; with decoupled decay the weight shrinks by lr * decay before."""
    adam, adamw = (nn.Parameter(torch.tensor([2.0], dtype=torch.float64)) for _ in range(2))
    adam.grad = adamw.grad = torch.tensor([7.0], dtype=torch.float64)
    Adam([adam], lr=0.1, eps=1e-12).step()
    AdamW([adamw], lr=0.1, eps=1e-12, weight_decay=0.5).step()
    assert (adam.item(), adamw.item()) == pytest.approx((1.9, 1.8))


def test_lion_follows_algorithm_2():
    (weight,) = weights((3, 2))
    gradient = torch.ones(3, 2).normal_(generator=torch.Generator().manual_seed(1)).double()
    expected, momentum, optimizer = (
        weight.detach().clone(),
        torch.zeros(3, 2),
        Lion([weight], lr=0.1, weight_decay=0.5),
    )
    for step in range(5):
        weight.grad = gradient * (step - 2) ** 3
        update = (0.9 * momentum + 0.1 * weight.grad).sign()
        expected = expected - 0.1 * (update + 0.5 * expected)
        momentum = 0.99 * momentum + 0.01 * weight.grad
        optimizer.step()
    torch.testing.assert_close(weight.detach(), expected)


def test_muon_orthogonalizes():
    for shape in ((6, 6), (4, 30), (30, 4)):
        (weight,) = weights(shape)
        values = torch.linalg.svdvals(orthogonalized(weight.detach(), 5))
        assert values.min() > 0.5
        assert values.max() < 1.3


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_that_of_torch_on_matrices_and_adamw_on_the_rest(nesterov):
    """Torch computes the iteration in bfloat16, so that its steps differ by the rounding."""
    settings: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}
    mine, theirs = (weights((8, 20), (20, 8), dtype=torch.float32) for _ in range(2))
    muon = Muon([{"params": mine, "matrices": True}], nesterov=nesterov, **settings)
    other = torch.optim.Muon(theirs, nesterov=nesterov, adjust_lr_fn="match_rms_adamw", **settings)
    for optimizer in (muon, other) * 4:
        optimizer.step()
    for one, two, start in zip(mine, theirs, weights((8, 20), (20, 8), dtype=torch.float32), strict=True):
        assert (one - two).norm() < 0.03 * (two - start).norm()
    mine, theirs = (weights((8,), (3, 2)) for _ in range(2))
    adam = torch.optim.AdamW(theirs, betas=(0.9, 0.99), **settings)
    for optimizer in (Muon([{"params": mine}], **settings), adam) * 4:
        optimizer.step()
    assert all(torch.allclose(one, two, rtol=1e-12) for one, two in zip(mine, theirs, strict=True))


def test_a_convolution_is_one_matrix():
    (kernel,), (matrix,) = weights((4, 3, 3, 3)), weights((4, 27))
    for weight in (kernel, matrix):
        Muon([{"params": [weight], "matrices": True}], lr=0.1).step()
    assert torch.equal(kernel.flatten(1), matrix)


FINAL = {"final_layer.linear.weight", "final_layer.adaLN_modulation.1.weight"}
CLASSES = "condition_embedding.attributes.category_label.linear.weight"
ENDS = {f"{part}.{layer}.weight" for part in ("encoder", "decoder") for layer in ("conv_in", "conv_out")}


@pytest.mark.parametrize(
    ("option", "shape", "outer"),
    [
        ("unet_tiny", (3, 16, 16), {"stem.weight", "out_conv.weight", "class_embedding.weight"}),
        ("classifier_tiny", (3, 16, 16), {"stem.weight", "head.weight"}),
        ("dit_tiny", (3, 16, 16), {"x_embedder.proj.weight", "y_embedder.embedding_table.weight", *FINAL}),
        ("edm2_tiny", (3, 16, 16), {"stem.weight", "out_conv.weight", CLASSES}),
        ("set_tiny", (3, 16), {"x_embedder.weight", *FINAL}),
        ("kl_tiny", (3, 16, 16), ENDS),
    ],
)
def test_the_first_and_the_last_layer_and_embeddings_are_left_to_adamw(option, shape, outer):
    node = yaml.safe_load((CONF / "model" / f"{option}.yaml").read_text())
    if "class_conditional" in node and option != "set_tiny":
        node["class_conditional"] = True
    network = build(node, shape, None if option == "set_tiny" else 4)
    matrices, others = (group["params"] for group in Muon.parameter_groups(nn.ModuleDict({"model": network})))
    names = {id(weight): name for name, weight in network.named_parameters()}
    assert len(matrices) + len(others) == len(names)
    left = {names[id(weight)] for weight in others if weight.ndim > 1}
    assert {name for name in left if not name.endswith(("inducing", "pos_embed"))} == outer


def test_a_network_of_a_plugin_leaves_its_first_and_last_layer_to_adamw():
    matrices, others = Muon.parameter_groups(NETWORK)
    assert [weight.shape for weight in matrices["params"]] == [(5, 4, 3, 3)]
    assert len(others["params"]) == 5


NOT_FOR_NETWORKS = {
    "LBFGS": "(a closure), but training computes it once; use another optimizer=, such as adamw",
    "SparseAdam": "dense gradients",
    "Muon": "2D parameters",
}
"""Optimizers of torch that refuse these weights, with a word of the reason."""


@pytest.mark.parametrize("name", exported("torch.optim"))
def test_every_optimizer_of_torch_trains_or_says_why_not(name):
    made = Optimization({"_target_": f"torch.optim.{name}"}, CONSTANT, None)
    if name not in NOT_FOR_NETWORKS:
        optimizer, _ = made.trial(NETWORK)
        assert all(weight.grad is not None for group in optimizer.param_groups for weight in group["params"])
        return
    with pytest.raises(UsageError) as error:
        made.check(NETWORK, sharded=False, max_steps=8)
    (line,) = error.value.lines
    assert line.startswith(f"optimizer._target_=torch.optim.{name}: ")
    assert NOT_FOR_NETWORKS[name] in line


def test_the_trial_steps_all_weights_or_one_of_each_shape():
    module = nn.ModuleList([*(nn.Linear(3, 3) for _ in range(3)), nn.Linear(3, 3).half(), nn.Linear(3, 4)])
    made = Optimization({"_target_": "diffusion_cli.training.Muon", "lr": 0.1}, CONSTANT, None)
    for alike, expected in ((True, [(3, 3)] * 4 + [(4, 3)]), (False, [(3, 3)] * 3 + [(4, 3)])):
        optimizer, _ = made.trial(module, alike=alike)
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        assert sorted(tuple(weight.shape) for weight in weights if weight.ndim == 2) == expected
        assert all(optimizer.state[weight] for weight in weights)


def test_a_wrong_value_of_torch_is_one_line():
    sgd, schedules = {"_target_": "torch.optim.SGD"}, "torch.optim.lr_scheduler"
    rate = "optimizer.lr=-1.0: torch.optim.SGD refuses it (Invalid learning rate: -1.0); use another value"
    cycle = {"_target_": f"{schedules}.CyclicLR", "base_lr": 0.1, "max_lr": 0.2}
    for optimizer, schedule, words in (
        ({**sgd, "momentum": 0.9, "lr": -1.0}, CONSTANT, rate),
        (sgd, {**cycle, "mode": "flat"}, f"lr_schedule.mode=flat: {schedules}.CyclicLR refuses it ("),
        (sgd, {"_target_": f"{schedules}.ReduceLROnPlateau"}, "'metrics')"),
        (
            sgd,
            {"_target_": f"{schedules}.OneCycleLR", "max_lr": 1.0},
            f"lr_schedule._target_={schedules}.OneCycleLR",
        ),
        (
            sgd,
            {"_target_": f"{schedules}.OneCycleLR", "max_lr": 1.0, "epochs": 1, "steps_per_epoch": 7},
            "lr_schedule: OneCycleLR ends at step 7, before max_steps=8; use lr_schedule.total_steps=8",
        ),
    ):
        with pytest.raises(UsageError) as error:
            Optimization(optimizer, schedule, None).check(NETWORK, sharded=False, max_steps=8)
        assert words in str(error.value)


def test_muon_refuses_to_be_sharded():
    node = {"_target_": "diffusion_cli.training.Muon", "lr": 0.1}
    with pytest.raises(UsageError, match=r"trainer\.strategy=fsdp: Muon needs whole weight matrices"):
        Optimization(node, CONSTANT, None).check(NETWORK, sharded=True, max_steps=8)


def test_one_kernel_is_used_where_there_is_one():
    for name, fused in (("SGD", True), ("RAdam", None)):
        made, _ = Optimization({"_target_": f"torch.optim.{name}"}, CONSTANT, None).make(NETWORK, fused=True)
        assert made.param_groups[0].get("fused") is fused
    node = {"_target_": "torch.optim.SGD", "foreach": True}
    assert Optimization(node, CONSTANT, None).make(NETWORK, fused=True)[0].param_groups[0]["fused"] is None


def test_the_rate_of_lion_is_a_tenth():
    rates = [
        load("train", [f"optimizer={name}"]).model_dump()["optimizer"]["lr"]
        for name in ("adamw", "lion", "muon")
    ]
    assert rates == pytest.approx([learning_rate(64, 64) * share for share in (1, 0.1, 1)])


# --- Whole trainings -------------------------------------------------------

OPTIONS = {
    "optimizer/radam.yaml": "# RAdam\n_target_: torch.optim.RAdam\nlr: 0.002  # rate\nbetas: [0.9, 0.99]  # averages\n",
    "optimizer/adafactor.yaml": "# Adafactor\n_target_: torch.optim.Adafactor\nlr: 0.05  # rate\n",
    "lr_schedule/cycle.yaml": "# One cycle\n_target_: torch.optim.lr_scheduler.OneCycleLR\nmax_lr: 0.003  # rate\n"
    "total_steps: 60  # steps\n",
    "lr_schedule/steps.yaml": "# Steps\n_target_: torch.optim.lr_scheduler.MultiStepLR\n"
    "milestones: [25, 45]  # steps\ngamma: 0.5  # factor\n",
}


@pytest.fixture
def options(tmp_path) -> str:
    """A folder with option files of a user."""
    for name, text in OPTIONS.items():
        (tmp_path / "conf" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "conf" / name).write_text(text)
    return f"--config-dir={tmp_path / 'conf'}"


DECAYING = ("cosine", "linear", "warmup_stable_decay")
PAIRS = [
    ("adamw", "cosine"), ("adamw", "steps"), ("adam", "linear"), ("lion", "warmup_stable_decay"),
    ("muon", "inverse_sqrt"), ("radam", "constant"), ("adafactor", "constant"), ("sgd", "cycle"),
]  # fmt: skip
"""Optimizers with schedules, so that each of both trains."""
OTHERS = ("optimizer.lr=", "lr_schedule", "checkpoint_every=", "model.channel_mult=")
RUN = [*(word for word in TINY if not word.startswith(OTHERS)), "model.channel_mult=[1]"]


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("optimizer", "schedule"), PAIRS)
def test_each_trains_and_continues_exactly(tmp_path, options, optimizer, schedule):
    words = [*RUN, options, f"optimizer={optimizer}", f"lr_schedule={schedule}"]
    words += ["ema.decay=0.9", "checkpoint_every=30", "log_every=1"]
    words += ["optimizer.lr=0.001"] if optimizer == "lion" else []
    words += [] if schedule in ("steps", "cycle") else ["lr_schedule.warm_up_steps=5"]
    words += ["lr_schedule.decay_steps=60"] if schedule in DECAYING else []
    for folder, steps in (("whole", 60), ("parts", 30), ("parts", 60)):
        assert run([*words, f"output_dir={tmp_path / folder}", f"max_steps={steps}"]) == 0
    whole, parts = (state(tmp_path / folder) for folder in ("whole", "parts"))
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_same(whole[key], parts[key])
    rows = csv.DictReader((tmp_path / "whole" / "tiny" / "metrics.csv").open())
    losses = [float(row["loss"]) for row in rows if row["loss"]]
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])


@pytest.mark.usefixtures("one_thread")
def test_sgd_is_that_of_a_plain_loop(tmp_path, monkeypatch):
    """The gradients of 20 steps, given to torch.optim.SGD outside of the trainer, give the same weights."""
    gradients: list[list[torch.Tensor]] = []
    starts: list[list[torch.Tensor]] = []
    step = torch.optim.SGD.step

    def recorded(self, closure=None):
        loss = closure() if closure is not None else None
        parameters = self.param_groups[0]["params"]
        if not starts:
            starts.append([weight.detach().clone() for weight in parameters])
        if any(weight.device.type == "meta" for weight in parameters):
            starts.clear()
        else:
            gradients.append([weight.grad.clone() for weight in parameters])
        step(self)
        return loss

    monkeypatch.setattr(torch.optim.SGD, "step", recorded)
    words = [
        "optimizer=sgd",
        "optimizer.lr=0.05",
        "lr_schedule=linear",
        "lr_schedule.decay_steps=30",
        "clip_norm=null",
    ]
    words = [*RUN, *words, "lr_schedule.warm_up_steps=4", f"output_dir={tmp_path}", "max_steps=20"]
    assert run(words) == 0
    monkeypatch.undo()
    mine = [nn.Parameter(weight) for weight in starts[0]]
    optimizer = torch.optim.SGD(mine, lr=0.05, momentum=0.9)
    for number, found in enumerate(gradients):
        optimizer.param_groups[0]["lr"] = 0.05 * min(1, (number + 1) / 4) * (1 - number / 30)
        for weight, gradient in zip(mine, found, strict=True):
            weight.grad = gradient
        optimizer.step()
    assert len(gradients) == 20
    trained = [
        value for key, value in state(tmp_path)["state_dict"].items() if key.startswith("model.network.")
    ]
    for weight, expected in zip(trained, mine, strict=True):
        torch.testing.assert_close(weight, expected.detach(), rtol=1e-6, atol=1e-7)


PLUGIN = '''
import torch

class Signed(torch.optim.Optimizer):
    """Steps of the sign, with a count in the options and the last gradient in the state."""

    def __init__(self, params, lr: float = 0.001, *, scale: float = 1.0):
        super().__init__(params, {"lr": lr, "scale": scale, "count": 0})

    @torch.no_grad()
    def step(self, closure=None):
        loss = closure() if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            group["count"] += 1
            for weight in group["params"]:
                self.state[weight]["last"] = weight.grad.clone()
                self.state[weight]["seen"] = self.state[weight].get("seen", 0) + 1
                weight.sub_(weight.grad.sign(), alpha=group["lr"] * group["scale"])
        return loss
'''.replace("closure() if closure is None", "None if closure is None")


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_an_optimizer_of_a_plugin_trains_and_continues(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(PLUGIN)
    (tmp_path / "own" / "optimizer").mkdir(parents=True)
    (tmp_path / "own" / "optimizer" / "signed.yaml").write_text(
        "# Signs\n_target_: mine.Signed\nlr: 0.01  # rate\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    words = [*RUN, "plugins=[mine]", f"--config-dir={tmp_path / 'own'}", "optimizer=signed", "output_dir=o"]
    for steps in (3, 6):
        assert run([*words, f"max_steps={steps}"]) == 0
    optimizer = state(tmp_path / "o")["optimizer_states"][0]
    assert optimizer["param_groups"][0]["count"] == optimizer["state"][0]["seen"] == 6


def test_names_of_runs_have_the_schedule(tmp_path):
    names = [
        load("train", words).model_dump()["name"]
        for words in (
            [], ["lr_schedule=constant"], ["optimizer=adam"], ["optimizer=adam", "lr_schedule=cosine"],
            ["clip_norm=2", "lr_schedule.warm_up_steps=7"], ["experiment=iddpm_cifar10"],
        )
    ]  # fmt: skip
    assert names == [
        "digits-cosine", "digits-cosine-constant", "digits-cosine-adam", "digits-cosine-adam-cosine",
        "digits-cosine-clip_norm_2-warm_up_steps_7", "cifar10-cosine-iddpm_cifar10-adamw-hybrid-unet_iddpm_cifar10",
    ]  # fmt: skip
    assert all(one != two for one, two in pairwise(names))


def test_decay_rates_outside_of_0_to_1_are_one_line(tmp_path, capsys):
    assert train(tmp_path, "max_steps=1", "optimizer=lion", "optimizer.betas=[2,0.9]") == 2
    assert (
        "optimizer.betas=[2, 0.9]: must be two numbers in [0, 1); use [0.9,0.999]" in capsys.readouterr().err
    )
    assert not (tmp_path / "tiny" / "checkpoints").exists()
