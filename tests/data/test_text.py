"""Tokenizers that are learned from captions, and the choice among several captions."""

from pathlib import Path

import pytest
import torch

from diffusion_cli.data import LearnedText, NoText, TokenEncoder
from diffusion_cli.errors import FormatError, UsageError
from helpers.texts import CAPTIONS

CPU = torch.device("cpu")
TEXTS = [text for texts in CAPTIONS for text in texts]


def learned(**options) -> TokenEncoder:
    return LearnedText(**{"vocabulary": 400, "length": 12, **options}).fitted(TEXTS, CPU)


def size(encoder: TokenEncoder) -> int:
    return encoder.description.vocabulary or 0


def test_frequent_words_are_one_token_each() -> None:
    assert learned().lengths(["a red seven above a blue three", "blue", ""]) == [7, 1, 0]


def test_a_word_that_no_caption_has_is_composed_of_parts() -> None:
    encoder = learned()
    known, zebra, cat = encoder.encode(["red", "zebra", "猫"])
    assert (known >= 0).sum() == 1
    assert (zebra >= 0).sum() > 1
    assert (cat >= 0).sum() >= 3  # bytes in UTF-8
    assert not torch.equal(zebra, encoder.encode(["zebras"])[0])


@pytest.mark.parametrize("text", ["A red SEVEN", " a  red\tseven\n", "a red seven"])
def test_case_and_blanks_do_not_matter(text) -> None:
    encoder = learned()
    assert torch.equal(encoder.encode([text]), encoder.encode(["a red seven"]))


def test_composed_and_decomposed_letters_are_equal() -> None:
    encoder = learned()
    assert torch.equal(encoder.encode(["caf\u00e9"]), encoder.encode(["cafe\u0301"]))


def test_the_end_of_a_long_text_is_cut() -> None:
    encoder = learned(length=3)
    long, short = encoder.encode(["a red seven above", "a red seven"])
    assert torch.equal(long, short)
    assert encoder.cut(["a red seven above", "a red seven", "one"]) == 1
    assert encoder.encode(["red " * 10_000]).shape == (1, 3)


def test_an_empty_text_is_a_missing_one() -> None:
    assert (learned().encode(["", " \n"]) == -1).all()
    assert learned().encode([]).shape == (0, 12)


def test_equal_texts_are_read_once_and_in_parts(monkeypatch) -> None:
    monkeypatch.setattr("diffusion_cli.data.text.TOGETHER", 3)
    encoder = learned(length=3)
    read: list[list[str]] = []
    tokens = encoder._tokens
    monkeypatch.setattr(encoder, "_tokens", lambda texts: [read.append([*texts]), tokens(texts)][1])
    texts = ["a red seven above", *["one", "red", "blue", "a"] * 2, "a red seven above"]
    assert encoder.cut(iter(texts)) == 2
    assert read == [["a red seven above", "one", "red"], ["blue", "a"]]
    whole = torch.cat([encoder.encode([text]) for text in texts])
    read.clear()
    table = encoder.stored(texts, Path())
    assert torch.equal(table.rows(torch.arange(len(texts))), whole)
    assert max(map(len, read)) == 3
    assert table.tokens.dtype == torch.int32


def test_half_surrogate_pairs_are_no_error() -> None:
    assert torch.equal(learned().encode(["\udc80"]), learned().encode(["?"]))


def test_a_stored_tokenizer_gives_the_same_tokens() -> None:
    encoder = learned()
    again = LearnedText().restored(encoder.description, encoder.state, CPU)
    texts = [*TEXTS, "zebra", "猫", ""]
    assert torch.equal(again.encode(texts), encoder.encode(texts))
    assert again.encode(texts).max() < size(encoder)


def test_two_merges_may_give_one_token() -> None:
    state = "a b\nab c\nb c\na bc"
    encoder = TokenEncoder(learned().description.model_copy(update={"vocabulary": 259}), state)
    assert encoder.encode(["abc"])[0, :2].tolist() != [-1, -1]
    learned_words = ["xabc abc ab bc"] * 9
    merges = LearnedText(vocabulary=300).fitted(learned_words, CPU)
    assert size(merges) <= 256 + len(merges.state.splitlines())


