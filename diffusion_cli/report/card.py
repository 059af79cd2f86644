"""Model cards: a Markdown page about exported weights, with the metadata of the Hugging Face Hub."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from diffusion_cli import __version__
from diffusion_cli.errors import class_name, format_value
from diffusion_cli.export import Exportable, ExportFormat
from diffusion_cli.formats.files import opened
from diffusion_cli.metrics import Report, Result, read_history
from diffusion_cli.report.page import measured_model, number
from diffusion_cli.runs.load import LoadedDenoiser, named_weights
from diffusion_cli.runs.overview import data_name
from diffusion_cli.runs.schema import CheckpointInfo
from diffusion_cli.system.hub import CARD
from diffusion_cli.system.untrusted import LONGEST_MANIFEST, MOST_IN_MANIFEST, escaped, read, read_json

PICTURE = "samples.png"
MARK = re.compile(r"^<!-- diffuse \d\S*: (.+) -->\r?$", re.MULTILINE)
"""Last line of a card, with the files of its export."""
MOST_BYTES = 2**24
"""Size of a card beyond which it is none of ours."""
NODES = (
    "schedule", "parameterization", "objective", "time_sampling", "optimizer", "lr_schedule",
)  # fmt: skip
"""Parts of the recipe: a class and its options. Others contain paths of this machine."""
SIZES = ("channels", "channel_mult", "hidden_size", "depth", "patch_size", "latent_channels")
"""Options of networks that describe their size."""
VALUES = ("batch_size", "max_steps", "precision", "seed")


class MeasuredValue(NamedTuple):
    """A stored result and its protocol in short."""

    metric: str
    value: float
    samples: str
    sampler: str
    reference: str
    features: str


class ModelCard(NamedTuple):
    """The page without the list of files, and the picture of samples beside it."""

    text: str
    picture: bytes | None
    """PNG file; None without samples of these weights."""

    def write(self, folder: Path) -> None:
        """Write the page, with the files of the folder, and its picture; OSError of the file system."""
        if self.picture is not None:
            (folder / PICTURE).write_bytes(self.picture)
        names = ", ".join(sorted({CARD, *files_in(folder)}))
        page = f"{self.text}\n<!-- diffuse {__version__}: {names} -->\n"
        (folder / CARD).write_text(page, encoding="utf-8")


def files_in(folder: Path) -> list[str]:
    """Return the paths of all files and links in a folder, sorted."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.relative_to(folder).as_posix() for path in found)


def exported_files(card: Path) -> frozenset[str] | None:
    """Return the paths of the files that an export wrote with a model card; None for a card of another program.

    An export may replace these files, and no others.
    """
    try:
        mark = MARK.search(read(card, MOST_BYTES).decode())
    except (OSError, ValueError):
        return None
    return None if mark is None else frozenset(mark[1].split(", "))


def model_card(
    run: Path,
    model: Exportable,
    form: ExportFormat,
    *,
    weights: str,
    source: str,
    license: str | None = None,
    download: str | None = None,
) -> ModelCard:
    """Return the card of an export; all names and texts of the run are escaped.

    Args:
        run: run folder, with stored samples and results.
        model: its model.
        form: format of the export.
        weights: weights of the model, ema or raw.
        source: folder or repository in the example.
        license: licence of the weights; None for that of an imported model, if it states one.
        download: command that gets the files; None if the example does.
    """
    info = model.info
    license = license or (info.origin.licence if info.origin is not None else None)
    reports = [Report.from_dict(entry) for entry in read_history(run / "metrics.json")]
    results = _of_these_weights(reports, model.digest)
    picture = _picture(run, model.digest)
    environment = Environment(
        loader=PackageLoader("diffusion_cli.report", "."),
        autoescape=False,  # the filter `text` escapes Markdown, with the tags of HTML
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"text": _text, "number": number}
    text = environment.get_template("card.jinja").render(
        front_matter=_front_matter(model, form, license),
        name=run.resolve().name,
        summary=_summary(model),
        picture=None if picture is None else PICTURE,
        license=license,
        download=download,
        example=form.example(model, source).rstrip("\n"),
        class_names=_class_names(model),
        data=_data(info),
        recipe={"model": _network(model), **dict(_recipe(info))},
        options={key: format_value(value) for key, value in info.config.model.items() if key != "_target_"},
        results=[_measured(result) for result in results],
        notes=_notes(reports, results),
        origin=f"Written by diffuse {__version__} from step {model.step} of a run, "
        f"{named_weights(weights, model.ema_length)} weights, SHA-256 {model.digest}.",
    )
    return ModelCard(text, picture)


def _class_names(model: Exportable) -> tuple[str, ...]:
    """Return the classes that the model is conditioned on; none for an unconditional model."""
    conditional = isinstance(model, LoadedDenoiser) and model.num_classes is not None
    return (model.info.class_names or ()) if conditional else ()


