"""Frozen text encoders of transformers, and the cache of their features."""

import shutil
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from diffusion_cli.data import FrozenEncoder, FrozenText
from diffusion_cli.data.encoder_identity import same_encoder
from diffusion_cli.data.frozen_text import FEATURES, STARTS, FrozenNetwork
from diffusion_cli.errors import UsageError
from helpers.texts import clip_folder, t5_folder

CPU = torch.device("cpu")
TEXTS = ["a b", "", "d", "a b c d e f g h i j", "x y"]
MAKE = {"clip": clip_folder, "t5": t5_folder}


@pytest.fixture(scope="session")
def encoders(tmp_path_factory):
    """Return the folder of each tiny encoder."""

    @cache
    def folder(name: str) -> Path:
        return MAKE[name](tmp_path_factory.mktemp(name))

    return folder


@pytest.fixture(params=MAKE)
def option(request, encoders) -> FrozenText:
    return FrozenText(encoder=request.param, weights=str(encoders(request.param)), length=6)


def stored(encoder: FrozenEncoder, texts: list[str], folder: Path) -> torch.Tensor:
    return encoder.stored(texts, folder).rows(torch.arange(len(texts))).float()


def equal(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, equal_nan=True, rtol=2e-3, atol=2e-3)


def test_features_are_the_last_hidden_states(option) -> None:
    import transformers

    encoder = option.fitted([], CPU)
    kind = {"clip": transformers.CLIPTextModel, "t5": transformers.T5EncoderModel}[option.encoder]
    network = kind.from_pretrained(option.weights).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(option.weights)("a b", return_tensors="pt")
    with torch.inference_mode():
        wanted = network(**tokens).last_hidden_state[0]
    (found,) = encoder.encode(["a b"])
    count = tokens["input_ids"].shape[1]
    assert encoder.lengths(["a b", ""]) == [count, 0]
    equal(found[:count], wanted)
    assert found[count:].isnan().all()
    assert encoder.description.features == 32


def test_an_empty_text_is_a_missing_one(option) -> None:
    encoder = option.fitted([], CPU)
    assert encoder.encode(["", " "]).isnan().all()
    assert encoder.encode([]).shape == (0, 6, 32)


def test_the_end_of_a_long_text_is_cut(option) -> None:
    encoder = option.fitted([], CPU)
    assert encoder.cut(TEXTS) == 1
    assert not encoder.encode(TEXTS)[3].isnan().any()


def test_the_features_of_a_text_do_not_depend_on_the_other_texts(option) -> None:
    encoder = option.fitted([], CPU)
    texts = [*TEXTS, *"efghijklm", "a b"]
    together = encoder.encode(texts)
    for text, found in zip(texts, together, strict=True):
        (alone,) = encoder.encode([text])
        torch.testing.assert_close(found, alone, equal_nan=True, rtol=0, atol=0)


def test_cached_features_equal_new_ones(option, tmp_path) -> None:
    encoder = option.fitted([], CPU)
    new = encoder.encode(TEXTS)
    found = stored(encoder, TEXTS, tmp_path)
    torch.testing.assert_close(found, new, equal_nan=True, rtol=0, atol=0)
    source = encoder.source([("d", "x y"), (), ("",)], tmp_path)
    values = source.values(torch.tensor([1, 2, 0]), torch.zeros(3, 1), 5)
    assert values.dtype == torch.float32
    assert values[:2].isnan().all()
    assert any(torch.equal(values[2].nan_to_num(), new[n].nan_to_num()) for n in (2, 4))


