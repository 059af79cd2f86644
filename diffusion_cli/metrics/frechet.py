"""The Frechet distance of Gaussians fitted to features: FID, when the features are Inception's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from diffusion_cli.checkpoint import whole_file
from diffusion_cli.metrics.base import Finding, Measurement, Metric
from diffusion_cli.metrics.features import FeatureBatch, Features
