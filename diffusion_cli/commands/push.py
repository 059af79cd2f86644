"""`diffuse push`: upload the model of a run, in the format of another program, to the Hugging Face Hub."""

from pathlib import Path
from tempfile import TemporaryDirectory

from diffusion_cli.commands.export import listed, load
from diffusion_cli.config import PushConfig, build
from diffusion_cli.errors import FormatError, UsageError
from diffusion_cli.export import ExportFormat
from diffusion_cli.report.card import CARD, model_card
from diffusion_cli.runs.find import find_run
from diffusion_cli.system.hub import check_login, check_name, upload
from diffusion_cli.system.untrusted import reason


def run(config: PushConfig) -> None:
    """Upload the files, or print them with the model card for `dry_run`.

    Raises UsageError if the format cannot express the model, or the repository cannot be written.
    """
    try:
        check_name(config.repo)
    except FormatError as error:
        raise UsageError("repo", config.repo, reason(error), "write for example repo=me/digits") from error
    try:
        folder = find_run(config.run, config.output_dir)
        if not config.dry_run:
            check_login()
        address = _push(config, folder)
    except FormatError as error:
        raise UsageError(
            "repo", config.repo, reason(error), "dry_run=true shows the files without it"
        ) from error
    print(
        f"{folder.name}: nothing was uploaded to {config.repo}"
        if address is None
        else f"{folder.name}: {address}"
    )


def _push(config: PushConfig, folder: Path) -> str | None:
    """Write the export of a run, upload it, and return the address of the repository; None for `dry_run`."""
    form: ExportFormat = build(config.format)
    model = load(folder, config.weights, config.step)
    form.check(model)
    name = config.repo.partition("/")[2]
    card = model_card(
        folder, model, form, weights=config.weights, license=config.license,
        source=config.repo if form.loads_repositories else name,
        download=None if form.loads_repositories else f"hf download {config.repo} --local-dir {name}",
    )  # fmt: skip
    with TemporaryDirectory(prefix="diffuse-push-") as temporary:
        form.write(model, Path(temporary))
        card.write(Path(temporary))
        for line in listed(Path(temporary)):
            print(line)
        if config.dry_run:
            print(f"\n{CARD}:\n{card.text}")
            return None
        message = f"Weights of step {model.step}, {config.weights}"
        return upload(Path(temporary), config.repo, message, config.private)
