"""Bits per dimension of real images, by the variational bound or the probability flow ODE."""

import math
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from diffusion_cli.conditions import Condition
from diffusion_cli.config import fingerprint
from diffusion_cli.data import Images, to_model_range
from diffusion_cli.diffusion.denoiser import Denoise, Prediction, clip_x0
from diffusion_cli.diffusion.latents import Pixels
from diffusion_cli.diffusion.likelihood import bound_terms, flow_likelihood, prior_term
from diffusion_cli.diffusion.posterior import Variance
from diffusion_cli.diffusion.schedules import Discrete
from diffusion_cli.errors import NO_VALUE, FormatError, UsageError
from diffusion_cli.generate import SeededNoise
from diffusion_cli.metrics.base import EvaluatedModel, MetricValue, ModelMetric
from diffusion_cli.system import cache
from diffusion_cli.system.own_folder import own_folder
from diffusion_cli.system.precision import autocast
from diffusion_cli.system.progress import ProgressBar
from diffusion_cli.system.untrusted import LONGEST_TEXT, read

FIXED: tuple[Variance, Variance] = ("small", "large")

Columns = dict[str, Tensor]
"""Values of each image of a batch by name, [B]; `bits` is the reported one."""
Part = dict[str, list[float]]
"""The same values in a JSON file."""


class PerImage(ModelMetric):
    """Base class of metrics that are the mean of a value of each image, with the standard error.

    Image n uses noise of seed + n. Finished batches are stored in the run's folder, so the same command resumes an
    interrupted measurement. With several shards, each measures every num_shards-th batch, and the last one to finish
    reports the mean.
    """

    name: str
    """Name of the value in reports."""
    key: str
    """Name of the metric in the configuration."""

    def __init__(
        self, split: Literal["val", "train"], num_images: int | None, shard: int, num_shards: int
    ) -> None:
        if shard >= num_shards:
            raise UsageError(f"metric.{self.key}.shard", shard, f"must be less than num_shards={num_shards}")
        self.split: Literal["val", "train"] = split
        self.num_images, self.shard, self.num_shards = num_images, shard, num_shards

    @abstractmethod
    def settings(self, subject: EvaluatedModel) -> dict[str, Any]:
        """Return all settings that the value depends on, as plain data."""

    @abstractmethod
    def refusal(self, subject: EvaluatedModel) -> str | None:
        """Return why the value is not defined for this model, or None."""

    @abstractmethod
    def columns(
        self,
        subject: EvaluatedModel,
        images: Tensor,
        y: Condition | None,
        noise: SeededNoise,
        advance: Callable[[float], Any],
    ) -> Columns:
        """Return the values of a batch of stored images; report progress by `advance(fraction of the batch)`."""

    def measure(self, subject: EvaluatedModel) -> MetricValue | None:
        if not isinstance(subject.model.space, Pixels):
            raise UsageError(
                "metric",
                self.key,
                "needs a pixel-space model; latent models give pixels no likelihood",
                "use a metric of samples, such as fid",
            )
        subject.model.info.require_mean("metric", self.key, "use a metric of samples, such as fid")
        refusal = self.refusal(subject)
        if refusal is not None:
            return MetricValue(self.name, None, notes=(refusal,))
        images = subject.load(self.split)
        count = min(self.num_images or len(images), len(images))
        if count < 2:
            raise UsageError(
                f"metric.{self.key}.split",
                self.split,
                f"gives {count} image{'' if count == 1 else 's'}; a standard error needs 2",
                f"set metric.{self.key}.split=train or a larger metric.{self.key}.num_images, or add validation data",
            )
        # The batch size is included because the images of a batch may share the steps of an ODE solver.
        settings = self.settings(subject) | {
            "split": self.split, **subject.identity(images), "count": count, "batch_size": subject.batch_size,
            "precision": subject.precision, "device": subject.device.type,
        }  # fmt: skip
        name = fingerprint(settings | {"weights_sha256": subject.model.digest})
        folder = own_folder(subject.folder, self.name, name)
        batches = list(torch.arange(count).split(subject.batch_size))
        paths = [folder / f"{int(rows[0]):06d}.json" for rows in batches]
        shared = range(self.shard, len(batches), self.num_shards)
        mine = [i for i in shared if _stored(paths[i], len(batches[i])) is None]
        with ProgressBar(
            total=sum(len(batches[i]) for i in mine), desc=self.name, unit="image", unit_scale=True, delay=1.0
        ) as bar:
            for i in mine:
                self._do(subject, images, batches[i], paths[i], bar)
        # Read all files now, including those that other shards wrote meanwhile.
        stored = [_stored(path, len(rows)) for path, rows in zip(paths, batches, strict=True)]
        parts = [part for part in stored if part is not None]
        missing = len(paths) - len(parts)
        if missing:
            note = f"{self.name}: {missing} of {len(paths)} batches are left to other shards; the last reports the mean"
            return MetricValue(self.name, None, notes=(note,))
        return self._collect(parts, folder, settings)

    def reported(self, columns: Columns) -> tuple[Columns, tuple[str, ...]]:
        """Return the columns to report, over all images, with `bits`; and notes."""
        return columns, ()

    def _do(
        self, subject: EvaluatedModel, images: Images, rows: Tensor, path: Path, bar: ProgressBar
    ) -> None:
        batch, y = subject.batch(images, rows)
        noise = SeededNoise([subject.seed + int(row) for row in rows], subject.model.shape, subject.device)
        with bar.batch(len(rows)) as advance, autocast(subject.device, subject.precision):
            columns = self.columns(subject, batch, y, noise, advance)
        cache.write_json(path, {name: value.tolist() for name, value in columns.items()})

    def _collect(self, parts: list[Part], folder: Path, settings: dict[str, Any]) -> MetricValue:
        if any(part.keys() != parts[0].keys() for part in parts):
            raise UsageError(
                folder,
                NO_VALUE,
                "its files have different columns",
                "remove the folder to measure again",
            )
        columns = {
            name: torch.tensor([number for part in parts for number in part[name]], dtype=torch.float64)
            for name in parts[0]
        }
        columns, notes = self.reported(columns)
        bits = columns.pop("bits")
        details = {"standard_error": float(bits.std() / math.sqrt(len(bits))), "images": len(bits)}
        details |= {name: float(values.mean()) for name, values in columns.items()}
        return MetricValue(
            self.name,
            float(bits.mean()),
            details,
            settings,
            (*notes, f"{self.name}: values of single images are in {folder}"),
        )


