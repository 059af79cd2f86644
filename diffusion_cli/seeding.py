"""Seeds as a function of what they are for, so that no result depends on hidden generator state."""

import json
from hashlib import blake2b


def mix(*parts: int | str) -> int:
    """A seed in [0, 2^63) that is a hash of the parts: the same on every platform, unlike for unlike parts.

    `mix(seed, "flip", 7)` and `mix(seed, "flip", 8)` are unrelated numbers, which neighbouring seeds are not
    for every generator. PyTorch's CPU generator uses the low 32 bits of its seed, its CUDA generator all.
    """
    digest = blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
