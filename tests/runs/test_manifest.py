"""The manifest of a folder of images: tasks of several machines write it at once, and nothing is lost or refused."""

import fcntl
import json
import multiprocessing
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diffusion_cli.commands import outputs
from diffusion_cli.commands.outputs import claim, keep_calls, keep_results, keep_seeds, read_manifest
from diffusion_cli.errors import UsageError
from diffusion_cli.report import record
from diffusion_cli.runs.manifest import MANIFEST, RECORDS, add_record
from helpers import checkpoint_info

SETTINGS = {"labels": None, "steps": 2}
MODEL: Any = SimpleNamespace(step=20, info=checkpoint_info())
FORK = multiprocessing.get_context("fork")


def task(folder: Path, seeds: range, start: Any = None, flock: Any = None, links: bool = True) -> None:
    """What one task of an array does: claim the folder, write an image a seed, and keep the seeds."""
    outputs._adding = threading.Lock()  # the parent may have forked while it had it
    if flock is not None:
        fcntl.flock = flock
    if not links:
        os.link = refuse
    if start is not None:
        start.wait()
    claim(folder, SETTINGS, MODEL)
    for seed in seeds:
        (folder / f"{seed:06d}.png").write_bytes(b"")
    keep_calls(folder, 2)
    keep_seeds(folder, seeds)


def refuse(*_: Any) -> None:
    raise OSError(38, "Function not implemented")


def allow(*_: Any) -> None:
    """As on two machines that do not see each other's locks."""


def run_tasks(*tasks: Any) -> None:
    processes = [FORK.Process(target=task, args=arguments, daemon=True) for arguments in tasks]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0] * len(processes)


def on_disk(folder: Path) -> dict[str, Any]:
    """The file alone, as other programs and earlier versions read it."""
    return json.loads((folder / MANIFEST).read_text())


@pytest.mark.slow
@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
@pytest.mark.parametrize("flock", [allow, refuse], ids=["node-local flock", "no flock"])
def test_thirty_tasks_share_a_folder(tmp_path, flock, links):
    start = FORK.Barrier(30)
    run_tasks(*((tmp_path / "out", range(3 * n, 3 * n + 3), start, flock, links) for n in range(30)))
    assert on_disk(tmp_path / "out")["seeds"] == [[0, 89]]
    assert on_disk(tmp_path / "out") == read_manifest(tmp_path / "out")
    assert on_disk(tmp_path / "out")["network_calls"] == 2
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_a_task_that_ends_while_another_merges_is_not_lost(tmp_path, monkeypatch):
    task(tmp_path, range(3))
    real, times = outputs.write_json, []

    def write_json(path, manifest):
        times.append(manifest["seeds"])
        if len(times) == 1:  # the other task records and publishes between our merge and our move
            run_tasks((tmp_path, range(10, 13)))
            assert [10, 12] in on_disk(tmp_path)["seeds"]
        real(path, manifest)

    monkeypatch.setattr(outputs, "write_json", write_json)
    keep_seeds(tmp_path, range(3, 6))
    assert times == [[[0, 5]], [[0, 5], [10, 12]]]
    assert on_disk(tmp_path)["seeds"] == [[0, 5], [10, 12]]


def test_a_claim_between_the_two_looks_of_another_refuses_nothing(tmp_path, monkeypatch):
    real = Path.is_file

    def is_file(path):
        if path.name == MANIFEST and not real(path):
            monkeypatch.undo()
            run_tasks((tmp_path, range(2)))
        return real(path)

    monkeypatch.setattr(Path, "is_file", is_file)
    task(tmp_path, range(2, 4))
    assert on_disk(tmp_path)["seeds"] == [[0, 3]]


