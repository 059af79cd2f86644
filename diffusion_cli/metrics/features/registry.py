"""Feature networks of an evaluation, each built once."""

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml

from diffusion_cli.config import build, options
from diffusion_cli.data import Dataset
from diffusion_cli.errors import UsageError
from diffusion_cli.metrics.features.base import Features
from diffusion_cli.metrics.features.classifier_training import Recipe
from diffusion_cli.metrics.features.judge import AttributeJudge
from diffusion_cli.metrics.features.pixels import RawPixels


def cache_folder(cache_dir: str | None) -> Path:
    """Return the cache folder as configured; None: ~/.cache/diffuse."""
    return Path(cache_dir or "~/.cache/diffuse").expanduser()


class FeatureExtractors:
    """Feature networks, built on first use: the one of `features=`, and those that metrics are defined on."""

    def __init__(
        self, node: Mapping[str, Any], dataset: Dataset, cache_dir: Path, device: torch.device
    ) -> None:
        self.node, self.dataset, self.cache_dir, self.device = node, dataset, cache_dir, device
        self._built: dict[str, Features] = {}

    @cached_property
    def chosen(self) -> Features:
        """Network of `features=`."""
        return self._build(self.node)

    @cached_property
    def pixels(self) -> Features:
        """Placeholder for metrics without features."""
        return RawPixels(self.device)

    def option(self, name: str, **changes: Any) -> Features:
        """Return the network `features=name`, with changed values."""
        return self._build(yaml.safe_load(options("features")[name].read_text()) | changes)

    def of_metric(self, metric: str, name: str, weights: str) -> Features:
        """Return the network `features=name` of a metric that has its own `weights`."""
        try:
            return self.option(name, weights=weights)
        except UsageError as error:
            raise error.renamed({"features.weights": f"metric.{metric}.weights"}) from error

    def classifier(self) -> Features:
        """Return a classifier of the dataset's classes: the chosen network if it is one."""
        names_classes = "auto" not in self.node["_target_"] and "Classifier" not in self.node["_target_"]
        return self.option("classifier") if names_classes or not self.chosen.knows_labels else self.chosen

    def judge(self, recipe: Recipe) -> Features:
        """Return the network of the dataset's attributes with these settings."""
        return self.once(
            f"judge {recipe}",
            lambda: AttributeJudge(self.dataset, self.cache_dir, self.device, recipe),
        )

    def once(self, key: str, make: Callable[[], Features]) -> Features:
        """Return the network of a key, created by `make` on first use."""
        if key not in self._built:
            self._built[key] = make()
        return self._built[key]

    def _build(self, node: Mapping[str, Any]) -> Features:
        arguments = (self.dataset, self.cache_dir, self.device)
        return self.once(str(sorted(node.items())), lambda: build(node, *arguments))
