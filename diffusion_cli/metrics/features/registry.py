"""The networks that metrics look through, each built once."""

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml

from diffusion_cli.config import build, options
from diffusion_cli.data import Dataset
from diffusion_cli.metrics.features.base import Features


def cache_folder(cache_dir: str | None) -> Path:
    """The folder of the cache, as configured; None is ~/.cache/diffuse."""
    return Path(cache_dir or "~/.cache/diffuse").expanduser()


class FeatureExtractors:
    """The network that an evaluation chose, and any other that a metric is defined on; built when first asked for."""

    def __init__(
        self, node: Mapping[str, Any], dataset: Dataset, cache_dir: Path, device: torch.device
    ) -> None:
        self.node, self.dataset, self.cache_dir, self.device = node, dataset, cache_dir, device
        self._built: dict[str, Features] = {}

    @cached_property
    def chosen(self) -> Features:
        """What `features=` names."""
        return self._build(self.node)

    def option(self, name: str, **changes: Any) -> Features:
        """The option `features=name`, with some values changed."""
        return self._build(yaml.safe_load(options("features")[name].read_text()) | changes)

    def classifier(self) -> Features:
        """A network that knows the dataset's classes: the chosen one, if it does."""
        names_classes = "auto" not in self.node["_target_"] and "Classifier" not in self.node["_target_"]
        return self.option("classifier") if names_classes or not self.chosen.knows_labels else self.chosen

    def once(self, key: str, make: Callable[[], Features]) -> Features:
        """What `make` gives, made the first time that this key comes."""
        if key not in self._built:
            self._built[key] = make()
        return self._built[key]

    def _build(self, node: Mapping[str, Any]) -> Features:
        arguments = (self.dataset, self.cache_dir, self.device)
        return self.once(str(sorted(node.items())), lambda: build(node, *arguments))
