"""A trained denoiser in Python: the commands, on tensors."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffusion_cli import config as configuration
from diffusion_cli import editing
from diffusion_cli.batch_size import advise_batch_size
from diffusion_cli.commands import edit as edit_command
from diffusion_cli.commands.class_labels import class_number
from diffusion_cli.commands.eval import assess
from diffusion_cli.commands.evaluation_plan import plan_of
from diffusion_cli.commands.export import Export
from diffusion_cli.commands.inputs import Input
from diffusion_cli.commands.sample_conditions import condition_of, refuse_condition_images
from diffusion_cli.commands.trained import prepare
from diffusion_cli.conditions import Conditions
from diffusion_cli.config import (
    EditConfig,
    EvalConfig,
    ExportConfig,
    HistoryComparison,
    SampleConfig,
    build,
)
from diffusion_cli.config.values import Step, Weights
from diffusion_cli.data import to_model_range
from diffusion_cli.diffusion.denoiser import Denoiser, Prediction
from diffusion_cli.errors import NO_VALUE, UsageError, class_name
from diffusion_cli.export import diffusers_pipeline
from diffusion_cli.generate import generate
from diffusion_cli.metrics.protocol import Result
from diffusion_cli.model.arguments import (
    ConfigT,
    as_overrides,
    checked_config,
    described,
    given,
    mask_regions,
    shown,
    tensor,
    texts,
)
from diffusion_cli.runs.load import LoadedDenoiser, load_model
from diffusion_cli.samplers import Sampler
from diffusion_cli.system.precision import autocast, device_of

Value = int | float | str | bool | None
Attributes = Mapping[str, Value | Sequence[Value]]
"""Values of attributes by name; of a list, each in turn."""
Label = int | float | str | Attributes | Sequence[int | float | str | Attributes] | None
OF_FILES = {
    "sample": ("output", "strip", "gif", "frames"),
    "edit": (
        "output",
        "input",
        "num_images",
        "fit",
        "data_dir",
        "dataset.path",
        "dataset.masks",
        "dataset.source",
        "dataset.factory",
    ),
}
"""Keys about files, which have no effect on a loaded model."""


class Model:
    """A trained denoiser with the images, classes and sizes of its run; `load` makes one.

    Images are as samples are stored: uint8 [B, C, H, W] for 8-bit images, and numbers of the data's own type for
    others.
    """

    def __init__(
        self, folder: Path, weights: Weights, step: Step, device: str, ema_length: float | None = None
    ) -> None:
        self.folder = folder.resolve()
        """Folder of the run."""
        checked = checked_config(
            "sample",
            SampleConfig,
            as_overrides(weights=weights, step=step, device=device, ema_length=ema_length),
        )
        self._settings = {
            "run": str(self.folder),
            "weights": weights,
            "step": checked.step,
            "device": checked.device,
            "ema_length": checked.ema_length,
        }
        self._loaded: LoadedDenoiser = load_model(
            folder, weights, device_of(checked.device), checked.step, checked.ema_length
        )

    def __repr__(self) -> str:
        return f"Model({str(self.folder)!r}, step={self.step}, shape={self.shape})"

    @property
    def denoiser(self) -> Denoiser:
        """The denoiser: a module called with x_t, t and y, with `network`, `schedule` and `parameterization`."""
        return self._loaded.denoiser

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height and width of an image; or those of a volume or a point cloud."""
        return self._loaded.shape

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes of the data, or None without classes."""
        return self._loaded.info.class_names

    @property
    def conditions(self) -> Conditions:
        """What the model is conditioned on: attributes, which include classes, an image and a text."""
        info = self._loaded.info
        if info.conditions is not None:
            return info.conditions
        names = None if self._loaded.num_classes is None else info.class_names
        return Conditions() if names is None else Conditions.of_classes(names)

    @property
    def step(self) -> int:
        """Training step of the loaded checkpoint."""
        return self._loaded.step

    def sample(
        self,
        num_samples: int = 64,
        *,
        seed: int = 0,
        steps: int = 50,
        sampler: str | Sampler = "ddim",
        label: Label = None,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | None = None,
        guidance: str = "none",
        guidance_scale: float | None = None,
        batch_size: int | Literal["auto"] = 64,
        overrides: Sequence[str] = (),
    ) -> Tensor:
        """Make the images that `diffuse sample` writes.

        Args:
            num_samples: number of images N.
            seed: seed of the first image; image n has seed + n and depends on no other image. Of K labels or prompts
                in turn it has number (seed + n) mod K.
            steps: steps of the sampler.
            sampler: name of an option, or a sampler that `option` made.
            label: name or index of a class, a list of them in turn, "all", or "none" as well as []; None is "none" with
                a prompt, else "all". Attributes are a mapping, as {"age": 40, "species": "frog"}, with all combinations
                of lists in it.
            prompt: text that describes the images, or a list of texts in turn; None is no text.
            negative_prompt: text of the unconditional prediction of guidance="cfg"; None is no text.
            guidance: name of an option, as "cfg".
            guidance_scale: its scale, or None for its default.
            batch_size: images at a time.
            overrides: further arguments of `diffuse sample`, as "sampler.eta=1" or "precision=fp32".

        Returns:
            Images as stored, [N, *shape], on the CPU.

        Raises:
            UsageError: for settings that are incompatible with each other or the model.

        Example:
            >>> load("outputs/demo").sample(4, steps=5).shape
            torch.Size([4, 1, 8, 8])
        """
        settings = as_overrides(
            num_samples=num_samples, seed=seed, steps=steps, guidance=guidance, batch_size=batch_size,
            **given(
                label=label, prompt=prompt, negative_prompt=negative_prompt, **{"guidance.scale": guidance_scale}
            ),
        )  # fmt: skip
        settings += [] if isinstance(sampler, Sampler) else as_overrides(sampler=sampler)
        checked = self._checked("sample", SampleConfig, settings, overrides)
        refuse_condition_images(self._loaded)
        prepared = prepare(checked.sampling, self.folder, self._loaded)
        if isinstance(sampler, Sampler):
            self._check_sampler(sampler, overrides)
            prepared = replace(prepared, sampler=sampler)
        prepared.check()
        seeds = checked.seeds
        with advise_batch_size(checked.batch_size, checked.device):
            batches = generate(prepared, seeds, prepared.batch_size(len(seeds)))
            return torch.cat([batch.images.cpu() for batch in batches])

    @torch.no_grad()
    def denoise(
        self,
        x_t: Tensor,
        t: Tensor | float,
        y: Tensor | Sequence[int | str] | Mapping[str, Any] | None = None,
    ) -> Prediction:
        """Estimate the clean image and the noise of x_t.

        Args:
            x_t: noised images, float [B, C, H, W], where clean pixels are in [-1, 1]; or noised latents.
            t: times in (0, 1], one for all images or one per image.
            y: indices or names of classes [B], or None for unconditional. Other conditions are a mapping of names to
                B values, with None for missing ones, as {"age": [20, 40], "text": ["a frog", None]}; images are
                float [C, H, W] in [-1, 1], as large as those of the model, together a list or a tensor.

        Returns:
            A prediction with x0, eps and the score -eps / sigma, each float32 in the shape of x_t.

        Raises:
            UsageError: for another shape, a time outside (0, 1], or unknown conditions.

        Example:
            >>> import torch
            >>> load("outputs/demo").denoise(torch.randn(2, 1, 8, 8), 0.5).x0.shape
            torch.Size([2, 1, 8, 8])
        """
        device, x_t = self._device, self._states("x_t", x_t)
        wanted = "one time in (0, 1], or one per image"
        times = tensor("t", t, wanted).double()
        if times.shape not in ((), (len(x_t),)) or not bool(((times > 0) & (times <= 1)).all()):
            raise UsageError("t", times.tolist(), f"must be {wanted}")
        with autocast(device, "fp32"):
            condition = (
                condition_of(self._loaded, y, len(x_t))
                if isinstance(y, Mapping)
                else self._labels(y, len(x_t))
            )
            return self._loaded.denoiser(x_t, times.to(device) if times.ndim else times, condition)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return images as the denoiser's clean input: pixels in [-1, 1], or latents, float [B, ...]."""
        images = self._images(images)
        if tuple(images.shape[1:]) != self.shape:
            raise UsageError("images", described(images), f"must be {self._stored_images}")
        return self._loaded.space.encode(to_model_range(images.to(self._device)))

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Return the denoiser's pixels in [-1, 1], or latents, as stored images: the inverse of `encode`."""
        return self._loaded.info.form.quantize(self._loaded.space.decode(self._states("x", x))).cpu()

    def edit(
        self,
        name: str,
        images: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        restoration: str | None = None,
        seed: int = 0,
        steps: int | None = None,
        sampler: str | None = None,
        label: Label = None,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | None = None,
        guidance: str = "none",
        guidance_scale: float | None = None,
        overrides: Sequence[str] = (),
    ) -> Tensor:
        """Edit images as `diffuse edit` does.

        Args:
            name: name of an option of `edit`, as "inpaint" or "img2img". images: as stored, [B, C, H, W];
            None for "interpolate" and others with `edit.seeds` among the overrides. mask: for "inpaint", bool
            [H, W] or [D, H, W], true where to paint, or one per image, [B, ...]; None is a box in the centre.
            restoration: method of edits that restore images: "replacement", "repaint" or "dps"; None is
            "repaint". seed: seed of the first
            result; result n has seed + n. steps: steps of the sampler; None is the number for the
            restoration, or 50. sampler: name of an option; None is the sampler for the restoration, or
            "ddim". label, prompt, negative_prompt, guidance, guidance_scale: as in `sample`; a label of None is no
            label. overrides: further arguments of `diffuse edit`, as "edit.strength=0.5".

        Returns:
            Results as stored, [B, *shape], or [B, N, *shape] for an edit with N results per image. The
            override "variations=V" gives V consecutive results per image, B * V in all.

        Raises:
            UsageError: for incompatible settings, or images of another shape.

        Example:
            >>> model = load("outputs/demo")
            >>> model.edit("img2img", model.sample(2, steps=5), steps=5).shape
            torch.Size([2, 1, 8, 8])
        """
        node = _edit_node(name)
        settings = as_overrides(
            edit=name, seed=seed, guidance=guidance,
            **given(
                restoration=restoration or _default_restoration(node), steps=steps, sampler=sampler, label=label,
                prompt=prompt, negative_prompt=negative_prompt, **{"guidance.scale": guidance_scale},
            ),
        )  # fmt: skip
        inputs = pixels = None
        if images is not None:
            inputs = [Input(f"{number:05d}", image) for number, image in enumerate(self._images(images))]
            settings.append("input=val")  # a placeholder, not read
        if mask is not None:
            if node and "mask" not in node:
                raise UsageError("mask", shown(mask), f"has no effect on edit={name}", "leave it out")
            larger = inputs and _edit_class(node).takes_condition_image
            sizes = tuple(inputs[0].pixels.shape[1:]) if inputs and larger else self.shape[1:]
            pixels = mask_regions(mask, sizes, len(inputs or ()))
            settings.append("edit.mask=mask")
        checked = self._checked("edit", EditConfig, settings, overrides)
        if images is None and checked.edit.get("seeds") is None:
            seeds = ", or edit.seeds=[0,1] in overrides" if "seeds" in node else ""
            raise UsageError("images", NO_VALUE, "missing", f"give a tensor {self._stored_images}{seeds}")
        prepared = prepare(checked.sampling, self.folder, self._loaded)
        with advise_batch_size(checked.batch_size, checked.device):
            try:
                results = edit_command.edited(checked, prepared, inputs, pixels)
            except UsageError as error:
                named = error.renamed({"input": "images", "edit.mask": "mask"})
                placeholder = ("mask", "mask")  # stands for the tensor
                raise UsageError.several(
                    each._replace(value=NO_VALUE) if (each.key, each.value) == placeholder else each
                    for each in named.problems
                ) from error
        return results[:, 0] if results.shape[1] == 1 else results

    def evaluate(
        self,
        metrics: Sequence[str],
        *,
        num_samples: int | None = None,
        seed: int = 0,
        steps: int = 50,
        sampler: str = "ddim",
        label: Label = None,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | None = None,
        guidance: str = "none",
        guidance_scale: float | None = None,
        batch_size: int | Literal["auto"] = 250,
        overrides: Sequence[str] = (),
    ) -> dict[str, Result]:
        """Measure samples of the model, or the model itself, as `diffuse eval` does.

        Args:
            metrics: names of metrics, as "fid" and "kid". num_samples: number of images; None is 2000. seed,
            steps, sampler, label, prompt, negative_prompt, guidance, guidance_scale, batch_size: as in `sample`;
                a label of None draws classes in the proportions of the reference, or conditions of its images.
            overrides: further arguments of `diffuse eval`, as "features=classifier".

        Returns:
            Results by name, each with details and protocol. They are not added to metrics.json.

        Raises:
            UsageError: for incompatible settings, or too few samples for a metric.

        Example:
            >>> model = load("outputs/demo")
            >>> overrides = ["features=classifier", "metric.kid.subset_size=20"]
            >>> results = model.evaluate(["kid"], num_samples=50, steps=2, overrides=overrides)
            >>> results["kid_classifier"].protocol["samples"]
            50
        """
        settings = as_overrides(
            metric=texts("metrics", metrics), seed=seed, steps=steps, sampler=sampler, guidance=guidance,
            batch_size=batch_size,
            **given(
                num_samples=num_samples, label=label, prompt=prompt, negative_prompt=negative_prompt,
                **{"guidance.scale": guidance_scale},
            ),
        )  # fmt: skip
        return evaluated(self._checked("eval", EvalConfig, settings, overrides), self._loaded)

    def export(
        self,
        folder: str | Path | None = None,
        format: str = "diffusers",
        *,
        license: str | None = None,
        force: bool = False,
        overrides: Sequence[str] = (),
    ) -> Path:
        """Write the model for other programs, with a model card, as `diffuse export` does.

        Args:
            folder: output folder; None is exports/<format> in the run's folder.
            format: "diffusers", "safetensors", "onnx" or "torch".
            license: licence of the weights in the model card, as "apache-2.0".
            force: whether to replace an earlier export.
            overrides: further arguments of `diffuse export`, as "format.scheduler=ddpm".

        Returns:
            The output folder.

        Raises:
            UsageError: the format cannot express the model, or the folder exists.

        Example:
            >>> load("outputs/demo").export("demo_weights", "safetensors").name
            'demo_weights'
        """
        output = None if folder is None else str(folder)
        settings = as_overrides(format=format, force=force, **given(output=output, license=license))
        export = Export(self._checked("export", ExportConfig, settings, overrides), self.folder)
        export.write(self._loaded.on_cpu())
        return export.output

    def to_diffusers(self, scheduler: str | None = None) -> Any:
        """Return the model as a pipeline of diffusers, on the CPU.

        Args:
            scheduler: as `format.scheduler` of `diffuse export`, for example "dpm_solver"; None for one that suits
                the run.

        Returns:
            The pipeline; where diffusers has none, as for a U-Net with classes, its denoiser.

        Raises:
            UsageError: diffusers is missing, or cannot express the model.

        Example:
            >>> pipeline = load("outputs/demo").to_diffusers()
            >>> type(pipeline).__name__
            'DDIMPipeline'
        """
        settings = as_overrides(format="diffusers", **given(**{"format.scheduler": scheduler}))
        form = build(self._checked("export", ExportConfig, settings, ()).format)
        return diffusers_pipeline(form, self._loaded.on_cpu())

    @property
    def _device(self) -> torch.device:
        return next(self._loaded.denoiser.parameters()).device

    @property
    def _stored_images(self) -> str:
        """Type and shape of images as stored."""
        dtype = str(self._stored_dtype).removeprefix("torch.")
        return f"{dtype} [B, {', '.join(map(str, self.shape))}]"

    @property
    def _stored_dtype(self) -> torch.dtype:
        return self._loaded.info.form.quantize(torch.zeros(1, *self.shape)).dtype

    def _states(self, key: str, value: Tensor) -> Tensor:
        """Return a denoiser input as float32 on its device; UsageError about `key` for another shape."""
        shape = self._loaded.space.shape
        wanted = f"float [B, {', '.join(map(str, shape))}]"
        x = tensor(key, value, wanted)
        if tuple(x.shape[1:]) != shape or not x.is_floating_point():
            raise UsageError(
                key, described(x), f"must be {wanted}", "" if x.is_floating_point() else "use encode"
            )
        return x.to(self._device, torch.float32)

    def _labels(self, y: Tensor | Sequence[int | str] | None, count: int) -> Tensor | None:
        """Return class indices on the device of the model, int64 [B]."""
        if y is None:
            return None
        classes = self._loaded.num_classes
        if classes is None:
            names = ", ".join(self.conditions.names)
            remedy = f"give a mapping of {names} to values" if names else "leave it out"
            raise UsageError("y", NO_VALUE, "the model is not class-conditional", remedy)
        if isinstance(y, list | tuple):
            names = self.class_names or ()
            y = [class_number(one, names, "y") if isinstance(one, str) else one for one in y]
        wanted = f"a list with one class per image, by index (0 to {classes - 1}) or name"
        labels = tensor("y", y, wanted)
        whole = not labels.is_floating_point() and labels.shape == (count,)
        if not whole or bool(((labels < 0) | (labels >= classes)).any()):
            raise UsageError("y", labels.tolist(), f"must be {wanted}")
        return labels.to(self._device, torch.int64)

    def _images(self, value: Tensor) -> Tensor:
        """Return images as stored, on the CPU; UsageError for another number of dimensions or type."""
        images = tensor("images", value, self._stored_images).cpu()
        if images.ndim != len(self.shape) + 1 or images.dtype != self._stored_dtype:
            raise UsageError("images", described(images), f"must be {self._stored_images}")
        return images

    def _check_sampler(self, sampler: Sampler, overrides: Sequence[str]) -> None:
        """Raise UsageError for a sampler of another schedule, and for overrides of its settings."""
        built, own = sampler.schedule, self.denoiser.schedule
        if not built.equals(own):
            settings = " with other settings" if built.name == own.name else ""
            problem = f"was built with schedule {built.name}, but the model has {own.name}{settings}"
            raise UsageError("sampler", NO_VALUE, problem, "build it with model.denoiser.schedule")
        for word in overrides:
            if re.match(r"sampler[.=]", word):
                raise UsageError(
                    "overrides", word, "has no effect on a sampler object", "set it in option(...)"
                )

    def _checked(
        self, command: str, kind: type[ConfigT], settings: list[str], overrides: Sequence[str]
    ) -> ConfigT:
        """Return the configuration of a command for this model, with its run, weights and device."""
        more = texts("overrides", overrides)
        for key in (*self._settings, "output_dir", "processes", "compile", *OF_FILES.get(command, ())):
            if any(word.startswith(f"{key}=") for word in more):
                raise UsageError("overrides", key, "cannot be set for a loaded model", "leave it out")
        checked = checked_config(command, kind, [*settings, *more])
        own = {key: value for key, value in self._settings.items() if key in kind.model_fields}
        return checked.model_copy(update=own)


def evaluated(
    checked: EvalConfig, model: LoadedDenoiser | None, images: Tensor | None = None
) -> dict[str, Result]:
    """Return the results of an evaluation by name, of a model or of images in memory [N, C, H, W]."""
    mode = checked.mode()
    if isinstance(mode, HistoryComparison):
        raise UsageError("overrides", "compare", "is not supported here", "leave it out")
    with advise_batch_size(mode.batch_size, mode.device):
        reports = assess(plan_of(mode, model, images))
    return {result.name: result for report in reports for result in report.results}


def _edit_node(edit: str) -> dict[str, Any]:
    """Return the node of an edit; empty for an unknown one, which the configuration rejects later."""
    if edit not in configuration.options("edit"):
        return {}
    return configuration.compose("edit", [f"edit={edit}"])[0]["edit"]


def _default_restoration(edit: Mapping[str, Any]) -> str | None:
    """Return the default restoration of an edit, or None for an edit without restoration."""
    found = _edit_class(edit)
    return "repaint" if found.restores and not found.measures else None


def _edit_class(edit: Mapping[str, Any]) -> type[editing.Edit]:
    """Return the class of the node of an edit; the base class for an unknown one."""
    return getattr(editing, class_name(edit)) if edit else editing.Edit
