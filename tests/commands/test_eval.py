"""`diffuse eval` and `diffuse compare` by their command lines: which samples and references, and which errors."""

import csv
import json
import shutil
import sys
import zipfile
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_cli.cli import run
from diffusion_cli.commands.samples import run_of
from diffusion_cli.config import CONF, EvalConfig, build, fingerprint, load
from diffusion_cli.data import Digits
from diffusion_cli.errors import UsageError
from diffusion_cli.metrics import Metric, ModelMetric
from helpers import TINY

WORDS = ["features=classifier", "features.steps=20", "batch_size=50"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with two runs, `a` and `b`, class-conditional, trained for a few steps, and a cache."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seed in (("a", 0), ("b", 1)):
        words = ["max_steps=4", f"seed={seed}", "model.class_conditional=true", f"output_dir={folder}/o"]
        assert run([*TINY, *words, f"name={name}"]) == 0
    return folder


def evaluate(place: Path, *words: str) -> int:
    made = [] if any(word.startswith("samples=") for word in words) else ["steps=2"]
    return run(["eval", f"output_dir={place}/o", f"cache_dir={place}/cache", *WORDS, *made, *words])


def record(place: Path, samples: Path) -> Path:
    """The metrics.json of samples that lie somewhere."""
    key = fingerprint({"path": str(samples.resolve())})[:4]
    return place / "o" / "evaluations" / f"{samples.name}-{key}" / "metrics.json"


def numbers(path: Path) -> dict[str, float]:
    """The newest entry of a metrics.json."""
    return {result["name"]: result["value"] for result in json.loads(path.read_text())[-1]["results"]}


def protocol(path: Path) -> dict:
    return json.loads(path.read_text())[-1]["results"][0]["protocol"]


@pytest.fixture(scope="module")
def images(place) -> Path:
    """A folder of 90 samples of `a`, made by `diffuse sample`."""
    words = ["run=a", "steps=2", "num_samples=90", f"output={place}/samples", f"output_dir={place}/o"]
    assert run(["sample", *words]) == 0
    return place / "samples"


def other_forms(images: Path, folder: Path) -> list[Path]:
    """The same images as a plain folder, a ZIP, an .npz, a compressed one, and an .npy."""
    files = sorted(images.glob("[0-9]*.png"))
    plain = folder / "plain"
    plain.mkdir()
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for file in files:
            (plain / file.name).write_bytes(file.read_bytes())
            archive.write(file, file.name)
    array = np.stack([np.asarray(Image.open(file)) for file in files])
    np.savez(folder / "stored.npz", array)
    np.savez_compressed(folder / "packed.npz", arr_0=array)
    np.save(folder / "images.npy", array)
    return [plain, *(folder / name for name in ("images.zip", "stored.npz", "packed.npz", "images.npy"))]


METRICS = ["metric=[fid,kid,is,precision_recall]", "metric.kid.subset_size=40"]


def test_the_same_images_have_the_same_numbers_in_any_form_and_batch(place, images, tmp_path):
    assert evaluate(place, f"samples={images}", "dataset=digits", *METRICS) == 0
    expected = numbers(record(place, images))
    known = protocol(record(place, images))["sampling"]
    assert known["steps"] == 2
    assert len(known["weights_sha256"]) == 64
    assert len(expected) == 5
    digests = {known["pixels_sha256"]}
    for number, path in enumerate(other_forms(images, tmp_path)):
        size = (1, 7, 64, 90, 200)[number]
        assert evaluate(place, f"samples={path}", "dataset=digits", *METRICS, f"batch_size={size}") == 0
        history = record(place, path)
        assert numbers(history) == pytest.approx(expected, rel=1e-6)
        digests.add(protocol(history)["sampling"]["pixels_sha256"])
    assert len(digests) == 1


@pytest.mark.slow
def test_two_processes_find_the_same_numbers(place, images, tmp_path, monkeypatch):
    words = [*METRICS, "batch_size=7"]
    assert evaluate(place, f"samples={images}", "dataset=digits", *words) == 0
    expected = numbers(record(place, images))
    cache = f"cache_dir={tmp_path}/cache"  # features of real images are shared out too
    assert evaluate(place, f"samples={images}", "dataset=digits", *words, "processes=2", cache) == 0
    assert numbers(record(place, images)) == pytest.approx(expected, rel=1e-6)
    assert evaluate(place, "run=a", "num_samples=90", *words) == 0
    alone = numbers(place / "o" / "a" / "metrics.json")
    assert evaluate(place, "run=a", "num_samples=90", *words, "processes=2") == 0
    assert numbers(place / "o" / "a" / "metrics.json") == pytest.approx(alone, rel=1e-6)


@pytest.mark.slow
def test_what_a_process_refuses_is_one_line(place, images, capfd):
    words = [f"samples={images}", "dataset=digits", "processes=2", "metric.kid.subset_size=91", "metric=kid"]
    assert evaluate(place, *words) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("diffuse:")]
    assert lines == [
        "diffuse: metric.kid.subset_size=91: must be at least 2 and at most 90, the number of images of samples; "
        "change it, or use more images"
    ]


