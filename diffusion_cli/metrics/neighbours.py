"""Exact nearest neighbours and balls of feature vectors, with bounded memory."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from diffusion_cli.errors import NO_VALUE, UsageError
from diffusion_cli.metrics.rows import Rows
from diffusion_cli.system.progress import ProgressBar

TIE = 1e-9  # relative difference of squared distances below which they are recomputed exactly


def nearest(queries: Rows, keys: Rows, k: int, device: torch.device, title: str) -> tuple[Tensor, Tensor]:
    """Return the squared distances to the k nearest keys of each query, and the indices of these keys.

    Candidates are found by |q|^2 + |k|^2 - 2 q.k; their distances are then sums of squared differences in float64.
    A query that is one of the keys finds itself at distance 0.

    Returns:
        Distances, float64 [N, k], increasing, and indices, int64 [N, k].

    Raises:
        UsageError: there are fewer than k keys.
    """
    if len(keys) < k:
        raise UsageError(
            "neighbours",
            NO_VALUE,
            f"{k} are needed, but there are {len(keys)} images",
            "use more images, or a smaller k",
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
    """Return the number of balls that contain each query, int64 [N], and which balls contain any query, bool [M].

    `radii` [M] are squared, as distances of `nearest`; the boundary belongs to a ball unless `strict`.
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
    """Return squared distances [N, M] up to rounding, and the scale of their rounding errors."""
    scale = q.square().sum(1, keepdim=True) + c.square().sum(1)
    return scale - 2 * q @ c.T, scale


def _progress(rows: Rows, title: str) -> Iterator[Tensor]:
    """Yield the vectors in chunks, with a progress bar."""
    with ProgressBar(
        total=len(rows), desc=title, unit="image", unit_scale=True, delay=1.0, leave=False
    ) as bar:
        for block in rows.blocks():
            for part in block.split(1024):
                yield part
                bar.update(len(part))
