"""Schedulers of diffusers as a noise process and a sampler of this package, and the way back."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from diffusion_cli.convert.base import Node, Process, parse
from diffusion_cli.errors import FormatError, class_name, format_value

SCHEDULES = "diffusion_cli.diffusion.schedules"
PARAMETERIZATIONS = "diffusion_cli.diffusion.parameterizations"
OBJECTIVES = "diffusion_cli.diffusion.objectives"
SAMPLERS = "diffusion_cli.samplers"
PREDICTIONS = {"epsilon": "Eps", "sample": "X0", "v_prediction": "V", "flow_prediction": "Flow"}
"""Class of the parameterization for each `prediction_type`."""
TABLES = ("Betas", "Cosine", "Linear", "ScaledLinear", "Sigmoid")
"""Classes of the schedules with a table of betas, which have the same samplers."""
FLOWS = ("FlowMatching", "Rectified")
"""Classes of the schedules with straight paths."""
NAMED_BETAS = {"linear": "Linear", "scaled_linear": "ScaledLinear", "squaredcos_cap_v2": "Cosine"}
"""Class of the schedule for each `beta_schedule` that has one."""
ORIGINAL_COSINE = {"offset": 0.008, "max_beta": 0.999}
OF_1000 = 1000
"""Number of timesteps that our `beta_start` and `beta_end` refer to."""

Count = Annotated[int, Field(gt=0, le=10**5)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Beta = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Spacing = Literal["leading", "trailing", "linspace"]


class _Scheduler(BaseModel):
    """Base class of the settings of a scheduler, with the defaults of diffusers."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    def remarks(self) -> Iterator[str]:
        """Yield the settings that would give other images than the sampler of this package."""
        yield from ()


class _Discrete(_Scheduler):
    """Settings of the schedulers with a table of betas."""

    num_train_timesteps: Count = 1000
    beta_start: Fraction = 0.0001
    beta_end: Fraction = 0.02
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"] = "linear"
    trained_betas: Annotated[list[Beta], Field(min_length=1, max_length=10**5)] | None = None
    rescale_betas_zero_snr: bool = False
    prediction_type: Literal["epsilon", "sample", "v_prediction", "flow_prediction"] = "epsilon"
    timestep_spacing: Spacing = "leading"
    steps_offset: int = 0

    def spacing(self) -> str:
        """Return the spacing of the times."""
        return self.timestep_spacing

    def zero_terminal_snr(self) -> bool:
        """Return whether the last timestep is pure noise."""
        return self.rescale_betas_zero_snr or (self.trained_betas is not None and self.trained_betas[-1] == 1)

    def remarks(self) -> Iterator[str]:
        if self.steps_offset and self.spacing() == "leading":
            yield f"steps_offset={self.steps_offset} shifts its timesteps"


class _Thresholding(_Discrete):
    thresholding: bool = False
    dynamic_thresholding_ratio: Fraction = 0.995
    sample_max_value: Positive = 1.0

    def remarks(self) -> Iterator[str]:
        yield from super().remarks()
        if self.thresholding and self.sample_max_value > 1:
            yield f"thresholding=true clips each image at its quantile {self.dynamic_thresholding_ratio}"

    def clip(self) -> bool | Literal["keep_eps"]:
        """Return the value of `clip_x0`."""
        return self.thresholding


class _Clipping(_Thresholding):
    clip_sample: bool = True
    clip_sample_range: Positive = 1.0

    def remarks(self) -> Iterator[str]:
        yield from super().remarks()
        if self.clip_sample and self.clip_sample_range != 1:
            yield f"clip_sample_range={self.clip_sample_range} is not 1"

    def clip(self) -> bool | Literal["keep_eps"]:
        return self.thresholding or self.clip_sample


class _DDPM(_Clipping):
    variance_type: Literal[
        "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned_range"
    ] = "fixed_small"

    def sampler(self) -> Node:
        kind = self.variance_type.split("_")
        return _sampler(
            "DDPM", variance="learned" if kind[0] == "learned" else kind[1], spacing=self.spacing()
        )


