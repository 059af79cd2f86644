"""Seeds as a function of what they are for, so that no result depends on hidden generator state."""

import json
from hashlib import blake2b
from typing import Any

from diffusion_cli.errors import FormatError


def mix(*parts: int | str) -> int:
    """A seed in [0, 2^63) that is a hash of the parts: the same on every platform, unlike for unlike parts.

    `mix(seed, "flip", 7)` and `mix(seed, "flip", 8)` are unrelated numbers, which neighbouring seeds are not
    for every generator. PyTorch's CPU generator uses the low 32 bits of its seed, its CUDA generator all.
    """
    digest = blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_ranges(stored: Any) -> list[range]:
    """Join seeds as a manifest holds them to ascending ranges.

    `stored` is a list of ranges [first, last], or of single seeds as earlier versions wrote them. Raises FormatError
    for anything else.
    """
    pairs = (
        [[seed, seed] if type(seed) is int else seed for seed in stored] if type(stored) is list else [None]
    )
    if not all(map(_is_range, pairs)):
        raise FormatError("seeds should be whole numbers, or ranges [first, last] of them")
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
