"""Check of the values of images against their stated range."""

from collections.abc import Sequence

import numpy as np

LOOKED_AT = 8
"""Number of images of a dataset to check."""
MOST_CUT = 0.01
"""Share of values outside the range above which a remark states it."""
TOLERANCE = 1e-6
"""Distance outside the range, relative to half of it, of range ends stored as float32."""
INTENDED = "give dataset.range=[low,high] of all images if this is not intended"
"""Remedy of a disagreement."""
LEAST_FILLED = 1 / 8


def disagreement(images: Sequence[np.ndarray], low: Sequence[float], high: Sequence[float]) -> str | None:
    """Return how the values of images [C, H, W] do not fit their range, or None if they do.

    They do not fit if over 1 % of the values are outside the range, or if no channel covers 1/8 of it. The range is
    one pair for all channels, or one pair per channel.
    """
    start, half = np.array(low)[:, None, None], (np.array(high) - np.array(low))[:, None, None] / 2
    x = [(values.astype(np.float64) - start) / half - 1 for values in images]
    cut = sum(int((np.abs(each) > 1 + TOLERANCE).sum()) for each in x) / sum(each.size for each in x)
    ends = [(each.min((1, 2)), each.max((1, 2))) for each in x]
    filled = float(np.ptp([np.min([a for a, _ in ends], 0), np.max([b for _, b in ends], 0)], 0).max() / 2)
    if cut <= MOST_CUT and not filled < LEAST_FILLED:  # `filled` may be NaN
        return None
    found = min(values.min() for values in images), max(values.max() for values in images)
    of = "the first image" if len(images) == 1 else f"{len(images)} images examined"
    what = (
        f"clips {cut:.0%} of the values"
        if cut > MOST_CUT
        else f"only {filled:.1%} of it is used by the values"
    )
    return f"{what} of {of}, {found[0]:g} to {found[1]:g}"