class _DDIM(_Clipping):
    set_alpha_to_one: bool = True

    def sampler(self) -> Node:
        return _sampler("DDIM", eta=0.0, spacing=self.spacing())

    def remarks(self) -> Iterator[str]:
        yield from super().remarks()
        if not self.set_alpha_to_one:
            yield "set_alpha_to_one=false ends its last step at the first noise level"

    def clip(self) -> bool | Literal["keep_eps"]:
        # Its step has a flag use_clipped_model_output, which is false by default.
        return super().clip() and "keep_eps"


class _PNDM(_Discrete):
    skip_prk_steps: bool = False
    set_alpha_to_one: bool = False

    def sampler(self) -> Node:
        return _sampler("PLMS", spacing=self.spacing())

    def remarks(self) -> Iterator[str]:
        yield from super().remarks()
        if not self.skip_prk_steps:
            yield "skip_prk_steps=false starts with Runge-Kutta steps"
        if not self.set_alpha_to_one:
            yield "set_alpha_to_one=false ends its last step at the first noise level"


class _NoiseGrids(_Discrete):
    """Settings of the schedulers that also have grids in sigma / alpha."""

    timestep_spacing: Spacing = "linspace"
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False
    use_lu_lambdas: bool | None = False
    use_flow_sigmas: bool | None = False
    flow_shift: Positive = 1.0
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"

    def spacing(self) -> str:
        if self.use_exponential_sigmas or self.use_lu_lambdas:
            return "log_snr"
        return "karras" if self.use_karras_sigmas else self.timestep_spacing

    def remarks(self) -> Iterator[str]:
        yield from super().remarks()
        if self.use_beta_sigmas:
            yield "use_beta_sigmas=true is a grid of its own"
        if self.final_sigmas_type != "zero":
            yield "final_sigmas_type=sigma_min ends at the first noise level"
        if self.use_flow_sigmas and self.flow_shift != 1:
            yield f"flow_shift={self.flow_shift} shifts its grid"


class _DPMSolver(_NoiseGrids, _Thresholding):
    solver_order: Literal[1, 2, 3] = 2
    lower_order_final: bool = True
    algorithm_type: Literal["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"] = "dpmsolver++"
    solver_type: Literal["midpoint", "heun"] = "midpoint"
    euler_at_final: bool = False
    lambda_min_clipped: float = -math.inf
    variance_type: Literal["learned_range"] | None = None

    def sampler(self) -> Node:
        return _sampler(
            "DPMSolverMultistep",
            order=self.solver_order,
            eta=float(self.algorithm_type.startswith("sde")),
            solver_type=self.solver_type,
            spacing=self.spacing(),
        )

    def remarks(self) -> Iterator[str]:
        yield from super().remarks()
        if not self.algorithm_type.endswith("++"):
            yield f"algorithm_type={self.algorithm_type} is not DPM-Solver++"
        if self.lower_order_final and self.solver_order == 3:
            yield "lower_order_final=true lowers the order of its second last step, with fewer than 15 steps"
        if not self.lower_order_final and self.final_sigmas_type != "zero":
            yield "lower_order_final=false keeps the order of its last step"
        if self.euler_at_final:
            yield "euler_at_final=true makes its last step one of Euler's method"
        if self.lambda_min_clipped > -math.inf:
            yield f"lambda_min_clipped={self.lambda_min_clipped} leaves out noisier timesteps"


class _UniPC(_NoiseGrids, _Thresholding):
    solver_order: Literal[1, 2, 3] = 2
    solver_type: Literal["bh1", "bh2"] = "bh2"
    lower_order_final: bool = True
    predict_x0: bool = True
    disable_corrector: list[int] = []

    def sampler(self) -> Node:
        return _sampler("UniPC", order=self.solver_order, variant=self.solver_type, spacing=self.spacing())

    def remarks(self) -> Iterator[str]:
        yield from super().remarks()
        if not self.lower_order_final:
            yield "lower_order_final=false keeps the order of its last steps"
        elif self.solver_order == 3:
            yield "lower_order_final=true lowers the order of its second last step"
        if not self.predict_x0:
            yield "predict_x0=false predicts the noise"
        if self.disable_corrector:
            yield f"disable_corrector={self.disable_corrector} leaves out corrections"


