"""Coloured digits with captions: the grammar of scenes, and images that show them."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from diffusion_cli.data import CaptionedDigits, Digits
from diffusion_cli.data.base import Split
from diffusion_cli.data.captioned_digits import (
    COLOURS,
    DIGITS,
    HELD_OUT,
    SEEN,
    SIDE,
    ColouredDigit,
    DigitPictures,
    Draws,
    Scene,
    _resized,
    drawn_scene,
    parse,
)
from diffusion_cli.errors import FormatError
from helpers.data import labels_of

SPLITS: tuple[Split, ...] = ("train", "val")


@pytest.fixture(scope="module")
def dataset() -> CaptionedDigits:
    return CaptionedDigits("", size=300, val_size=100)


def texts(dataset: CaptionedDigits, split: Split = "train") -> list[tuple[str, ...]]:
    captions = dataset.load(split).captions
    assert captions is not None
    return [*captions.texts]


def test_each_caption_describes_its_scene():
    for draws in Draws.of(200, 0, "test"):
        scene = drawn_scene(draws)
        captions = scene.captions()
        assert len(set(captions)) == len(captions) == (2 if scene.arrangement == "single" else 4)
        assert [parse(caption) for caption in captions] == [scene] * len(captions)


def test_a_relation_has_two_directions():
    seven, three = ColouredDigit("red", 7), ColouredDigit("blue", 3)
    assert parse("a red seven above a blue three") == Scene("column", (seven, three))
    assert parse("a three in blue below  a red SEVEN") == Scene("column", (seven, three))
    assert parse("a red seven right of a blue three") == Scene("row", (three, seven))


def test_the_article_of_eight_is_an():
    scene = Scene("column", (ColouredDigit("red", 8), ColouredDigit("blue", 1)))
    assert scene.captions() == (
        "a red eight above a blue one",
        "a blue one below a red eight",
        "an eight in red above a one in blue",
        "a one in blue below an eight in red",
    )
    assert parse("a eight in red above a blue one") == scene


@pytest.mark.parametrize(
    "caption", ["", "a red", "a pink seven", "a red seven near a blue three", "a red 7", "a red seven above"]
)
def test_other_captions_are_refused(caption):
    with pytest.raises(FormatError, match="has no digit in the form 'a red seven'; the colours are red,"):
        parse(caption)


def test_no_image_has_a_held_out_combination(dataset):
    assert len(HELD_OUT) == 10
    assert {item.digit for item in HELD_OUT} == {*range(10)}
    assert {item.colour for item in HELD_OUT} == {*COLOURS}
    assert len({*SEEN} | {*HELD_OUT}) == len(SEEN) + len(HELD_OUT) == len(COLOURS) * len(DIGITS)
    found: set[ColouredDigit] = set()
    for split in SPLITS:
        found |= {item for captions in texts(dataset, split) for item in parse(captions[0]).items}
    assert found == {*SEEN}
    asked = [drawn_scene(draws, held_out=True) for draws in Draws.of(200, 0, "asked")]
    assert all(sum(item in HELD_OUT for item in scene.items) == 1 for scene in asked)
    assert all(scene.is_held_out for scene in asked)
    assert not parse("a red one").is_held_out


def test_an_image_depends_on_the_seed_and_its_row_alone(dataset):
    images = dataset.load("train")
    fewer = CaptionedDigits("", size=20, val_size=0)
    assert_close(fewer.load("train").pixels, images.pixels[:20], rtol=0, atol=0)
    assert texts(fewer) == texts(dataset)[:20]
    assert len(fewer.load("val")) == 0
    other = CaptionedDigits("", size=20, seed=1)
    assert (other.load("train").pixels != images.pixels[:20]).flatten(1).any(1).all()
    assert images.pixels.sum().item() == 7_242_122  # the same on every machine


def test_colours_and_places_are_those_of_the_caption(dataset):
    """The largest pixel of each half of an image has the colour of the digit that the caption places there."""
    for image, texts in zip(dataset.load("train").pixels, dataset.load("train").captions.texts, strict=True):
        scene = parse(texts[0])
        half, parts = SIDE // 2, [image]
        if scene.arrangement == "column":
            parts = [image[:, :half], image[:, half:]]
        elif scene.arrangement == "row":
            parts = [image[..., :half], image[..., half:]]
        for part, item in zip(parts, scene.items, strict=True):
            pixels = part.flatten(1).float()
            brightest = pixels[:, pixels.sum(0).argmax()]
            colours = torch.tensor([*COLOURS.values()], dtype=torch.float32)
            likeness = torch.nn.functional.cosine_similarity(colours, brightest[None])
            assert [*COLOURS][int(likeness.argmax())] == item.colour


def test_training_and_validation_show_different_handwriting(dataset):
    digits = Digits("", val_fraction=0.2)
    for split in SPLITS:
        pictures, images = DigitPictures(split), digits.load(split)
        assert sum(map(len, pictures.of_digit)) == len(images)
        labels = labels_of(images).numpy()
        for digit, rows in enumerate(pictures.of_digit):
            assert (rows == np.flatnonzero(labels == digit)).all()


def test_resized_digits_keep_their_values():
    """Interpolation between the centres of pixels of a linear slope gives the slope."""
    slope = np.broadcast_to(2 * np.arange(8), (1, 8, 8))
    for size in (8, 10):
        places = np.clip((np.arange(size) + 0.5) * 8 / size - 0.5, 0, 7)
        expected = np.broadcast_to(np.floor(2 * places * 255 / 16), (1, size, size))
        assert_close(_resized(slope, size), expected.astype(np.int64), rtol=0, atol=0)
