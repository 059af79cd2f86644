"""`diffuse sample`: its files, manifest, labels and settings."""

import json
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusion_cli.cli import run
from diffusion_cli.commands.class_labels import class_number
from diffusion_cli.commands.outputs import claim, keep_calls, keep_seeds
from diffusion_cli.generate import generate
from diffusion_cli.images import Writer
from diffusion_cli.system.seeding import seed_ranges
from helpers import checkpoint_info
from helpers.sampling import pngs, sample


def test_no_seed_is_lost_where_several_sample_into_one_folder(tmp_path):
    model: Any = SimpleNamespace(step=1, info=checkpoint_info())

    def task(number: int) -> None:
        claim(tmp_path / "out", {"steps": 4}, model)
        keep_seeds(tmp_path / "out", range(10 * number, 10 * number + 10))
        keep_calls(tmp_path / "out", number)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(task, range(32))) == [None] * 32
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["seeds"], manifest["network_calls"]) == ([[0, 319]], 31)


@pytest.mark.slow
def test_a_manifest_of_a_million_samples_is_small_and_the_older_form_is_read(tmp_path):
    model: Any = SimpleNamespace(step=1, info=checkpoint_info())
    manifest = claim(tmp_path / "out", {"steps": 4}, model)
    file = tmp_path / "out" / "manifest.json"
    file.write_text(json.dumps(manifest | {"seeds": list(range(10**6))}, indent=2))
    assert claim(tmp_path / "out", {"steps": 4}, model)["step"] == 1
    keep_seeds(tmp_path / "out", range(10**6, 3 * 10**6))
    assert json.loads(file.read_text())["seeds"] == [[0, 3 * 10**6 - 1]]


def test_seeds_are_joined_to_ranges():
    assert seed_ranges([[5, 6], 3, [0, 1], 9, 4, [5, 5]]) == [range(2), range(3, 7), range(9, 10)]


def test_samples_are_files_named_by_seed_with_a_manifest(sample_runs, tmp_path):
    assert sample(sample_runs, f"output={tmp_path}/out", "seed=5", "run=small") == 0
    assert sorted(pngs(tmp_path / "out")) == [f"{seed:06d}.png" for seed in range(5, 11)]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["seeds"] == [[5, 10]]
    assert manifest["settings"]["steps"] == 4
    assert len(manifest["settings"]["weights_sha256"]) == 64
    assert manifest["step"] == 20
    pixels = np.array(Image.open(tmp_path / "out" / "000005.png"))
    assert pixels.shape == (8, 8)
    assert pixels.dtype == np.uint8


def test_a_writer_keeps_no_more_waiting_than_it_may():
    gate, begun = threading.Event(), []

    def save(number: int) -> None:
        begun.append(number)
        assert gate.wait(60)

    with Writer(3) as writer:
        for number in range(3):
            writer(save, number)
        threading.Timer(0.05, gate.set).start()
        writer(save, 3)  # waits for one of the others
        assert gate.is_set()
    assert sorted(begun) == [0, 1, 2, 3]


@pytest.mark.parametrize("ending", [OSError, KeyboardInterrupt])
def test_what_was_handed_to_a_writer_is_written_whatever_ends_it(tmp_path, ending):
    handed = threading.Event()

    def save(number: int) -> None:
        assert handed.wait(60)
        if number == 1:
            raise OSError(f"{number}: cannot be written")
        (tmp_path / str(number)).touch()

    def hand_over() -> None:
        with Writer(9) as writer:
            for number in range(8):
                writer(save, number)
            handed.set()
            if ending is KeyboardInterrupt:
                raise KeyboardInterrupt

    with pytest.raises(ending):
        hand_over()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0", *"234567"]


