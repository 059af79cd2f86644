"""Texts as conditions: options of the group `text`, encoders of texts, and the captions of a split as a source."""

import os
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from diffusion_cli.conditions import TextDescription
from diffusion_cli.data.sources import ConditionSource, row_uniform
from diffusion_cli.errors import FormatError, UsageError
from diffusion_cli.system.distributed import Distributed

BYTES = 256
"""Tokens of single bytes, of which every text can be composed."""
LONGEST = 1024
"""Most tokens of a text."""
LARGEST = 2**16
"""Largest vocabulary."""
LONGEST_STATE = 2**23
"""Most characters of a stored tokenizer."""
LONGEST_TOKEN = 48
"""Most bytes of a token."""
RARE = 2
"""Least number of occurrences of two neighbouring tokens that become one."""


TOGETHER = 10_000
"""Texts that are tokenized together; all tokens of millions of captions, as objects, would fill the memory."""


def parts(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yield texts in parts of `TOGETHER`."""
    return (texts[first : first + TOGETHER] for first in range(0, len(texts), TOGETHER))


class EncodedTexts(ABC):
    """Encoded texts by number."""

    @abstractmethod
    def rows(self, numbers: Tensor) -> Tensor:
        """Return encoded texts, int64 [B, L] or float16 [B, L, D], of numbers, int64 [B]; -1 is a missing text."""

    def to(self, device: torch.device) -> "EncodedTexts":
        """Return the texts, on a device if they are in memory."""
        return self


class TextEncoder(ABC):
    """Encoder of texts to values of the condition `text`; an empty text is a missing one.

    Args:
        description: form of the encoded texts.
        state: what makes the encodings reproducible, such as a learned tokenizer; checkpoints store it.
    """

    def __init__(self, description: TextDescription, state: str) -> None:
        self.description, self.state = description, state

    @abstractmethod
    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text, not cut; 0 for an empty one."""

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return texts as tokens, int64 [N, L] padded with -1, or as features, float32 [N, L, D] padded with NaN.

        They are on the CPU. Tokens beyond L = `description.length` are cut.
        """

    @abstractmethod
    def stored(self, texts: Sequence[str], cache_dir: Path) -> EncodedTexts:
        """Return encoded texts, in memory or in a file of the cache folder; all processes must call this together."""

    def cut(self, texts: Iterable[str]) -> int:
        """Return the number of texts that are longer than L tokens, which `encode` cuts; equal ones are read once."""
        counts = Counter(texts)
        return sum(
            counts[text]
            for part in parts(list(counts))
            for text, length in zip(part, self.lengths(part), strict=True)
            if length > self.description.length
        )

    def source(self, captions: Sequence[tuple[str, ...]], cache_dir: Path | None) -> "CaptionSource":
        """Return the source of the condition `text` of images with captions, several or none of each."""
        return CaptionSource(captions, self, cache_dir)


class TextsOnRead(EncodedTexts):
    """Texts that are encoded when their rows are read.

    Args:
        texts: the texts.
        encoder: encoder of the texts.
    """

    def __init__(self, texts: Sequence[str], encoder: TextEncoder) -> None:
        self.texts, self.encoder = texts, encoder

    def rows(self, numbers: Tensor) -> Tensor:
        places: list[int] = numbers.tolist()
        return self.encoder.encode([self.texts[place] if place >= 0 else "" for place in places])


class CaptionSource(ConditionSource):
    """Encoded captions of images: one of each image's captions, drawn anew at each step of training.

    Args:
        captions: captions of each row; an empty tuple is a missing one.
        encoder: encoder of the captions.
        cache_dir: folder for encodings that are too large for the memory; None: captions are encoded when their rows
            are read.
    """

    def __init__(
        self, captions: Sequence[tuple[str, ...]], encoder: TextEncoder, cache_dir: Path | None
    ) -> None:
        numbers: dict[str, int] = {}
        which = [numbers.setdefault(text, len(numbers)) for texts in captions for text in texts]
        self.texts = [*numbers]
        counts = torch.tensor([len(texts) for texts in captions], dtype=torch.int64)
        self._counts, self._starts = counts, counts.cumsum(0) - counts
        self._which = torch.tensor([*which, -1], dtype=torch.int64)  # the last is that of a missing caption
        self._encoded = (
            TextsOnRead(self.texts, encoder) if cache_dir is None else encoder.stored(self.texts, cache_dir)
        )
        self._state = encoder.state

    def values(self, rows: Tensor, images: Tensor, draw: int | None) -> Tensor:
        encoded = self._encoded.rows(self.numbers(rows, draw)).to(images.device, non_blocking=True)
        return encoded.float() if encoded.is_floating_point() else encoded

    def numbers(self, rows: Tensor, draw: int | None) -> Tensor:
        """Return the numbers of the texts that are drawn for rows, int64 [B] on the CPU; -1 for a missing caption."""
        rows = rows.cpu()
        counts = self._counts[rows]
        chosen = (row_uniform(rows, draw)[:, 0] * counts).long()
        return self._which[torch.where(counts > 0, self._starts[rows] + chosen, len(self._which) - 1)]

    def texts_of(self, rows: Tensor) -> list[str | None]:
        """Return the texts of rows, as without a draw; None for a missing caption."""
        return [self.texts[number] if number >= 0 else None for number in self.numbers(rows, None).tolist()]

    def digest(self) -> str:
        state = sha256(self._state.encode())
        for tensor in (self._counts, self._which):
            state.update(tensor.numpy().tobytes())
        for text in self.texts:
            state.update(f"{text}\0".encode())
        return state.hexdigest()

    def has_missing(self) -> bool:
        return bool((self._counts == 0).any())

    def to(self, device: torch.device) -> Self:
        moved = copy(self)
        moved._encoded = self._encoded.to(device)
        return moved


class TextCondition(ABC):
    """Base class of the options of the group `text`: how texts become a condition."""

    @abstractmethod
    def fitted(self, captions: Iterable[str], device: torch.device) -> TextEncoder | None:
        """Return the encoder for the captions of the training images; all processes must call this together.

        None for a model without texts.
        """

    @abstractmethod
    def restored(self, description: TextDescription, state: str, device: torch.device) -> TextEncoder:
        """Return the encoder that a checkpoint describes.

        Raises:
            UsageError: a file that it needs is missing or has changed.
            FormatError: the state is not of such an encoder.
        """


class NoText(TextCondition):
    """No texts: captions are not read."""

    def fitted(self, captions: Iterable[str], device: torch.device) -> None:
        return None

    def restored(self, description: TextDescription, state: str, device: torch.device) -> TextEncoder:
        raise FormatError("has a text encoder, but text=none")


class LearnedText(TextCondition):
    """Texts as tokens, which a transformer reads that is trained with the network.

    The tokenizer is learned from the training captions by byte-pair encoding. It composes any text of bytes, and
    makes one token of each frequent word.

    Args:
        vocabulary: largest number of tokens, 256 of them single bytes.
        length: maximum number of tokens of a text.
        width: features of each token in the transformer.
        depth: blocks of the transformer.
        heads: attention heads of each block.

    Raises:
        UsageError: a number is outside its range.

    Source: Sennrich et al. 2016 (byte-pair encoding); Radford et al. 2019 (bytes).
    """

    def __init__(
        self,
        *,
        vocabulary: PositiveInt = 2000,
        length: PositiveInt = 32,
        width: PositiveInt = 128,
        depth: NonNegativeInt = 2,
        heads: PositiveInt = 4,
    ) -> None:
        if not BYTES <= vocabulary <= LARGEST:
            problem = f"is not between {BYTES}, the tokens of single bytes, and {LARGEST}"
            raise UsageError("text.vocabulary", vocabulary, problem, "use for example 2000")
        check_length(length, LONGEST)
        if width % heads:
            raise UsageError("text.heads", heads, f"does not divide text.width={width}", "use a divisor")
        self.vocabulary, self.length = vocabulary, length
        self.width, self.depth, self.heads = width, depth, heads

    def fitted(self, captions: Iterable[str], device: torch.device) -> "TokenEncoder":
        ranks = Distributed()
        merges = ranks.broadcast(learned_merges(captions, self.vocabulary) if ranks.is_main else "")
        description = TextDescription(
            length=self.length,
            vocabulary=len(vocabulary_of(merges)[0]),
            width=self.width,
            depth=self.depth,
            heads=self.heads,
        )
        return TokenEncoder(description, merges)

    def restored(self, description: TextDescription, state: str, device: torch.device) -> "TokenEncoder":
        return TokenEncoder(description, state)


class TokenEncoder(TextEncoder):
    """Byte-pair encoding of texts in lower case.

    Args:
        description: form of the tokens.
        merges: one line "left right" for each token after those of bytes: the tokens that it joins, in order

    Raises:
        FormatError: the merges are malformed, or their number is not that of the description.
    """

    def __init__(self, description: TextDescription, merges: str) -> None:
        super().__init__(description, merges)
        self._vocabulary, self._merges = vocabulary_of(merges)
        if len(self._vocabulary) != description.vocabulary:
            raise FormatError(
                f"has a tokenizer of {len(self._vocabulary)} tokens, not {description.vocabulary}"
            )

    def lengths(self, texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self._tokens(texts)]

    def encode(self, texts: Sequence[str]) -> Tensor:
        return self._encoded(texts, torch.int64)

    def stored(self, texts: Sequence[str], cache_dir: Path) -> "TokenTable":
        return TokenTable(self._encoded(texts, torch.int32))

    def _encoded(self, texts: Sequence[str], dtype: torch.dtype) -> Tensor:
        """Return texts as tokens, [N, L] padded with -1; only those of some texts are lists at the same time."""
        length = self.description.length
        found = torch.empty(len(texts), length, dtype=dtype)
        for part, rows in zip(parts(texts), found.split(TOGETHER), strict=False):
            cut = [[*ids[:length], *[-1] * (length - len(ids))] for ids in self._tokens(part)]
            rows.copy_(torch.tensor(cut))
        return found

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch([*map(normalized, texts)])]

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import models

        return _pipeline(models.BPE(self._vocabulary, self._merges))


class TokenTable(EncodedTexts):
    """Tokens of texts in memory, int32 [N, L]."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def rows(self, numbers: Tensor) -> Tensor:
        numbers = numbers.to(self.tokens.device)
        if not len(self.tokens):
            return numbers.new_full((len(numbers), self.tokens.shape[1]), -1)
        return self.tokens[numbers.clamp(min=0)].long().masked_fill((numbers < 0)[:, None], -1)

    def to(self, device: torch.device) -> "TokenTable":
        return TokenTable(self.tokens.to(device))


def check_length(length: int, most: int) -> None:
    """Raise UsageError if `text.length` is larger than `most`."""
    if length > most:
        raise UsageError("text.length", length, f"is larger than {most}", "use a smaller number")


def normalized(text: str) -> str:
    """Return a text in lower case, with composed letters and single spaces; half surrogate pairs become "?"."""
    whole = text.encode("utf-8", "replace").decode()
    return " ".join(unicodedata.normalize("NFC", whole).lower().split())


def learned_merges(captions: Iterable[str], size: int) -> str:
    """Return the merges of byte-pair encoding that captions give, one line each, for a vocabulary of at most `size`."""
    import json

    from tokenizers import models, trainers

    tokenizer = _pipeline(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=RARE,
        max_token_length=LONGEST_TOKEN,
        initial_alphabet=_letters(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(map(normalized, captions), trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    # Older versions of the library write each merge as one text.
    return "\n".join(merge if isinstance(merge, str) else " ".join(merge) for merge in merges)


def vocabulary_of(merges: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the numbers of the tokens, and the merges as pairs.

    Raises:
        FormatError: the merges are too long, or one of them joins tokens that do not exist before it.
    """
    if len(merges) > LONGEST_STATE:
        raise FormatError(f"has a tokenizer of more than {LONGEST_STATE} characters")
    numbers = {letter: number for number, letter in enumerate(_letters())}
    pairs = []
    for line in merges.splitlines():
        left, _, right = line.partition(" ")
        if left not in numbers or right not in numbers:
            raise FormatError(f"has a tokenizer with the invalid merge {line[:40]!r}")
        numbers.setdefault(left + right, len(numbers))  # two merges can give the same token
        pairs.append((left, right))
    if len(numbers) > LARGEST:
        raise FormatError(f"has a tokenizer of more than {LARGEST} tokens")
    return numbers, pairs


def _letters() -> list[str]:
    """Return the letters that stand for the 256 bytes."""
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _pipeline(model: Any) -> Any:
    """Return a tokenizer that splits texts into words with a space before each, and these by a model."""
    os.environ.setdefault(
        "TOKENIZERS_PARALLELISM", "false"
    )  # threads would not survive a fork of this process
    from tokenizers import Tokenizer, pre_tokenizers

    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer
