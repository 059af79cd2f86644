"""Export as a folder of diffusers: a pipeline, or its parts where no pipeline samples such a model.

The files are written here, so that diffusers is not needed.
"""

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch

from diffusion_cli.convert import diffusers_autoencoder, diffusers_dit, diffusers_scheduler, diffusers_unet
from diffusion_cli.convert.base import Network, Node, Weights
from diffusion_cli.convert.diffusers_folder import CONFIG, INDEX, LABELS, SCHEDULER, WEIGHTS
from diffusion_cli.diffusion.latents import Latents
from diffusion_cli.diffusion.schedules import VP, Discrete, Schedule
from diffusion_cli.errors import FormatError, class_name
from diffusion_cli.export.base import Exportable, ExportFormat
from diffusion_cli.runs.load import LoadedAutoencoder, LoadedDenoiser
from diffusion_cli.runs.weights import save_weights
from diffusion_cli.system.files import atomic_write
from diffusion_cli.system.untrusted import reason

Scheduler = Literal["ddim", "ddpm", "dpm_solver", "unipc", "pndm", "euler", "flow_match", "score_sde_ve"]

SCHEDULERS: dict[Scheduler, str] = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm_solver": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "flow_match": "FlowMatchEulerDiscreteScheduler",
    "score_sde_ve": "ScoreSdeVeScheduler",
}
"""Class of each scheduler in diffusers."""
VERSION = "0.30.0"
"""Earliest version of diffusers that reads these files."""
VP_TIMESTEPS = 1000
"""Timesteps 0, 1, ..., 999 of networks of the continuous VP schedule, which get 999 t."""
ALL_CLASSES = 1000
"""Number of the null class in DiTPipeline, whatever the number of classes."""
PIPELINES: dict[tuple[str, bool], dict[str, list[Scheduler]]] = {
    ("UNet2DModel", False): {
        "DDIMPipeline": ["ddim"],
        "DDPMPipeline": ["ddpm", "dpm_solver", "flow_match"],
        "ScoreSdeVePipeline": ["score_sde_ve"],
    },
    ("UNet2DModel", True): {"LDMPipeline": ["ddim", "ddpm", "dpm_solver", "unipc", "pndm", "euler"]},
    ("DiTTransformer2DModel", True): {"DiTPipeline": ["ddim", "ddpm", "dpm_solver", "unipc", "pndm"]},
}
"""Pipelines that sample denoisers of pixels or latents (True), and the schedulers that they call as these need."""


class _Architecture(NamedTuple):
    """A class of denoisers in diffusers."""

    module: ModuleType
    folder: str
    kind: str


UNET = _Architecture(diffusers_unet, "unet", "UNet2DModel")
DIT = _Architecture(diffusers_dit, "transformer", "DiTTransformer2DModel")
ARCHITECTURES = {diffusers_unet.UNET: UNET, diffusers_dit.DIT: DIT}
"""Architecture of each class of networks."""


@dataclass(frozen=True)
class _Model:
    """A part with weights."""

    folder: str
    kind: str
    config: Node
    state: Callable[[], Weights]
    """The weights by the names of diffusers."""


@dataclass(frozen=True)
class _Pipeline:
    """A denoiser with the parts that sample from it."""

    denoiser: _Model
    scheduler: Node
    autoencoder: _Model | None
    kind: str | None
    """Pipeline of diffusers that samples this model; None if there is none."""
    num_classes: int | None
    """Number of classes; None if it has none."""
    labels: Node | None
    """Names of the classes by number; None if it has no names."""

    @property
    def models(self) -> list[_Model]:
        """The parts with weights."""
        return [self.denoiser] + ([] if self.autoencoder is None else [self.autoencoder])

    @property
    def index(self) -> Node:
        """Content of model_index.json."""
        parts = {model.folder: ["diffusers", model.kind] for model in self.models}
        return {
            "_class_name": self.kind,
            "_diffusers_version": VERSION,
            **({} if self.labels is None else {LABELS: self.labels}),
            "scheduler": ["diffusers", self.scheduler["_class_name"]],
            **parts,
        }


