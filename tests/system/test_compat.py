"""Private APIs of libraries: each does what the package needs, and is still needed."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from sklearn.datasets import load_digits
from torch import distributed, nn
from torch.autograd import forward_ad

from diffusion_cli.system import compat


def trainer(folder, *callbacks, **settings):
    return Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=folder,
        callbacks=[*callbacks],
        **settings,
    )


def test_exit_functions_run_before_the_process_ends():
    code = """
import atexit, os
from diffusion_cli.system.compat import run_exit_functions
atexit.register(print, "done", flush=True)
run_exit_functions()
os._exit(0)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "done\n"


@pytest.mark.parametrize("keep", [True, False])
def test_lightning_replaces_signal_handlers_unless_it_is_stopped(tmp_path, keep):
    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            self.handler = signal.getsignal(signal.SIGTERM)

    def own(number, frame):
        raise AssertionError

    look, before = Look(), signal.signal(signal.SIGTERM, own)
    try:
        training = trainer(tmp_path, look)
        if keep:
            compat.keep_signal_handlers(training)
        training.fit(BoringModel())
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (look.handler is own) == keep


def test_a_checkpoint_counts_as_many_batches_as_it_is_given(tmp_path):
    """Six batches of three steps, then one batch a step: without the new count Lightning continues from the sixth."""
    first = trainer(tmp_path, accumulate_grad_batches=2)
    first.fit_loop.epoch_loop.max_steps = 3
    first.fit(BoringModel())
    first.save_checkpoint(tmp_path / "last.ckpt")

    class Fewer(BoringModel):
        def on_load_checkpoint(self, checkpoint):
            compat.set_batch_progress(checkpoint, checkpoint["global_step"])

    numbers = []
    for model in (BoringModel(), Fewer()):
        second = trainer(tmp_path)
        second.fit_loop.epoch_loop.max_steps = 4
        second.fit(model, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
        numbers.append(second.fit_loop.epoch_loop.batch_progress.total.ready)
    assert numbers == [7, 4]


def test_a_training_imports_the_base_classes_of_torchmetrics_and_the_metrics_at_their_first_use():
    code = """
import sys
import diffusion_cli.commands.train
assert not {"scipy.signal", "torchvision", "transformers", "torchmetrics.functional"} & sys.modules.keys()
import torchmetrics
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultMetric
assert issubclass(_ResultMetric, torchmetrics.Metric)
assert not hasattr(torchmetrics, "__unknown__")
import torchmetrics.image
assert torchmetrics.functional.accuracy and torchmetrics.image.PeakSignalNoiseRatio
assert issubclass(torchmetrics.Accuracy, torchmetrics.Metric) and torchmetrics.__version__
from diffusion_cli.system.compat import defer_torchmetrics
defer_torchmetrics()
assert torchmetrics is sys.modules["torchmetrics"] and type(torchmetrics) is type(sys)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "line",
    [
        "from torchmetrics.metric import Metric",
        "from torchmetrics.aggregation import MeanMetric",
        "from torchmetrics import Accuracy",
        "import torchmetrics.functional",
        "from torchmetrics.image.fid import FrechetInceptionDistance",
    ],
)
def test_plugins_import_any_part_of_torchmetrics_first(line):
    code = f"""
import sys
import diffusion_cli.commands
assert "torch" not in sys.modules
{line}
import torchmetrics
assert issubclass(torchmetrics.Accuracy, torchmetrics.metric.Metric)
assert torchmetrics.Metric is torchmetrics.metric.Metric
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="needs Linux")
def test_bfloat16_instructions_are_those_that_the_kernel_lists():
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    if flags is None:
        pytest.skip("needs an x86 CPU")
    assert compat.cpu_has_bf16() == bool({"avx512_bf16", "amx_tile"} & set(flags[1].split()))


def test_a_group_counts(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert [compat.count_in_group("x"), compat.count_in_group("x"), compat.count_in_group("y")] == [
            1,
            2,
            1,
        ]
    finally:
        distributed.destroy_process_group()


def test_a_network_is_compiled_once_it_is_asked_to_be():
    network = nn.Linear(2, 2)
    assert not compat.is_compiled(network)
    network.compile(backend="eager")
    assert compat.is_compiled(network)


def test_what_the_compiler_raises_has_one_base_class():
    @torch.compile(backend="eager", fullgraph=True)
    def broken(x):
        torch._dynamo.graph_break()
        return x

    with pytest.raises(compat.compile_error()):
        broken(torch.ones(1))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["alex", "vgg", "squeeze"])
def test_lpips_has_a_backbone_in_slices_and_trained_linear_layers(name):
    network = compat.untrained_lpips(name)
    assert all(re.match(r"slices?\.?\d+\.\d+\.", key) for key in network.net.state_dict())
    linear = [value for key, value in network.state_dict().items() if re.match(r"lin\d\.", key)]
    assert linear
    assert all((value >= 0).all() for value in linear), "as trained; random ones have both signs"
    with torch.inference_mode():
        x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
        assert network(x, x).flatten().tolist() == [0, 0]
        assert network(x[:1], x[1:]).item() > 0


def test_overrides_are_parsed_as_hydra_composes_them(tmp_path):
    (tmp_path / "c.yaml").write_text("a: 0\nb: 0\n")
    words = ["a=[1,{x: 2.5}]", "++c='1'", "b=null"]
    with hydra.initialize_config_dir(str(tmp_path), version_base="1.3"):
        composed = hydra.compose("c", overrides=words)
    parsed = {item.get_key_element().lstrip("+"): item.value() for item in map(compat.parse_override, words)}
    assert {**composed} == parsed
    assert compat.parse_override("a=1,2").is_sweep_override()
    with pytest.raises(Exception, match="EQUAL") as caught:
        compat.parse_override("a")
    assert type(caught.value).__module__.partition(".")[0] == "hydra"


def test_keys_are_set_as_hydra_composes_them(tmp_path):
    (tmp_path / "c.yaml").write_text("a:\n  b: 0\n  c: ${d}\nd: 1\n")
    words = ["a.b=[1,{x: 2.5}]", "d='2'"]
    with hydra.initialize_config_dir(str(tmp_path), version_base="1.3"):
        composed, changed = hydra.compose("c", overrides=words), hydra.compose("c")
        compat.apply_overrides(changed, words)
        assert changed == composed
        assert changed.a.c == "2"
        with pytest.raises(Exception, match=r"Could not override 'a\.e'"):
            compat.apply_overrides(changed, ["a.e=1"])


def test_the_digits_are_those_of_scikit_learn_without_its_imports(monkeypatch):
    code = "import sys; from diffusion_cli.system.compat import sklearn_digits; sklearn_digits(); print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert {"sklearn", "pandas", "scipy"}.isdisjoint(loaded)
    values, labels = load_digits(return_X_y=True)
    found = compat.sklearn_digits()
    assert np.array_equal(found[:, :-1], values)
    assert np.array_equal(found[:, -1], labels)
    monkeypatch.setattr(compat, "find_spec", lambda name: None)  # as if it had another file
    assert np.array_equal(compat.sklearn_digits(), found)


def test_transforms_of_torch_are_noticed():
    x, seen = torch.ones(2), []

    def look(part):
        seen.append(compat.is_transformed())
        return part * 1

    look(x.clone().requires_grad_()).sum().backward()
    torch.func.vmap(look)(x)
    torch.func.grad(lambda part: look(part).sum())(x)
    with forward_ad.dual_level():
        look(forward_ad.make_dual(x, x))
    look(x)
    assert seen == [False, True, True, True, False]
