"""Coloured digits with captions: scenes of one or two digits, their grammar, and a dataset of them."""

import re
from functools import cache, partial
from itertools import product
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import NonNegativeInt, PositiveInt

from diffusion_cli.data.base import Dataset, Split, shuffled_mask
from diffusion_cli.data.captions import CaptionTable, ReadCaptions
from diffusion_cli.data.memory import MemoryImages
from diffusion_cli.errors import FormatError
from diffusion_cli.system.compat import sklearn_digits
from diffusion_cli.system.seeding import mix

COLOURS = {
    "red": (255, 40, 40),
    "green": (40, 220, 40),
    "blue": (70, 90, 255),
    "yellow": (255, 230, 30),
    "purple": (220, 60, 240),
    "white": (255, 255, 255),
}
"""Names of the colours with their red, green and blue, 0 to 255."""
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
"""Words of the digits."""
SIDE = 24
"""Height and width of the images in pixels."""
SIZES = (9, 10, 11)
"""Heights and widths of the digits in pixels."""
JITTER = 1
"""Greatest distance in pixels from the middle of the image, across the arrangement of the digits."""
DRAWS = 16
"""Random numbers of a scene and its image, at least as many as they use."""
VAL_FRACTION = 0.2  # as of dataset=digits, with the same images

Arrangement = Literal["single", "column", "row"]
ARRANGEMENTS: tuple[Arrangement, ...] = ("single", "column", "row")
"""One digit in the middle; two in a column, the upper first; two in a row, the left one first."""
RELATIONS: dict[Arrangement, tuple[str, str]] = {
    "column": ("above", "below"),
    "row": ("left of", "right of"),
}
"""Words for the first digit beside the second, and for the second beside the first."""
FORMS = ("{colour} {digit}", "{digit} in {colour}")
"""Phrases for a digit, without their article."""


class ColouredDigit(NamedTuple):
    """A digit of a scene."""

    colour: str
    digit: int

    def __str__(self) -> str:
        return self.phrase(0)

    def phrase(self, form: int) -> str:
        """Return the phrase for the digit, in one of the `FORMS`."""
        words = FORMS[form].format(colour=self.colour, digit=DIGITS[self.digit])
        return f"{'an' if words.startswith('eight') else 'a'} {words}"


class Scene(NamedTuple):
    """One or two digits and their arrangement."""

    arrangement: Arrangement
    items: tuple[ColouredDigit, ...]
    """The digit, or the upper and the lower one, or the left and the right one."""

    def captions(self) -> tuple[str, ...]:
        """Return all captions of the scene: each phrase of the digits, from either digit."""
        if self.arrangement == "single":
            return tuple(self.items[0].phrase(form) for form in range(len(FORMS)))
        forward, backward = RELATIONS[self.arrangement]
        first, second = self.items
        return tuple(
            f"{one.phrase(form)} {word} {other.phrase(form)}"
            for form in range(len(FORMS))
            for one, word, other in ((first, forward, second), (second, backward, first))
        )

    @property
    def is_held_out(self) -> bool:
        """Whether the scene has a combination that no training image has."""
        return any(item in HELD_OUT for item in self.items)


HELD_OUT = tuple(ColouredDigit(list(COLOURS)[digit % len(COLOURS)], digit) for digit in range(len(DIGITS)))
"""Combinations that no image of the dataset has: red zero, green one, blue two, yellow three, purple four, ..."""
SEEN = tuple(
    item
    for item in (ColouredDigit(*pair) for pair in product(COLOURS, range(len(DIGITS))))
    if item not in HELD_OUT
)
"""All other combinations."""


def parse(caption: str) -> Scene:
    """Return the scene of a caption, in any phrase that `Scene.captions` writes.

    Raises:
        FormatError: the caption has another form, colour or digit.
    """
    words = " ".join(caption.lower().split())
    for arrangement, relations in RELATIONS.items():
        for place, relation in enumerate(relations):
            first, found, second = words.partition(f" {relation} ")
            if found:
                items = _item(first, caption), _item(second, caption)
                return Scene(arrangement, items if place == 0 else items[::-1])
    return Scene("single", (_item(words, caption),))


def _item(phrase: str, caption: str) -> ColouredDigit:
    for form in FORMS:
        pattern = "an? " + form.format(colour="(?P<colour>[a-z]+)", digit="(?P<digit>[a-z]+)")
        found = re.fullmatch(pattern, phrase)
        if found and found["colour"] in COLOURS and found["digit"] in DIGITS:
            return ColouredDigit(found["colour"], DIGITS.index(found["digit"]))
    raise FormatError(
        f"{caption[:80]!r} has no digit in the form 'a red seven'; "
        f"the colours are {', '.join(COLOURS)}, and the digits {', '.join(DIGITS)}"
    )


class Draws:
    """The random choices of one scene and its image.

    Args:
        numbers: random numbers in 0..2^31 - 1.
    """

    def __init__(self, numbers: np.ndarray) -> None:
        self._numbers = iter(numbers.tolist())

    def below(self, count: int) -> int:
        """Return a random number in 0..count - 1."""
        return next(self._numbers) * count >> 31

    @staticmethod
    def of(count: int, *seed: int | str) -> "list[Draws]":
        """Return the draws of several scenes; those of scene n are a function of the seed and n."""
        # NumPy guarantees the stream of RandomState.
        random = np.random.RandomState(mix(*seed) % 2**32)
        return [Draws(numbers) for numbers in random.randint(2**31, size=(count, DRAWS))]


