"""`diffuse push`: upload the model of a run, in the format of another program, to the Hugging Face Hub."""

from pathlib import Path
from tempfile import TemporaryDirectory

from diffusion_cli.commands.export import listed, load
from diffusion_cli.config import PushConfig, build
from diffusion_cli.errors import FormatError, UsageError
from diffusion_cli.export import ExportFormat
from diffusion_cli.report.card import exported_files, model_card
from diffusion_cli.runs.find import find_run
from diffusion_cli.runs.load import named_weights
from diffusion_cli.system.hub import CARD, check_login, check_name, published, repository_in, upload
from diffusion_cli.system.untrusted import reason

GIT_ATTRIBUTES = ".gitattributes"
"""The only file of a new repository."""


def run(config: PushConfig) -> None:
    """Upload the files, or print them with the model card for `dry_run`.

    Raises UsageError if the format cannot express the model, or the repository cannot be written or has other files.
    """
    try:
        check_name(config.repo)
    except FormatError as error:
        name = repository_in(config.repo)
        remedy = "write for example repo=me/digits" if name is None else f"write repo={name}"
        raise UsageError("repo", config.repo, reason(error), remedy) from error
    try:
        folder = find_run(config.run, config.output_dir)
        outdated: frozenset[str] = frozenset()
        if not config.dry_run:
            check_login()
            outdated = _outdated(config)
        address = _push(config, folder, outdated)
    except FormatError as error:
        raise UsageError(
            "repo", config.repo, reason(error), "dry_run=true shows the files without it"
        ) from error
    print(
        f"{folder.name}: nothing was uploaded to {config.repo}"
        if address is None
        else f"{folder.name}: {address}"
    )


def _outdated(config: PushConfig) -> frozenset[str]:
    """Return the files of an earlier export in the repository.

    Raises UsageError if a private repository is wanted and it is public, or another program wrote its files.
    """
    repository = published(config.repo)
    if repository is None:
        return frozenset()
    if config.private and not repository.private:
        problem = f"{config.repo} exists and is public"
        remedy = "make it private in its settings on the Hub, or choose another repository"
        raise UsageError("private", True, problem, remedy)
    written = None if repository.card is None else exported_files(repository.card)
    others = sorted(repository.files - {GIT_ATTRIBUTES})
    if written is None and others and not config.force:
        problem = f"has {others[0]}, which diffuse did not write"
        raise UsageError("repo", config.repo, problem, "choose another repository, or set force=true")
    return repository.files & (written or frozenset())


def _push(config: PushConfig, folder: Path, outdated: frozenset[str]) -> str | None:
    """Write the export of a run, upload it, and return the address of the repository; None for `dry_run`."""
    form: ExportFormat = build(config.format)
    model = load(folder, config.weights, config.step, config.ema_length)
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
        message = f"Weights of step {model.step}, {named_weights(config.weights, model.ema_length)}"
        return upload(
            Path(temporary), config.repo, message, private=config.private, outdated=sorted(outdated)
        )