class _Euler(_NoiseGrids):
    interpolation_type: Literal["linear", "log_linear"] = "linear"
    timestep_type: Literal["discrete"] = "discrete"
    sigma_min: Positive | None = None
    sigma_max: Positive | None = None

    def spacing(self) -> str:
        return "log_snr" if self.interpolation_type == "log_linear" else super().spacing()

    def sampler(self) -> Node:
        return _sampler("DDIM", eta=0.0, spacing=self.spacing())

    def remarks(self) -> Iterator[str]:
        yield from super().remarks()
        if self.sigma_min is not None or self.sigma_max is not None:
            yield "sigma_min and sigma_max shorten its grid"


class _EulerAncestral(_Discrete):
    timestep_spacing: Spacing = "linspace"

    def sampler(self) -> Node:
        return _sampler("DDIM", eta=1.0, spacing=self.spacing())


class _FlowMatch(_Scheduler):
    num_train_timesteps: Count = 1000
    shift: Positive = 1.0
    use_dynamic_shifting: bool = False
    shift_terminal: float | None = None
    invert_sigmas: Literal[False] = False
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False
    stochastic_sampling: bool = False

    def remarks(self) -> Iterator[str]:
        for key in ("shift", "shift_terminal", "use_dynamic_shifting"):
            value = getattr(self, key)
            if value != type(self).model_fields[key].default:
                yield f"{key}={format_value(value)} shifts its grid"
        for key in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
            if getattr(self, key):
                yield f"{key}=true is a grid of its own"
        if self.stochastic_sampling:
            yield "stochastic_sampling=true adds noise"


class _VarianceExploding(_Scheduler):
    snr: Positive = 0.15
    sigma_min: Positive = 0.01
    sigma_max: Positive = 1348.0
    sampling_eps: Fraction = 1e-5
    correct_steps: Annotated[int, Field(gt=0, le=1000)] = 1


class _VariancePreserving(_Scheduler):
    beta_min: Positive = 0.1
    beta_max: Positive = 20.0
    sampling_eps: Fraction = 1e-3


CLASSES: dict[str, type[_Scheduler]] = {
    "DDPMScheduler": _DDPM,
    "DDIMScheduler": _DDIM,
    "PNDMScheduler": _PNDM,
    "DPMSolverMultistepScheduler": _DPMSolver,
    "UniPCMultistepScheduler": _UniPC,
    "EulerDiscreteScheduler": _Euler,
    "EulerAncestralDiscreteScheduler": _EulerAncestral,
    "FlowMatchEulerDiscreteScheduler": _FlowMatch,
    "ScoreSdeVeScheduler": _VarianceExploding,
    "ScoreSdeVpScheduler": _VariancePreserving,
}
"""Schedulers that are read, by the name of their class."""
KNOWN = frozenset(name for kind in CLASSES.values() for name in kind.model_fields) | {
    "base_image_seq_len",
    "base_shift",
    "max_image_seq_len",
    "max_shift",
    "solver_p",
    "time_shift_type",
}
"""Settings of any scheduler; a class ignores those of others, which stay in files that were converted."""
PREDICTS_NOISE = "predict_epsilon"
"""Early setting in place of `prediction_type`: epsilon if true, sample if false."""
DEAD = frozenset({"tensor_format", "timestep_values", PREDICTS_NOISE})
"""Settings of early versions without an effect today."""


