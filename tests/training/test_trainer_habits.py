"""Devices without float64, and the habits of Lightning's Trainer: profiles, trial runs, deterministic algorithms."""

import itertools
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusion_cli.cli import run
from diffusion_cli.conditions import Condition
from diffusion_cli.config import CONF, build
from diffusion_cli.data import Batch
from diffusion_cli.diffusion.denoiser import Denoiser
from diffusion_cli.diffusion.latents import Pixels
from diffusion_cli.errors import UsageError
from diffusion_cli.networks import UNet
from diffusion_cli.networks.layers import float64_device, widened
from diffusion_cli.system.precision import device_of, emulated_format, has_fast_bf16
from diffusion_cli.training.device import Device, naming_nondeterministic
from diffusion_cli.training.module import DenoisingModule
from diffusion_cli.training.optimizers import Optimization
from helpers import TINY, assert_same, checkpoint_info, state

pytestmark = pytest.mark.usefixtures("one_thread")
META = torch.device("meta")
"""A device that the tests have and that, as MPS, counts as one without float64."""


class WithoutFloat64(TorchDispatchMode):
    """Refuses float64 tensors on META, as MPS does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.device.type == "meta":
                assert value.dtype != torch.float64, func
        return result


def node(group: str, option: str) -> Any:
    return build(yaml.safe_load((CONF / group / f"{option}.yaml").read_text()))


COMBINATIONS = [
    ("cosine", "eps", "simple", "uniform"),
    ("linear", "v", "target", "uniform"),
    ("sigmoid", "x0", "min_snr", "stratified"),
    ("edm", "edm", "edm", "log_normal"),
    ("vp", "score", "likelihood", "uniform"),
    ("subvp", "eps", "simple", "uniform"),
    ("ve", "eps", "target", "uniform"),
    ("rectified", "flow", "target", "logit_normal"),
    ("linear", "eps", "hybrid", "uniform"),
    ("linear", "eps", "vlb", "stratified"),
]


@pytest.mark.parametrize("names", COMBINATIONS, ids="-".join)
def test_a_training_step_has_no_float64_on_a_device_without_it(names, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # META has none
    schedule, parameterization, objective, times = map(
        node, ("schedule", "parameterization", "objective", "time_sampling"), names
    )
    learned = names[2] == "hybrid"
    network = UNet(
        (1, 8, 8),
        3,
        channels=8,
        norm_groups=4,
        channel_mult=[1],
        head_channels=4,
        class_conditional=True,
        learn_variance=learned,
    )
    denoiser = Denoiser(network, schedule, parameterization)
    optimization = Optimization(
        {"_target_": "torch.optim.SGD"}, {"_target_": "diffusion_cli.training.ConstantRate"}, 1.0
    )
    module = DenoisingModule(
        denoiser, objective, times, Pixels((1, 8, 8)), optimization, seed=0, info=checkpoint_info()
    )
    module.to(META)
    place = {"accumulate_grad_batches": 1, "world_size": 1, "global_rank": 0, "global_step": 0}
    module.trainer = SimpleNamespace(**place)  # pyright: ignore[reportAttributeAccessIssue]
    images, labels = torch.zeros(4, 1, 8, 8, device=META), torch.zeros(4, dtype=torch.int64, device=META)
    batch = Batch(0, images, Condition.of(labels), torch.arange(4))
    with WithoutFloat64():
        module.training_step(batch, 0).backward()
        for loss in module.val_losses(denoiser, [batch]):
            assert loss.device.type == "meta"
        module.trial(images)
    assert all(weight.grad is not None for weight in network.parameters() if weight.requires_grad)


def test_the_check_finds_float64():
    with WithoutFloat64(), pytest.raises(AssertionError):
        torch.ones(2, device=META).double()
    assert widened(torch.ones(2, device=META)).dtype == torch.float32
    assert widened(torch.ones(2)).dtype == torch.float64


@pytest.mark.parametrize(("cuda", "mps"), [*itertools.product([True, False], repeat=2)])
def test_names_of_devices(monkeypatch, cuda, mps):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert device_of("auto").type == ("cuda" if cuda else "cpu")
    for name, there in (("cuda", cuda), ("mps", mps), ("gpu", cuda or mps)):
        if there:
            assert device_of(name).type == ({True: "cuda", False: "mps"}[cuda] if name == "gpu" else name)
        else:
            with pytest.raises(UsageError):
                device_of(name)
    assert float64_device(torch.device("mps")).type == "cpu"
    assert not has_fast_bf16(torch.device("mps"))


@pytest.mark.parametrize(
    ("precision", "has_bf16", "better"),
    [
        ("fp32", False, None),
        ("bf16", True, None),
        ("bf16", False, "fp32"),
        ("fp16", True, "bf16"),
        ("fp16", False, "fp32"),
    ],
)
def test_a_precision_that_the_cpu_emulates_names_a_faster_one(monkeypatch, precision, has_bf16, better):
    monkeypatch.setattr("diffusion_cli.system.precision.cpu_has_bf16", lambda: has_bf16)
    line = emulated_format(precision, torch.device("cpu"))
    assert line is None if better is None else str(line).endswith(f"; use precision={better}")
    assert emulated_format(precision, torch.device("cuda")) is None


def test_training_and_sampling_name_an_emulated_precision(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("diffusion_cli.system.precision.cpu_has_bf16", lambda: False)
    words = [word for word in TINY if not word.startswith("precision=")]
    for command in (
        [*words, "precision=bf16-mixed", "max_steps=1", f"output_dir={tmp_path}"],
        ["sample", f"run={tmp_path / 'tiny'}", "precision=bf16", "steps=1", "num_samples=1", "device=cpu"],
    ):
        assert run(command) == 0
        assert capsys.readouterr().err.count("precision=bf16: this CPU emulates it") == 1


def test_an_apple_gpu_has_its_own_limits(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    device = Device(accelerator="gpu")
    assert device.trainer_arguments()["accelerator"] == "mps"
    with pytest.raises(UsageError, match="precision=fp16: is not supported on Apple GPUs; use bf16 or fp32"):
        device.plugins("fp16")


def test_several_processes_need_several_devices(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    words = ["trainer.accelerator=mps", "trainer.devices=2", f"output_dir={tmp_path}"]
    assert run([*TINY, *words, "max_steps=1"]) == 2
    assert "trainer.devices=2: an Apple GPU is one device; use trainer.devices=1" in capsys.readouterr().err


# --- Profiles, trial runs, deterministic algorithms -------------------------


def test_each_start_has_its_profile(tmp_path):
    for steps in (1, 2):
        words = ["trainer.profiler=simple", f"max_steps={steps}", f"output_dir={tmp_path}"]
        assert run([*TINY, *words]) == 0
    files = sorted(file.name for file in (tmp_path / "tiny" / "profile").iterdir())
    assert files == ["fit-simple-0.txt", "fit-simple-1.txt"]
    assert "optimizer_step" in (tmp_path / "tiny" / "profile" / files[0]).read_text()


@pytest.mark.slow
def test_a_profile_of_operators(tmp_path):
    assert run([*TINY, "trainer.profiler=pytorch", "max_steps=6", f"output_dir={tmp_path}"]) == 0
    files = [*(tmp_path / "tiny" / "profile").iterdir()]
    assert any("aten::" in file.read_text() for file in files if file.suffix == ".txt")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_trial_run_keeps_nothing_and_leaves_a_run_of_its_name_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "temporary").mkdir()
    words = [*TINY, f"output_dir={tmp_path / 'o'}", "max_steps=500", "preview_every=100", "preview_steps=50"]
    assert run([*words, "trainer.fast_dev_run=true"]) == 0
    out, err = capsys.readouterr()
    assert "one step of training, validation and previews worked; nothing is kept" in out
    assert "\nTrial run, not kept: UNet of " in err
    assert str(tmp_path / "temporary") not in out + err
    assert not (tmp_path / "o").exists()
    assert run([*TINY, f"output_dir={tmp_path / 'o'}", "max_steps=1"]) == 0
    before = contents(tmp_path / "o")
    assert run([*words, "trainer.fast_dev_run=true"]) == 0
    assert contents(tmp_path / "o") == before
    assert not list((tmp_path / "temporary").glob("diffuse-*"))


def test_a_trial_run_finds_what_the_preview_cannot_do(tmp_path, capsys):
    words = [*TINY, f"output_dir={tmp_path}", "trainer.fast_dev_run=true", "optimizer=sgd", "optimizer.lr=-1"]
    assert run(words) == 2
    assert "optimizer.lr=-1: torch.optim.SGD refuses it (" in capsys.readouterr().err


def test_deterministic_trainings_are_equal(tmp_path, monkeypatch):
    seen = []
    step = nn.Module.__call__

    def watched(self, *args, **kwargs):
        if isinstance(self, UNet) and self.training:
            seen.append(torch.are_deterministic_algorithms_enabled())
        return step(self, *args, **kwargs)

    monkeypatch.setattr(UNet, "__call__", watched)
    for folder in ("a", "b"):
        words = ["trainer.deterministic=true", "max_steps=2", f"output_dir={tmp_path / folder}"]
        assert run([*TINY, *words]) == 0
    torch.use_deterministic_algorithms(False)
    assert_same(state(tmp_path / "a")["state_dict"], state(tmp_path / "b")["state_dict"])
    assert seen
    assert all(seen)


def test_an_operation_without_a_deterministic_algorithm_is_one_line():
    with pytest.raises(UsageError) as error, naming_nondeterministic():
        raise RuntimeError(
            "cumsum_cuda_kernel does not have a deterministic implementation, but you set 'torch.use_"
        )
    assert error.value.lines == (
        "trainer.deterministic=true: cumsum_cuda_kernel does not have a deterministic implementation on this device; "
        "leave it out, or use trainer=cpu",
    )
    with pytest.raises(RuntimeError, match="other"), naming_nondeterministic():
        raise RuntimeError("other")
