"""Words beside images: where they are, what they leave as it is, and letters without a font."""

import pytest
import torch
from PIL import Image

from diffusion_cli import captions
from diffusion_cli.captions import Captions, class_name, font_file, readable
from diffusion_cli.images import by_class, grid, rows, save_gif, stacked

WORDS = Captions(["a cat", "dogs"], ["1", "0.5", "0"], "t", "cosine schedule, DDIM, 50 steps")


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [1, 8, 28, 64, 300])
def test_images_stay_as_they_are_at_the_bottom_right(channels, side):
    images = [noise(3, channels, side, side), noise(2, channels, side, side)]
    plain, with_words = rows(images), rows(images, WORDS)
    down, across = plain.shape[1:]
    assert torch.equal(with_words[:, -down:, -across:], plain)
    for margin in (with_words[:, :-down], with_words[:, :, :-across]):
        assert margin.min() < 128, "there are words"
        assert margin[:, 0].min() == margin[:, :, 0].min() == 255, "on white"


def test_no_words_take_no_space():
    images = noise(7, 1, 8, 8)
    assert torch.equal(grid(images, 3, Captions()), grid(images, 3))
    assert torch.equal(rows([images], Captions([], [], "", "")), rows([images]))


def test_columns_are_as_wide_as_their_names():
    images = [noise(2, 1, 8, 8)]
    assert rows(images).shape[2] == 2 * 34
    assert rows(images, Captions(columns=["0.5", "1"])).shape[2] == 2 * 34
    wider = rows(images, Captions(columns=["reconstructed", "1"])).shape[2]
    assert (wider // 2 - 2) % 8 == 0, "images are enlarged by an integer factor"
    longest = rows(images, Captions(columns=["a" * 1000, "1"])).shape[2]
    assert longest == 2 * (4 * 32 + 2), "a long name is cut"


def test_names_of_rows_keep_their_beginning_and_end():
    one, other = (
        rows([noise(2, 1, 32, 32)], Captions([f"photo_of_{'x' * 60}_{end}"])) for end in ("01", "02")
    )
    assert one.shape == other.shape
    assert not torch.equal(one, other)


def test_long_words_do_not_move_the_images_far():
    picture = rows([noise(10, 3, 8, 8)], Captions(["a" * 1000], title="b" * 1000 + " c" * 300))
    assert picture.shape[2] < 10 * 34 + 300


@pytest.mark.parametrize("name", ["Katze", "кошка", "γάτα", "été", "chat\u0301", "قط"])
def test_names_in_scripts_of_the_shipped_font_are_drawn(name):
    assert font_file(name) == captions.dejavu()
    assert readable(name) == name


def test_letters_without_a_font_are_escapes_and_such_a_class_has_a_number(monkeypatch):
    monkeypatch.setattr("matplotlib.font_manager.fontManager.ttflist", [])
    captions.font_file.cache_clear()
    try:
        assert readable("a 猫\n") == "a \\u732b\\n"
        assert class_name(1, ["dog", "猫"]) == "class 1"
        assert class_name(0, ["dog", "猫"]) == "dog"
        assert class_name(5, None) == "class 5"
        picture = rows([noise(2, 1, 8, 8)], Captions(["猫\ud800\n"], ["猫", "1"], "猫", "猫 \x1b"))
        assert picture.shape[1] > 34
    finally:
        captions.font_file.cache_clear()


def test_a_font_of_the_machine_with_the_letters_is_taken(monkeypatch):
    monkeypatch.setattr(
        captions, "_letters", lambda font: {65} if font == captions.dejavu() else {65, 0x732B}
    )
    captions.font_file.cache_clear()
    try:
        found = font_file("猫A")
        assert found is not None
        assert found != captions.dejavu()
        assert readable("猫A") == "猫A"
    finally:
        captions.font_file.cache_clear()


@pytest.mark.parametrize(
    ("count", "labels", "lengths", "words"),
    [
        (9, None, [3, 3, 3], []),
        (10, [4, 7], [5, 5], ["four", "seven"]),
        (42, [4, 7], [7, 7, 7, 7, 7, 7], ["four", "", "", "seven", "", ""]),
        (9, [7], [9], ["seven"]),
        (20, [0, 7, 4, 1], [5, 5, 5, 5], ["class 0", "seven", "four", "class 1"]),
        (12, [4, 7, 4], [8, 4], ["four", "seven"]),
        (3, [0, 7], [2, 1], []),
    ],
)
@pytest.mark.parametrize("first", [0, 3])
def test_images_of_one_class_are_in_rows_of_their_own(count, labels, lengths, words, first):
    names = ["\x00", "\x07", "two", "three", "four", "five", "six", "seven"]
    seeds = range(first, first + count)
    images = torch.tensor(seeds, dtype=torch.uint8)[:, None, None, None].expand(count, 1, 8, 8)
    found, said = by_class(images, seeds, labels, names)
    assert [len(row) for row in found] == lengths
    assert list(said.rows) == words
    name = ""
    for row, word in zip(found, words, strict=False):
        name = word or name
        assert {class_name(labels[seed % len(labels)], names) for seed in row[:, 0, 0, 0].tolist()} == {name}


def test_classes_that_were_asked_for_have_rows_even_of_one_image():
    found, said = by_class(noise(3, 1, 8, 8), [0, 1, 2], [3, 1, 2, 0], None, always=True)
    assert [len(row) for row in found] == [1, 1, 1]
    assert said.rows == ["class 3", "class 1", "class 2"]


def test_groups_of_rows_are_enlarged_alike_and_keep_their_words():
    words = [(["a"], ["1"]), (["a"], ["1234567"])]
    groups = [([noise(2, 1, 32, 32)], Captions(*each)) for each in words]
    picture = stacked(groups)
    (first, one), (second, other) = groups
    alone = rows(second, other)
    assert picture.shape[1] == 2 * alone.shape[1]
    assert torch.equal(picture[:, alone.shape[1] :], alone)
    assert picture.shape[1] > rows(first, one).shape[1] + alone.shape[1]


@pytest.mark.parametrize("names", [[], ["t = 1", "t = 0.5", "step 1,000,000"]])
def test_frames_of_an_animation_have_one_size(tmp_path, names):
    save_gif(noise(3, 1, 8, 8), tmp_path / "x.gif", names=names)
    with Image.open(tmp_path / "x.gif") as animation:
        assert getattr(animation, "n_frames", 1) == 4
        assert (animation.size == (34, 34)) == (not names)


def test_words_share_a_font_of_a_size():
    assert captions._font("one", 12) is captions._font("two", 12)
    assert captions._font("one", 12) is not captions._font("one", 13)
