"""Export as programs that run without this package: ONNX models and programs of torch.export."""

import contextlib
import json
import logging
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from io import BytesIO, StringIO
from pathlib import Path
from typing import ClassVar

import torch
from torch.export import ExportedProgram

from diffusion_cli.diffusion.latents import Latents
from diffusion_cli.errors import first_line
from diffusion_cli.export.base import Exportable, ExportFormat
from diffusion_cli.export.graph import Graph, graphs
from diffusion_cli.runs.load import LoadedAutoencoder, LoadedDenoiser
from diffusion_cli.system.files import writing

PACKAGES = ("onnx", "onnxscript")
"""Packages with which torch writes ONNX."""
DDIM_STEP = "    x = alpha[n + 1] * x0 + sigma[n + 1] / sigma[n] * (x - alpha[n] * x0)"
"""Last line of the sampling loop in a model card, from time n to n + 1 (Song et al. 2021a, Eq. 12)."""


class _Programs(ExportFormat):
    """Base class of formats with one file for each program of `graphs`."""

    ending: ClassVar[str]
    """Ending of the names of the files."""

    def write(self, model: Exportable, folder: Path) -> None:
        """Write the programs of a model; UsageError, before a file is written, if it cannot be expressed."""
        try:
            with _quiet():
                savers = {name: self._convert(graph) for name, graph in graphs(model).items()}
        except Exception as error:  # the exporters of torch raise many types of errors
            problem = f"cannot express this model: {first_line(error)}"
            raise self.refusal(problem, "choose format=safetensors, which takes any model") from error
        for name, save in savers.items():
            path = folder / f"{name}.{self.ending}"
            with writing(path), _quiet():
                save(path)

    def example(self, model: Exportable, source: str) -> str:
        lines = (
            self._reconstruction(source)
            if isinstance(model, LoadedAutoencoder)
            else self._sampling(model, source)
        )
        return "\n".join([*lines, ""])

    def _path(self, source: str, name: str) -> str:
        """Return the path of a program in a folder `source`, as text in Python."""
        return json.dumps(f"{source}/{name}.{self.ending}")

    @abstractmethod
    def _convert(self, graph: Graph) -> Callable[[Path], None]:
        """Return a function that saves a program in this format."""

    @abstractmethod
    def _reconstruction(self, source: str) -> list[str]:
        """Return the lines of an example for an autoencoder."""

    @abstractmethod
    def _sampling(self, model: LoadedDenoiser, source: str) -> list[str]:
        """Return the lines of an example that samples from a denoiser by DDIM in 50 steps."""


class Torch(_Programs):
    """Programs of torch.export, which `torch.export.load` reads."""

    name, library, ending = "torch", "pytorch", "pt2"

    def check(self, model: Exportable) -> None:
        """Raise UsageError for other conditions than classes; only tracing shows what else cannot be expressed."""
        self.refuse_conditions(model)

    def _convert(self, graph: Graph) -> Callable[[Path], None]:
        return partial(_save, graph.program)

    def _reconstruction(self, source: str) -> list[str]:
        return [
            "import torch",
            "",
            *(
                f"{name} = torch.export.load({self._path(source, name)}).module()"
                for name in ("encoder", "decoder")
            ),
            "images = decoder(encoder(images))  # float [B, C, H, W] in [-1, 1]",
        ]

    def _sampling(self, model: LoadedDenoiser, source: str) -> list[str]:
        names = _programs_of(model)
        y = f", torch.arange(4) % {model.num_classes}" if model.num_classes is not None else ""
        return [
            "import torch",
            "",
            *(f"{name} = torch.export.load({self._path(source, name)}).module()" for name in names),
            "times = torch.linspace(1, 0, 51)",
            "alpha, sigma = schedule(times)",
            f"x = sigma[0].clamp(min=1) * torch.randn(4, {_sizes(model)})",
            "for n in range(50):  # DDIM",
            f"    x0 = denoiser(x, times[n].expand(4){y})[0]{_clipped(model, 'clamp')}",
            DDIM_STEP,
            "images = decoder(x)" if "decoder" in names else "images = x",
        ]


def _save(program: ExportedProgram, path: Path) -> None:
    buffer = BytesIO()  # on a full disk, torch would end the process
    torch.export.save(program, buffer)
    path.write_bytes(buffer.getbuffer())


class Onnx(_Programs):
    """ONNX models, which onnxruntime and other programs run."""

    name, library, ending = "onnx", "onnx", "onnx"

    def check(self, model: Exportable) -> None:
        """Raise UsageError for a missing package, or other conditions than classes; tracing shows the rest."""
        self.refuse_conditions(model)
        if missing := [package for package in PACKAGES if find_spec(package) is None]:
            raise self.refusal(
                f"needs {' and '.join(missing)}", "install it: pip install 'diffuse-cli[onnx]'"
            )

    def _convert(self, graph: Graph) -> Callable[[Path], None]:
        model = torch.onnx.export(
            graph.program, input_names=graph.inputs, output_names=graph.outputs, dynamo=True, verbose=False
        )
        assert model is not None
        return model.save

    def _reconstruction(self, source: str) -> list[str]:
        return [
            "from onnxruntime import InferenceSession",
            "",
            *(f"{name} = InferenceSession({self._path(source, name)})" for name in ("encoder", "decoder")),
            'x = encoder.run(None, {"images": images})[0]  # float32 [B, C, H, W] in [-1, 1]',
            'images = decoder.run(None, {"x": x})[0]',
        ]

    def _sampling(self, model: LoadedDenoiser, source: str) -> list[str]:
        names = _programs_of(model)
        y = f', "y": np.arange(4) % {model.num_classes}' if model.num_classes is not None else ""
        return [
            "import numpy as np",
            "from onnxruntime import InferenceSession",
            "",
            *(f"{name} = InferenceSession({self._path(source, name)})" for name in names),
            "times = np.linspace(1, 0, 51, dtype=np.float32)",
            'alpha, sigma = schedule.run(None, {"t": times})',
            f"x = sigma[0].clip(1) * np.random.randn(4, {_sizes(model)}).astype(np.float32)",
            "for n in range(50):  # DDIM",
            f'    inputs = {{"x": x, "t": np.repeat(times[n], 4){y}}}',
            f'    x0 = denoiser.run(["x0"], inputs)[0]{_clipped(model, "clip")}',
            DDIM_STEP,
            'images = decoder.run(None, {"x": x})[0]' if "decoder" in names else "images = x",
        ]


def _programs_of(model: LoadedDenoiser) -> list[str]:
    """Return the names of the programs that sample from a denoiser."""
    return ["denoiser", "schedule", *(["decoder"] if isinstance(model.space, Latents) else [])]


def _sizes(model: LoadedDenoiser) -> str:
    return ", ".join(map(str, model.space.shape))


def _clipped(model: LoadedDenoiser, method: str) -> str:
    """Return the call that clips x0 of bounded data."""
    return f".{method}(-1, 1)" if model.space.bounded else ""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Context without the warnings of the exporters, and the graphs that they print when they fail."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
