"""Seeds derived from their purpose, so that no result depends on hidden generator state."""

import json
from hashlib import blake2b
from typing import Any

from diffusion_cli.errors import FormatError


def mix(*parts: int | str) -> int:
    """Return a seed in [0, 2^63), a hash of the parts that is the same on every platform.

    `mix(seed, "flip", 7)` and `mix(seed, "flip", 8)` are unrelated, whereas some generators correlate
    neighbouring seeds. PyTorch's CPU generator uses the low 32 bits of a seed, its CUDA generator all.
    """
    digest = blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_ranges(stored: Any) -> list[range]:
    """Join the seeds of a manifest to ascending ranges.

    `stored` is a list of ranges [first, last] or, from earlier versions, of single seeds. Raises FormatError
    for other values.
    """
    pairs = (
        [[seed, seed] if type(seed) is int else seed for seed in stored] if type(stored) is list else [None]
    )
    if not all(map(_is_range, pairs)):
        raise FormatError("seeds must be whole numbers, or ranges [first, last] of them")
    joined: list[range] = []
    for first, last in sorted(pairs):
        if joined and first <= joined[-1].stop:
            joined[-1] = range(joined[-1].start, max(joined[-1].stop, last + 1))
        else:
            joined.append(range(first, last + 1))
    return joined


def _is_range(pair: Any) -> bool:
    return (
        type(pair) is list and [type(seed) for seed in pair] == [int, int] and 0 <= pair[0] <= pair[1] < 2**32
    )
