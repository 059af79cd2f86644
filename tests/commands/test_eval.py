"""`diffuse eval`: its images, samples, classes and records."""

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
from diffusion_cli.config import fingerprint
from diffusion_cli.data import Digits
from helpers.evaluation import evaluate, other_forms


def record(eval_runs: Path, samples: Path) -> Path:
    """The metrics.json of samples that lie somewhere."""
    key = fingerprint({"path": str(samples.resolve())})[:4]
    return eval_runs / "o" / "evaluations" / f"{samples.name}-{key}" / "metrics.json"


def numbers(path: Path) -> dict[str, float]:
    """The newest entry of a metrics.json."""
    return {result["name"]: result["value"] for result in json.loads(path.read_text())[-1]["results"]}


def protocol(path: Path) -> dict:
    return json.loads(path.read_text())[-1]["results"][0]["protocol"]


METRICS = ["metric=[fid,kid,is,precision_recall]", "metric.kid.subset_size=40"]


def test_the_same_images_have_the_same_numbers_in_any_form_and_batch(eval_runs, images, tmp_path):
    assert evaluate(eval_runs, f"samples={images}", "dataset=digits", *METRICS) == 0
    expected = numbers(record(eval_runs, images))
    known = protocol(record(eval_runs, images))["sampling"]
    assert known["steps"] == 2
    assert len(known["weights_sha256"]) == 64
    assert len(expected) == 5
    digests = {known["pixels_sha256"]}
    for number, path in enumerate(other_forms(images, tmp_path)):
        size = (1, 7, 64, 90, 200)[number]
        assert evaluate(eval_runs, f"samples={path}", "dataset=digits", *METRICS, f"batch_size={size}") == 0
        history = record(eval_runs, path)
        assert numbers(history) == pytest.approx(expected, rel=1e-6)
        digests.add(protocol(history)["sampling"]["pixels_sha256"])
    assert len(digests) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_two_processes_find_the_same_numbers(eval_runs, images, tmp_path, monkeypatch):
    words = [*METRICS, "batch_size=7"]
    assert evaluate(eval_runs, f"samples={images}", "dataset=digits", *words) == 0
    expected = numbers(record(eval_runs, images))
    cache = f"cache_dir={tmp_path}/cache"  # features of real images are shared out too
    assert evaluate(eval_runs, f"samples={images}", "dataset=digits", *words, "processes=2", cache) == 0
    assert numbers(record(eval_runs, images)) == pytest.approx(expected, rel=1e-6)
    assert evaluate(eval_runs, "run=a", "num_samples=90", *words) == 0
    alone = numbers(eval_runs / "o" / "a" / "metrics.json")
    assert evaluate(eval_runs, "run=a", "num_samples=90", *words, "processes=2") == 0
    assert numbers(eval_runs / "o" / "a" / "metrics.json") == pytest.approx(alone, rel=1e-6)


@pytest.mark.slow
def test_what_a_process_refuses_is_one_line(eval_runs, images, capfd):
    words = [f"samples={images}", "dataset=digits", "processes=2", "metric.kid.subset_size=91", "metric=kid"]
    assert evaluate(eval_runs, *words) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("diffuse:")]
    assert lines == [
        "diffuse: metric.kid.subset_size=91: must be at least 2 and at most 90, the number of images of samples; "
        "use 45, or more images"
    ]


def test_samples_of_a_run_are_kept_once_and_taken_from_there(eval_runs, capsys):
    words = ["run=b", "num_samples=70", "metric=is", "keep=true"]
    assert evaluate(eval_runs, *words) == 0
    (folder,) = (eval_runs / "o" / "b" / "samples").iterdir()
    files = sorted(folder.glob("[0-9]*.png"))
    assert len(files) == 70
    assert json.loads((folder / "manifest.json").read_text())["seeds"] == [[0, 69]]
    first = numbers(eval_runs / "o" / "b" / "metrics.json")
    assert evaluate(eval_runs, "run=b", "num_samples=70", "metric=is") == 0  # made in memory
    assert numbers(eval_runs / "o" / "b" / "metrics.json") == pytest.approx(first, rel=1e-6)
    assert evaluate(eval_runs, *words) == 0  # none is made, and what they took is on record
    assert protocol(eval_runs / "o" / "b" / "metrics.json")["sampling"]["network_calls"] == 2
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(files[3])
    assert evaluate(eval_runs, *words) == 0
    assert numbers(eval_runs / "o" / "b" / "metrics.json") != pytest.approx(first, rel=1e-6)
    Image.fromarray(np.zeros((9, 8), np.uint8)).save(files[3])
    capsys.readouterr()
    files[4].unlink()
    assert evaluate(eval_runs, *words) == 2
    assert f"{files[3].name}: " in capsys.readouterr().err


