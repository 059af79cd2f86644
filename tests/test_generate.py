"""From seeds to images: each image is its own, and nothing of the user's is overwritten."""

import json
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_cli.cli import run
from diffusion_cli.commands.class_labels import class_number, labels_named
from diffusion_cli.commands.outputs import claim, keep_calls, keep_seeds
from diffusion_cli.diffusion.denoiser import Denoiser, Prediction
from diffusion_cli.diffusion.guidance import NoGuidance
from diffusion_cli.diffusion.latents import Pixels
from diffusion_cli.diffusion.parameterizations import Eps
from diffusion_cli.formats import to_bytes
from diffusion_cli.generate import (
    SamplingPipeline,
    SeededNoise,
    generate,
    scale_for_display,
    states,
    trajectories,
)
from diffusion_cli.images import Writer, grid
from diffusion_cli.networks import UNet
from diffusion_cli.runs.load import LoadedDenoiser
from diffusion_cli.samplers import DDIM, DDPM, Sampler
from diffusion_cli.system.seeding import seed_ranges
from helpers import checkpoint_info

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of a few steps."""
    root = tmp_path_factory.mktemp("outputs")
    words = [
        "model.channels=8",
        "model.norm_groups=4",
        "model.num_heads=1",
        "model.head_channels=null",
        "batch_size=64",
        "max_steps=20",
    ]
    assert run(["train", *words, "logger=csv", "name=small", f"output_dir={root}", "trainer=cpu"]) == 0
    return root


@pytest.fixture(scope="module")
def model(schedules):
    """An untrained network with random weights everywhere, so that inputs matter."""
    torch.manual_seed(0)
    network = UNet(
        (1, 8, 8), 3, channels=8, channel_mult=[1, 2], attention_resolutions=[4], num_heads=1, head_channels=None,
        norm_groups=4, dropout=0.5, class_conditional=True,
    )  # fmt: skip
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    denoiser = Denoiser(network, schedules["cosine"], Eps()).eval()
    info = checkpoint_info(class_names=("a", "b", "c"))
    return LoadedDenoiser(info, 0, "", denoiser, Pixels((1, 8, 8)))


def pipeline(model: LoadedDenoiser, sampler: Sampler, steps: int) -> SamplingPipeline:
    """Sampling of the three classes in turn, without guidance."""
    return SamplingPipeline(
        model=model, sampler=sampler, steps=steps, guidance=NoGuidance(None), labels=[0, 1, 2], clip=True,
        precision="fp32",
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["ddim", "ddpm"])
def test_an_image_does_not_depend_on_its_batch(model, kind):
    schedule = model.denoiser.schedule
    sampler = (
        DDIM(schedule, eta=0.0, spacing="trailing")
        if kind == "ddim"
        else DDPM(schedule, variance="large", spacing="trailing")
    )

    def images(seeds, batch_size):
        batches = generate(pipeline(model, sampler, steps=6), seeds, batch_size)
        return {seed: image for part, out, _, _ in batches for seed, image in zip(part, out, strict=True)}

    together, alone, others = images(range(10), 10), images(range(10), 1), images([7, 3, 100], 2)
    for seed in range(10):
        assert (together[seed].int() - alone[seed].int()).abs().max() <= 1
    for seed in (3, 7):
        assert (together[seed].int() - others[seed].int()).abs().max() <= 1
    assert not torch.equal(together[0], together[3])


def test_labels_go_round_and_matter(model):
    sampler = DDIM(model.denoiser.schedule, eta=0.0, spacing="trailing")
    parts = list(generate(pipeline(model, sampler, steps=3), range(5), 2))
    given = [label for _, _, labels, _ in parts if labels is not None for label in labels.tolist()]
    assert given == [0, 1, 2, 0, 1]
    x, t = torch.randn(1, 1, 8, 8), torch.tensor(0.5, dtype=torch.float64)
    one, other = (model.denoiser(x, t, torch.tensor([label])).eps for label in (0, 1))
    assert not torch.allclose(one, other)


def test_noise_is_one_stream_a_seed():
    together, alone = SeededNoise([3, 4], (1, 4, 4), CPU), SeededNoise([4], (1, 4, 4), CPU)
    for _ in range(3):
        assert torch.equal(together.noise()[1], alone.noise()[0])


def test_generation_starts_from_the_noise_of_the_process(schedules):
    def denoise(x, t):
        return Prediction(x0=0 * x, eps=x, sigma=t)

    for tag, size in (("ve", 50), ("edm", 80), ("vp", 1)):
        sampler = DDIM(schedules[tag], eta=0.0, spacing="time")
        start = next(states(denoise, sampler, sampler.grid(3), [3, 4], (1, 4, 4), CPU))
        torch.testing.assert_close(start, size * SeededNoise([3, 4], (1, 4, 4), CPU).noise())


def test_noise_drawn_ahead_is_the_same_and_only_where_there_is_more_than_a_start(monkeypatch):
    gpu: Any = SimpleNamespace(type="cuda")  # a device that takes no tensor, and draws ahead
    empty, threads = torch.empty, set()

    def drawn(self, _next=SeededNoise._next):
        threads.add(threading.current_thread())
        return _next(self)

    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory: empty(*shape))
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, non_blocking: self)
    monkeypatch.setattr(SeededNoise, "_next", drawn)
    ahead, now = SeededNoise([3, 4], (1, 4, 4), gpu), SeededNoise([3, 4], (1, 4, 4), CPU)
    assert torch.equal(ahead.noise(), now.noise())
    assert threads == {threading.current_thread()}
    for _ in range(5):
        assert torch.equal(ahead.noise(), now.noise())
    assert len(threads) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_noise_on_a_gpu_is_that_of_the_cpu():
    on_gpu, on_cpu = (SeededNoise([3, 4], (1, 64, 64), torch.device(name)) for name in ("cuda", "cpu"))
    for _ in range(20):
        assert torch.equal(on_gpu.noise().cpu(), on_cpu.noise())


def test_bytes_are_the_nearest_levels():
    levels = torch.arange(256.0)
    assert torch.equal(to_bytes(levels / 127.5 - 1), levels.byte())
    assert to_bytes(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
    assert to_bytes((levels[:-1] + 0.49) / 127.5 - 1).tolist() == list(range(255))


def test_grid_shows_each_image_in_its_place():
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 1, 40, 40) * 10
    picture = grid(images, columns=3)
    assert picture.shape == (1, 84, 126)
    assert picture[0, 21::42, 21::42].tolist() == [[0, 10, 20], [30, 40, 50]]


def sample(folder, *words):
    return run(["sample", f"output_dir={folder}", "steps=4", "num_samples=6", "device=cpu", *words])


def pngs(output):
    return {file.name: file.read_bytes() for file in output.glob("0*.png")}


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


def test_samples_are_files_named_by_seed_with_a_manifest(folder, tmp_path):
    assert sample(folder, f"output={tmp_path}/out", "seed=5", "run=small") == 0
    assert sorted(pngs(tmp_path / "out")) == [f"{seed:06d}.png" for seed in range(5, 11)]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["seeds"] == [[5, 10]]
    assert manifest["settings"]["steps"] == 4
    assert len(manifest["settings"]["weights_sha256"]) == 64
    assert manifest["step"] == 20
    pixels = np.array(Image.open(tmp_path / "out" / "000005.png"))
    assert pixels.shape == (8, 8)
    assert pixels.dtype == np.uint8


def test_a_writer_counts_what_is_there_and_keeps_no_more_waiting_than_it_may():
    gate, begun = threading.Event(), []

    def save(number: int) -> None:
        begun.append(number)
        assert gate.wait(60)

    with Writer(3) as writer:
        for number in range(3):
            writer(save, number)
        assert writer.written == 0
        threading.Timer(0.05, gate.set).start()
        writer(save, 3)  # waits for one of the others
        assert gate.is_set()
        assert writer.written >= 1
    assert writer.written == 4
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
def test_a_signal_loses_no_image_that_was_made(folder, tmp_path, monkeypatch, capsys):
    from diffusion_cli.commands import sample as command

    made = generate

    def stopped(*arguments, **how):
        yield from made(*arguments, **how)
        if arguments[1][0] >= 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(command, "generate", stopped)
    assert sample(folder, f"output={tmp_path}/out", "batch_size=2") == 75
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
def test_on_the_way_to_the_first_network_call_nothing_is_read_or_imported_in_vain(folder, tmp_path):
    words = ["sample", f"output_dir={folder}", f"output={tmp_path}/out"]
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
def test_a_stopped_run_is_completed_and_equals_a_whole_one(folder, tmp_path, capsys):
    sample(folder, f"output={tmp_path}/whole")
    sample(folder, f"output={tmp_path}/parts", "num_samples=3", "batch_size=2")
    kept = tmp_path / "parts" / "000001.png"
    before = kept.stat().st_mtime_ns
    (tmp_path / "parts" / "000000.png").unlink()
    sample(folder, f"output={tmp_path}/parts")
    assert "has 2 of 6 images" in capsys.readouterr().err
    assert kept.stat().st_mtime_ns == before
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert pngs(whole).keys() == pngs(parts).keys()
    for name in pngs(whole):
        one, other = (np.array(Image.open(place / name)).astype(int) for place in (whole, parts))
        assert abs(one - other).max() <= 1


def test_other_settings_in_the_folder_are_refused(folder, tmp_path, capsys):
    sample(folder, f"output={tmp_path}")
    before = pngs(tmp_path)
    assert sample(folder, f"output={tmp_path}", "steps=3", "sampler.eta=1") == 2
    err = capsys.readouterr().err
    assert "diffuse: steps=3: the images in" in err
    assert "sampler.eta=1" in err
    assert "choose another folder" in err
    assert pngs(tmp_path) == before


def test_samples_of_the_grid_of_an_earlier_version_are_not_completed(folder, tmp_path, capsys):
    words = ["sampler=dpmpp_2m", "sampler.spacing=leading", f"output={tmp_path}"]
    assert sample(folder, *words) == 0
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["settings"]["grid"]  # as an earlier version wrote it
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "000000.png").unlink()
    capsys.readouterr()
    assert sample(folder, *words) == 2
    assert f"diffuse: output={tmp_path}: contains images made with other settings" in capsys.readouterr().err
    assert not (tmp_path / "000000.png").exists()


def test_a_folder_of_someone_else_is_left_alone(folder, tmp_path, capsys):
    (tmp_path / "000000.png").write_text("mine")
    assert sample(folder, f"output={tmp_path}") == 2
    assert "is not empty and has no manifest.json" in capsys.readouterr().err
    assert (tmp_path / "000000.png").read_text() == "mine"


def test_a_damaged_manifest_is_named(folder, tmp_path, capsys):
    (tmp_path / "manifest.json").write_text("{")
    assert sample(folder, f"output={tmp_path}") == 2
    assert "manifest.json: is not a manifest of diffuse" in capsys.readouterr().err


def test_the_newest_run_is_taken_and_others_are_found_by_name_or_path(folder, capsys):
    assert sample(folder, "steps=2") == 0
    assert str(folder / "small") in capsys.readouterr().out
    assert sample(folder, "steps=2", f"run={folder / 'small'}") == 0
    assert sample(folder, "run=smal") == 2
    assert "run=smal: does not exist; did you mean small?" in capsys.readouterr().err


@pytest.mark.slow
def test_evaluation_writes_numbers_with_their_protocol(folder, capsys, tmp_path):
    words = [f"output_dir={folder}", "steps=2", "num_samples=80", "metric=[fid,is]", f"cache_dir={tmp_path}"]
    few = ["features=classifier", "features.steps=20"]
    assert run(["eval", *words, *few]) == 0
    table = capsys.readouterr().out
    (entry,) = json.loads((folder / "small" / "metrics.json").read_text())
    results = {result["name"]: result for result in entry["results"]}
    assert set(results) == {"frechet_classifier", "is_classifier"}
    assert all(name in table for name in results)
    protocol = results["frechet_classifier"]["protocol"]
    assert protocol["samples"] == 80
    assert protocol["sampling"]["steps"] == 2
    assert protocol["sampling"]["seeds"] == [0, 79]
    assert run(["eval", f"output_dir={folder}", "metric=inversion", "label=none"]) == 2
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


def test_the_words_of_label_stand_for_classes_of_that_name_first(model):
    def labels(label, *names):
        return labels_named(
            label,
            replace(model, info=checkpoint_info(class_names=names)),
            NoGuidance(None),
            [0, 2],
            null_label="all",
        )

    usual = "a", "b", "c"
    for label, expected in (
        (None, [0, 2]),
        ("null", [0, 2]),
        ("all", [0, 2]),
        ("none", None),
        ([], None),
    ):
        assert labels(label, *usual) == expected
    assert labels("none", "mild", "none", "severe") == [1]
    assert labels("all", "all", "null", "true") == [0]
    assert labels("null", "all", "null", "true") == [1]
    assert labels(None, "all", "null", "true") == [0, 2]
    assert labels([], "none", "null", "all") is None
    assert labels(["null", "all"], "all", "null", "true") == [1, 0]


# --- How images arise --------------------


@pytest.mark.parametrize(("frames", "kept"), [(7, 7), (3, 3), (100, 7)])
def test_a_trajectory_goes_from_the_noise_to_the_image_itself(model, frames, kept):
    sampling = pipeline(model, DDPM(model.denoiser.schedule, variance="large", spacing="trailing"), steps=6)
    ways = trajectories(sampling, range(5), 2, frames=frames)
    assert ways.shape == (5, kept, 1, 8, 8)
    images = torch.cat([batch.images for batch in generate(sampling, range(5), 2)])
    assert torch.equal(ways[:, -1], images)
    noise = torch.cat([SeededNoise([seed], (1, 8, 8), CPU).noise() for seed in range(5)])
    assert torch.equal(ways[:, 0], to_bytes(noise))


@pytest.mark.parametrize("name", ["ve", "edm", "subvp", "rectified", "cosine"])
def test_states_are_shown_with_the_variance_of_the_data(schedules, name):
    schedule = schedules[name]
    image, noise = torch.full((1, 1, 4, 4), 0.3), torch.linspace(-0.9, 0.9, 16).reshape(1, 1, 4, 4)
    one, zero = torch.ones(1), torch.zeros(1)
    assert torch.equal(to_bytes(scale_for_display(image, zero, schedule)), to_bytes(image))
    _, sigma = schedule(one)
    state = (sigma * noise).float()
    difference = to_bytes(scale_for_display(state, one, schedule)).int() - to_bytes(noise).int()
    assert difference.abs().max() <= 1
    if name == "cosine":
        assert torch.equal(to_bytes(scale_for_display(state, one, schedule)), to_bytes(state))


@pytest.mark.slow
def test_strips_and_animations_change_no_image_and_are_made_afterwards_too(folder, tmp_path, capsys):
    words = ["run=small", f"output_dir={folder}", "steps=4", "num_samples=10", "sampler=ddpm"]
    plain, drawn = tmp_path / "plain", tmp_path / "drawn"
    assert run(["sample", *words, f"output={plain}"]) == 0
    assert run(["sample", *words, f"output={drawn}", "strip=true", "gif=true", "frames=3"]) == 0
    before = {file.name: file.read_bytes() for file in plain.iterdir() if file.is_file()}
    after = {file.name: file.read_bytes() for file in drawn.iterdir() if file.is_file()}
    assert set(after) - set(before) == {"strip.png", "denoising.gif"}
    assert all(after[name] == content for name, content in before.items())
    with Image.open(drawn / "strip.png") as strip:
        assert strip.size == (3 * 34, 8 * 34)  # 8 x 8 pixels, four times as large, and a frame of one
        pixels = np.array(strip)
    for row in range(8):
        with Image.open(drawn / f"{row:06d}.png") as image:
            last = pixels[34 * row + 1 : 34 * row + 33 : 4, 2 * 34 + 1 : 3 * 34 - 1 : 4]
            assert np.array_equal(last, np.array(image))
    with Image.open(drawn / "denoising.gif") as animation:
        assert getattr(animation, "n_frames", 1) == 4  # there and back
    assert run(["sample", *words, f"output={plain}", "strip=true", "frames=3"]) == 0
    assert (plain / "strip.png").read_bytes() == after["strip.png"]
    assert run(["sample", *words, f"output={plain}", "frames=1", "strip=true"]) == 2
    assert "frames=1: must be at least 2" in capsys.readouterr().err


def test_a_strip_is_no_image_to_edit(folder, tmp_path):
    words = ["run=small", f"output_dir={folder}", "steps=2"]
    assert run(["sample", *words, "num_samples=2", "strip=true", f"output={tmp_path / 'some'}"]) == 0
    given = [f"input={tmp_path / 'some'}", f"output={tmp_path / 'edited'}"]
    assert run(["edit", *words, "edit=img2img", *given]) == 0
    assert sorted(file.name for file in (tmp_path / "edited").glob("*.png")) == [
        "000000.png",
        "000001.png",
        "grid.png",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError(), RuntimeError("can't allocate memory"), MemoryError()]
)
@pytest.mark.parametrize(
    ("size", "remedy"), [("4", "try batch_size=2, or auto"), ("1", "one image does not fit")]
)
def test_memory_that_runs_out_in_sampling_names_the_batch_size(
    folder, tmp_path, monkeypatch, capsys, error, size, remedy
):
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(Denoiser, "forward", refuse)
    assert sample(folder, f"output={tmp_path}/out", "run=small", f"batch_size={size}") == 2
    words = [
        "edit",
        f"output_dir={folder}",
        "run=small",
        "edit=img2img",
        "input=val",
        "num_images=4",
        "device=cpu",
    ]
    assert run([*words, f"output={tmp_path}/edits", f"batch_size={size}"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "diffuse: " in line]
    assert [line[line.index("diffuse: ") :].partition("; use")[0] for line in lines] == 2 * [
        f"diffuse: batch_size={size}: cpu is out of memory; {remedy}"
    ]


@pytest.mark.slow
def test_the_batch_size_is_found_and_said_and_changes_no_image(folder, tmp_path, capsys):
    assert sample(folder, f"output={tmp_path}/found", "batch_size=auto") == 0
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("batch_size="))
    assert int(line.removeprefix("batch_size=")) in (1, 2, 4)
    assert sample(folder, f"output={tmp_path}/given", "batch_size=6") == 0
    assert_alike(tmp_path / "found", tmp_path / "given")


def assert_alike(one, other) -> None:
    assert pngs(one).keys() == pngs(other).keys() != set()
    for name in pngs(one):
        mine, theirs = (np.array(Image.open(place / name)).astype(int) for place in (one, other))
        assert abs(mine - theirs).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["sampler=ddpm", "strip=true"]], ids=["ddim", "ddpm"])
def test_a_compiled_network_makes_the_same_images_compiled_once(folder, tmp_path, words):
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    words = ["precision=fp32", "batch_size=4", *words]
    assert sample(folder, f"output={tmp_path}/compiled", "compile=true", *words) == 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert sample(folder, f"output={tmp_path}/written", *words) == 0
    assert_alike(tmp_path / "compiled", tmp_path / "written")


def test_a_network_that_cannot_be_compiled_here_is_said_to_be_the_option(
    folder, tmp_path, monkeypatch, capsys
):
    from torch._dynamo.exc import TorchDynamoException

    def failing(*arguments):
        raise TorchDynamoException("No working C++ compiler found\nin a long text")

    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **how: setattr(self, "_compiled_call_impl", failing)
    )
    assert sample(folder, f"output={tmp_path}/out", "compile=true") == 2
    assert (
        "diffuse: compile=true: torch cannot compile the network here (No working" in capsys.readouterr().err
    )
