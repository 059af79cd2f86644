"""`diffuse export`: write the model of a run in the format of another program, with a model card."""

from pathlib import Path

from diffusion_cli.config import ExportConfig, build
from diffusion_cli.config.values import Step, Weights
from diffusion_cli.diffusion.denoiser import Denoiser, NoisyClassifier
from diffusion_cli.errors import UsageError
from diffusion_cli.export import Exportable, ExportFormat
from diffusion_cli.report.card import exported_files, files_in, model_card
from diffusion_cli.runs.find import find_run, task_of
from diffusion_cli.runs.load import load_autoencoder, load_model, named_weights
from diffusion_cli.system.files import new_folder
from diffusion_cli.system.hub import CARD
from diffusion_cli.system.precision import device_of

EXPORTS = "exports"
"""Folder of the exports in the folder of a run."""


def run(config: ExportConfig) -> None:
    """Write the folder, and print its files.

    Raises UsageError if the format cannot express the model, or the folder exists.
    """
    folder = find_run(config.run, config.output_dir)
    export = Export(config, folder)
    model = load(folder, config.weights, config.step, config.ema_length)
    export.write(model)
    for line in listed(export.output):
        print(line)
    print(
        f"{export.form.name} of {folder.name}, step {model.step}, "
        f"{named_weights(config.weights, model.ema_length)} weights: {export.output}"
        f"{export.form.remark(export.output)}"
    )


class Export:
    """An export of a run, without its model.

    Args:
        config: settings of the command.
        folder: run folder.

    Raises:
        UsageError: the output folder exists, and is not to be replaced.
    """

    def __init__(self, config: ExportConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.form: ExportFormat = build(config.format)
        self.output = Path(config.output) if config.output else folder / EXPORTS / self.form.name
        check_output(self.output, config.force)

    def write(self, model: Exportable) -> None:
        """Write the folder for the model of the run, on the CPU; UsageError if the format cannot express it."""
        self.form.check(model)
        card = model_card(
            self.folder,
            model,
            self.form,
            weights=self.config.weights,
            source=self.output.resolve().name,
            license=self.config.license,
        )
        with new_folder(self.output.resolve(), replace=self.config.force) as temporary:
            self.form.write(model, temporary)
            card.write(temporary)


def load(folder: Path, weights: Weights, step: Step, ema_length: float | None) -> Exportable:
    """Return the denoiser or the autoencoder of a run; UsageError for a classifier."""
    task = task_of(folder)
    if task == NoisyClassifier.task:
        remedy = "give a run of a denoiser or an autoencoder"
        raise UsageError("run", folder.name, "is a classifier, which is not exported", remedy)
    load_run = load_model if task == Denoiser.task else load_autoencoder
    return load_run(folder, weights=weights, step=step, device=device_of("cpu"), ema_length=ema_length)


def check_output(output: Path, force: bool) -> None:
    """Raise UsageError if a folder exists, unless `force` is set and it has only the files of an export."""
    if output.is_symlink():
        raise UsageError("output", output, "is a link", "choose the folder that it points to")
    if not output.exists():
        return
    if not force:
        raise UsageError("output", output, "exists already", "choose another folder, or set force=true")
    written = exported_files(output / CARD)
    if written is None:
        raise UsageError("output", output, "is no export of diffuse", "choose another folder")
    if others := [name for name in files_in(output) if name not in written]:
        problem = f"has {others[0]}, which the export did not write"
        raise UsageError("output", output, problem, "move this file, or choose another folder")


def listed(folder: Path) -> list[str]:
    """Return a line for each file in a folder, with its size."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [f"{path.stat().st_size:>12,}  {path.relative_to(folder).as_posix()}" for path in files]