@pytest.mark.slow
def test_a_signal_loses_no_image_that_was_made(sample_runs, tmp_path, monkeypatch, capsys):
    from diffusion_cli.commands import sample as command

    made = generate

    def stopped(*arguments, **how):
        yield from made(*arguments, **how)
        if arguments[1][0] >= 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(command, "generate", stopped)
    assert sample(sample_runs, f"output={tmp_path}/out", "batch_size=2") == 75
    assert "run the same command again" in capsys.readouterr().err
    assert sorted(pngs(tmp_path / "out")) == [f"{seed:06d}.png" for seed in range(4)]


STARTING = """
import os, sys
import torch
before = set(sys.modules)  # torch's own
from diffusion_cli import cli
from diffusion_cli.runs import checkpoint
from diffusion_cli.diffusion.denoiser import Denoiser

sums, read = checkpoint._check_sums, []

def counted(path):
    read.append(path)
    sums(path)

def stop(self, *arguments):
    print(len(read), *(name for name in set(sys.modules) - before))
    sys.stdout.flush()
    os._exit(0)

checkpoint._check_sums, Denoiser.forward = counted, stop
cli.run(sys.argv[1:])
"""


@pytest.mark.slow
def test_on_the_way_to_the_first_network_call_nothing_is_read_or_imported_in_vain(sample_runs, tmp_path):
    words = ["sample", f"output_dir={sample_runs}", f"output={tmp_path}/out"]
    done = subprocess.run([sys.executable, "-c", STARTING, *words], capture_output=True, text=True)
    read, *imported = done.stdout.split()
    assert int(read) == 1
    assert "diffusion_cli.generate" in imported
    heavy = {
        "torch.export", "torch._dynamo", "torch._inductor", "torchvision", "lightning", "matplotlib", "scipy",
        "sklearn",
    }  # fmt: skip
    assert not heavy & set(imported)


@pytest.mark.slow
def test_a_stopped_run_is_completed_and_equals_a_whole_one(sample_runs, tmp_path, capsys):
    sample(sample_runs, f"output={tmp_path}/whole")
    sample(sample_runs, f"output={tmp_path}/parts", "num_samples=3", "batch_size=2")
    kept = tmp_path / "parts" / "000001.png"
    before = kept.stat().st_mtime_ns
    (tmp_path / "parts" / "000000.png").unlink()
    sample(sample_runs, f"output={tmp_path}/parts")
    assert "has 2 of 6 images" in capsys.readouterr().err
    assert kept.stat().st_mtime_ns == before
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert pngs(whole).keys() == pngs(parts).keys()
    for name in pngs(whole):
        one, other = (np.array(Image.open(place / name)).astype(int) for place in (whole, parts))
        assert abs(one - other).max() <= 1


def test_other_settings_in_the_folder_are_refused(sample_runs, tmp_path, capsys):
    sample(sample_runs, f"output={tmp_path}")
    before = pngs(tmp_path)
    assert sample(sample_runs, f"output={tmp_path}", "steps=3", "sampler.eta=1") == 2
    err = capsys.readouterr().err
    assert "diffuse: steps=3: the images in" in err
    assert "sampler.eta=1" in err
    assert "choose another folder" in err
    assert pngs(tmp_path) == before


def test_samples_of_the_grid_of_an_earlier_version_are_not_completed(sample_runs, tmp_path, capsys):
    words = ["sampler=dpmpp_2m", "sampler.spacing=leading", f"output={tmp_path}"]
    assert sample(sample_runs, *words) == 0
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["settings"]["grid"]  # as an earlier version wrote it
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "000000.png").unlink()
    capsys.readouterr()
    assert sample(sample_runs, *words) == 2
    assert f"diffuse: output={tmp_path}: contains images made with other settings" in capsys.readouterr().err
    assert not (tmp_path / "000000.png").exists()


def test_a_folder_of_someone_else_is_left_alone(sample_runs, tmp_path, capsys):
    (tmp_path / "000000.png").write_text("mine")
    assert sample(sample_runs, f"output={tmp_path}") == 2
    assert "is not empty and has no manifest.json" in capsys.readouterr().err
    assert (tmp_path / "000000.png").read_text() == "mine"