def test_samples_of_a_run_are_kept_once_and_taken_from_there(place, capsys):
    words = ["run=b", "num_samples=70", "metric=is", "keep=true"]
    assert evaluate(place, *words) == 0
    (folder,) = (place / "o" / "b" / "samples").iterdir()
    files = sorted(folder.glob("[0-9]*.png"))
    assert len(files) == 70
    assert json.loads((folder / "manifest.json").read_text())["seeds"] == [[0, 69]]
    first = numbers(place / "o" / "b" / "metrics.json")
    assert evaluate(place, "run=b", "num_samples=70", "metric=is") == 0  # made in memory
    assert numbers(place / "o" / "b" / "metrics.json") == pytest.approx(first, rel=1e-6)
    assert evaluate(place, *words) == 0  # none is made, and what they took is on record
    assert protocol(place / "o" / "b" / "metrics.json")["sampling"]["network_calls"] == 2
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(files[3])
    assert evaluate(place, *words) == 0
    assert numbers(place / "o" / "b" / "metrics.json") != pytest.approx(first, rel=1e-6)
    Image.fromarray(np.zeros((9, 8), np.uint8)).save(files[3])
    capsys.readouterr()
    files[4].unlink()
    assert evaluate(place, *words) == 2
    assert f"{files[3].name}: " in capsys.readouterr().err


def test_network_calls_are_right_after_a_kill_or_said_to_be_unknown(place, capsys, monkeypatch):
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    words = ["run=a", "num_samples=20", "metric=is", "keep=true", "seed=300"]
    with monkeypatch.context() as patch:
        patch.setattr("diffusion_cli.commands.eval.keep_seeds", killed)
        assert evaluate(place, *words) == 75
    history = place / "o" / "a" / "metrics.json"
    assert evaluate(place, *words) == 0
    assert protocol(history)["sampling"]["network_calls"] == 2
    (file,) = place.glob("o/a/samples/*/manifest.json")
    manifest = json.loads(file.read_text())
    del manifest["network_calls"]  # as an earlier version left it
    shutil.rmtree(file.with_name(".manifest"))
    file.write_text(json.dumps(manifest))
    capsys.readouterr()
    assert evaluate(place, *words) == 0
    assert protocol(history)["sampling"]["network_calls"] is None
    shown = capsys.readouterr().out
    assert "an unknown number of network calls" in shown
    assert "note: network calls: unknown" in shown


@pytest.mark.parametrize("stream", ["stdout", "history"])
def test_numbers_are_kept_or_shown_if_either_cannot_be_written(place, images, tmp_path, monkeypatch, stream):
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if stream == "stdout":
        monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=refuse, flush=lambda: None))
    else:
        monkeypatch.setattr("diffusion_cli.commands.eval.append_history", refuse)
        monkeypatch.setattr("diffusion_cli.commands.eval.save_rows", refuse)
    shown = StringIO()
    if stream == "history":
        monkeypatch.setattr(sys, "stdout", shown)
    words = [f"samples={images}", f"output_dir={tmp_path}", "dataset=digits", "metric=[is,memorization]"]
    assert evaluate(place, *words) == 2
    kept = list(tmp_path.glob("evaluations/*/metrics.json"))
    assert len(kept) == (stream == "stdout")
    assert ("is_classifier" in shown.getvalue()) == (stream == "history")


def newest_notes(path: Path) -> list[str]:
    return json.loads(path.read_text())[-1]["notes"]


