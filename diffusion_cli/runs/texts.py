"""The text encoder of a run."""

import torch

from diffusion_cli.config import build
from diffusion_cli.data import TextCondition, TextEncoder
from diffusion_cli.errors import NO_VALUE, FormatError, UsageError
from diffusion_cli.runs.schema import CheckpointInfo
from diffusion_cli.system.untrusted import reason


def load_text_encoder(info: CheckpointInfo, device: torch.device) -> TextEncoder | None:
    """Return the encoder of the texts that a run was trained with; None for a model without texts.

    Args:
        info: `diffuse` entry of a checkpoint whose nodes `check_built` accepts.
        device: device of a frozen encoder.

    Raises:
        UsageError: the tokenizer is malformed, or the weights of a frozen encoder are missing or have changed.
    """
    description = None if info.conditions is None else info.conditions.text
    if description is None or info.text is None or info.config.text is None:
        return None
    text: TextCondition = build(info.config.text)
    try:
        return text.restored(description, info.text, device)
    except FormatError as error:
        problem = f"the text encoder of the run cannot be read ({reason(error)})"
        raise UsageError("text", NO_VALUE, problem, "choose another run") from error
