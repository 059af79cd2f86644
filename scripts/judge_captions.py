"""Print how often samples of a run on captioned digits show what their prompts ask for, and draw some of them.

    diffuse train experiment=captioned_digits name=captioned
    python scripts/judge_captions.py outputs/captioned --picture docs/images/captions.png

A judge network finds the scene of each sample: the arrangement, and digit and colour in each place. It is trained on
new renderings of the training digits. Its own accuracy is that on renderings of the validation digits. Prompts ask
for combinations of colour and digit that the training images have, or for one that no training image has.

Columns are shares of samples with a 95 % interval (Wilson 1927) over prompts and noise, not over trainings:
all right: each digit has its colour and place, and the number is right. digits, colours: in any place. places: the
arrangement and its order. number: one digit in each place and no bright pixels besides, see `only_digits`.
The second row has real images with a further digit each, near a corner. A right one has the digit on top of another.
"""

import argparse
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

import diffusion_cli as diffuse
from diffusion_cli.data import CaptionedDigits
from diffusion_cli.data.base import Split
from diffusion_cli.data.captioned_digits import (
    ARRANGEMENTS,
    COLOURS,
    DIGITS,
    SEEN,
    SIDE,
    Arrangement,
    ColouredDigit,
    DigitPictures,
    Draws,
    Scene,
    drawn_scene,
    parse,
)

