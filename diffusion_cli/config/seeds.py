"""Seeds of repeated evaluations, which should share no image."""

import json
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

from diffusion_cli.config.evaluation import CompareConfig, EvaluationConfig
from diffusion_cli.config.schema import Config
from diffusion_cli.errors import Problem


def shared_seeds(configs: Sequence[Config]) -> list[Problem]:
    """Return a problem for each group of evaluations that differ by their seed only, and share some of their images.

    Image n has seed + n, so that seeds nearer to each other than num_samples give mostly the same images, and the
    numbers a spread that says nothing.
    """
    groups: dict[str, list[EvaluationConfig]] = defaultdict(list)
    for config in configs:
        if isinstance(config, EvaluationConfig) and config.makes_samples:
            groups[json.dumps(config.model_dump(exclude={"seed"}), sort_keys=True)].append(config)
    return list(dict.fromkeys(line for group in groups.values() if (line := _shared(group)) is not None))


def _shared(configs: Sequence[EvaluationConfig]) -> Problem | None:
    seeds = sorted({config.seed for config in configs})
    number, list_form = len(configs[0].seeds), "[{}]" if isinstance(configs[0], CompareConfig) else "{}"
    nearest = min((after - before for before, after in pairwise(seeds)), default=number)
    if nearest >= number:
        return None
    given, apart = (
        list_form.format(",".join(map(str, values)))
        for values in (seeds, [seeds[0] + place * number for place in range(len(seeds))])
    )
    return Problem(
        "seed",
        given,
        f"{number - nearest} of {number} images are the same, since image n has seed + n",
        f"use seed={apart}, or repeats={len(seeds) * configs[0].repeats}",
    )
