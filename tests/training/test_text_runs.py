"""Trainings on captions: their tokenizers and features, what checkpoints store of them, and what cannot be."""

import json
from pathlib import Path

import pytest
import torch

from diffusion_cli.cli import run
from diffusion_cli.commands.train_setup import set_up
from diffusion_cli.conditions import Condition
from diffusion_cli.data import CaptionedDigits, TextEncoder
from diffusion_cli.data.conditioned import with_captions
from diffusion_cli.errors import UsageError
from diffusion_cli.runs.checkpoint import LAST, read
from diffusion_cli.runs.load import load_model
from diffusion_cli.runs.schema import parse_info
from diffusion_cli.runs.texts import load_text_encoder
from helpers import TINY, assert_same
from helpers.recipes import train_config
from helpers.texts import clip_folder

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]
CPU = torch.device("cpu")
WORDS = [
    *TINY, "dataset=captioned_digits", "dataset.size=64", "dataset.val_size=8", "text=learned", "batch_size=8",
    "text.width=16", "text.depth=1", "text.heads=2", "text.length=12", "validate_every=2", "preview_every=null",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Return the folder of a run `whole` of four steps."""
    folder = tmp_path_factory.mktemp("runs")
    assert train(folder, "name=whole", "max_steps=4") == 0
    return folder


def train(folder: Path, *words: str) -> int:
    return run([*WORDS, f"output_dir={folder / 'o'}", f"cache_dir={folder / 'cache'}", *words])


def encoder_of(folder: Path) -> TextEncoder:
    encoder = load_text_encoder(read(folder / LAST).info, CPU, None)
    assert encoder is not None
    return encoder


def refused(capsys, *words: str) -> str:
    others = [word for word in WORDS if not word.startswith("dataset.")]
    assert run([*others, *words]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_stopped_run_continues_with_its_tokenizer(runs) -> None:
    assert train(runs, "name=parts", "max_steps=2") == 0
    assert train(runs, "name=parts", "max_steps=4") == 0
    whole, parts = (read(runs / "o" / name / LAST).state for name in ("whole", "parts"))
    for key in ("state_dict", "optimizer_states"):
        assert_same(whole[key], parts[key], key)
    for key in ("text", "conditions", "labels_sha256"):
        assert whole["diffuse"][key] == parts["diffuse"][key] is not None


def test_the_network_gets_the_tokens_of_the_stored_tokenizer(runs) -> None:
    model = load_model(runs / "o" / "whole", "ema", CPU)
    encoder = encoder_of(runs / "o" / "whole")
    assert model.denoiser.conditions.text == encoder.description
    assert encoder.lengths(["a red seven"]) == [3]
    assert encoder.description.length == 12


def test_a_malformed_tokenizer_is_one_line(runs) -> None:
    entry = read(runs / "o" / "whole" / LAST).state["diffuse"]
    with pytest.raises(
        UsageError, match=r"the text encoder of the run cannot be read \(has a tokenizer with the"
    ):
        load_text_encoder(
            parse_info({**entry, "text": entry["text"].replace("\n", "\nab cd\n", 1)}), CPU, None
        )
    with pytest.raises(UsageError, match="text: contradicts the conditions"):
        parse_info({**entry, "text": None})
    with pytest.raises(UsageError, match="text: has more than 8388608 characters"):
        parse_info({**entry, "text": "a" * 2**24})


def test_other_captions_are_refused_when_a_run_continues(tmp_path, capsys) -> None:
    words = [*captioned(tmp_path / "images"), f"output_dir={tmp_path}", "name=changed", "batch_size=4"]
    assert run([*words, "max_steps=2"]) == 0
    write_captions(tmp_path / "images", "another picture of number")
    assert run([*words, "max_steps=4"]) == 2
    assert (
        "labels or captions: differ from those that the run started with; restore the labels or captions, or choose"
        in capsys.readouterr().err
    )


def test_a_frozen_encoder_is_stored_by_its_digest(runs, tmp_path, capsys) -> None:
    weights = clip_folder(tmp_path)
    words = ["text=clip", f"text.weights={weights}", "text.length=8", "text.width=16"]
    words = [word for word in WORDS if not word.startswith("text")] + words
    assert (
        run([*words, f"output_dir={runs / 'o'}", f"cache_dir={runs / 'cache'}", "name=clip", "max_steps=2"])
        == 0
    )
    assert "text.length=8: the ends of" in capsys.readouterr().err
    encoder = encoder_of(runs / "o" / "clip")
    assert encoder.description.features == 32
    assert encoder.encode(["a b"])[0, :4].isfinite().all()
    assert len(encoder.state) == 64 + 1 + 64
    for file in weights.iterdir():
        file.unlink()
    assert (
        run([*words, f"output_dir={runs / 'o'}", f"cache_dir={runs / 'cache'}", "name=clip", "max_steps=4"])
        == 0
    )


def test_texts_and_classes_condition_one_model(tmp_path) -> None:
    words = [*captioned(tmp_path / "images"), "model.class_conditional=true", "batch_size=4"]
    assert run([*words, f"output_dir={tmp_path}", "name=both", "max_steps=2"]) == 0
    info = read(tmp_path / "both" / LAST).info
    assert info.conditions is not None
    assert info.conditions.names == ("label", "text")
    assert info.class_names == ("cat", "dog")


def captioned(folder: Path) -> list[str]:
    """Write eight images of two classes with captions; return the words of a training on them."""
    from PIL import Image

    for number in range(8):
        path = folder / image_name(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(path)
    write_captions(folder, "a picture of number")
    others = [word for word in WORDS if not word.startswith("dataset")]
    return [*others, "dataset=folder", f"dataset.path={folder}", "dataset.resolution=8"]


def write_captions(folder: Path, start: str) -> None:
    rows = [{"file_name": image_name(number), "text": f"{start} {number}"} for number in range(8)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def image_name(number: int) -> str:
    return f"{('cat', 'dog')[number % 2]}/{number}.png"


# --- What cannot be ------------------------------------------------------------


def test_a_dataset_without_captions_is_refused(capsys) -> None:
    line = refused(capsys, "dataset=digits", "dataset.val_fraction=0.2")
    assert line.startswith("diffuse: text=learned: the images have no captions: ")
    assert line.endswith("use a dataset with captions, or text=none")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["task=autoencoder"], "text=learned: a model of task=autoencoder has no texts; use text=none"),
        (["text.vocabulary=9"], "text.vocabulary=9: is not between 256"),
        (["text.length=0"], "text.length=0: "),
    ],
)
def test_what_has_no_use_for_texts_refuses_them(capsys, words, line) -> None:
    others = [word for word in WORDS if not word.startswith(("model.", "dataset."))]
    assert run([*others, *words]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"diffuse: {line}")


# --- Samples -------------------------------------------------------------------


def test_prompts_condition_samples_by_the_tokens_of_the_run(runs, tmp_path) -> None:
    words = [f"run={runs / 'o' / 'whole'}", "num_samples=2", "steps=2", "device=cpu"]
    for name, prompt in {"one": "a red seven", "same": "A  red seven"}.items():
        assert run(["sample", *words, f"prompt='{prompt}'", f"output={tmp_path / name}"]) == 0
    one, same = (
        [*map(Path.read_bytes, sorted((tmp_path / name).glob("0*.png")))] for name in ("one", "same")
    )
    assert len(one) == 2
    assert one == same


def test_the_network_sees_the_prompt(runs) -> None:
    denoiser = load_model(runs / "o" / "whole", "raw", CPU).denoiser
    tokens = encoder_of(runs / "o" / "whole").encode(["a red seven", "A red seven", "a blue three", ""])
    noise = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(0)).expand(4, -1, -1, -1)
    with torch.no_grad():
        first, again, other, without = denoiser(noise, torch.full((4,), 0.5), Condition({"text": tokens})).x0
    torch.testing.assert_close(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, without)


def test_an_evaluation_describes_samples_by_the_captions_of_images(runs) -> None:
    encoder = encoder_of(runs / "o" / "whole")
    images = CaptionedDigits("", size=64, val_size=8).load("val")
    assert images.captions is not None
    for cache_dir in (runs, None):
        source = with_captions(images, encoder, cache_dir).conditions["text"]
        (tokens,) = source.values(torch.tensor([3]), torch.zeros(1, 1), None).tolist()
        assert tokens in encoder.encode(images.captions.texts[3]).tolist()


def test_a_long_prompt_is_a_remark(runs, tmp_path, capsys) -> None:
    words = [
        f"run={runs / 'o' / 'whole'}",
        "num_samples=1",
        "steps=2",
        "device=cpu",
        f"output={tmp_path / 'o'}",
    ]
    assert run(["sample", *words, f"prompt={'red ' * 30}"]) == 0
    assert "prompt: the ends of 1 text are cut to 12 tokens" in capsys.readouterr().err


def test_first_weights_of_a_run_with_another_tokenizer_have_no_tokens_of_it(runs, tmp_path) -> None:
    words = [word for word in WORDS[1:] if not word.startswith(("name=", "model."))]
    words += [f"output_dir={tmp_path}", f"init.run={runs / 'o' / 'whole'}", "name=next", "max_steps=1"]

    def fresh(*others: str) -> list[str]:
        init = set_up(train_config(*words, *others), tmp_path / "next", None).info.init
        assert init is not None
        return init.fresh

    assert fresh() == []
    tokens = "condition_embedding.text.read.tokens.weight"
    assert fresh("dataset.seed=1") == [f"{tokens} (other tokens or features in the source)"]
