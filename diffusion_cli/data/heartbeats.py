"""Synthetic electrocardiograms: the built-in signals."""

import numpy as np

from diffusion_cli.system.seeding import mix

CLASSES = ("normal", "premature")
"""Classes of the built-in signals: regular beats, or one premature ventricular beat among them."""
RATE = 128
"""Values per second."""
LOW, HIGH = -1.5, 2.0
"""Range of the values in millivolts."""
NOISE = 0.02  # standard deviation of the noise in millivolts
WAVES = {  # centre after the R wave and width (standard deviation) in seconds, height in millivolts
    "P": (-0.18, 0.022, 0.12), "Q": (-0.028, 0.010, -0.12), "R": (0.0, 0.012, 1.1), "S": (0.032, 0.012, -0.25),
    "T": (0.26, 0.040, 0.28),
}  # fmt: skip
PREMATURE = {"R": (0.0, 0.040, 1.2), "S": (0.10, 0.040, -0.6), "T": (0.30, 0.060, -0.35)}
"""Waves of a premature ventricular beat: no P wave, and wide others."""
EARLY = (
    0.6  # interval before a premature beat, in intervals of normal beats; the next beat follows after a pause
)


def heartbeats(number: int, length: int) -> np.ndarray:
    """Return signal `number`, float64 [length] in millivolts at `RATE`: a sum of Gaussian waves and white noise.

    Each beat is `sum_w a_w exp(-(t - r - c_w)^2 / 2 s_w^2)` over its waves w, with R at time r. The class is `number`
    modulo the number of `CLASSES`. The heart rate (50 to 110 beats per minute), the phase and the heights (by 20 %) are
    random functions of `number`, and intervals vary by 3 %.

    Source: McSharry et al. 2003 (the model as a sum of Gaussian waves).
    """
    draw = np.random.RandomState(mix("heartbeats", number) % 2**32)
    interval = 60 / draw.uniform(50, 110)
    heights = {name: draw.uniform(0.8, 1.2) for name in WAVES}
    duration = length / RATE
    times = [-2 * interval + draw.uniform(0, interval)]
    while times[-1] < duration + interval:
        times.append(times[-1] + interval * (1 + 0.03 * draw.standard_normal()))
    beats = np.array(times)
    early = -1
    if number % len(CLASSES) == 1:
        shown = np.flatnonzero((beats > 0.1) & (beats < duration))
        early = int(draw.choice(shown)) if len(shown) else int(np.abs(beats - duration / 2).argmin())
        beats[early] -= (1 - EARLY) * interval
    t = np.arange(length) / RATE
    signal = NOISE * draw.standard_normal(length)
    for place, beat in enumerate(beats):
        for name, (centre, width, height) in (PREMATURE if place == early else WAVES).items():
            signal += heights[name] * height * np.exp(-0.5 * ((t - beat - centre) / width) ** 2)
    return signal
