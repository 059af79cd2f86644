"""What only a GPU can show; scripts/check_gpu.sh runs these tests."""

import csv
import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor, nn

from diffusion_cli.cli import run
from diffusion_cli.conditions import AttributeDescription, Condition, Conditions, TextDescription
from diffusion_cli.config import build, options
from diffusion_cli.diffusion.denoiser import Denoiser
from diffusion_cli.diffusion.latents import Latents
from diffusion_cli.diffusion.objectives import Simple
from diffusion_cli.diffusion.parameterizations import Eps
from diffusion_cli.diffusion.schedules import Cosine
from diffusion_cli.runs.checkpoint import LAST, read
from diffusion_cli.training.optimizers import AdamW
from helpers.exports import KL, denoiser

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Every option of `model`, with the same layers but fewer and narrower, so that it compiles in seconds.
SMALLER = {
    "channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1, "hidden_size": 64, "depth": 2, "num_heads": 2,
    "norm_groups": 8, "dropout": 0.0, "head_channels": None,
}  # fmt: skip
TINY = [
    "model.channels=8", "model.norm_groups=4", "model.num_heads=1", "model.head_channels=null", "batch_size=16",
    "lr_schedule=constant", "optimizer.lr=0.001", "lr_schedule.warm_up_steps=3", "ema.decay=0.9", "logger=csv",
    "log_every=5", "checkpoint_every=5", "preview_every=1000", "validate_every=1000",
]  # fmt: skip


def distinct_networks() -> dict[str, dict[str, Any]]:
    """The options of `model` that still differ in their layers after all are made small, by their names."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for name in sorted(options("model")):
        node = yaml.safe_load(options("model")[name].read_text()) or {}
        if "_target_" in node:
            small = node | {key: value for key, value in SMALLER.items() if key in node}
            if "attention_resolutions" in small:
                small["attention_resolutions"] = [8]
            key = json.dumps([small, "3d" in name], sort_keys=True)
            found.setdefault(key, (name, small))
    return dict(found.values())


@pytest.fixture
def deterministic():
    """Kernels that add in one order."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.deterministic = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


def inputs(name: str, node: dict[str, Any]) -> tuple[tuple[int, ...], list[Tensor]]:
    """The shape of an image for a network, and what its call takes."""
    kind = node["_target_"].rpartition(".")[2]
    shape = (3, 64) if kind == "SetTransformer" else (1, 8, 8, 8) if "3d" in name else (3, 16, 16)
    torch.manual_seed(0)
    images = torch.randn(4, *shape, device="cuda")
    if kind == "AutoencoderKL":
        return shape, [images, torch.zeros(4, node["latent_channels"], 8, 8, device="cuda")]
    return shape, [images, torch.full((4,), 500.0, device="cuda")]


def gradients(network: nn.Module, call: Callable[..., Any], given: list[Tensor]) -> list[Tensor]:
    """The output of a call and the gradients of the weights."""
    network.zero_grad()
    output = call(*given)
    output = output[0] if isinstance(output, tuple) else output
    output.square().mean().backward()
    return [output.detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)]


@pytest.mark.parametrize(("name", "node"), distinct_networks().items(), ids=distinct_networks())
def test_a_compiled_network_computes_what_it_computes_eagerly(name, node):
    shape, given = inputs(name, node)
    network = build(node, shape, 10).cuda()
    with torch.no_grad():
        for weight in network.parameters():  # many start at zero, and would hide what lies behind them
            weight.add_(0.02 * torch.randn_like(weight))
    eager = gradients(network, network, given)
    compiled = gradients(network, torch.compile(network), given)
    assert len(eager) == len(compiled)
    for one, other in zip(eager, compiled, strict=True):
        scale = one.abs().max().clamp(min=1e-6)
        assert ((one - other).abs().max() / scale).item() < 2e-2  # TF32 convolutions


CONDITIONS = Conditions(
    attributes=(AttributeDescription(name="age", kind="number", low=0.0, high=96.0),),
    image=1,
    text=TextDescription(length=6, vocabulary=9, width=16, depth=1, heads=2),
)


def eight(given: Conditions) -> Condition | None:
    """Conditions of eight images, some of them missing."""
    condition = given.example(8, (16, 16), torch.device("cpu"))
    return None if condition is None else condition.dropped(where=torch.arange(8) > 5)


def loss_and_gradient(device: str, autocast: bool, given: Conditions) -> tuple[float, Tensor]:
    """The loss of one training step and its whole gradient, from the same images, times and noise everywhere."""
    torch.manual_seed(0)
    node = yaml.safe_load(options("model")["unet_tiny"].read_text())
    network = build(node | {"class_conditional": bool(given.attributes)}, (3, 16, 16), given)
    for weight in network.parameters():
        weight.data.add_(0.02 * torch.randn_like(weight))
    schedule = Cosine()
    model = Denoiser(network, schedule, Eps())
    x0, eps, t = torch.randn(8, 3, 16, 16), torch.randn(8, 3, 16, 16), torch.linspace(0.1, 0.9, 8).double()
    model, x0, eps, t = model.to(device), x0.to(device), eps.to(device), t.to(device)
    y = eight(given)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        loss = Simple(label_dropout=0.0)(model, x0, None if y is None else y.to(device), t, eps).mean()
    loss.backward()
    flat = torch.cat([p.grad.flatten().cpu() for p in network.parameters() if p.grad is not None])
    return loss.item(), flat