def read(config: Mapping[str, Any], *, learns_variance: bool = False, label_dropout: float = 0.0) -> Process:
    """Return the process and the sampler of a scheduler.

    Args:
        config: content of scheduler_config.json.
        learns_variance: whether the network has a variance head.
        label_dropout: label dropout of the objective; above 0 for a network with a trained null class.

    Raises:
        FormatError: the scheduler, or one of its settings, has no equivalent.
    """
    name = config.get("_class_name")
    kind = CLASSES.get(name) if isinstance(name, str) else None
    if kind is None:
        raise FormatError(
            f"the scheduler {format_value(name)[:80]} has no equivalent; read are {', '.join(CLASSES)}"
        )
    settings = {key: value for key, value in config.items() if not key.startswith("_") and key not in DEAD}
    if unknown := {key for key, value in settings.items() if key not in KNOWN and value is not None}:
        raise FormatError(f"{min(unknown)[:80]} is not a known setting of a scheduler")
    if config.get(PREDICTS_NOISE) is False:
        settings.setdefault("prediction_type", "sample")
    if kind is _PNDM:
        settings.pop("rescale_betas_zero_snr", None)  # which it does not have
    scheduler = parse(kind, settings)
    if getattr(scheduler, "variance_type", None) == "learned_range" and not learns_variance:
        raise FormatError("variance_type=learned_range needs a network with a variance head")
    schedule, parameterization, sampler = _READERS[kind](scheduler)
    return Process(
        schedule=schedule,
        parameterization=parameterization,
        objective=_objective(parameterization, learns_variance, label_dropout),
        sampler=sampler,
        clip=scheduler.clip() if isinstance(scheduler, _Thresholding) else False,
        remarks=tuple(scheduler.remarks()),
    )


def _discrete(scheduler: Any) -> tuple[Node, Node, Node]:
    flow = getattr(scheduler, "use_flow_sigmas", False)
    if flow != (scheduler.prediction_type == "flow_prediction"):
        raise FormatError(
            f"prediction_type={scheduler.prediction_type} contradicts use_flow_sigmas={format_value(bool(flow))}"
        )
    parameterization = _parameterization(PREDICTIONS[scheduler.prediction_type])
    if flow:
        return _straight_paths(scheduler.num_train_timesteps), parameterization, scheduler.sampler()
    if scheduler.zero_terminal_snr() and scheduler.prediction_type == "epsilon":
        cause = "rescale_betas_zero_snr=true" if scheduler.rescale_betas_zero_snr else "a last beta of 1"
        raise FormatError(
            f"prediction_type=epsilon is undefined with {cause}, where the last timestep is pure noise"
        )
    return _betas(scheduler), parameterization, scheduler.sampler()


def _betas(scheduler: _Discrete) -> Node:
    """Return the schedule with the betas of a scheduler."""
    T, rescaled = scheduler.num_train_timesteps, {"zero_terminal_snr": scheduler.zero_terminal_snr()}
    if scheduler.trained_betas is not None:
        if len(scheduler.trained_betas) != T:
            raise FormatError(f"trained_betas has {len(scheduler.trained_betas)} numbers, not {T}")
        if 1 in scheduler.trained_betas[:-1]:
            raise FormatError("trained_betas: only the last may be 1")
        return _schedule("Betas", betas=scheduler.trained_betas, **rescaled)
    unscaled = {"rescale_timesteps": False}
    if scheduler.beta_schedule == "squaredcos_cap_v2":
        return _schedule("Cosine", num_timesteps=T, **ORIGINAL_COSINE, **rescaled, **unscaled)
    if scheduler.beta_schedule == "sigmoid":
        first, last = scheduler.beta_start, scheduler.beta_end
        places = (6 * (2 * step / max(1, T - 1) - 1) for step in range(T))
        betas = [first + (last - first) / (1 + math.exp(-place)) for place in places]
        return _schedule("Betas", betas=betas, **rescaled)
    ends = {key: getattr(scheduler, key) * T / OF_1000 for key in ("beta_start", "beta_end")}
    if scheduler.beta_schedule == "scaled_linear":
        return _schedule("ScaledLinear", num_timesteps=T, **ends, **rescaled)
    return _schedule("Linear", num_timesteps=T, **ends, **rescaled, **unscaled)


def _flow_match(scheduler: Any) -> tuple[Node, Node, Node]:
    sampler = _sampler("DDIM", eta=0.0, spacing="linspace")
    return _straight_paths(scheduler.num_train_timesteps), _parameterization("Flow"), sampler


def _straight_paths(timesteps: int) -> Node:
    return _schedule("FlowMatching", num_timesteps=timesteps, grid_t_min=min(0.5, 1 / timesteps))