def test_a_run_is_evaluated_in_the_class_shares_of_its_data(place, capsys):
    words, history = ["num_samples=70", "metric=is", "metric.is.splits=2"], place / "o" / "a" / "metrics.json"
    assert evaluate(place, "run=a", *words) == 0
    labels = Digits("", val_fraction=0.2, flip=False).load("train").labels
    assert labels is not None
    assert protocol(history)["sampling"]["labels"] == list(range(10))
    assert protocol(history)["sampling"]["label_shares"] == labels.bincount().tolist()
    assert "class shares: those of digits/train; for equal shares use label=all" in newest_notes(history)
    assert evaluate(place, "run=b", *words, "label=all") == 0
    assert "label_shares" not in protocol(place / "o" / "b" / "metrics.json")["sampling"]
    capsys.readouterr()
    assert run(["eval", f"output_dir={place}/o", "compare=[a,b]"]) == 2
    assert "is_classifier of a and b: sampling.label_shares" in capsys.readouterr().err


def test_kept_samples_bring_their_class_shares(place):
    words = ["run=b", "num_samples=40", "metric=is", "metric.is.splits=2", "keep=true", "steps=1"]
    assert evaluate(place, *words) == 0
    found = [path.parent for path in (place / "o" / "b" / "samples").glob("*/manifest.json")]
    (folder,) = [
        path
        for path in found
        if "label_shares" in (path / "manifest.json").read_text() and "-1-" in path.name
    ]
    assert evaluate(place, f"samples={folder}", "metric=classifier") == 0
    assert protocol(record(place, folder))["sampling"]["label_shares"]
    results = json.loads(record(place, folder).read_text())[-1]["results"]
    assert results[0]["details"]["labelled"] == 40


def test_other_class_shares_than_the_reference_has_are_noted(place, tmp_path):
    data = Digits("", val_fraction=0.2, flip=False).load("val")
    assert data.labels is not None
    rows = (data.labels == 3).nonzero()[:30, 0]
    np.savez(tmp_path / "threes.npz", images=data[rows].numpy(), labels=data.labels[rows].numpy())
    words = ["dataset=digits", "metric=precision_recall", "metric.precision_recall.k=1"]
    assert evaluate(place, f"samples={tmp_path}/threes.npz", *words) == 0
    (note,) = [
        n for n in newest_notes(record(place, tmp_path / "threes.npz")) if n.startswith("class shares")
    ]
    assert note.startswith("class shares: class 3 has a share of 1 in the samples and 0.1")


def test_samples_belong_to_their_run_though_its_last_checkpoint_is_missing(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step_00000004.ckpt").touch()
    (tmp_path / "run" / "samples" / "x").mkdir(parents=True)
    assert run_of(tmp_path / "run" / "samples" / "x") == tmp_path / "run"


def test_samples_of_a_run_know_their_classes_and_dataset_without_being_told(place):
    assert run(["sample", "run=a", "steps=2", "num_samples=30", f"output_dir={place}/o"]) == 0
    folder = next(path for path in (place / "o" / "a" / "samples").iterdir() if (path / "grid.png").exists())
    assert evaluate(place, f"samples={folder}", "metric=classifier") == 0
    found = record(place, folder)
    (labelled, _) = json.loads(found.read_text())[-1]["results"]
    assert labelled["details"]["labelled"] == 30


@pytest.mark.parametrize("text", ['{"name": "PWA"}', "[1]", "{", '{"settings": 3, "versions": {}}'])
def test_a_manifest_of_others_is_none_of_ours(place, images, tmp_path, text):
    plain = other_forms(images, tmp_path)[0]
    (plain / "manifest.json").write_text(text)
    assert evaluate(place, f"samples={plain}", "dataset=digits", "metric=is") == 0
    assert protocol(record(place, plain))["samples"] == 90


@pytest.mark.parametrize("folder", ["", "out/"])
def test_results_in_a_zip_are_evaluated_without_the_pictures_of_them(place, images, tmp_path, folder):
    with zipfile.ZipFile(tmp_path / "whole.zip", "w") as archive:
        for file in images.iterdir():
            archive.write(file, f"{folder}{file.name}")
    assert evaluate(place, f"samples={tmp_path}/whole.zip", "dataset=digits", "metric=classifier") == 0
    known = json.loads(record(place, tmp_path / "whole.zip").read_text())[-1]["results"]
    assert known[0]["name"] == "class_accuracy"
    assert known[0]["details"]["labelled"] == 90


def test_results_of_an_edit_are_evaluated(place):
    words = ["edit=img2img", "input=val", "num_images=6", "steps=4", "run=a", f"output_dir={place}/o"]
    assert run(["edit", *words]) == 0
    (folder,) = (place / "o" / "a" / "edits").iterdir()
    assert evaluate(place, f"samples={folder}", "metric=is", "metric.is.splits=2") == 0
    assert protocol(record(place, folder))["samples"] == 6


def test_a_part_of_sorted_files_is_spread_over_the_classes(place, tmp_path):
    data = Digits("", val_fraction=0.2, flip=False).load("train")
    assert data.labels is not None
    order = data.labels.argsort(stable=True)
    np.save(tmp_path / "sorted.npy", data[order].numpy())
    words = [f"samples={tmp_path}/sorted.npy", "dataset=digits", "metric=classifier", "features.steps=200"]
    assert evaluate(place, *words, "num_samples=100") == 0
    (result,) = json.loads(record(place, tmp_path / "sorted.npy").read_text())[-1]["results"]
    assert result["details"]["entropy_of_classes"] > 2.2
    assert evaluate(place, *words[:2], "metric=fid") == 0
    (result,) = json.loads(record(place, tmp_path / "sorted.npy").read_text())[-1]["results"]
    assert result["details"]["equal_size_ratio"] < 2


def test_class_folders_are_matched_by_name(place, tmp_path):
    data = Digits("", val_fraction=0.2, flip=False).load("val")
    pixels, labels = data[torch.arange(60)], data.labels
    assert labels is not None
    for number in range(60):
        path = tmp_path / "sorted" / str(int(labels[number])) / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[number, 0].numpy()).save(path)
    words = ["metric=classifier", "dataset=digits", "features.steps=200"]
    assert evaluate(place, f"samples={tmp_path}/sorted", *words) == 0
    assert numbers(record(place, tmp_path / "sorted"))["class_accuracy"] > 0.9