def test_two_claims_of_different_settings_at_once_are_one(tmp_path, monkeypatch):
    real = outputs.create

    def create(folder, manifest):
        monkeypatch.undo()
        run_tasks((tmp_path, range(2)))
        real(folder, manifest)

    monkeypatch.setattr(outputs, "create", create)
    with pytest.raises(UsageError, match=r"steps=5: the images in .* were made with 2"):
        claim(tmp_path, SETTINGS | {"steps": 5}, MODEL)
    assert on_disk(tmp_path)["settings"] == SETTINGS


def test_a_task_killed_between_its_record_and_the_manifest_loses_nothing(tmp_path):
    task(tmp_path, range(2))
    add_record(tmp_path, {"seeds": [[7, 8]], "network_calls": 5})
    assert on_disk(tmp_path)["seeds"] == [[0, 1]]
    assert claim(tmp_path, SETTINGS, MODEL)["seeds"] == [[0, 1], [7, 8]]
    (tmp_path / "grid.png").write_bytes(b"")
    assert record._settings(tmp_path / MANIFEST)["images"] == 4
    keep_seeds(tmp_path, range(1))
    assert on_disk(tmp_path)["seeds"] == [[0, 1], [7, 8]]
    assert on_disk(tmp_path)["network_calls"] == 5


def test_a_folder_of_an_earlier_version_continues(tmp_path):
    earlier = {
        "settings": SETTINGS,
        "step": 20,
        "model": {},
        "versions": {},
        "network_calls": 2,
        "seeds": [0, 1],
    }
    (tmp_path / MANIFEST).write_text(json.dumps(earlier))
    (tmp_path / "000000.png").write_bytes(b"")
    keep_calls(tmp_path, 2)
    assert claim(tmp_path, SETTINGS, MODEL) == earlier
    assert not (tmp_path / RECORDS).exists()  # nothing is new
    task(tmp_path, range(2, 4))
    assert on_disk(tmp_path) == earlier | {"seeds": [[0, 3]]}


def test_seeds_that_an_earlier_version_adds_meanwhile_are_kept(tmp_path):
    task(tmp_path, range(2))
    (tmp_path / MANIFEST).write_text(json.dumps(on_disk(tmp_path) | {"seeds": [0, 1, 50]}))
    task(tmp_path, range(2, 3))
    assert on_disk(tmp_path)["seeds"] == [[0, 2], [50, 50]]


def test_a_folder_whose_visible_files_were_removed_is_new(tmp_path):
    task(tmp_path, range(9))
    for file in tmp_path.glob("*"):
        if not file.name.startswith("."):
            file.unlink()
    claim(tmp_path, SETTINGS | {"steps": 5}, MODEL)
    keep_seeds(tmp_path, range(2))
    assert on_disk(tmp_path)["seeds"] == [[0, 1]]


def test_results_of_tasks_are_merged(tmp_path):
    task(tmp_path, range(1))
    keep_results(tmp_path, {"a": {"rmse": 1.0}})
    child = FORK.Process(target=keep_results, args=(tmp_path, {"b": {}}))
    child.start()
    child.join(20)
    keep_results(tmp_path, {"c": {"rmse": 0.5}})
    assert on_disk(tmp_path)["results"] == {"a": {"rmse": 1.0}, "b": {}, "c": {"rmse": 0.5}}
    assert len(list((tmp_path / RECORDS).iterdir())) == 2


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"seeds": ["a"]}', '{"results": 1}', '{"network_calls": -1}']
)
def test_a_damaged_record_is_named(tmp_path, text):
    task(tmp_path, range(2))
    (file,) = (tmp_path / RECORDS).iterdir()
    file.write_text(text)
    with pytest.raises(UsageError, match=f"{file.name}: .*; remove it, or choose another output="):
        claim(tmp_path, SETTINGS, MODEL)


def test_a_copy_without_records_is_whole(tmp_path):
    task(tmp_path / "out", range(2))
    shutil.copytree(tmp_path / "out", tmp_path / "copy", ignore=lambda *_: [RECORDS])
    task(tmp_path / "copy", range(2, 4))
    assert on_disk(tmp_path / "copy")["seeds"] == [[0, 3]]
