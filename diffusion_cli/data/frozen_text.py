"""Texts as features of a frozen encoder of transformers, with a cache of the features of captions."""

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor
from torch.nn.functional import pad

from diffusion_cli.conditions import TextDescription
from diffusion_cli.data.array import opened_array
from diffusion_cli.data.encoder_identity import same_encoder, settings_digest
from diffusion_cli.data.text import (
    LONGEST,
    EncodedTexts,
    TextCondition,
    TextEncoder,
    check_length,
    normalized,
    parts,
)
from diffusion_cli.errors import NO_VALUE, UsageError
from diffusion_cli.system import pretrained
from diffusion_cli.system.cache import BLOCK, Blocks, ChecksumError, report_damage, write_checksums
from diffusion_cli.system.distributed import Distributed
from diffusion_cli.system.files import new_folder, write_npy
from diffusion_cli.system.locks import locked
from diffusion_cli.system.pretrained import PublishedWeights
from diffusion_cli.system.progress import ProgressBar
from diffusion_cli.system.tensors import digest

ENCODED = 8
"""Texts per batch. Every batch is full: the last digits of the features depend on its size."""
FEATURES, STARTS = "features.npy", "starts.npy"
CHECKED_AT_ONCE = 2**30
"""Bytes of a file that is verified before its use; larger ones are verified during use."""
ARCHITECTURES = {"clip": "CLIPTextModel", "t5": "T5EncoderModel"}
TOKENIZERS = {"clip": pretrained.TOKENIZER, "t5": ("tokenizer.json",)}
OPTIONAL = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "spiece.model")


class FrozenText(TextCondition):
    """Texts as features of a frozen encoder: the last hidden states of its tokens, rounded to float16.

    The features of captions are computed once, and stored in the cache folder.

    Args:
        encoder: architecture: clip (text encoder of CLIP) or t5 (encoder of T5).
        weights: a folder with config.json, model.safetensors and a tokenizer, or a name on the Hugging Face hub.
        length: maximum number of tokens of a text, up to 77 for CLIP.
        width: features of each token in the network, to which a linear map takes those of the encoder.

    Raises:
        UsageError: a number is outside its range.

    Source: Radford et al. 2021 (CLIP); Raffel et al. 2020 (T5); Saharia et al. 2022 (frozen encoders).
    """

    def __init__(
        self,
        *,
        encoder: Literal["clip", "t5"] = "clip",
        weights: str = "openai/clip-vit-large-patch14",
        length: PositiveInt = 77,
        width: PositiveInt = 128,
    ) -> None:
        check_length(length, LONGEST)
        self.encoder, self.weights, self.length, self.width = encoder, weights, length, width

    def downloads(self) -> list[pretrained.HubFile]:
        """Return the published files of the encoder; none for a folder."""
        needed = (*pretrained.NETWORK, *TOKENIZERS[self.encoder])
        return pretrained.files(self.weights, needed, [name for name in OPTIONAL if name not in needed])

    def fitted(self, captions: Iterable[str], device: torch.device) -> "FrozenEncoder":
        network = FrozenNetwork(self._weights, self.encoder, self.length, device)
        ranks = Distributed()  # only the main process needs the network
        features, state = ranks.broadcast((network.features, network.digest) if ranks.is_main else (0, ""))
        description = TextDescription(length=self.length, features=features, width=self.width)
        return FrozenEncoder(description, state, network)

    def restored(self, description: TextDescription, state: str, device: torch.device) -> "FrozenEncoder":
        network = FrozenNetwork(self._weights, self.encoder, description.length, device, state)
        return FrozenEncoder(description, state, network)

    @property
    def _weights(self) -> PublishedWeights:
        return PublishedWeights("text", self.encoder, self.weights, "use text=learned")