class Diffusers(ExportFormat):
    """Folder that `from_pretrained` of diffusers reads: U-Nets, DiT and their autoencoders.

    Args:
        scheduler: scheduler of the pipeline; None for the one that suits the run: flow_match for flows,
            score_sde_ve for schedule=ve, ddpm for a U-Net with learned variance, else ddim.
    """

    name = "diffusers"
    library = "diffusers"
    loads_repositories = True

    def __init__(self, *, scheduler: Scheduler | None = None) -> None:
        self.scheduler: Scheduler | None = scheduler

    def check(self, model: Exportable) -> None:
        self.refuse_conditions(model)
        if model.info.is_consistency_model:
            problem = "has no scheduler for consistency models on this package's schedules"
            raise self.refusal(problem, "choose format=safetensors")
        try:
            if isinstance(model, LoadedAutoencoder):
                self._autoencoder(model)
            else:
                self._pipeline(model)
        except FormatError as error:
            remedy = "choose format=safetensors, which takes any model"
            raise self.refusal(f"cannot express this model: {reason(error)}", remedy) from error

    def write(self, model: Exportable, folder: Path) -> None:
        if isinstance(model, LoadedAutoencoder):
            _write_model(self._autoencoder(model), folder)
            return
        pipeline = self._pipeline(model)
        for part in pipeline.models:
            _write_model(part, folder / part.folder)
        _write_json(folder / "scheduler" / SCHEDULER, pipeline.scheduler)
        if pipeline.kind is not None:
            _write_json(folder / INDEX, pipeline.index)

    def remark(self, folder: Path) -> str:
        whole = any((folder / name).is_file() for name in (INDEX, CONFIG))
        return "" if whole else " (parts only, see README.md in the folder)"

    def example(self, model: Exportable, source: str) -> str:
        lines = (
            _autoencoder_example(self._autoencoder(model).kind, source)
            if isinstance(model, LoadedAutoencoder)
            else _denoiser_example(self._pipeline(model), source)
        )
        return "\n".join([*lines, ""])

    def _autoencoder(self, model: LoadedAutoencoder) -> _Model:
        if self.scheduler is not None:
            raise FormatError(
                f"an autoencoder has no scheduler, so format.scheduler={self.scheduler} does not apply"
            )
        network = Network(node=model.info.config.model, shape=model.shape)
        return _autoencoder_model(
            "", diffusers_autoencoder.Normalized(network, model.network.state_dict(), 1.0)
        )

    def _pipeline(self, model: LoadedDenoiser) -> _Pipeline:
        """Return the parts of a denoiser; FormatError, with the reason, for one that diffusers cannot express."""
        info, denoiser = model.info, model.denoiser
        architecture = ARCHITECTURES.get(str(info.config.model["_target_"]))
        if architecture is None:
            name = type(denoiser.network).__name__
            raise FormatError(f"its network {name} is neither a UNet nor a DiT")
        if model.shape != info.shape:
            reached, whole = ("x".join(map(str, shape)) for shape in (model.shape, info.shape))
            raise FormatError(f"its progressive resolution has reached {reached} of {whole}")
        latent = model.space if isinstance(model.space, Latents) else None
        network = Network(
            node=info.config.model,
            shape=info.network_shape,
            num_classes=model.num_classes,
            null_class=info.label_dropout > 0,
        )
        schedule, noise = info.config.schedule or {}, {}
        scheduler, kind = self._chosen(schedule, architecture, latent is not None, network)
        if kind == "ScoreSdeVePipeline":  # noise of pixels in [0, 1]
            noise = {key: schedule[key] / 2 for key in ("sigma_min", "sigma_max")}
        config = architecture.module.write(network)
        labels = None
        if network.num_classes is not None and info.stated_class_names is not None:
            labels = {str(number): name for number, name in enumerate(info.stated_class_names)}
        if kind is None and labels is not None:
            config |= {f"_{LABELS}": labels}
        return _Pipeline(
            denoiser=_Model(
                architecture.folder,
                architecture.kind,
                config,
                lambda: architecture.module.state(network, denoiser.network.state_dict()),
            ),
            scheduler=diffusers_scheduler.write(
                schedule | noise,
                info.config.parameterization or {},
                SCHEDULERS[scheduler],
                alpha_bar=_alpha_bar(denoiser.schedule),
                clip=model.space.bounded,
                # DiTPipeline leaves it out.
                learns_variance=_learns_variance(network, architecture) and scheduler == "ddpm",
            ),
            autoencoder=None if latent is None else _latent_part(model, latent, architecture),
            kind=kind,
            num_classes=network.num_classes,
            labels=labels,
        )

    def _chosen(
        self, schedule: Node, architecture: _Architecture, latent: bool, network: Network
    ) -> tuple[Scheduler, str | None]:
        """Return the scheduler, and the pipeline that samples with it."""
        name = class_name(schedule)
        learned, square = _learns_variance(network, architecture), len(set(network.shape[1:])) == 1
        usual: Scheduler = "ddpm" if learned else "ddim"
        chosen = self.scheduler or (
            "flow_match" if name in diffusers_scheduler.FLOWS else "score_sde_ve" if name == "VE" else usual
        )
        if learned and chosen != "ddpm":
            raise FormatError(f"format.scheduler={chosen} has no learned variance, and ddpm has")
        if name == "VE" and (network.node.get("centered", True) or network.shape[0] != 3 or not square):
            raise FormatError(
                "with schedule=ve, it samples square colour images of networks with centered=false only"
            )
        if architecture is UNET and (network.num_classes is not None or (latent and not square)):
            return chosen, None  # pipelines of U-Nets take no classes, and that of latents is for square ones
        pipelines = PIPELINES.get((architecture.kind, latent), {})
        return chosen, next((kind for kind, schedulers in pipelines.items() if chosen in schedulers), None)