def test_network_calls_are_right_after_a_kill_or_said_to_be_unknown(eval_runs, capsys, monkeypatch):
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    words = ["run=a", "num_samples=20", "metric=is", "keep=true", "seed=300"]
    with monkeypatch.context() as patch:
        patch.setattr("diffusion_cli.commands.eval.keep_seeds", killed)
        assert evaluate(eval_runs, *words) == 75
    history = eval_runs / "o" / "a" / "metrics.json"
    assert evaluate(eval_runs, *words) == 0
    assert protocol(history)["sampling"]["network_calls"] == 2
    (file,) = eval_runs.glob("o/a/samples/*/manifest.json")
    manifest = json.loads(file.read_text())
    del manifest["network_calls"]  # as an earlier version left it
    shutil.rmtree(file.with_name(".manifest"))
    file.write_text(json.dumps(manifest))
    capsys.readouterr()
    assert evaluate(eval_runs, *words) == 0
    assert protocol(history)["sampling"]["network_calls"] is None
    shown = capsys.readouterr().out
    assert "an unknown number of network calls" in shown
    assert "note: network calls: unknown" in shown


@pytest.mark.parametrize("stream", ["stdout", "history"])
def test_numbers_are_kept_or_shown_if_either_cannot_be_written(
    eval_runs, images, tmp_path, monkeypatch, stream
):
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if stream == "stdout":
        monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=refuse, flush=lambda: None))
    else:
        monkeypatch.setattr("diffusion_cli.commands.eval.append_history", refuse)
        monkeypatch.setattr("diffusion_cli.commands.eval.save_png", refuse)
    shown = StringIO()
    if stream == "history":
        monkeypatch.setattr(sys, "stdout", shown)
    words = [f"samples={images}", f"output_dir={tmp_path}", "dataset=digits", "metric=[is,memorization]"]
    assert evaluate(eval_runs, *words) == 2
    kept = list(tmp_path.glob("evaluations/*/metrics.json"))
    assert len(kept) == (stream == "stdout")
    assert ("is_classifier" in shown.getvalue()) == (stream == "history")


def newest_notes(path: Path) -> list[str]:
    return json.loads(path.read_text())[-1]["notes"]


def test_a_run_is_evaluated_in_the_class_shares_of_its_data(eval_runs, capsys):
    words, history = (
        ["num_samples=70", "metric=is", "metric.is.splits=2"],
        eval_runs / "o" / "a" / "metrics.json",
    )
    assert evaluate(eval_runs, "run=a", *words) == 0
    labels = Digits("", val_fraction=0.2, flip=False).load("train").labels
    assert labels is not None
    assert protocol(history)["sampling"]["labels"] == list(range(10))
    assert protocol(history)["sampling"]["label_shares"] == labels.bincount().tolist()
    assert "class shares: those of digits/train; for equal shares use label=all" in newest_notes(history)
    assert evaluate(eval_runs, "run=b", *words, "label=all") == 0
    assert "label_shares" not in protocol(eval_runs / "o" / "b" / "metrics.json")["sampling"]
    capsys.readouterr()
    assert run(["eval", f"output_dir={eval_runs}/o", "compare=[a,b]"]) == 2
    assert "is_classifier of a and b: sampling.label_shares" in capsys.readouterr().err


def test_kept_samples_bring_their_class_shares(eval_runs):
    words = ["run=b", "num_samples=40", "metric=is", "metric.is.splits=2", "keep=true", "steps=1"]
    assert evaluate(eval_runs, *words) == 0
    found = [path.parent for path in (eval_runs / "o" / "b" / "samples").glob("*/manifest.json")]
    (folder,) = [
        path
        for path in found
        if "label_shares" in (path / "manifest.json").read_text() and "-1-" in path.name
    ]
    assert evaluate(eval_runs, f"samples={folder}", "metric=classifier") == 0
    assert protocol(record(eval_runs, folder))["sampling"]["label_shares"]
    results = json.loads(record(eval_runs, folder).read_text())[-1]["results"]
    assert results[0]["details"]["labelled"] == 40


def test_other_class_shares_than_the_reference_has_are_noted(eval_runs, tmp_path):
    data = Digits("", val_fraction=0.2, flip=False).load("val")
    assert data.labels is not None
    rows = (data.labels == 3).nonzero()[:30, 0]
    np.savez(tmp_path / "threes.npz", images=data[rows].numpy(), labels=data.labels[rows].numpy())
    words = ["dataset=digits", "metric=precision_recall", "metric.precision_recall.k=1"]
    assert evaluate(eval_runs, f"samples={tmp_path}/threes.npz", *words) == 0
    (note,) = [
        n for n in newest_notes(record(eval_runs, tmp_path / "threes.npz")) if n.startswith("class shares")
    ]
    assert note.startswith("class shares: class 3 has a share of 1 in the samples and 0.1")


