"""Processes of `launch` that a server forks: a new interpreter takes seconds to import torch."""

import multiprocessing
from collections.abc import Callable
from typing import Any

from torch.multiprocessing.spawn import ProcessContext, start_processes

IMPORTED = [
    "diffusion_cli.commands.eval",
    "diffusion_cli.commands.sample",
    "diffusion_cli.commands.train",
    "diffusion_cli.training.module",
    "torch._dynamo",
]
"""Modules that the server imports before it forks."""


def start_forked(
    work: Callable[..., None], arguments: tuple[Any, ...], **options: Any
) -> ProcessContext | None:
    """Start processes as `start_processes` does, from the server, which starts at the first call."""
    multiprocessing.set_forkserver_preload(IMPORTED)
    return start_processes(work, arguments, **{**options, "start_method": "forkserver"})