def test_lossy_files_of_samples_are_noted_and_in_the_protocol(place, images, tmp_path):
    names = [f"{row:06d}.png" for row in range(40)]
    for row, name in enumerate(names):
        with Image.open(images / name) as image:
            if row < 30:
                image.save(tmp_path / f"{row:06d}.jpg", quality=75)
            else:
                image.save(tmp_path / name)
    words = [f"samples={tmp_path}", "dataset=digits", "metric=is", "metric.is.splits=2"]
    assert evaluate(place, *words) == 0
    assert protocol(record(place, tmp_path))["sampling"]["lossy"] == {"JPEG": 30}
    note = "samples: 30 of 40 are JPEG files; values include the effect of this compression"
    assert note in newest_notes(record(place, tmp_path))
    assert evaluate(place, *words, f"samples={images}") == 0
    assert "lossy" not in protocol(record(place, images))["sampling"]


def test_the_reference_may_be_another_folder_of_images(place, images, tmp_path):
    paths = other_forms(images, tmp_path)
    words = [
        "dataset=digits",
        "reference=images",
        "metric.fid.reference_distance=false",
        "metric=[fid,precision_recall]",
    ]
    assert evaluate(place, f"samples={paths[0]}", f"reference.path={paths[2]}", *words) == 0
    found = numbers(record(place, paths[0]))
    assert found == {
        "frechet_classifier": pytest.approx(0, abs=1e-9), "precision_classifier": 1, "recall_classifier": 1,
    }  # fmt: skip


def test_runs_are_set_beside_each_other_and_unlike_protocols_refused(place, capsys):
    for name in "ab":
        assert evaluate(place, f"run={name}", "num_samples=70", "metric=is", "metric.is.splits=2") == 0
    capsys.readouterr()
    assert run(["eval", f"output_dir={place}/o", "compare=[a,b]"]) == 0
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert "is_classifier" in head
    assert [row.split(" | ")[0] for row in rows[:2]] == ["| a", "| b"]
    assert evaluate(place, "run=b", "num_samples=70", "metric=is", "metric.is.splits=5") == 0
    capsys.readouterr()
    assert run(["eval", f"output_dir={place}/o", "compare=[a,b]"]) == 2
    assert (
        "is_classifier of a and b: splits); measure them alike, or set force=true" in capsys.readouterr().err
    )
    assert run(["eval", f"output_dir={place}/o", "compare=[a,b]", "force=true"]) == 0
    assert "*" in capsys.readouterr().out


