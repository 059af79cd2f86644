"""The direction in which a sweep improves a metric."""

import re

import pytest

from diffusion_cli import config
from diffusion_cli.config.objectives import higher_is_better


def test_sweeps_maximize_what_the_metrics_say_is_better_if_higher():
    sources = "".join(file.read_text() for file in (config.HERE / "metrics").glob("*.py"))
    values = re.findall(
        r'MetricValue\(\s*(?:named\()?"(\w+)"((?:(?!MetricValue).)*?)higher_is_better=True', sources, re.S
    )
    names = {name for name, _ in values} | {"classification_accuracy_score", "shape_coverage"}
    assert {"watertight", "psnr"} & names
    assert [name for name in names if not higher_is_better(name)] == []


@pytest.mark.parametrize("name", ["fid_classifier", "chamfer", "volume", "val_loss", "spectrum"])
def test_others_are_minimized(name):
    assert not higher_is_better(name)
