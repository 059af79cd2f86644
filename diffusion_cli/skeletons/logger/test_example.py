"""The logger `example` writes what it gets."""

import json
from pathlib import Path

import diffusion_cli as diffuse

diffuse.allow_plugins("example_package")


def test_each_point_is_a_line(tmp_path: Path) -> None:
    logger = diffuse.option("logger", "example", path=str(tmp_path / "points"))
    logger.log_metrics({"loss": 0.5}, 1)
    logger.log_metrics({"loss": 0.25}, 2)
    lines = (tmp_path / "points").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