def _exploding(scheduler: Any) -> tuple[Node, Node, Node]:
    noise = _schedule(
        "VE",
        sigma_min=scheduler.sigma_min,
        sigma_max=scheduler.sigma_max,
        grid_t_min=scheduler.sampling_eps,
    )
    sampler = _sampler(
        "PC",
        predictor="reverse_diffusion",
        corrector="langevin",
        corrector_steps=scheduler.correct_steps,
        snr=scheduler.snr,
        spacing="time",
    )
    return noise, _parameterization("Score"), sampler


def _preserving(scheduler: Any) -> tuple[Node, Node, Node]:
    noise = _schedule(
        "VP", beta_min=scheduler.beta_min, beta_max=scheduler.beta_max, grid_t_min=scheduler.sampling_eps
    )
    return noise, _parameterization("Eps"), _sampler("EulerMaruyama", spacing="time")


_READERS: dict[type[_Scheduler], Callable[[Any], tuple[Node, Node, Node]]] = {
    **dict.fromkeys((_DDPM, _DDIM, _PNDM, _DPMSolver, _UniPC, _Euler, _EulerAncestral), _discrete),
    _FlowMatch: _flow_match,
    _VarianceExploding: _exploding,
    _VariancePreserving: _preserving,
}
"""Reader of the schedule, the parameterization and the sampler, by the settings of a scheduler."""


def _objective(parameterization: Node, learns_variance: bool, label_dropout: float) -> Node:
    """Return the loss of the paper for a prediction."""
    if learns_variance:
        return {
            "_target_": f"{OBJECTIVES}.Hybrid",
            "vlb_weight": 0.001,
            "label_dropout": label_dropout,
            "single_dropout": 0.0,
        }
    of_noise = class_name(parameterization) in ("Eps", "Score")
    return {
        "_target_": f"{OBJECTIVES}.{'Simple' if of_noise else 'Target'}",
        "huber_delta": None,
        "label_dropout": label_dropout,
        "single_dropout": 0.0,
    }


def changed(process: Process, schedule: Node | None = None, parameterization: Node | None = None) -> Process:
    """Return a process with another schedule or parameterization, and the objective and sampler that suit them.

    A loss with a learned variance or of the likelihood stays, and so does a sampler that suits both schedules.
    """
    schedule, parameterization = schedule or process.schedule, parameterization or process.parameterization
    objective, before, now = process.objective, class_name(process.schedule), class_name(schedule)
    if class_name(objective) in ("Simple", "Target"):
        objective = _objective(parameterization, False, objective.get("label_dropout", 0.0))
    process = replace(
        process, schedule=schedule, parameterization=parameterization, objective=objective, assumptions=()
    )
    if now == before or any(before in group and now in group for group in (TABLES, FLOWS)):
        return process
    sampler = _sampler("DDIM", eta=0.0, spacing="linspace" if now in FLOWS else "trailing")
    return replace(process, sampler=sampler, clip=now not in FLOWS and process.clip, remarks=())