@pytest.mark.slow
def test_a_comparison_measures_each_combination_once(place, capsys):
    words = ["compare", "run=a", f"output_dir={place}/o", f"cache_dir={place}/cache", "features=classifier"]
    words += ["features.steps=20", "num_samples=70", "metric=[fid,is]"]
    assert run([*words, "sampler=[ddim,ddpm]", "steps=[1,2]"]) == 0
    seen = capsys.readouterr()
    assert "[4/4] sampler=ddpm steps=2" in seen.err
    folder = Path(seen.out.strip().rpartition("Table and plot: ")[2])
    with (folder / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["sampler"], row["steps"], row["network calls"]) for row in rows] == [
        ("ddim", "1", "1"), ("ddim", "2", "2"), ("ddpm", "1", "1"), ("ddpm", "2", "2"),
    ]  # fmt: skip
    assert all(float(row["frechet_classifier"]) > 0 for row in rows)
    assert Image.open(folder / "plot.png").size[0] > 500
    assert run([*words, "sampler=[ddim,ddpm,euler]", "steps=[2,1]"]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("[")]
    assert told == ["[5/6] sampler=euler steps=2", "[6/6] sampler=euler steps=1"]
    store = sorted((place / "o" / "a" / "compared").iterdir())
    for file, text in zip(store, ("{", "[]", '{"row": 1}'), strict=False):
        file.write_text(text)
    assert run([*words, "sampler=[ddim,ddpm,euler]", "steps=[2,1]"]) == 0
    lines = capsys.readouterr().err.splitlines()
    damaged = {line.partition(" is damaged")[0] for line in lines if line.startswith("diffuse")}
    assert damaged == {f"diffuse: {file}:" for file in store[:3]}
    assert sum(line.startswith("[") for line in lines) == 3


@pytest.mark.slow
def test_a_comparison_without_costs_has_a_table_and_no_plot(place, capsys):
    words = ["compare", "run=a", f"output_dir={place}/o", f"cache_dir={place}/cache", "precision=fp32"]
    assert run([*words, "metric=bound", "metric.bound.num_images=2", "weights=[ema,raw]"]) == 0
    out = capsys.readouterr().out
    assert "raw" in out
    folder = Path(out.strip().rpartition("\nTable: ")[2])
    assert (folder / "table.csv").is_file()
    assert not (folder / "plot.png").exists()


def test_memory_that_runs_out_names_the_batch_size(place, monkeypatch, capsys):
    def refuse(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("diffusion_cli.diffusion.denoiser.Denoiser.forward", refuse)
    shared = [
        f"output_dir={place}/o",
        f"cache_dir={place}/cache",
        *WORDS,
        "run=b",
        "metric=is",
        "num_samples=11",
    ]
    for words in (["eval", "steps=2"], ["compare", "steps=[2,3]"]):
        assert run([*words, *shared]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "diffuse: " in line]
    assert len(lines) == 2
    assert all("batch_size=50: cpu is out of memory; try batch_size=25, or auto" in line for line in lines)


def poisoned(entry: dict, kind: str) -> None:
    """Change an entry of a comparison as a bit flip, a stranger, or a copy from another run would."""
    if kind != "number":
        del entry["crc32"]
    if kind in ("number", "row"):
        entry["row"]["is_classifier"] += 0.5
    if kind == "number":
        entry["reports"][0]["results"][0]["value"] += 0.5
    if kind == "weights":
        del entry["facts"]
        entry["reports"][0]["results"][0]["protocol"]["sampling"]["weights_sha256"] = "0" * 64
    if kind == "settings":
        entry["facts"]["seed"] = 9


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["number", "row", "weights", "settings", "notes", "earlier version"])
def test_stored_numbers_are_held_to_their_checksum_weights_and_settings(place, capsys, kind):
    words = ["compare", "run=b", f"output_dir={place}/o", f"cache_dir={place}/cache", *WORDS]
    words += ["num_samples=10", "metric=is", "metric.is.splits=1", "steps=[1,2]"]
    assert run(words) == 0
    expected = capsys.readouterr().out
    file = min((place / "o" / "b" / "compared").iterdir())
    entry = json.loads(file.read_text())
    poisoned(entry, kind)
    if kind == "notes":
        entry["reports"][0]["notes"] = ["\x1b]0;title\x07\nnote: \x1b[31mred"]
    if kind == "earlier version":
        del entry["facts"]
    file.write_text(json.dumps(entry))
    assert run(words) == 0
    seen = capsys.readouterr()
    assert ("is damaged" in seen.err) == (kind not in ("notes", "earlier version"))
    assert seen.out.replace("\n", "").isprintable()
    assert len(seen.out.splitlines()) == len(expected.splitlines()) + (kind == "notes")
    file.unlink()