def drawn_scene(draws: Draws, held_out: bool = False) -> Scene:
    """Return a random scene: each arrangement and each combination with equal probability.

    Args:
        draws: random choices.
        held_out: whether one digit has a held-out combination; otherwise none has.
    """
    arrangement = ARRANGEMENTS[draws.below(len(ARRANGEMENTS))]
    items = [SEEN[draws.below(len(SEEN))] for _ in range(1 if arrangement == "single" else 2)]
    if held_out:
        items[draws.below(len(items))] = HELD_OUT[draws.below(len(HELD_OUT))]
    return Scene(arrangement, tuple(items))


class DigitPictures:
    """Handwritten digits of scikit-learn of one split, in the sizes of the scenes.

    Args:
        split: training or validation images of `dataset=digits`.
    """

    def __init__(self, split: Split) -> None:
        values, labels = _handwritten()
        rows = shuffled_mask(len(values), VAL_FRACTION) == (split == "val")
        gray = values[rows].astype(np.int64).reshape(-1, 8, 8)
        self.by_size = {size: _resized(gray, size) for size in SIZES}
        self.of_digit = [np.flatnonzero(labels[rows] == digit) for digit in range(len(DIGITS))]

    def render(self, scene: Scene, draws: Draws) -> np.ndarray:
        """Return an image of a scene, uint8 [3, SIDE, SIDE], on black.

        Each digit has a random picture of its class and a random size. It lies at a random place within its half of
        the image, and near the middle in the other direction.
        """
        image = np.zeros((3, SIDE, SIDE), dtype=np.uint8)
        for place, item in enumerate(scene.items):
            size = SIZES[draws.below(len(SIZES))]
            rows = self.of_digit[item.digit]
            gray = self.by_size[size][rows[draws.below(len(rows))]]
            middle = [(SIDE - size) // 2 + draws.below(2 * JITTER + 1) - JITTER for _ in range(2)]
            half = place * SIDE // 2 + draws.below(SIDE // 2 - size + 1)
            top = half if scene.arrangement == "column" else middle[0]
            left = half if scene.arrangement == "row" else middle[1]
            colour = np.array(COLOURS[item.colour])[:, None, None]
            image[:, top : top + size, left : left + size] = colour * gray // 255
        return image


@cache
def _handwritten() -> tuple[np.ndarray, np.ndarray]:
    rows = sklearn_digits()
    return rows[:, :-1], rows[:, -1].astype(np.int64)


def _resized(gray: np.ndarray, size: int) -> np.ndarray:
    """Return pictures 8x8 of values 0..16 in another size, values 0..255, by bilinear interpolation.

    Whole numbers make the pixels the same on every machine.
    """
    places = np.clip(((2 * np.arange(size) + 1) * 8 - size), 0, 2 * size * 7)  # in 1 / (2 size) of a pixel
    low = np.minimum(places // (2 * size), 6)
    part = places - 2 * size * low
    weights = np.zeros((size, 8), dtype=np.int64)
    weights[np.arange(size), low] = 2 * size - part
    weights[np.arange(size), low + 1] = part
    sums = weights @ gray @ weights.T
    return sums * 255 // (16 * (2 * size) ** 2)


class CaptionedDigits(Dataset):
    """Scenes of one or two coloured handwritten digits on 24x24 pixels, with captions; needs no download.

    Each image has all captions of its scene, such as "a red seven above a blue three" and "a three in blue below
    a seven in red". The arrangements are one digit in the middle, two in a column and two in a row. The digits are
    those of `dataset=digits`, 9 to 11 pixels wide; validation images have other digits than training images.
    The combinations of colour and digit in `HELD_OUT` are in no image, but a prompt may ask for them.

    Args:
        data_dir: unused.
        size: number of training images. Image n is a function of the seed and n.
        val_size: number of validation images.
        seed: seed of the scenes.
    """

    name = "captioned_digits"
    shape = (3, SIDE, SIDE)
    class_names = None
    missing_classes = "its images have captions"
    captions = True
    flip = False

    def __init__(
        self,
        data_dir: str,
        *,
        size: PositiveInt = 20000,
        val_size: NonNegativeInt = 1000,
        seed: NonNegativeInt = 0,
    ) -> None:
        super().__init__(data_dir)
        self.sizes: dict[Split, int] = {"train": size, "val": val_size}
        self.seed = seed

    def load(self, split: Split) -> MemoryImages:
        pictures = DigitPictures(split)
        pixels = np.zeros((self.sizes[split], *self.shape), dtype=np.uint8)
        scenes: list[Scene] = []
        for row, draws in enumerate(Draws.of(len(pixels), self.seed, "scenes", split)):
            scenes.append(drawn_scene(draws))
            pixels[row] = pictures.render(scenes[row], draws)
        images = MemoryImages(torch.from_numpy(pixels), None)
        images.captions = CaptionTable(partial(_captions, scenes))
        return images


def _captions(scenes: list[Scene]) -> ReadCaptions:
    return ReadCaptions([scene.captions() for scene in scenes])