def test_samples_belong_to_their_run_though_its_last_checkpoint_is_missing(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step_00000004.ckpt").touch()
    (tmp_path / "run" / "samples" / "x").mkdir(parents=True)
    assert run_of(tmp_path / "run" / "samples" / "x") == tmp_path / "run"


def test_samples_of_a_run_know_their_classes_and_dataset_without_being_told(eval_runs):
    assert run(["sample", "run=a", "steps=2", "num_samples=30", f"output_dir={eval_runs}/o"]) == 0
    folder = next(
        path for path in (eval_runs / "o" / "a" / "samples").iterdir() if (path / "grid.png").exists()
    )
    assert evaluate(eval_runs, f"samples={folder}", "metric=classifier") == 0
    found = record(eval_runs, folder)
    (labelled, _) = json.loads(found.read_text())[-1]["results"]
    assert labelled["details"]["labelled"] == 30


@pytest.mark.parametrize("text", ['{"name": "PWA"}', "[1]", "{", '{"settings": 3, "versions": {}}'])
def test_a_manifest_of_others_is_none_of_ours(eval_runs, images, tmp_path, text):
    plain = other_forms(images, tmp_path)[0]
    (plain / "manifest.json").write_text(text)
    assert evaluate(eval_runs, f"samples={plain}", "dataset=digits", "metric=is") == 0
    assert protocol(record(eval_runs, plain))["samples"] == 90


@pytest.mark.parametrize("folder", ["", "out/"])
def test_results_in_a_zip_are_evaluated_without_the_pictures_of_them(eval_runs, images, tmp_path, folder):
    with zipfile.ZipFile(tmp_path / "whole.zip", "w") as archive:
        for file in images.iterdir():
            archive.write(file, f"{folder}{file.name}")
    assert evaluate(eval_runs, f"samples={tmp_path}/whole.zip", "dataset=digits", "metric=classifier") == 0
    known = json.loads(record(eval_runs, tmp_path / "whole.zip").read_text())[-1]["results"]
    assert known[0]["name"] == "class_accuracy"
    assert known[0]["details"]["labelled"] == 90


def test_results_of_an_edit_are_evaluated(eval_runs):
    words = ["edit=img2img", "input=val", "num_images=6", "steps=4", "run=a", f"output_dir={eval_runs}/o"]
    assert run(["edit", *words]) == 0
    (folder,) = (eval_runs / "o" / "a" / "edits").iterdir()
    assert evaluate(eval_runs, f"samples={folder}", "metric=is", "metric.is.splits=2") == 0
    assert protocol(record(eval_runs, folder))["samples"] == 6


def test_a_part_of_sorted_files_is_spread_over_the_classes(eval_runs, tmp_path):
    data = Digits("", val_fraction=0.2, flip=False).load("train")
    assert data.labels is not None
    order = data.labels.argsort(stable=True)
    np.save(tmp_path / "sorted.npy", data[order].numpy())
    words = [f"samples={tmp_path}/sorted.npy", "dataset=digits", "metric=classifier", "features.steps=200"]
    assert evaluate(eval_runs, *words, "num_samples=100") == 0
    (result,) = json.loads(record(eval_runs, tmp_path / "sorted.npy").read_text())[-1]["results"]
    assert result["details"]["entropy_of_classes"] > 2.2
    assert evaluate(eval_runs, *words[:2], "metric=fid") == 0
    (result,) = json.loads(record(eval_runs, tmp_path / "sorted.npy").read_text())[-1]["results"]
    assert result["details"]["equal_size_ratio"] < 2


def test_class_folders_are_matched_by_name(eval_runs, tmp_path):
    data = Digits("", val_fraction=0.2, flip=False).load("val")
    pixels, labels = data[torch.arange(60)], data.labels
    assert labels is not None
    for number in range(60):
        path = tmp_path / "sorted" / str(int(labels[number])) / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[number, 0].numpy()).save(path)
    words = ["metric=classifier", "dataset=digits", "features.steps=200"]
    assert evaluate(eval_runs, f"samples={tmp_path}/sorted", *words) == 0
    assert numbers(record(eval_runs, tmp_path / "sorted"))["class_accuracy"] > 0.9


def test_lossy_files_of_samples_are_noted_and_in_the_protocol(eval_runs, images, tmp_path):
    names = [f"{row:06d}.png" for row in range(40)]
    for row, name in enumerate(names):
        with Image.open(images / name) as image:
            if row < 30:
                image.save(tmp_path / f"{row:06d}.jpg", quality=75)
            else:
                image.save(tmp_path / name)
    words = [f"samples={tmp_path}", "dataset=digits", "metric=is", "metric.is.splits=2"]
    assert evaluate(eval_runs, *words) == 0
    assert protocol(record(eval_runs, tmp_path))["sampling"]["lossy"] == {"JPEG": 30}
    note = "samples: 30 of 40 are JPEG files; values include the effect of this compression"
    assert note in newest_notes(record(eval_runs, tmp_path))
    assert evaluate(eval_runs, *words, f"samples={images}") == 0
    assert "lossy" not in protocol(record(eval_runs, images))["sampling"]


def test_the_reference_may_be_another_folder_of_images(eval_runs, images, tmp_path):
    paths = other_forms(images, tmp_path)
    words = [
        "dataset=digits",
        "reference=images",
        "metric.fid.reference_distance=false",
        "metric=[fid,precision_recall]",
    ]
    assert evaluate(eval_runs, f"samples={paths[0]}", f"reference.path={paths[2]}", *words) == 0
    found = numbers(record(eval_runs, paths[0]))
    assert found == {
        "frechet_classifier": pytest.approx(0, abs=1e-9), "precision_classifier": 1, "recall_classifier": 1,
    }  # fmt: skip