def write(
    schedule: Node,
    parameterization: Node,
    scheduler: str = "DDIMScheduler",
    *,
    alpha_bar: Sequence[float] = (),
    clip: bool = True,
    learns_variance: bool = False,
    unit_range: bool = False,
) -> Node:
    """Return scheduler_config.json of a scheduler with the noise of a schedule.

    Args:
        schedule: node of the schedule.
        parameterization: node of the parameterization.
        scheduler: name of the class: one of `CLASSES`.
        alpha_bar: alpha_bar of the network's timesteps 0, 1, ..., for a schedule that has no `beta_schedule`.
        clip: whether samples are clipped to [-1, 1] where the scheduler can, as for pixels.
        learns_variance: whether the network has a variance head.
        unit_range: whether the written network is for pixels in [0, 1], whose sigma is half of that here.

    Raises:
        FormatError: the scheduler has no such process.
    """
    if scheduler not in CLASSES:
        raise FormatError(f"the scheduler {scheduler} is unknown; choose from {', '.join(CLASSES)}")
    kind, noise, prediction = CLASSES[scheduler], class_name(schedule), class_name(parameterization)
    config: Node = {"_class_name": scheduler}
    if noise in FLOWS or kind is _FlowMatch:
        if noise not in FLOWS or prediction != "Flow" or kind is not _FlowMatch:
            raise FormatError(_other(noise, prediction, "FlowMatchEulerDiscreteScheduler", "flow"))
        # Networks of the rectified schedule get 999 t.
        return config | {"num_train_timesteps": schedule.get("num_timesteps", 999), "shift": 1.0}
    if noise == "VE" or kind is _VarianceExploding:
        if noise != "VE" or prediction != "Score" or kind is not _VarianceExploding:
            raise FormatError(_other(noise, prediction, "ScoreSdeVeScheduler", "score"))
        part = 0.5 if unit_range else 1.0
        config |= {key: part * schedule[key] for key in ("sigma_min", "sigma_max")}
        return config | {"sampling_eps": schedule["grid_t_min"]}
    if kind is _VariancePreserving:
        if noise != "VP" or prediction != "Eps":
            raise FormatError(_other(noise, prediction, "ScoreSdeVpScheduler", "eps"))
        names = {"beta_min": "beta_min", "beta_max": "beta_max", "grid_t_min": "sampling_eps"}
        return config | {theirs: schedule[ours] for ours, theirs in names.items()}
    config |= _written_betas(schedule, prediction, kind, alpha_bar) | {"timestep_spacing": "trailing"}
    if issubclass(kind, _Clipping):
        config["clip_sample"] = clip
    if kind is _DDPM:
        config["variance_type"] = "learned_range" if learns_variance else "fixed_small"
    if kind in (_DDIM, _PNDM):
        config["set_alpha_to_one"] = True
    if kind is _PNDM:
        config["skip_prk_steps"] = True
    return config


def _other(noise: str, prediction: str, scheduler: str, parameterization: str) -> str:
    return (
        f"schedule {noise} with parameterization {prediction} is not that of this scheduler; {scheduler} needs "
        f"parameterization={parameterization}"
    )


def _written_betas(
    schedule: Node, prediction: str, kind: type[_Scheduler], alpha_bar: Sequence[float]
) -> Node:
    """Return the settings of a scheduler with a table of betas."""
    types = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    if prediction not in types or prediction == "Flow":
        raise FormatError(f"parameterization {prediction} has no prediction_type in diffusers")
    if schedule.get("rescale_timesteps") and schedule["num_timesteps"] != OF_1000:
        raise FormatError(
            f"rescale_timesteps=true with {schedule['num_timesteps']} timesteps has no equivalent in diffusers"
        )
    named = {ours: theirs for theirs, ours in NAMED_BETAS.items()}.get(class_name(schedule))
    if named == "squaredcos_cap_v2" and any(schedule[key] != value for key, value in ORIGINAL_COSINE.items()):
        named = None
    rescaled = bool(schedule.get("zero_terminal_snr"))
    if rescaled and kind is _PNDM:
        raise FormatError("PNDMScheduler divides by alpha, which is 0 with zero_terminal_snr=true")
    config: Node = {"prediction_type": types[prediction]}
    if (
        rescaled
    ):  # it keeps betas that are rescaled already, and schedulers in sigma avoid an infinite one with it
        config["rescale_betas_zero_snr"] = True
    if named is None:
        if not alpha_bar:
            raise FormatError(
                f"schedule {class_name(schedule)} has no equivalent in diffusers: alpha^2 + sigma^2 is not 1"
            )
        ratios = (now / before for before, now in zip((1.0, *alpha_bar), alpha_bar, strict=False))
        config |= {"num_train_timesteps": len(alpha_bar), "trained_betas": [1 - ratio for ratio in ratios]}
    else:
        T = schedule["num_timesteps"]
        config |= {"num_train_timesteps": T, "beta_schedule": named}
        ends = {key: schedule[key] * OF_1000 / T for key in ("beta_start", "beta_end") if key in schedule}
        config |= ends
    return config


def _schedule(name: str, **options: Any) -> Node:
    return {"_target_": f"{SCHEDULES}.{name}", **options}


def _parameterization(name: str) -> Node:
    return {"_target_": f"{PARAMETERIZATIONS}.{name}"}


def _sampler(name: str, **options: Any) -> Node:
    return {"_target_": f"{SAMPLERS}.{name}", **options}
