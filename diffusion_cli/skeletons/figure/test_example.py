"""The figure `example` is drawn."""

from pathlib import Path

from diffusion_cli.cli import run


def test_it_is_written_for_several_schedules(tmp_path: Path) -> None:
    words = ["plot", "plugins=[example_package]", "figure=example", "schedule=[cosine,linear]"]
    assert run([*words, f"output={tmp_path / 'figure.png'}"]) == 0
    assert (tmp_path / "figure.png").stat().st_size > 1000