class FrozenNetwork:
    """Tokenizer and network of a frozen encoder, loaded at their first use.

    Args:
        weights: weights of the network, with the files of the tokenizer.
        encoder: architecture, clip or t5.
        length: most tokens of a text.
        device: device of the network.
        expected: digest that a checkpoint states, see `digest`; None: any.
    """

    def __init__(
        self,
        weights: PublishedWeights,
        encoder: str,
        length: int,
        device: torch.device,
        expected: str | None = None,
    ) -> None:
        self.weights, self.encoder, self.length = weights, encoder, length
        self.device, self.expected = device, expected

    @property
    def features(self) -> int:
        """Features D of each token."""
        return self._network.config.hidden_size

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights and the vocabulary, and after a blank that of `settings_digest`.

        Checkpoints of earlier versions have the first one alone.
        """
        vocabulary = json.dumps(sorted(self._tokenizer.get_vocab().items()))
        first = sha256(f"{digest(self._network.state_dict())} {vocabulary}".encode()).hexdigest()
        return f"{first} {settings_digest(self.encoder, self._network.config, self._tokenizer)}"

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of texts that are not empty, with those of beginning and end, not cut."""
        return self._tokenizer(list(texts), truncation=False, verbose=False)["input_ids"] if texts else []

    @torch.inference_mode()
    def states(self, texts: Sequence[str]) -> list[Tensor]:
        """Return the features of the tokens of each text, float16 [tokens, D] on the CPU.

        They depend on the text alone: it is computed in a batch of `ENCODED` texts of the greatest length.

        Args:
            texts: at most `ENCODED` texts that are not empty.

        Raises:
            UsageError: as `PublishedWeights.network`; the weights are not those of the checkpoint; or their features
                are not finite.
        """
        if self.expected is not None and not same_encoder(self.digest, self.expected):
            problem = "has other weights, settings or tokens than those that the model was trained with"
            raise UsageError("text.weights", self.weights.place, problem, "restore them")
        batch = [*texts, *[texts[-1]] * (ENCODED - len(texts))]
        tokens = self._tokenizer(
            batch, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )
        mask = tokens["attention_mask"]
        inputs = {"input_ids": tokens["input_ids"].to(self.device), "attention_mask": mask.to(self.device)}
        states = self._network(**inputs).last_hidden_state.half().cpu()
        rows = zip(states[: len(texts)], mask[: len(texts)].bool(), strict=True)
        found = [each[kept] for each, kept in rows]
        if not all(bool(each.isfinite().all()) for each in found):
            raise UsageError(
                "text.weights",
                self.weights.place,
                "gives features beyond the range of float16",
                "give other weights",
            )
        return found

    @cached_property
    def _network(self) -> Any:
        network = self.weights.network(ARCHITECTURES[self.encoder])
        most = getattr(network.config, "max_position_embeddings", None)
        if most is not None:
            check_length(self.length, most)
        return network.to(self.device, torch.float32)

    @cached_property
    def _tokenizer(self) -> Any:
        files = " and ".join(TOKENIZERS[self.encoder])
        try:
            tokenizer = self.weights.read(self.weights.transformers().AutoTokenizer)
        except Exception as error:  # missing and damaged files raise errors of many types
            raise self.weights.missing(files, error) from error
        # The library makes an empty tokenizer if files are missing.
        if not 2 < len(tokenizer) <= self._network.config.vocab_size:
            raise self.weights.missing(files, ValueError("has no tokenizer for this network"))
        tokenizer.padding_side = tokenizer.truncation_side = "right"
        return tokenizer


