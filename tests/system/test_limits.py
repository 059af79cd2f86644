"""The limits of a job and of a file: memory of a cgroup, cores that are allowed, images that inflate, deep pickles."""

import io
import os
import pickletools
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffusion_cli.data import decoding
from diffusion_cli.data.decoding import ImageDecoder
from diffusion_cli.formats.files import Room, upright
from diffusion_cli.metrics.features.weights import content_of, read
from diffusion_cli.system.machine import free_memory, usable_cores
from diffusion_cli.system.untrusted import check_weights

GIB = 2**30


def machine(root: Path, cgroup: str, groups: dict[str, tuple[str, int, int]], version: int) -> Path:
    """The files of a machine with 24 GiB free; each group has a limit, what it uses, and files that can be dropped."""
    limit, usage, dropped = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:   {24 * GIB // 1024} kB\n")
    (root / "proc" / "self" / "cgroup").write_text(cgroup)
    for name, (most, used, files) in groups.items():
        folder = root / "sys" / "fs" / "cgroup" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / limit).write_text(f"{most}\n")
        (folder / usage).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"cache 5\n{dropped} {files}\n")
    return root


def test_the_memory_of_a_job_is_that_of_its_cgroup(tmp_path):
    job = {"slurm/job_7": (str(2 * GIB), GIB, GIB // 2), "slurm": ("max", 9 * GIB, 0)}
    assert free_memory(machine(tmp_path, "0::/slurm/job_7\n", job, 2)) == 3 * GIB // 2


def test_a_group_above_may_have_the_limit(tmp_path):
    job = {"slurm/job_7/step": ("max", 0, 0), "slurm/job_7": (str(3 * GIB), GIB, 0)}
    assert free_memory(machine(tmp_path, "0::/slurm/job_7/step\n", job, 2)) == 2 * GIB


def test_the_first_version_of_cgroups_counts_too(tmp_path):
    words = "9:name=systemd:/\n4:cpu,memory:/job\n0::/\n"
    job = {"memory/job": (str(GIB), GIB // 4, 0), "memory": (str(2**63 - 4096), 0, 0)}
    assert free_memory(machine(tmp_path, words, job, 1)) == 3 * GIB // 4


@pytest.mark.parametrize("words", ["0::/elsewhere\n", "0::/../../elsewhere\n", "4:memory:/job\n", ""])
def test_without_a_limit_the_memory_is_that_of_the_machine(tmp_path, words):
    assert free_memory(machine(tmp_path, words, {}, 2)) == 24 * GIB


def test_a_group_over_its_limit_has_nothing_free(tmp_path):
    assert free_memory(machine(tmp_path, "0::/job\n", {"job": (str(GIB), 2 * GIB, 0)}, 2)) == 0


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux")
def test_cores_are_those_that_are_allowed(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 256)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5})
    assert usable_cores() == 2


def test_threads_share_room_and_one_alone_may_exceed_it():
    room, most, started = Room(10), [0], threading.Barrier(6)

    def take(size: int) -> None:
        started.wait()
        for _ in range(200):
            with room.hold(size):
                most[0] = max(most[0], room.taken)

    threads = [threading.Thread(target=take, args=(4,)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0 < most[0] <= 10
    with room.hold(99):
        assert room.taken == 99
    assert room.taken == 0


def test_an_image_takes_room_for_its_pixels(monkeypatch):
    data = io.BytesIO()
    Image.new("RGB", (300, 200)).save(data, "WEBP", lossless=True)
    held: list[int] = []
    room = Room(1)
    monkeypatch.setattr(decoding, "DECODING", room)
    monkeypatch.setattr(decoding, "upright", lambda image: (held.append(room.taken), upright(image))[1])
    ImageDecoder((3, 8, 8), "white", False)(data.getvalue())
    assert held == [4 * 300 * 200]
    assert room.taken == 0


def pickled(path: Path, program: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (("x/data.pkl", program), ("x/byteorder", b"little"), ("x/version", b"3")):
            archive.writestr(name, data)
    return path


NESTED = b"\x80\x02}" + b")" + b"\x85" * 10**5 + b"Ns."


@pytest.mark.parametrize("zipped", [True, False])
def test_weights_with_deep_tuples_are_refused_before_torch_reads_them(tmp_path, zipped):
    path = tmp_path / "w.pth"
    if zipped:
        pickled(path, NESTED)
    else:
        path.write_bytes(NESTED)
    with pytest.raises(ValueError, match="has tuples nested deeper than 32 levels"):
        read(content_of(path, "features.weights"), path, "features.weights")


def test_weights_name_nothing_but_tensors(tmp_path):
    path = pickled(tmp_path / "w.pth", b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.")
    with pytest.raises(ValueError, match="names builtins bytearray"):
        read(content_of(path, "features.weights"), path, "features.weights")


def test_the_very_bytes_that_torch_reads_are_checked(tmp_path):
    path = pickled(tmp_path / "w.pth", NESTED)
    content = content_of(path, "features.weights")
    torch.save({"a": torch.ones(3)}, path)  # another file took its place meanwhile
    with pytest.raises(ValueError, match="has tuples nested deeper than 32 levels"):
        read(content, path, "features.weights")


@pytest.mark.parametrize("position", range(5))
def test_each_pickle_of_old_weights_is_checked(position):
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(1)}, buffer, _use_new_zipfile_serialization=False)
    content, starts = buffer.getvalue(), [0]
    buffer.seek(0)
    for _ in range(5):
        list(pickletools.genops(buffer))
        starts.append(buffer.tell())
    billion = b"\x80\x02cbuiltins\nbytearray\nJ\x00\xca\x9a\x3b\x85R."  # bytearray(10**9)
    with pytest.raises(ValueError, match="names builtins bytearray"):
        check_weights(content[: starts[position]] + billion + content[starts[position + 1] :])


@pytest.mark.parametrize("zipped", [True, False])
def test_weights_of_old_and_new_versions_of_torch_are_read(tmp_path, zipped):
    path = tmp_path / "w.pth"
    weights = {
        "a": torch.ones(3),
        "b": torch.nn.Parameter(torch.ones(2)),
        "c": torch.zeros(2, dtype=torch.int64),
    }
    torch.save(weights, path, _use_new_zipfile_serialization=zipped)
    check_weights(path.read_bytes())
    found = read(content_of(path, "features.weights"), path, "features.weights")
    assert found["a"].tolist() == [1, 1, 1]
    assert found["b"].tolist() == [1, 1]