def test_the_vocabulary_has_at_most_its_size() -> None:
    assert size(learned(vocabulary=260)) == 260
    assert size(learned(vocabulary=60000)) < 400
    assert learned(vocabulary=256).lengths(["red"]) == [4]


@pytest.mark.parametrize("state", ["a b\nabc d", "a", "a b\n\n", "a b c"])
def test_a_malformed_tokenizer_is_refused(state) -> None:
    description = learned().description
    with pytest.raises(FormatError, match="invalid merge"):
        TokenEncoder(description, state)


def test_a_tokenizer_of_another_size_or_a_huge_one_is_refused() -> None:
    encoder = learned()
    with pytest.raises(FormatError, match="has a tokenizer of 257 tokens, not"):
        TokenEncoder(encoder.description, "a b")
    with pytest.raises(FormatError, match="more than 8388608 characters"):
        TokenEncoder(encoder.description, "a b\n" * 2**21 + "x")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            {"vocabulary": 100},
            "text.vocabulary=100: is not between 256, the tokens of single bytes, and 65536",
        ),
        ({"length": 5000}, "text.length=5000: is larger than 1024"),
        ({"heads": 3}, "text.heads=3: does not divide text.width=128; use a divisor"),
    ],
)
def test_sizes_outside_their_range_are_one_line(options, line) -> None:
    with pytest.raises(UsageError) as caught:
        LearnedText(**options)
    assert str(caught.value).startswith(line)


def test_no_text_reads_no_captions() -> None:
    def unread():
        raise AssertionError
        yield

    assert NoText().fitted(unread(), CPU) is None


# --- Captions of images ------------------------------------------------------


def test_each_row_gets_one_of_its_own_captions_and_a_new_one_at_each_step(tmp_path) -> None:
    encoder = learned()
    source = encoder.source(CAPTIONS, tmp_path)
    rows, images = torch.arange(len(CAPTIONS)), torch.zeros(len(CAPTIONS), 1)
    drawn = torch.stack([source.values(rows, images, draw) for draw in range(40)])
    for row, captions in enumerate(CAPTIONS):
        wanted = {tuple(tokens) for tokens in encoder.encode(captions).tolist()}
        assert {tuple(tokens) for tokens in drawn[:, row].tolist()} == (wanted or {(-1,) * 12})


def test_the_caption_of_a_row_does_not_depend_on_the_batch(tmp_path) -> None:
    source = learned().source(CAPTIONS, tmp_path)
    rows, images = torch.tensor([77, 0, 42, 4, 2]), torch.zeros(5, 1)
    together = source.values(rows, images, 7)
    alone = torch.cat([source.values(row[None], images[:1], 7) for row in rows])
    assert torch.equal(together, alone)


def test_evaluations_get_the_same_captions_every_time(tmp_path) -> None:
    source = learned().source(CAPTIONS, tmp_path)
    rows, images = torch.arange(80), torch.zeros(80, 1)
    assert torch.equal(source.values(rows, images, None), source.values(rows, images, None))


def test_a_source_on_a_device_has_the_same_values(tmp_path) -> None:
    source = learned().source(CAPTIONS, tmp_path)
    rows, images = torch.arange(80), torch.zeros(80, 1)
    assert torch.equal(source.to(CPU).values(rows, images, 3), source.values(rows, images, 3))


def test_without_any_caption_all_are_missing() -> None:
    source = learned().source([(), ()], Path())
    assert (source.values(torch.tensor([1, 0]), torch.zeros(2, 1), 0) == -1).all()


def test_the_digest_covers_captions_their_rows_and_the_tokenizer(tmp_path) -> None:
    encoder = learned()
    digests = {
        encoder.source(captions, tmp_path).digest()
        for captions in ([("a", "b"), ()], [("a",), ("b",)], [("b", "a"), ()], [("a", "c"), ()])
    }
    digests.add(learned(vocabulary=256).source([("a", "b"), ()], tmp_path).digest())
    assert len(digests) == 5