def test_a_comparison_is_made_anew_where_what_it_depends_on_changed(place, images, tmp_path, capsys):
    (real,) = [path for path in other_forms(images, tmp_path) if path.suffix == ".npy"]
    words = ["compare", "run=a", f"output_dir={place}/o", f"cache_dir={place}/cache", "features=classifier"]
    words += ["features.steps=20", "num_samples=30", "metric=precision_recall", "steps=[1,2]"]
    words += ["reference=images", f"reference.path={real}", f"output={tmp_path}/table"]
    assert run(words) == 0
    first = (tmp_path / "table" / "table.csv").read_text()
    assert run(words) == 0
    assert (tmp_path / "table" / "table.csv").read_text() == first  # to the second
    np.save(real, np.random.RandomState(0).randint(0, 256, (50, 8, 8)).astype(np.uint8))
    capsys.readouterr()
    assert run(words) == 0
    assert "[2/2] steps=2" in capsys.readouterr().err


def test_a_comparison_of_runs_marks_numbers_of_unlike_protocols(place, tmp_path, capsys):
    words = ["max_steps=1", "dataset.val_fraction=0.5", f"output_dir={place}/o", "name=c"]
    assert run([*TINY, *words]) == 0
    words = ["steps=1", "num_samples=20", "metric=[is,precision_recall]", "metric.is.splits=2", "run=[b,c]"]
    common = ["compare", f"output_dir={place}/o", f"cache_dir={place}/cache", *WORDS]
    assert run([*common, *words, f"output={tmp_path}/table"]) == 0
    table = (tmp_path / "table" / "table.md").read_text()
    (first, second) = [line for line in table.splitlines() if line.startswith(("| b ", "| c "))]
    assert "*" not in first
    assert second.count("*") == 3
    assert "(*) precision_classifier: the protocols of run=c and run=b differ in features, reference" in table
    assert "*" not in (tmp_path / "table" / "table.csv").read_text()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["steps=2"], "compare: nothing to compare; give lists"),
        (["processes=[1,2]"], "processes: does not change the results; give one value, not a list"),
        (["steps=[1,2]", "keep=true"], "keep=true: unknown key"),
        (["steps=[1,2]", "output={mine}"], "is not empty and not written by diffuse compare"),
        (["steps=[1,2]", "num_samples=5"], "num_samples=5: 5 images are fewer than the 65"),
    ],
)
def test_a_wrong_comparison_gets_one_line(place, tmp_path, capsys, words, line):
    (tmp_path / "table.md").write_text("precious")
    filled = [word.format(mine=tmp_path) for word in words]
    common = ["compare", "run=a", f"output_dir={place}/o", f"cache_dir={place}/cache", *WORDS]
    assert run([*common, *filled]) == 2
    err = [text for text in capsys.readouterr().err.splitlines() if text.startswith("diffuse:")]
    assert len(err) == 1
    assert line in err[0]
    assert (tmp_path / "table.md").read_text() == "precious"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["samples=/nowhere", "dataset=digits"], "samples=/nowhere: does not exist"),
        (
            ["samples={plain}", "metric=bits_per_dim", "dataset=digits"],
            "metric=bits_per_dim: applies only to a run's model",
        ),
        (
            ["samples={plain}", "label=3", "dataset=digits"],
            "label=3: applies only to a run's model, and samples=",
        ),
        (
            ["samples={plain}", "steps=3", "dataset=digits"],
            "steps=3: applies only to a run's model, and samples=",
        ),
        (
            ["samples={plain}", "run=a", "dataset=digits"],
            "run=a: sets the reference dataset, and so does dataset=; leave one of them out",
        ),
        (["samples={plain}", "compare=[a,b]"], "has no effect on compare="),
        (
            ["run=a", "metric=memorization", "reference.split=val"],
            "reference.split=val: metric=memorization",
        ),
        (
            ["run=a", "num_samples=65", "metric.fid.infinity=15"],
            "metric.fid.infinity=15: needs subsets of at least 65",
        ),
        (["samples={plain}", "num_samples=91", "dataset=digits"], "num_samples=91: samples="),
        (
            ["samples={plain}", "features=inception", "features.weights=x.pth", "metric=is"],
            "features.weights=x.pth",
        ),
        (["samples={plain}"], "features=auto: plain has 1 channel(s) and no classes"),
        (
            ["samples={broken}", "dataset=digits", "force=true"],
            "cannot use 1 of the images; repair or remove b.png",
        ),
        (["samples={colour}", "dataset=digits"], "samples="),
        (["run=a", "reference=images", "reference.path=/nowhere"], "reference.path=/nowhere: does not exist"),
        (["run=a", "reference.stats=/nowhere.npz"], "reference.stats=/nowhere.npz: cannot be read"),
        (
            ["run=a", "metric=is", "reference.stats=x.npz"],
            "reference.stats=x.npz: used only by fid, sfid and fd_dinov2",
        ),
        (
            ["run=a", "metric=bits_per_dim", "num_samples=100"],
            "num_samples=100: applies only to samples, and metric=bits_per_dim uses none; "
            "leave it out, or set "
            "metric.bound.num_images and metric.flow_likelihood.num_images",
        ),
        (
            ["run=a", "metric=bound", "steps=9"],
            "steps=9: applies only to samples, and metric=bound uses none",
        ),
        (
            ["run=a", "metric=inversion", "sampler=ddpm"],
            "sampler=DDPM: applies only to samples, and metric=inversion",
        ),
        (
            ["run=a", "metric=latents", "repeats=2"],
            "repeats=2: applies only to samples, and metric=latents uses none",
        ),
        (["run=a", "metric=[bound,fid]", "num_samples=9"], "num_samples=9: 9 images are fewer than the 65"),
        (
            ["run=a", "metric=bound", "processes=2"],
            "processes=2: applies only to samples, and metric=bound uses none",
        ),
        (["run=a", "metric=sfid"], "metric=sfid: needs feature maps of Inception"),
        (
            ["run=a", "metric=lpips", "metric.lpips.weights=/x.pth"],
            "metric.lpips.weights=/x.pth: no such file",
        ),
        (["compare=[none,nobody]"], "compare=none: has no metrics.json"),
        (["compare=[a]"], "compare=['a']: must be a list of 2 or more values"),
        (["metric.fid.bootstrap=3", "run=a"], "metric.fid.bootstrap=3: is too small"),
    ],
)
def test_wrong_input_gets_one_line(place, images, tmp_path, capsys, words, line):
    other_forms(images, tmp_path)
    for name in ("broken", "colour"):
        (tmp_path / name).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / name / "a.png")
    (tmp_path / "broken" / "b.png").write_bytes(b"no image")
    Image.new("RGB", (8, 8)).save(tmp_path / "colour" / "a.png")
    places = {name: tmp_path / name for name in ("plain", "broken", "colour")}
    filled = [word.format(**places) if word.startswith("samples") else word for word in words]
    few = [] if any(word.startswith("features=") for word in filled) else ["features.steps=20"]
    if "features=auto" not in line and not any(word.startswith("features=") for word in filled):
        few = ["features=classifier", *few]
    assert run(["eval", f"output_dir={place}/o", f"cache_dir={place}/cache", *few, *filled]) == 2
    err = [text for text in capsys.readouterr().err.splitlines() if text.startswith("diffuse:")]
    assert len(err) == 1
    assert line in err[0]


@pytest.mark.parametrize("file", sorted(CONF.glob("metric/*.yaml")), ids=lambda file: file.stem)
def test_the_keys_of_a_metric_give_its_kind(file):
    checked = load("eval", [f"metric={file.stem}", "run=x"])
    assert isinstance(checked, EvalConfig)
    for name, node in checked.metric.items():
        metric = build(node)
        assert (name in checked.model_metrics) == isinstance(metric, ModelMetric)
        assert checked.splits.get(name) == (metric.split if isinstance(metric, Metric) else None)


def test_every_setting_that_a_mode_does_not_use_is_refused_at_once():
    with pytest.raises(UsageError) as refused:
        load(
            "eval",
            ["samples=there", "dataset=digits", "sampler=ddpm", "guidance=cfg", "steps=3", "label=null"],
        )
    assert sorted(problem.key for problem in refused.value.problems) == ["guidance", "sampler", "steps"]
    with pytest.raises(
        UsageError, match=r"^sampler.eta=1.0: applies only to samples, and metric=bound uses none"
    ):
        load("eval", ["metric=bound", "sampler.eta=1.0"])
