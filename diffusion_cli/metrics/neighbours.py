"""Nearest neighbours and balls among feature vectors, exact to the tie, in the memory of one block."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from diffusion_cli.errors import NO_VALUE, UsageError
from diffusion_cli.metrics.rows import Rows
from diffusion_cli.system.progress import ProgressBar

TIE = 1e-9  # relative difference from which on float64 products tell two squared distances apart


def nearest(queries: Rows, keys: Rows, k: int, device: torch.device, title: str) -> tuple[Tensor, Tensor]:
    """Squared distances to the k nearest keys of each query, float64 [N, k] rising, and which keys, int64 [N, k].

    A query that is among the keys finds itself at 0. Distances are sums of squared differences in float64, candidates
    those of |q|^2 + |k|^2 - 2 q.k. Raises UsageError if there are fewer than k keys.
    """
    if len(keys) < k:
        raise UsageError(
            "neighbours",
            NO_VALUE,
            f"{k} are wanted among {len(keys)} images",
            "take more images, or a smaller k",
        )
    distances, indices = [], []
    for block in _progress(queries, title):
        q = block.to(device, torch.float64)
        best, where = (
            q.new_full((len(q), 0), math.inf),
            torch.empty(len(q), 0, dtype=torch.int64, device=device),
        )
        first = 0
        for part in keys.blocks():
            squares, _ = _squares(q, part.to(device, torch.float64))
            here = torch.arange(first, first + len(part), device=device).expand(len(q), -1)
            best, places = torch.cat([best, squares], 1).topk(min(k, first + len(part)), largest=False)
            where = torch.cat([where, here], 1).gather(1, places)
            first += len(part)
        near = keys[where.cpu().numpy()].to(device, torch.float64)
        exact, order = (q[:, None] - near).square().sum(-1).sort(1)
        distances.append(exact.cpu())
        indices.append(where.gather(1, order).cpu())
    return torch.cat(distances), torch.cat(indices)


def within(
    queries: Rows, centres: Rows, radii: Tensor, strict: bool, device: torch.device, title: str
) -> tuple[Tensor, Tensor]:
    """In how many balls each query lies, int64 [N], and in which balls any query lies, bool [M].

    `radii` [M] are squared, as `nearest` gives them; a query on the rim is in, unless `strict`.
    """
    counts, hit = [], torch.zeros(len(centres), dtype=torch.bool, device=device)
    for block in _progress(queries, title):
        q = block.to(device, torch.float64)
        number, first = torch.zeros(len(q), dtype=torch.int64, device=device), 0
        for part in centres.blocks():
            c = part.to(device, torch.float64)
            radius = radii[first : first + len(c)].to(device)
            squares, scale = _squares(q, c)
            close = ((squares - radius).abs() <= TIE * (scale + radius)).nonzero(as_tuple=True)
            squares[close] = (q[close[0]] - c[close[1]]).square().sum(-1)
            inside = squares < radius if strict else squares <= radius
            number += inside.sum(1)
            hit[first : first + len(c)] |= inside.any(0)
            first += len(c)
        counts.append(number.cpu())
    return torch.cat(counts), hit.cpu()


def _squares(q: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances [N, M] up to rounding, and the size of what was subtracted to have them."""
    scale = q.square().sum(1, keepdim=True) + c.square().sum(1)
    return scale - 2 * q @ c.T, scale


def _progress(rows: Rows, title: str) -> Iterator[Tensor]:
    """The vectors, some at a time, under a progress bar."""
    with ProgressBar(
        total=len(rows), desc=title, unit="image", unit_scale=True, delay=1.0, leave=False
    ) as bar:
        for block in rows.blocks():
            for part in block.split(1024):
                yield part
                bar.update(len(part))