def _learns_variance(network: Network, architecture: _Architecture) -> bool:
    """Return whether the scheduler gets the output of a variance head."""
    return architecture is UNET and bool(network.node.get("learn_variance"))


def _alpha_bar(schedule: Schedule) -> list[float]:
    """Return alpha_bar at the timesteps 0, 1, ... of the network; empty for a schedule without such a table."""
    if isinstance(schedule, Discrete):
        t = torch.arange(1, schedule.num_timesteps + 1, dtype=torch.float64) / schedule.num_timesteps
    elif isinstance(schedule, VP):
        t = torch.arange(VP_TIMESTEPS, dtype=torch.float64) / (VP_TIMESTEPS - 1)
        t = t.clamp(min=schedule.t_min)  # betas must be positive
    else:
        return []
    return schedule(t)[0].square().tolist()


def _autoencoder_model(folder: str, autoencoder: diffusers_autoencoder.Normalized) -> _Model:
    """Return an autoencoder as part of a pipeline; FormatError for a class of a plugin."""
    target = str(autoencoder.network.node["_target_"])
    if target not in (diffusers_autoencoder.KL, diffusers_autoencoder.VQ):
        raise FormatError(f"its autoencoder {target} is neither AutoencoderKL nor VQModel")
    config = diffusers_autoencoder.write(autoencoder.network, autoencoder.scaling_factor)
    return _Model(
        folder,
        config["_class_name"],
        config,
        lambda: diffusers_autoencoder.state(autoencoder.network, autoencoder.weights),
    )


def _latent_part(model: LoadedDenoiser, latent: Latents, architecture: _Architecture) -> _Model:
    """Return the autoencoder of a denoiser, with the normalized latents that it works on."""
    assert model.info.latent is not None
    network = Network(node=model.info.latent.autoencoder, shape=model.info.shape)
    state = latent.autoencoder.state_dict()
    normalized = diffusers_autoencoder.normalized(network, state, latent.mean, latent.std)
    return _autoencoder_model("vqvae" if architecture is UNET else "vae", normalized)


def _write_model(model: _Model, folder: Path) -> None:
    _write_json(folder / CONFIG, model.config)
    save_weights(model.state(), folder / WEIGHTS)


def _write_json(path: Path, content: Node) -> None:
    with atomic_write(path) as temporary:
        text = json.dumps({**content, "_diffusers_version": VERSION}, indent=2, sort_keys=True)
        temporary.write_text(f"{text}\n", encoding="utf-8")


def _denoiser_example(pipeline: _Pipeline, source: str) -> list[str]:
    example = _loop_example if pipeline.kind is None else _pipeline_example
    return example(pipeline, source)


def _autoencoder_example(kind: str, source: str) -> list[str]:
    latents = "latents" if kind == "VQModel" else "latent_dist.mean"
    return [
        f"from diffusers import {kind}",
        "",
        f"autoencoder = {kind}.from_pretrained({json.dumps(source)})",
        f"latents = autoencoder.encode(images).{latents}  # images [B, C, H, W] in [-1, 1]",
        "images = autoencoder.decode(latents).sample",
    ]