def _stored(path: Path, count: int) -> Part | None:
    """Return the stored values of a batch of `count` images; None if the file is missing or damaged."""
    if not path.is_file():
        return None
    try:
        part = cache.parse_json(read(path, LONGEST_TEXT))
        if not all(
            len(values) == count and all(isinstance(n, int | float) for n in values)
            for values in part.values()
        ):
            raise FormatError(f"must have {count} numbers per column")
        if not any(name.startswith("bits") for name in part):
            raise FormatError("has no column bits")
    except (ValueError, TypeError) as error:
        cache.report_damage(path, error)
        return None
    return part


class VariationalBound(PerImage):
    """Variational bound on the bits per dimension.

    Reports the terms of prior and decoder, and the sum of the terms in between, also in ten equal parts of time from
    data to noise.

    Args:
        variance: variance of the reverse process. `best`: the learned variance if the model has one; otherwise the
            lower of the bounds with `small` and `large` variance.
        cdf: normal distribution function of the decoder: `exact`, or the published approximation by `tanh`.
        split: split of the dataset.
        num_images: number of images; None: all.
        shard: index of this shard.
        num_shards: number of shards.

    Source: Ho et al. 2020, Sec. 3.2; Nichol and Dhariwal 2021, Sec. 3.1.
    """

    name = "bits_per_dim_bound"
    key = "bound"

    def __init__(
        self,
        *,
        variance: Literal["best", "small", "large", "learned"] = "best",
        cdf: Literal["tanh", "exact"] = "tanh",
        split: Literal["val", "train"] = "val",
        num_images: PositiveInt | None = None,
        shard: NonNegativeInt = 0,
        num_shards: PositiveInt = 1,
    ) -> None:
        super().__init__(split, num_images, shard, num_shards)
        self.variance: Literal["best", "small", "large", "learned"] = variance
        self.cdf = cdf

    def settings(self, subject: EvaluatedModel) -> dict[str, Any]:
        return {
            "variance": self.variance, "cdf": self.cdf, "clip_x0": subject.clip, "noise_seed": subject.seed,
        }  # fmt: skip

    def refusal(self, subject: EvaluatedModel) -> str | None:
        schedule = subject.model.denoiser.schedule
        if not isinstance(schedule, Discrete):
            return f"{self.name}: needs discrete timesteps; the {schedule.name} schedule is continuous"
        if self.variance == "learned" and not subject.model.denoiser.learns_variance:
            raise UsageError(
                "metric.bound.variance",
                "learned",
                "the model has no variance head",
                "use best, small or large",
            )
        if schedule.zero_terminal_snr:
            return f"{self.name}: undefined for schedules with zero terminal SNR"
        if subject.dataset.load(self.split)[torch.zeros(1, dtype=torch.int64)].is_floating_point():
            return f"{self.name}: needs 8-bit pixels; those of {subject.dataset.name} are real-valued"
        return None

    def columns(
        self,
        subject: EvaluatedModel,
        images: Tensor,
        y: Condition | None,
        noise: SeededNoise,
        advance: Callable[[float], Any],
    ) -> Columns:
        schedule = subject.model.denoiser.schedule
        assert isinstance(schedule, Discrete)
        x_0 = to_model_range(images).double()
        denoise = _in_float32(partial(subject.model.denoiser, y=y))
        if subject.clip:
            denoise = clip_x0(denoise, schedule, keep_eps=subject.clip == "keep_eps")
        variances = self._variances(subject)
        terms = []
        with torch.inference_mode():
            draw = lambda: noise.noise().double()  # noqa: E731
            for term in bound_terms(schedule, denoise, x_0, draw, variances, self.cdf == "exact"):
                terms.append(term)
                advance(1 / schedule.num_timesteps)
            prior = prior_term(schedule, x_0)
        rising = torch.stack(terms[::-1])
        # The decoder term does not depend on the fixed variance.
        columns = {"prior": prior, "decoder": rising[0, 0]}
        for number, variance in enumerate(variances):
            middle = rising[1:, number]
            own = {"bits": rising[:, number].sum(0) + prior}
            if len(middle):
                own["middle"] = middle.sum(0)
                own |= {f"middle_{i}": part.sum(0) for i, part in enumerate(middle.tensor_split(10))}
            suffix = f"_{variance}" if len(variances) > 1 else ""
            columns |= {name + suffix: values for name, values in own.items()}
        return columns

    def _variances(self, subject: EvaluatedModel) -> tuple[Variance, ...]:
        if self.variance != "best":
            return (self.variance,)
        return ("learned",) if subject.model.denoiser.learns_variance else FIXED

    def reported(self, columns: Columns) -> tuple[Columns, tuple[str, ...]]:
        if "bits" in columns:
            return columns, ()
        best = min(FIXED, key=lambda variance: float(columns[f"bits_{variance}"].mean()))
        shared = {name: columns[name] for name in ("prior", "decoder")}
        ending = f"_{best}"
        own = {name.removesuffix(ending): values for name, values in columns.items() if name.endswith(ending)}
        both = {name: columns[name] for name in (f"bits_{variance}" for variance in FIXED)}
        return shared | own | both, (
            f"{self.name}: uses the {best} variance, which gives the lower of the two bounds",
        )