@pytest.mark.parametrize("given", [Conditions(), CONDITIONS], ids=["unconditional", "conditioned"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_a_training_step_is_that_of_the_cpu(autocast, given):
    loss, gradient = loss_and_gradient("cuda", autocast, given)
    exact, reference = loss_and_gradient("cpu", False, given)
    assert loss == pytest.approx(exact, rel=2e-2 if autocast else 2e-3)
    assert torch.cosine_similarity(gradient, reference, dim=0).item() > (0.995 if autocast else 0.99999)


def curve(folder: Path) -> list[float]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]


def test_a_training_falls_as_on_the_cpu(tmp_path):
    words = ["train", *TINY, f"output_dir={tmp_path}", "max_steps=100", "batch_size=128", "log_every=50"]
    assert run([*words, "name=cpu", "trainer=cpu", "precision=fp32"]) == 0
    assert run([*words, "name=bf16", "trainer=gpu", "precision=bf16", "compile=false"]) == 0
    assert run([*words, "name=compiled", "trainer=gpu", "precision=bf16", "compile=true"]) == 0
    cpu, bf16, compiled = (curve(tmp_path / name) for name in ("cpu", "bf16", "compiled"))
    # The GPU draws other noise, so that only means over thousands of images compare.
    assert bf16[-1] == pytest.approx(cpu[-1], rel=0.1)
    assert compiled[-1] == pytest.approx(cpu[-1], rel=0.1)


@pytest.mark.parametrize(
    "words", [[], ["precision=fp16"], ["trainer.strategy=fsdp"], ["trainer.offload_ema=true"]]
)
def test_a_continued_run_equals_one_without_a_stop(tmp_path, deterministic, words):
    tiny = ["train", *TINY, "name=tiny", "trainer=gpu", "precision=bf16", "compile=false", *words]
    assert run([*tiny, f"output_dir={tmp_path / 'whole'}", "max_steps=10"]) == 0
    for steps in (5, 10):
        assert run([*tiny, f"output_dir={tmp_path / 'parts'}", f"max_steps={steps}"]) == 0
    whole, parts = (read(tmp_path / name / "tiny" / LAST).state for name in ("whole", "parts"))
    for name, weight in whole["state_dict"].items():
        assert torch.equal(weight, parts["state_dict"][name]), name


@pytest.fixture
def trained(tmp_path) -> Path:
    assert run(["train", *TINY, f"output_dir={tmp_path}", "name=tiny", "max_steps=5", "trainer=gpu"]) == 0
    return tmp_path


def pixels(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(file)).astype(int) for file in sorted(folder.glob("0*.png"))])


def test_samples_by_cuda_graphs_are_those_without(trained):
    words = ["sample", f"output_dir={trained}", "run=tiny", "steps=8", "num_samples=48", "precision=fp32"]
    variants = {
        "plain": ["batch_size=48"],
        "graphs": ["batch_size=16", "compile=true"],
        "small": ["batch_size=7"],
        "auto": ["batch_size=auto"],
        "cpu": ["device=cpu"],
        "stochastic": ["sampler=ddpm"],
        "stochastic_cpu": ["sampler=ddpm", "device=cpu"],
    }
    for name, extra in variants.items():
        assert run([*words, f"output={trained / name}", *extra]) == 0
    plain = pixels(trained / "plain")
    assert len(plain) == 48
    for name in ("graphs", "small", "auto", "cpu"):
        difference = np.abs(pixels(trained / name) - plain)
        assert difference.max() <= 3, name
        assert difference.mean() < 0.05, name
    assert np.abs(pixels(trained / "stochastic") - pixels(trained / "stochastic_cpu")).mean() < 0.1


def test_an_evaluation_takes_place_on_the_gpu(trained):
    words = ["eval", f"output_dir={trained}", "run=tiny", "steps=4", "num_samples=200", "metric=[fid,kid]"]
    words += ["features=classifier", f"cache_dir={trained}", "batch_size=auto", "metric.kid.subset_size=100"]
    assert run(words) == 0
    assert (trained / "tiny" / "metrics.json").is_file()


def test_the_fused_optimizer_takes_the_step_of_the_plain_one():
    results = []
    for fused in (True, False):
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(33, 7, device="cuda")) for _ in range(3)]
        optimizer = AdamW(weights, fused, lr=1e-3, weight_decay=0.01)
        for _ in range(5):
            for weight in weights:
                weight.grad = weight.detach().sin()
            optimizer.step()
        results.append(torch.cat([weight.detach().flatten() for weight in weights]))
    assert torch.allclose(*results, rtol=1e-5, atol=1e-6)


def test_the_copy_of_a_model_on_the_cpu_is_the_same_model():
    model = denoiser(latent=KL)
    on_gpu = deepcopy(model)
    on_gpu.denoiser.cuda()
    assert isinstance(on_gpu.space, Latents)
    on_gpu.space.autoencoder.cuda()
    copy, x, t = on_gpu.on_cpu(), torch.randn(2, *model.space.shape), torch.full((2,), 0.5)
    assert torch.equal(copy.denoiser(x, t).x0, model.denoiser(x, t).x0)
    assert torch.equal(copy.space.decode(x), model.space.decode(x))
    assert on_gpu.space.device.type == "cuda"
