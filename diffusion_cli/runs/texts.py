"""The text encoder of a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffusion_cli.config import as_text, build
from diffusion_cli.config.catalogue import documented, options
from diffusion_cli.data import TextCondition, TextEncoder
from diffusion_cli.errors import NO_VALUE, FormatError, UsageError
from diffusion_cli.runs.schema import CheckpointInfo
from diffusion_cli.system.trusted_paths import WEIGHTS, is_own_run, unnamed
from diffusion_cli.system.untrusted import reason


def load_text_encoder(info: CheckpointInfo, device: torch.device, run: Path | None) -> TextEncoder | None:
    """Return the encoder of the texts that a run was trained with; None for a model without texts.

    Args:
        info: `diffuse` entry of a checkpoint whose nodes `check_built` accepts.
        device: device of a frozen encoder.
        run: folder of the run; None: the command names the encoder.

    Raises:
        UsageError: the tokenizer is malformed, the weights of a frozen encoder are missing or have changed, or a run of
            someone else has weights that this user has never named.
    """
    description = None if info.conditions is None else info.conditions.text
    if description is None or info.text is None or info.config.text is None:
        return None
    if run is not None and not is_own_run(run):
        _check_named(info.config.text, run)
    text: TextCondition = build(info.config.text)
    try:
        return text.restored(description, info.text, device)
    except FormatError as error:
        problem = f"the text encoder of the run cannot be read ({reason(error)})"
        raise UsageError("text", NO_VALUE, problem, "choose another run") from error


def _check_named(text: Mapping[str, Any], run: Path) -> None:
    """Raise UsageError for weights that neither this user nor an option of the package has named."""
    shipped = {
        value for file in options("text").values() for key, value, _ in documented(file) if key in WEIGHTS
    }
    for key, path in unnamed(text, WEIGHTS).items():
        if path not in shipped:
            problem = f"comes from the checkpoint in {run}, and you have never used it on this machine"
            words = f"text={text.get('encoder')} {as_text(f'text.{key}', path)}"
            remedy = f"if you trust the checkpoint, run once: diffuse data fetch {words}"
            raise UsageError(f"text.{key}", path, problem, remedy)
