"""`diffuse report`: write one HTML page about one run or several runs."""

from pathlib import Path

from diffusion_cli.config import ReportConfig
from diffusion_cli.errors import FormatError, UsageError
from diffusion_cli.report.page import is_ours, page
from diffusion_cli.report.record import read_record
from diffusion_cli.runs.find import find_run
from diffusion_cli.system.files import atomic_write


def run(config: ReportConfig) -> None:
    """Write the page; an earlier page of `diffuse report` is replaced."""
    named = config.run if isinstance(config.run, list) else [config.run]
    found = [find_run(run, config.output_dir) for run in named]
    folders = list({folder.resolve(): folder for folder in found}.values())
    place = folders[0] if len(folders) == 1 else Path(config.output_dir)
    output = Path(config.output) if config.output else place / "report.html"
    if output.is_dir():
        raise UsageError("output", output, "is a folder", "give a file")
    try:
        free = not output.exists() or is_ours(output)
    except FormatError as error:
        raise UsageError("output", output, str(error), "remove it, or choose another file") from error
    if not free:
        raise UsageError("output", output, "was not written by diffuse report", "choose another file")
    html = page([read_record(folder, name) for folder, name in zip(folders, _names(folders), strict=True)])
    with atomic_write(output) as temporary:
        temporary.write_text(html, encoding="utf-8", errors="replace")  # folder names may not be Unicode
    print(f"Report: {output}")


def _names(folders: list[Path]) -> list[str]:
    """Return the names of run folders, or their full paths if two names are equal."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]