def test_stored_features_need_no_network(option, tmp_path, monkeypatch) -> None:
    encoder = option.fitted([], CPU)
    wanted = stored(encoder, TEXTS, tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    again = option.restored(encoder.description, encoder.state, CPU)
    assert torch.equal(stored(again, TEXTS, tmp_path).nan_to_num(), wanted.nan_to_num())


def test_other_texts_lengths_and_weights_have_caches_of_their_own(encoders, tmp_path) -> None:
    folders = set()
    clip, t5 = str(encoders("clip")), str(encoders("t5"))
    first, longer = (FrozenText(weights=clip, length=length) for length in (6, 7))
    other = FrozenText(encoder="t5", weights=t5, length=6)
    for option, texts in [(first, TEXTS), (longer, TEXTS), (first, TEXTS[:2]), (other, TEXTS)]:
        stored(option.fitted([], CPU), texts, tmp_path)
        folders |= {path for path in tmp_path.iterdir() if path.is_dir()}
    assert len(folders) == 4


@pytest.mark.parametrize("damage", ["byte", "shorter", "starts", "gone"])
def test_a_damaged_cache_is_made_anew(encoders, tmp_path, capsys, damage) -> None:
    encoder = FrozenText(weights=str(encoders("clip")), length=6).fitted([], CPU)
    wanted = stored(encoder, TEXTS, tmp_path)
    (folder,) = tmp_path.iterdir()
    file = folder / (STARTS if damage == "starts" else FEATURES)
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(
            content[:-40] + (b"" if damage == "shorter" else bytes([content[-40] ^ 1]) + content[-39:])
        )
    assert torch.equal(stored(encoder, TEXTS, tmp_path).nan_to_num(), wanted.nan_to_num())
    assert "is damaged" in capsys.readouterr().err
    assert file.read_bytes() == content


def test_damage_during_use_is_one_line(encoders, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("diffusion_cli.data.frozen_text.CHECKED_AT_ONCE", 0)
    encoder = FrozenText(weights=str(encoders("clip")), length=6).fitted([], CPU)
    table = encoder.stored(TEXTS, tmp_path)
    (folder,) = tmp_path.iterdir()
    content = bytearray((folder / FEATURES).read_bytes())
    content[-40] ^= 1
    (folder / FEATURES).write_bytes(content)
    with pytest.raises(UsageError, match=r"features.npy: is damaged \(block 0 .*run the command again"):
        table.rows(torch.arange(5))
    assert not folder.exists()


def test_other_weights_than_those_of_the_training_are_refused(encoders) -> None:
    text = FrozenText(weights=str(encoders("clip")), length=6)
    encoder = text.fitted([], CPU)
    with pytest.raises(
        UsageError, match=r"text.weights=.*: has other weights, settings or tokens than those"
    ):
        text.restored(encoder.description, "0" * 64, CPU).encode(["a"])


def changed(folder: Path, copy: Path, encoder: str) -> Path:
    """Copy an encoder, with another activation (clip), or another score of a token (t5)."""
    shutil.copytree(folder, copy)
    file = copy / ("config.json" if encoder == "clip" else "tokenizer.json")
    text = file.read_text()
    old, new = ("quick_gelu", "gelu") if encoder == "clip" else ("-3.0", "-4.0")
    assert old in text
    file.write_text(text.replace(old, new, 1))
    return copy


def test_other_settings_and_tokenizers_are_other_encoders(option, tmp_path) -> None:
    encoder = option.fitted([], CPU)
    copy = shutil.copytree(option.weights, tmp_path / "same")
    assert (
        FrozenText(encoder=option.encoder, weights=str(copy), length=6).fitted([], CPU).state == encoder.state
    )
    weights = changed(Path(option.weights), tmp_path / "other", option.encoder)
    other = FrozenText(encoder=option.encoder, weights=str(weights), length=6)
    state = other.fitted([], CPU).state
    assert state[:64] == encoder.state[:64]
    assert state != encoder.state
    assert not same_encoder(state, encoder.state)
    with pytest.raises(
        UsageError, match=r"text\.weights=.*: has other weights, settings or tokens than those"
    ):
        other.restored(encoder.description, encoder.state, CPU).encode(["a"])


def test_runs_of_earlier_versions_state_weights_and_vocabulary_alone(option, tmp_path) -> None:
    encoder = option.fitted([], CPU)
    old = option.restored(encoder.description, encoder.state[:64], CPU)
    equal(old.encode(["a b"]), encoder.encode(["a b"]))
    assert same_encoder(old.state, encoder.state)
    assert same_encoder(encoder.state, old.state)


def test_the_digest_does_not_depend_on_earlier_calls(option) -> None:
    used = option.fitted([], CPU)
    used.encode(["a b"])
    again = FrozenNetwork(option._weights, option.encoder, 6, CPU)
    again.states(["a b c d e f g h"])
    assert again.digest == used.state


def test_a_text_longer_than_the_positions_of_the_encoder_is_refused(encoders) -> None:
    text = FrozenText(weights=str(encoders("clip")), length=9)
    with pytest.raises(UsageError, match=r"text\.length=9: is larger than 8"):
        text.fitted([], CPU)


def test_weights_without_a_tokenizer_or_of_another_encoder_are_refused(encoders, tmp_path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((encoders("clip") / name).read_bytes())
    with pytest.raises(UsageError, match=r"text.weights=.*vocab.json and merges.txt"):
        FrozenText(weights=str(tmp_path), length=6).fitted([], CPU)
    with pytest.raises(UsageError, match=r"text.weights=.*does not have the weights of a T5EncoderModel"):
        FrozenText(encoder="t5", weights=str(tmp_path), length=6).fitted([], CPU)


def test_a_path_without_a_folder_is_not_taken_for_a_name_on_the_hub(tmp_path) -> None:
    for place in (f"{tmp_path}/nothing", "./nothing", "a/b/c"):
        with pytest.raises(
            UsageError, match=r"^text.weights=\S*: is neither a folder nor a name on the Hugging"
        ):
            FrozenText(weights=place).fitted([], CPU)


def test_pickled_weights_and_a_missing_library_are_refused(encoders, tmp_path, monkeypatch) -> None:
    (tmp_path / "config.json").write_bytes((encoders("clip") / "config.json").read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"text.weights=.*not pickled"):
        FrozenText(weights=str(tmp_path)).fitted([], CPU)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=r"text=clip: needs transformers; install it: pip install"):
        FrozenText(weights=str(tmp_path)).fitted([], CPU)


def test_features_beyond_float16_are_refused(encoders, monkeypatch) -> None:
    encoder = FrozenText(weights=str(encoders("clip")), length=6).fitted([], CPU)
    network: FrozenNetwork = encoder._network
    network._network.final_layer_norm.weight.data *= 1e6
    with pytest.raises(UsageError, match="gives features beyond the range of float16"):
        encoder.encode(["a b"])
    del network._network


def test_the_files_of_the_hub_are_those_of_network_and_tokenizer() -> None:
    clip = [file.name for file in FrozenText(weights="a/b").downloads() if file.required]
    t5 = [file.name for file in FrozenText(encoder="t5", weights="a/b").downloads() if file.required]
    assert clip == ["config.json", "model.safetensors", "vocab.json", "merges.txt"]
    assert t5 == ["config.json", "model.safetensors", "tokenizer.json"]