def test_a_damaged_manifest_is_named(sample_runs, tmp_path, capsys):
    (tmp_path / "manifest.json").write_text("{")
    assert sample(sample_runs, f"output={tmp_path}") == 2
    assert "manifest.json: is not a manifest of diffuse" in capsys.readouterr().err


def test_the_newest_run_is_taken_and_others_are_found_by_name_or_path(sample_runs, capsys):
    assert sample(sample_runs, "steps=2") == 0
    assert str(sample_runs / "small") in capsys.readouterr().out
    assert sample(sample_runs, "steps=2", f"run={sample_runs / 'small'}") == 0
    assert sample(sample_runs, "run=smal") == 2
    assert "run=smal: does not exist; did you mean small?" in capsys.readouterr().err


@pytest.mark.slow
def test_evaluation_writes_numbers_with_their_protocol(sample_runs, capsys, tmp_path):
    words = [
        f"output_dir={sample_runs}",
        "steps=2",
        "num_samples=80",
        "metric=[fid,is]",
        f"cache_dir={tmp_path}",
    ]
    few = ["features=classifier", "features.steps=20"]
    assert run(["eval", *words, *few]) == 0
    table = capsys.readouterr().out
    (entry,) = json.loads((sample_runs / "small" / "metrics.json").read_text())
    results = {result["name"]: result for result in entry["results"]}
    assert set(results) == {"frechet_classifier", "is_classifier"}
    assert all(name in table for name in results)
    protocol = results["frechet_classifier"]["protocol"]
    assert protocol["samples"] == 80
    assert protocol["sampling"]["steps"] == 2
    assert protocol["sampling"]["seeds"] == [0, 79]
    assert run(["eval", f"output_dir={sample_runs}", "metric=inversion", "label=none"]) == 2
    assert (
        "label=none: applies only to samples, and metric=inversion uses none; leave it out"
        in capsys.readouterr().err
    )
    assert run(["eval", *words, *few, "num_samples=30"]) == 2
    assert "raise num_samples, or set force=true" in capsys.readouterr().err


def test_a_number_is_a_name_where_classes_are_called_by_numbers():
    assert class_number(2, ("1", "2", "3")) == 1
    assert class_number("2", ("1", "2", "3")) == 1
    assert class_number(2, ("ant", "bee", "cat")) == 2
    assert class_number(9, tuple("0123456789")) == 9
    for label, names in ((0, ("1", "2", "3")), (3, ("ant", "bee", "cat")), ("dog", ("ant",)), (-1, ("ant",))):
        with pytest.raises(ValueError, match=f"^label={label}: "):
            class_number(label, names)


DECIMAL = ("1.0", "10.0", "2.0")


@pytest.mark.parametrize(
    ("label", "names", "expected"),
    [
        ("1.0", DECIMAL, 0),
        ("1e3", ("1e3", "true"), 0),
        ("true", ("1e3", "true"), 1),
        ("cafe\u0301", ("ant", "caf\xe9"), 1),
        ("1", ("1st", "2nd"), 1),
        ("1", DECIMAL, "did you mean 1.0?"),
        ("1000", ("1e3", "true"), "did you mean 1e3?"),
        ("7", DECIMAL, "choose from 1.0, 10.0, 2.0"),
        ("0", ("1e3", "true"), "choose from 1e3, true"),
        ("1_0", tuple("abcdefghijkl"), "unknown class"),
        ("12", tuple("abcdefghijkl"), "out of range; use a class from 0 to 11"),
    ],
)
def test_a_class_is_named_by_its_own_name_whatever_that_looks_like(label, names, expected):
    if isinstance(expected, int):
        assert class_number(label, names) == expected
    else:
        with pytest.raises(ValueError, match=f"^label={label}: .*{re.escape(expected)}"):
            class_number(label, names)