def _front_matter(model: Exportable, form: ExportFormat, license: str | None) -> str:
    """Return the metadata that the Hugging Face Hub reads, as YAML."""
    unconditional = isinstance(model, LoadedDenoiser) and model.num_classes is None
    fields = {
        **({"license": license} if license else {}),
        "library_name": form.library,
        **({"pipeline_tag": "unconditional-image-generation"} if unconditional else {}),
        "tags": ["diffusion", "diffuse-cli"],
    }
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True).rstrip("\n")


def _summary(model: Exportable) -> str:
    info = model.info
    kind = {"diffusion": "Diffusion model", "autoencoder": "Autoencoder"}[info.task]
    latent = "" if info.latent is None else f" in latents of shape {_sizes(info.latent.shape)}"
    classes = f", with {len(names)} classes" if (names := _class_names(model)) else ""
    return f"{kind} for samples of shape {_sizes(model.shape)}{latent}{classes}."


def _sizes(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _data(info: CheckpointInfo) -> str:
    if info.origin is not None:
        return f"The training data is unknown: the weights were imported ({info.origin.kind})."
    assert info.config.dataset is not None
    images = f"{info.num_images} training images of {data_name(info.config.dataset)}, of shape {_sizes(info.shape)}."
    if info.init is None:
        return images
    source = "another run" if info.init.kind == "run" else f"another program ({info.init.kind})"
    return f"{images} The training started from the weights of {source}, which had data of its own."


def _network(model: Exportable) -> str:
    """Return class, size and input of a network in short."""
    network = model.denoiser.network if isinstance(model, LoadedDenoiser) else model.network
    parameters = sum(weight.numel() for weight in network.parameters())
    node = model.info.config.model
    sizes = [f"{key}={format_value(node[key])}" for key in SIZES if node.get(key) is not None]
    facts = [f"{parameters:,} parameters", f"input {_sizes(model.info.network_shape)}", *sizes]
    return ", ".join([class_name(node), *facts])


def _recipe(info: CheckpointInfo) -> Iterator[tuple[str, str]]:
    """Yield the main settings of the training."""
    config = info.config.model_dump()
    for name in (
        NODES if info.origin is None else NODES[:2]
    ):  # an import chooses an objective for later trainings
        if isinstance(node := config.get(name), Mapping) and "_target_" in node:
            options = (f"{key}={format_value(value)}" for key, value in node.items() if key != "_target_")
            yield name, ", ".join([class_name(node), *options])
    for name in VALUES:
        if config.get(name) is not None:
            yield name, format_value(config[name])
    for key in ("decay", "lengths") if info.config.ema.get("profile") == "power" else ("decay",):
        if (value := info.config.ema.get(key)) is not None:
            yield f"ema.{key}", format_value(value)


def _of_these_weights(reports: list[Report], digest: str) -> list[Result]:
    """Return the newest result of each metric that was measured on weights with a digest."""
    newest: dict[str, Result] = {}
    for result in (result for report in reversed(reports) for result in report.results):
        parts = (result.protocol.get(key) for key in ("sampling", "model"))
        if any(isinstance(part, Mapping) and part.get("weights_sha256") == digest for part in parts):
            newest.setdefault(result.name, result)
    return [*newest.values()]


def _notes(reports: list[Report], results: list[Result]) -> list[str]:
    """Return the notes of the reports with some results."""
    notes = (
        note for report in reports if any(each in report.results for each in results) for note in report.notes
    )
    return [*dict.fromkeys(notes)]


def _measured(result: Result) -> MeasuredValue:
    protocol = result.protocol
    reference, features = (
        part if isinstance(part := protocol.get(key), Mapping) else {} for key in ("reference", "features")
    )
    images = f", {reference['images']} images" if "images" in reference else ""
    return MeasuredValue(
        result.name,
        result.value,
        format_value(protocol.get("samples", "")),
        measured_model(result).sampler,
        f"{reference.get('name', '')}{images}",
        str(features.get("name", "")),
    )


def _picture(run: Path, digest: str) -> bytes | None:
    """Return the newest grid of samples of weights with a digest; damaged files are left out."""
    grids = sorted(run.glob("samples/*/grid.png"), key=lambda path: path.stat().st_mtime, reverse=True)
    for grid in grids:
        try:
            manifest = read_json(grid.with_name("manifest.json"), LONGEST_MANIFEST, MOST_IN_MANIFEST)
            if manifest["settings"]["weights_sha256"] == digest:
                data = read(grid)
                opened(data)
                return data
        except (OSError, ValueError, LookupError, TypeError):
            continue
    return None


def _text(value: Any) -> str:
    """Return a text on one line without the syntax of Markdown and HTML."""
    return re.sub(r"([\\`*_{}\[\]<>|#!&])", r"\\\1", escaped(str(value)))