class FlowLikelihood(PerImage):
    """Bits per dimension under the probability flow ODE, of uniformly dequantized images.

    Real-valued images are not dequantized, and the value is their density in bits. Predictions are not clipped,
    because the flow must be smooth.

    Args:
        trace: estimate of the divergence: `hutchinson` is unbiased; `exact` needs one backward pass per pixel.
        probe: distribution of the probe vectors of `hutchinson`.
        num_probes: probe vectors per image.
        rtol: relative tolerance of the ODE solver.
        atol: absolute tolerance of the ODE solver.
        max_steps: maximum number of solver steps.
        split: split of the dataset.
        num_images: number of images; None: all.
        shard: index of this shard.
        num_shards: number of shards.

    Source: Song et al. 2021b, Sec. 4.3 and App. D.2; Theis et al. 2016.
    """

    name = "bits_per_dim_flow"
    key = "flow_likelihood"

    def __init__(
        self,
        *,
        trace: Literal["hutchinson", "exact"] = "hutchinson",
        probe: Literal["rademacher", "gaussian"] = "rademacher",
        num_probes: PositiveInt = 1,
        rtol: PositiveFloat = 1e-05,
        atol: PositiveFloat = 1e-05,
        max_steps: PositiveInt = 1000,
        split: Literal["val", "train"] = "val",
        num_images: PositiveInt | None = None,
        shard: NonNegativeInt = 0,
        num_shards: PositiveInt = 1,
    ) -> None:
        super().__init__(split, num_images, shard, num_shards)
        self.trace, self.probe, self.num_probes = trace, probe, num_probes
        self.rtol, self.atol, self.max_steps = rtol, atol, max_steps

    def settings(self, subject: EvaluatedModel) -> dict[str, Any]:
        return {
            "trace": self.trace, "probe": self.probe, "num_probes": self.num_probes, "rtol": self.rtol,
            "atol": self.atol, "t_min": subject.model.denoiser.schedule.t_min, "noise_seed": subject.seed,
        }  # fmt: skip

    def refusal(self, subject: EvaluatedModel) -> str | None:
        return None

    def columns(
        self,
        subject: EvaluatedModel,
        images: Tensor,
        y: Condition | None,
        noise: SeededNoise,
        advance: Callable[[float], Any],
    ) -> Columns:
        x, offset = images.double(), 0.0
        if not images.is_floating_point():
            # Uniform noise in each bin; [0, 256) becomes [-1, 1), a factor of 128 = 2^7 in density.
            uniform = torch.special.ndtr(noise.noise().double())
            x, offset = (x + uniform) / 128 - 1, 7.0
        probes = None
        if self.trace == "hutchinson":
            normal = torch.stack([noise.noise() for _ in range(self.num_probes)])
            probes = normal if self.probe == "gaussian" else torch.where(normal < 0, -1.0, 1.0)
        denoise = partial(subject.model.denoiser, y=y)
        found = flow_likelihood(subject.model.denoiser.schedule, denoise, x.float(), probes, self)
        advance(1.0)
        bits = -found.log_p / (x[0].numel() * math.log(2)) + offset
        return {"bits": bits, "network_calls": torch.full_like(bits, found.calls)}


def _in_float32(denoise: Denoise) -> Denoise:
    """Wrap a denoiser to accept and return float64 images, and compute in float32."""

    def wide(x: Tensor, t: Tensor) -> Prediction:
        x0, eps, sigma, variance = denoise(x.float(), t)
        return Prediction(
            x0.double(), eps.double(), sigma.double(), None if variance is None else variance.double()
        )

    return wide