WINDOW = 14
"""Height and width in pixels of the part of an image that has one digit."""
EDGE = (SIDE - WINDOW) // 2
PLACES: dict[Arrangement, list[tuple[slice, slice]]] = {
    "single": [(slice(EDGE, SIDE - EDGE), slice(EDGE, SIDE - EDGE))],
    "column": [(half, slice(EDGE, SIDE - EDGE)) for half in (slice(SIDE // 2), slice(SIDE // 2, SIDE))],
    "row": [(slice(EDGE, SIDE - EDGE), half) for half in (slice(SIDE // 2), slice(SIDE // 2, SIDE))],
}
"""Rows and columns of the pixels of each digit."""
BRIGHT = 64
"""Least value, in any channel, of a pixel that belongs to a digit. Real digits have at least 26 such pixels."""
FEWEST = 13
"""Fewest bright pixels of a digit: half of those that real digits have."""
STRAY = 4
"""Most bright pixels besides the digits: less than a sixth of a real digit. Real images have none."""
HEADS = ("images", "guidance", "all right", "digits", "colours", "places", "number")
"""Columns of the table."""


class Judged(NamedTuple):
    """What a judge finds in an image."""

    scene: Scene
    """The most probable scene."""
    only_digits: bool
    """Whether each place of the scene has a digit, and there is nothing else."""


class Agreement(NamedTuple):
    """Which parts of a prompt a sample shows."""

    digits: bool
    """The digits, in any place and colour."""
    colours: bool
    """The colours, in any place."""
    places: bool
    """The arrangement; of two digits, the order that agrees better with the prompt."""
    number: bool
    """As many digits, and nothing else."""
    all: bool
    """Each digit with its colour in its place, and nothing else."""

    @classmethod
    def of(cls, judged: Judged, asked: Scene) -> "Agreement":
        """Compare what a judge finds in a sample with the scene of its prompt."""
        found, only_digits = judged
        swapped = found.items[::-1]
        return cls(
            sorted(item.digit for item in found.items) == sorted(item.digit for item in asked.items),
            sorted(item.colour for item in found.items) == sorted(item.colour for item in asked.items),
            found.arrangement == asked.arrangement
            and _agreement(found.items, asked) >= _agreement(swapped, asked),
            only_digits and len(found.items) == len(asked.items),
            only_digits and found == asked,
        )


def _agreement(items: Sequence[ColouredDigit], asked: Scene) -> int:
    """Return how many digits and colours agree, place by place."""
    pairs = zip(items, asked.items, strict=True)
    return sum((one.digit == other.digit) + (one.colour == other.colour) for one, other in pairs)


def layers(channels: Sequence[int], outputs: int) -> nn.Sequential:
    """Return a convolutional classifier that halves the image after every second layer."""
    modules: list[nn.Module] = []
    for number, (before, after) in enumerate(pairwise(channels)):
        modules += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        modules += [nn.MaxPool2d(2)] if number % 2 else []
    return nn.Sequential(*modules, nn.Flatten(), nn.Dropout(0.3), nn.LazyLinear(outputs))


class Judge(nn.Module):
    """Networks that find the arrangement of a scene, and the digit and the colour in a part of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.arrangement = layers((3, 8, 16, 16, 32), len(ARRANGEMENTS))
        self.item = layers((3, 32, 32, 64, 64), len(DIGITS) + len(COLOURS))

    def loss(self, pixels: Tensor, scenes: Sequence[Scene]) -> Tensor:
        """Return the mean cross-entropy of arrangements, digits and colours."""
        images = _scaled(pixels)
        arrangements = torch.tensor([ARRANGEMENTS.index(scene.arrangement) for scene in scenes])
        digits = torch.tensor([item.digit for scene in scenes for item in scene.items])
        colours = torch.tensor([[*COLOURS].index(item.colour) for scene in scenes for item in scene.items])
        parts = torch.cat(
            [_parts(image, scene.arrangement) for image, scene in zip(images, scenes, strict=True)]
        )
        logits = self.item(parts)
        return (
            functional.cross_entropy(self.arrangement(images), arrangements)
            + functional.cross_entropy(logits[:, : len(DIGITS)], digits)
            + functional.cross_entropy(logits[:, len(DIGITS) :], colours)
        )

    @torch.no_grad()
    def judged(self, pixels: Tensor) -> list[Judged]:
        """Return what the networks find in each image, uint8 [N, 3, SIDE, SIDE]."""
        self.eval()
        images = _scaled(pixels)
        found: list[Judged] = []
        numbers = self.arrangement(images).argmax(1).tolist()
        for stored, image, number in zip(pixels, images, numbers, strict=True):
            logits = self.item(_parts(image, ARRANGEMENTS[number]))
            digits = logits[:, : len(DIGITS)].argmax(1).tolist()
            colours = logits[:, len(DIGITS) :].argmax(1).tolist()
            items = [
                ColouredDigit([*COLOURS][colour], digit)
                for colour, digit in zip(colours, digits, strict=True)
            ]
            scene = Scene(ARRANGEMENTS[number], tuple(items))
            found.append(Judged(scene, only_digits(stored, scene)))
        return found


def only_digits(image: Tensor, scene: Scene) -> bool:
    """Return whether each place of a scene has a digit of its colour, and the image has nothing else.

    Bright pixels in the part of a digit belong to it if its colour is the nearest in direction. A digit has at least
    `FEWEST` pixels; at most `STRAY` bright pixels belong to no digit.

    Args:
        image: uint8 [3, SIDE, SIDE].
        scene: arrangement and colours.
    """
    colours = functional.normalize(torch.tensor([*COLOURS.values()], dtype=torch.float32), dim=1)
    nearest = torch.einsum("kc,chw->khw", colours, image.float()).argmax(0)
    rest = image.amax(0) >= BRIGHT
    for item, (rows, columns) in zip(scene.items, PLACES[scene.arrangement], strict=True):
        own = rest[rows, columns] & (nearest[rows, columns] == [*COLOURS].index(item.colour))
        if int(own.sum()) < FEWEST:
            return False
        rest[rows, columns] &= ~own
    return int(rest.sum()) <= STRAY


def _scaled(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1


def _parts(image: Tensor, arrangement: Arrangement) -> Tensor:
    """Return the part of each digit, [1 or 2, 3, WINDOW, WINDOW]; half an image is padded with black."""
    parts = [image[:, rows, columns] for rows, columns in PLACES[arrangement]]
    return torch.stack(
        [
            functional.pad(part, (0, WINDOW - part.shape[2], 0, WINDOW - part.shape[1]), value=-1.0)
            for part in parts
        ]
    )


def rendered(dataset: CaptionedDigits, split: Split) -> tuple[Tensor, list[Scene]]:
    """Return the images of a split and their scenes."""
    images = dataset.load(split)
    assert images.captions is not None
    return images.pixels, [parse(texts[0]) for texts in images.captions.texts]


def crowded(pixels: Tensor, seed: int) -> Tensor:
    """Return the images with a further validation digit each, near a random corner."""
    pictures, images = DigitPictures("val"), []
    for image, draws in zip(pixels, Draws.of(len(pixels), seed, "further digits"), strict=True):
        shifts = [(-EDGE, EDGE)[draws.below(2)] for _ in range(2)]
        digit = pictures.render(Scene("single", (SEEN[draws.below(len(SEEN))],)), draws)
        images.append(torch.maximum(image, torch.from_numpy(digit).roll(shifts, (1, 2))))
    return torch.stack(images)


def train(steps: int, batch: int = 128, seed: int = 1) -> Judge:
    """Return a judge, trained on renderings of training digits that differ from those of the dataset."""
    torch.manual_seed(seed)
    pixels, scenes = rendered(
        CaptionedDigits("", size=min(steps * batch, 40_000), val_size=0, seed=seed), "train"
    )
    judge = Judge()
    judge.loss(pixels[:2], scenes[:2])  # sets the sizes of lazy layers
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(pixels), (batch,)).tolist()
        optimizer.zero_grad()
        judge.loss(pixels[rows], [scenes[row] for row in rows]).backward()
        optimizer.step()
        schedule.step()
    return judge


def prompts(count: int, held_out: bool, seed: int) -> list[str]:
    """Return captions of random scenes, with one held-out combination each or none."""
    chosen: list[str] = []
    for draws in Draws.of(count, seed, "prompts", held_out):
        captions = drawn_scene(draws, held_out).captions()
        chosen.append(captions[draws.below(len(captions))])
    return chosen


def wilson(right: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a probability, of which `right` of `count` trials are a sample (Wilson 1927)."""
    z, share = 1.959964, right / count
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2) / (1 + z**2 / count)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def row(title: str, scale: str, found: Sequence[Judged], asked: Sequence[Scene]) -> str:
    """Return a row of the table: the share of samples that show each part of their prompts, with its interval."""
    scores = [Agreement.of(one, other) for one, other in zip(found, asked, strict=True)]
    cells: list[str] = []
    for values in zip(*scores, strict=True):
        low, high = wilson(sum(values), len(values))
        cells.append(f"{sum(values) / len(values):.3f} [{low:.3f}, {high:.3f}]")
    *parts, everything = cells
    return f"| {' | '.join([title, scale, everything, *parts])} |"


def draw(path: Path, samples: dict[float, Tensor], titles: Sequence[str]) -> None:
    """Write a picture: a column for each prompt, a row for each guidance scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(samples),
        len(titles),
        figsize=(1.2 * len(titles), 1.2 * len(samples) + 0.5),
        dpi=100,
        squeeze=False,
    )
    for line, (scale, images) in zip(axes, samples.items(), strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(f"guidance {scale:g}", fontsize=8)
    for axis, title in zip(axes[0], titles, strict=True):
        words = title.split()
        half = len(words) // 2 if len(words) > 4 else len(words)
        axis.set_title("\n".join([" ".join(words[:half]), " ".join(words[half:])]), fontsize=6)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    """Print the table and draw the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a run on dataset=captioned_digits")
    parser.add_argument("--prompts", type=int, default=300, help="number of prompts of each kind")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 2.0, 4.0], help="guidance scales")
    parser.add_argument("--steps", type=int, default=30, help="sampling steps")
    parser.add_argument("--judge-steps", type=int, default=400, help="training steps of the judge")
    parser.add_argument(
        "--real", type=int, default=2000, help="number of real images for the judge's own accuracy"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of prompts and samples")
    parser.add_argument("--picture", type=Path, help="output PNG of prompts and samples")
    parser.add_argument("--shown", type=int, default=5, help="prompts of each kind in the picture")
    arguments = parser.parse_args()
    judge = train(arguments.judge_steps)
    print(f"| {' | '.join(HEADS)} |\n{'|---' * len(HEADS)}|", flush=True)
    pixels, scenes = rendered(CaptionedDigits("", size=1, val_size=arguments.real, seed=2), "val")
    print(row("real, other handwriting", "", judge.judged(pixels), scenes), flush=True)
    print(row("real, with a further digit", "", judge.judged(crowded(pixels, 2)), scenes), flush=True)
    model = diffuse.load(arguments.run)
    shown: dict[float, list[Tensor]] = {scale: [] for scale in arguments.scales}
    titles: list[str] = []
    for held_out, title in ((False, "combinations in training"), (True, "held-out combinations")):
        asked = prompts(arguments.prompts, held_out, arguments.seed)
        titles += asked[: arguments.shown]
        for scale in arguments.scales:
            samples = model.sample(
                len(asked),
                seed=arguments.seed * len(asked),  # a multiple, so that the first sample has the first prompt
                steps=arguments.steps,
                prompt=asked,
                guidance="cfg",
                guidance_scale=scale,
            )
            print(row(title, f"{scale:g}", judge.judged(samples), list(map(parse, asked))), flush=True)
            shown[scale].append(samples[: arguments.shown])
    if arguments.picture:
        draw(arguments.picture, {scale: torch.cat(parts) for scale, parts in shown.items()}, titles)


if __name__ == "__main__":
    main()