def _pipeline_example(pipeline: _Pipeline, source: str) -> list[str]:
    """Return the lines that load and call a pipeline."""
    settings = ["num_inference_steps=50"]
    if pipeline.kind == "DiTPipeline":
        classes = pipeline.denoiser.config["num_embeds_ada_norm"]
        labels = [number % max(1, classes) for number in range(4)]
        # The pipeline has class 1000 as its null class.
        scale = 4.0 if classes == ALL_CLASSES else 1.0
        settings = [f"class_labels={labels}", f"guidance_scale={scale}", *settings]
    else:
        settings = ["batch_size=4", *settings]
    if _clips(pipeline):
        settings.append("use_clipped_model_output=True")
    return [
        f"from diffusers import {pipeline.kind}",
        "",
        f"pipeline = {pipeline.kind}.from_pretrained({json.dumps(source)})",
        f"images = pipeline({', '.join(settings)}).images",
        'images[0].save("sample.png")',
    ]


def _clips(pipeline: _Pipeline) -> bool:
    """Return whether the scheduler can clip images without a change to its noise prediction, which differs then."""
    return pipeline.scheduler["_class_name"] == SCHEDULERS["ddim"] and pipeline.scheduler["clip_sample"]


def _loop_example(pipeline: _Pipeline, source: str) -> list[str]:
    """Return the lines that load the parts of a model, and a loop that samples."""
    config, autoencoder = pipeline.denoiser.config, pipeline.autoencoder
    kinds = [part.kind for part in pipeline.models] + [pipeline.scheduler["_class_name"]]
    channels, size = config["in_channels"], config["sample_size"]
    height, width = size if isinstance(size, list) else (size, size)
    labelled = pipeline.num_classes is not None or pipeline.denoiser.kind == DIT.kind
    learned = pipeline.denoiser.kind == DIT.kind and config["out_channels"] > channels
    flows = pipeline.scheduler["_class_name"] == SCHEDULERS["flow_match"]
    consistent = ", use_clipped_model_output=True" if _clips(pipeline) else ""
    state, noise = (
        ("x", "") if flows else ("scheduler.scale_model_input(x, t)", " * scheduler.init_noise_sigma")
    )
    output = f"denoiser({state}, t.expand(4){', class_labels=labels' if labelled else ''}).sample"
    return [
        "import torch",
        f"from diffusers import {', '.join(sorted(kinds))}",
        "",
        *(
            f"{name} = {part.kind}.from_pretrained({json.dumps(source)}, subfolder={json.dumps(part.folder)})"
            for name, part in zip(("denoiser", "autoencoder"), pipeline.models, strict=False)
        ),
        f'scheduler = {pipeline.scheduler["_class_name"]}.from_pretrained({json.dumps(source)}, subfolder="scheduler")',
        "scheduler.set_timesteps(50)",
        *([f"labels = torch.arange(4) % {pipeline.num_classes or 1}"] if labelled else []),
        f"x = torch.randn(4, {channels}, {height}, {width}){noise}",
        "with torch.no_grad():",
        "    for t in scheduler.timesteps:",
        f"        output = {output}{f'[:, :{channels}]' if learned else ''}",
        f"        x = scheduler.step(output, t, x{consistent}).prev_sample",
        "    images = x.clamp(-1, 1)"
        if autoencoder is None
        else "    images = autoencoder.decode(x / autoencoder.config.scaling_factor).sample.clamp(-1, 1)",
    ]


def diffusers_pipeline(form: Diffusers, model: LoadedDenoiser) -> Any:
    """Return a denoiser as an object of diffusers, with copies of its weights.

    Args:
        form: format with the scheduler.
        model: model on the CPU.

    Returns:
        A pipeline; where diffusers has none for the model, its denoiser.

    Raises:
        UsageError: diffusers is missing, or cannot express the model.
    """
    form.check(model)
    try:
        library = importlib.import_module("diffusers")
    except ImportError as error:
        raise form.refusal("needs diffusers", "install it: pip install diffusers") from error
    pipeline = form._pipeline(model)
    parts = {}
    for part in pipeline.models:
        module = getattr(library, part.kind).from_config(part.config)
        module.load_state_dict(part.state())
        parts[part.folder] = module.eval()
    if pipeline.kind is None:
        return parts[pipeline.denoiser.folder]
    scheduler = getattr(library, pipeline.scheduler["_class_name"]).from_config(pipeline.scheduler)
    labels = {} if pipeline.labels is None else {LABELS: pipeline.labels}
    return getattr(library, pipeline.kind)(**parts, scheduler=scheduler, **labels)