class FrozenEncoder(TextEncoder):
    """Features of texts of a frozen network, see `FrozenText`.

    Args:
        description: form of the features.
        state: digest of the network and its tokenizer.
        network: the frozen network.
    """

    def __init__(self, description: TextDescription, state: str, network: FrozenNetwork) -> None:
        super().__init__(description, state)
        self._network = network

    def lengths(self, texts: Sequence[str]) -> list[int]:
        return [length for part in parts(texts) for length in self._lengths(part)]

    def _lengths(self, texts: Sequence[str]) -> list[int]:
        """Return the lengths of some texts, whose tokens are in memory together."""
        full = [number for number, text in enumerate(texts) if normalized(text)]
        found = [0] * len(texts)
        for number, tokens in zip(full, self._network.tokens([_clean(texts[n]) for n in full]), strict=True):
            found[number] = len(tokens)
        return found

    def encode(self, texts: Sequence[str]) -> Tensor:
        shape = self.description.length, self.description.features or 0
        rows = [_padded(states, shape[0]).float() for states in self._states(texts)]
        return torch.stack(rows) if rows else torch.empty(0, *shape)

    def stored(self, texts: Sequence[str], cache_dir: Path) -> "FeatureTable":
        facts = [ENCODED, self.state, self.description.length, list(texts)]
        folder = cache_dir / f"texts-{sha256(json.dumps(facts).encode()).hexdigest()[:16]}"
        is_main = Distributed().is_main

        def opened() -> FeatureTable:
            # Another run may be encoding the same texts.
            with locked(folder) if is_main else nullcontext():
                if is_main and not _is_intact(folder):
                    self._write(texts, folder)
                return FeatureTable(folder, self.description.length)

        return Distributed().main_first(opened)

    def _states(self, texts: Sequence[str]) -> Iterator[Tensor]:
        """Yield the features of each text, float16 [tokens, D]; an empty text has no tokens."""
        for first in range(0, len(texts), ENCODED):
            part = [*texts[first : first + ENCODED]]
            full = [_clean(text) for text in part if normalized(text)]
            found = iter(self._network.states(full) if full else ())
            none = torch.empty(0, self.description.features or 0, dtype=torch.float16)
            yield from (next(found) if normalized(text) else none for text in part)

    def _write(self, texts: Sequence[str], folder: Path) -> None:
        """Write the features of texts, of all tokens in one array, and the first token of each text."""
        lengths = [min(length, self.description.length) for length in self.lengths(texts)]
        starts = np.cumsum([0, *lengths])
        shape = (int(starts[-1]), self.description.features or 0)
        _check_room(folder, 2 * math.prod(shape))
        with new_folder(folder, replace=True) as temporary:
            write_npy(temporary / STARTS, starts)
            with (
                (temporary / FEATURES).open("wb") as file,
                ProgressBar(total=len(texts), desc="encoding texts", unit="text", delay=2.0) as progress,
            ):
                header = {"descr": "<f2", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for states in self._states(texts):
                    file.write(states.contiguous().numpy().data)
                    progress.update(1)
            for name in (STARTS, FEATURES):
                write_checksums(temporary / name, temporary / name)


class _Files(NamedTuple):
    """The arrays of a cache, and their checksums."""

    starts: np.ndarray
    features: np.ndarray
    blocks: Blocks
    header: int
    """Bytes before the features."""


class FeatureTable(EncodedTexts):
    """Memory-mapped features of texts; rows are compared with their checksums before their first use.

    Args:
        folder: folder that `FrozenEncoder.stored` has written.
        length: most tokens L of a text.
    """

    def __init__(self, folder: Path, length: int) -> None:
        self.folder, self.length = folder, length

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "length": self.length}  # each process maps the files itself

    def rows(self, numbers: Tensor) -> Tensor:
        starts, features, blocks, header = self._files
        found = []
        for number in numbers.tolist():
            first, last = starts[number : number + 2].tolist() if number >= 0 else (0, 0)
            self._check(blocks, header + first * features.strides[0], header + last * features.strides[0])
            found.append(_padded(torch.from_numpy(np.array(features[first:last])), self.length))
        return torch.stack(found)

    @cached_property
    def _files(self) -> _Files:
        return _opened(self.folder)

    def _check(self, blocks: Blocks, first: int, last: int) -> None:
        try:
            blocks.check(np.arange(first // BLOCK, -(-last // BLOCK)))
        except ChecksumError as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise UsageError(
                blocks.path,
                NO_VALUE,
                f"is damaged ({error})",
                "run the command again to encode these texts again",
            ) from error


def _opened(folder: Path) -> _Files:
    """Return the files of a cache; OSError or ValueError if they are missing or damaged."""
    Blocks(folder / STARTS).check()
    starts = opened_array(folder / STARTS, None)
    path = folder / FEATURES
    features = opened_array(path, None)
    blocks = Blocks(path)
    if path.stat().st_size <= CHECKED_AT_ONCE:
        blocks.check()
    if features.dtype != np.float16 or features.ndim != 2 or starts[-1] != len(features):
        raise ChecksumError("has another shape than its texts")
    return _Files(starts, features, blocks, path.stat().st_size - features.nbytes)


def _is_intact(folder: Path) -> bool:
    """Return whether a cache exists; print a line about a damaged one."""
    if not folder.is_dir():
        return False
    try:
        _opened(folder)
    except (OSError, ValueError) as error:
        report_damage(folder, error)
        return False
    return True


def _check_room(folder: Path, size: int) -> None:
    """Raise UsageError if the disk lacks space for `size` bytes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if size > free:
        raise UsageError(
            "cache_dir",
            folder.parent,
            f"the features of the captions need {size / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free",
            "free some space, or use a folder on another disk",
        )


def _clean(text: str) -> str:
    """Return a text without half surrogate pairs, which have no bytes."""
    return text.encode("utf-8", "replace").decode()


def _padded(states: Tensor, length: int) -> Tensor:
    """Return features as [length, D], with NaN after the last token."""
    return pad(states, (0, 0, 0, length - len(states)), value=math.nan)
