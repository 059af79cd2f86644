"""Exported programs compute what the denoiser and the autoencoder compute, at any batch size and time."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion_cli.errors import MachineError, UsageError
from diffusion_cli.export import ExportFormat, Onnx, Torch
from diffusion_cli.runs.load import LoadedDenoiser
from helpers.exports import KL, UNET, autoencoder, denoiser, option

NCSNPP = option(
    "model", "ncsnpp_tiny", channels=8, channel_mult=[1, 2], num_res_blocks=1, norm_groups=4, head_channels=8
)
DIT = option("model", "dit_tiny", hidden_size=16, depth=1, num_heads=2)
SETS = option("model", "set_tiny", hidden_size=16, depth=1, num_heads=2)
VOLUMES = option(
    "model", "unet3d_tiny", channels=8, channel_mult=[1, 2], num_res_blocks=1, norm_groups=4, num_heads=1,
    head_channels=None, attention_resolutions=[],
)  # fmt: skip
EDM2 = option("model", "edm2_tiny", channels=8, channel_mult=[1, 2], head_channels=4)
NO_SIGNAL = option("schedule", "cosine", zero_terminal_snr=True)
MODELS: dict[str, Callable[[], LoadedDenoiser]] = {
    "eps": lambda: denoiser(UNET | {"learn_variance": True}),
    "v": lambda: denoiser(classes=3, schedule=NO_SIGNAL, parameterization="v"),
    "edm": lambda: denoiser(schedule=option("schedule", "edm"), parameterization="edm"),
    "edm2": lambda: denoiser(EDM2, classes=3, schedule=option("schedule", "edm"), parameterization="edm"),
    "score": lambda: denoiser(NCSNPP, schedule=option("schedule", "ve"), parameterization="score"),
    "flow": lambda: denoiser(
        DIT, classes=3, schedule=option("schedule", "rectified"), parameterization="flow"
    ),
    "points": lambda: denoiser(SETS, (3, 10), schedule=option("schedule", "vp"), parameterization="v"),
    "volumes": lambda: denoiser(
        VOLUMES, (1, 4, 8, 8), schedule=option("schedule", "subvp"), parameterization="x0"
    ),
    "latents": lambda: denoiser(classes=3, latent=KL),
}
TIMES = torch.tensor([0.98765, 0.2345, 0.0123])
"""Times between those of the schedules."""


def written(form: ExportFormat, model: Any, folder: Path) -> dict[str, Callable[..., list[Tensor]]]:
    """The exported programs by name."""
    form.check(model)
    form.write(model, folder)
    load = _onnx if isinstance(form, Onnx) else _torch
    return {file.stem: load(file) for file in folder.iterdir()}


def _torch(file: Path) -> Callable[..., list[Tensor]]:
    program = torch.export.load(file).module()

    def call(*inputs: Tensor) -> list[Tensor]:
        results = program(*inputs)
        return [results] if isinstance(results, Tensor) else [*results]

    return call


def _onnx(file: Path) -> Callable[..., list[Tensor]]:
    session = pytest.importorskip("onnxruntime").InferenceSession(file)
    names = [each.name for each in session.get_inputs()]
    return lambda *inputs: [
        torch.from_numpy(result)
        for result in session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
    ]


def close(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4 * float(other.abs().max()))


def check_equal(model: LoadedDenoiser, form: ExportFormat, folder: Path) -> None:
    programs = written(form, model, folder)
    latents = ["decoder", "encoder"] if model.info.latent is not None else []
    assert sorted(programs) == sorted([*latents, "denoiser", "schedule"])
    alpha, sigma = (level.float() for level in model.denoiser.schedule(TIMES))
    close(programs["schedule"](TIMES), [alpha, sigma])
    for batch in (1, 3):
        generator = torch.Generator().manual_seed(batch)
        x, t = torch.randn(batch, *model.space.shape, generator=generator), TIMES[:batch]
        y = [] if model.num_classes is None else [torch.tensor([3, 0, 2])[:batch]]  # with the null class
        with torch.no_grad():
            wanted = model.denoiser(x, t, *y)
        results = [wanted.x0, wanted.eps] + ([] if wanted.variance is None else [wanted.variance])
        close(programs["denoiser"](x, t, *y), results)
        if latents:
            images = torch.rand(batch, *model.shape, generator=generator) * 2 - 1
            close(programs["encoder"](images), [model.space.encode(images)])
            close(programs["decoder"](x), [model.space.decode(x)])


def check_example(model: LoadedDenoiser, form: ExportFormat, folder: Path, monkeypatch) -> None:
    """The example of the model card samples by DDIM."""
    x = torch.randn(4, *model.space.shape, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(torch, "randn", lambda *shape: x.clone())
    monkeypatch.setattr(np.random, "randn", lambda *shape: x.double().numpy())
    names: dict[str, Any] = {}
    exec(form.example(model, str(folder)), names)
    close([torch.as_tensor(names["images"])], [by_ddim(model, x)])


@pytest.mark.parametrize("name", ["flow", pytest.param("latents", marks=pytest.mark.slow)])
def test_a_program_of_torch_computes_the_model(tmp_path, monkeypatch, name):
    model = MODELS[name]()
    check_equal(model, Torch(), tmp_path)
    check_example(model, Torch(), tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_an_onnx_model_computes_the_model(tmp_path, monkeypatch, name):
    pytest.importorskip("onnxscript")
    model = MODELS[name]()
    check_equal(model, Onnx(), tmp_path)
    check_example(model, Onnx(), tmp_path, monkeypatch)


@torch.no_grad()
def by_ddim(model: LoadedDenoiser, x: Tensor) -> Tensor:
    """The images for noise x after 50 uniform steps of DDIM (Song et al. 2021a, Eq. 12), in float64."""
    module, labels = model.denoiser, torch.arange(4) % 3 if model.num_classes else None
    times = torch.linspace(1, 0, 51, dtype=torch.float64)
    x = x.double() * module.schedule.prior_std(times[0])
    for t, s in pairwise(times):
        (alpha, sigma), (alpha_s, sigma_s) = module.schedule(t), module.schedule(s)
        x0 = module(x.float(), t.expand(4), labels).x0.double()
        x0 = x0.clamp(-1, 1) if model.space.bounded else x0
        x = alpha_s * x0 + sigma_s * (x - alpha * x0) / sigma
    return model.space.decode(x.float())


@pytest.mark.slow
def test_an_autoencoder_becomes_an_encoder_and_a_decoder(tmp_path):
    model = autoencoder()
    programs = written(Torch(), model, tmp_path)
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        wanted = model.network.reconstruct(images)
    close(programs["decoder"](*programs["encoder"](images)), [wanted])
    names: dict[str, Any] = {"images": images}
    exec(Torch().example(model, str(tmp_path)), names)
    close([names["images"]], [wanted])


class Undecided(torch.nn.Module):
    """A network with a branch on the values of its input."""

    def forward(self, x: Tensor, c_noise: Tensor, y: Tensor | None = None) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize("form", [Torch(), Onnx()], ids=["torch", "onnx"])
def test_a_network_that_cannot_be_traced_is_refused_in_a_line(tmp_path, form, capsys):
    model = denoiser()
    model.denoiser.network = Undecided()
    with pytest.raises(UsageError) as caught:
        form.write(model, tmp_path)
    assert str(caught.value).startswith(f"format={form.name}: cannot express this model: ")
    assert str(caught.value).endswith("; choose format=safetensors, which takes any model")
    assert len(caught.value.lines) == 1
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    "form", [Torch(), pytest.param(Onnx(), marks=pytest.mark.slow)], ids=["torch", "onnx"]
)
def test_a_full_disk_is_named(tmp_path, form):
    file = tmp_path / f"denoiser.{form.ending}"
    file.symlink_to("/dev/full")
    with pytest.raises(MachineError, match=r"denoiser.* cannot be written .No space left on device"):
        form.write(MODELS["points"](), tmp_path)


@pytest.mark.parametrize("form", [Torch(), Onnx()], ids=["torch", "onnx"])
def test_the_name_of_a_folder_is_text_in_an_example(form):
    for model in (denoiser(), autoencoder()):
        compile(form.example(model, 'a "quoted" name\\'), "card", "exec")


def test_packages_that_onnx_lacks_are_named(monkeypatch):
    monkeypatch.setattr("diffusion_cli.export.programs.find_spec", lambda name: None)
    with pytest.raises(UsageError) as caught:
        Onnx().check(denoiser())
    assert str(caught.value) == (
        "format=onnx: needs onnx and onnxscript; install it: pip install 'diffuse-cli[onnx]'"
    )
