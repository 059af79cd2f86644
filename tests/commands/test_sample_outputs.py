"""`diffuse sample`: strips, animations, memory and compilation."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_cli.cli import run
from diffusion_cli.data import Digits
from diffusion_cli.diffusion.denoiser import Denoiser
from diffusion_cli.system.progress import ProgressBar
from helpers.sampling import pngs, sample


@pytest.mark.slow
def test_strips_and_animations_change_no_image_and_are_made_afterwards_too(sample_runs, tmp_path, capsys):
    words = ["run=small", f"output_dir={sample_runs}", "steps=4", "num_samples=10", "sampler=ddpm"]
    plain, drawn = tmp_path / "plain", tmp_path / "drawn"
    assert run(["sample", *words, f"output={plain}"]) == 0
    assert run(["sample", *words, f"output={drawn}", "strip=true", "gif=true", "frames=3"]) == 0
    before = {file.name: file.read_bytes() for file in plain.iterdir() if file.is_file()}
    after = {file.name: file.read_bytes() for file in drawn.iterdir() if file.is_file()}
    assert set(after) - set(before) == {"strip.png", "denoising.gif"}
    assert all(after[name] == content for name, content in before.items())
    with Image.open(drawn / "strip.png") as strip:
        pixels = np.array(strip)[
            -8 * 34 :, -3 * 34 :
        ]  # 8 x 8 pixels, four times as large, and a frame of one
        assert strip.size > (3 * 34, 8 * 34), "with words at the left and at the top"
    for row in range(8):
        with Image.open(drawn / f"{row:06d}.png") as image:
            last = pixels[34 * row + 1 : 34 * row + 33 : 4, 2 * 34 + 1 : 3 * 34 - 1 : 4]
            assert np.array_equal(last, np.array(image))
    with Image.open(drawn / "denoising.gif") as animation:
        assert getattr(animation, "n_frames", 1) == 4  # there and back
    assert run(["sample", *words, f"output={plain}", "strip=true", "frames=3"]) == 0
    assert (plain / "strip.png").read_bytes() == after["strip.png"]
    for asked in (["strip=true"], ["gif=true"]):
        assert run(["sample", *words, f"output={plain}", *asked, "frames=3", "captions=false"]) == 0
    with Image.open(plain / "strip.png") as strip:
        assert np.array_equal(np.array(strip), pixels)
    with Image.open(plain / "denoising.gif") as animation:
        assert animation.size == (4 * 34 + 2, 3 * 34 + 2)
    assert run(["sample", *words, f"output={plain}", "frames=1", "strip=true"]) == 2
    assert "frames=1: must be at least 2" in capsys.readouterr().err


def test_a_strip_has_a_row_for_each_class_and_its_part_is_named(edit_runs, tmp_path, capsys):
    words = ["sample", f"output_dir={edit_runs}", "run=told", "steps=1", "label=all", "num_samples=20"]
    for already in (False, True):
        capsys.readouterr()
        assert run([*words, f"output={tmp_path / 'all'}", "strip=true", "frames=2", "captions=false"]) == 0
        out, err = capsys.readouterr()
        assert "strip.png (first 10 of 20 images)\n" in out
        assert ("20 images of step 20 already there, " in out) == already
        assert ("sample: 0%" in err) != already
    with Image.open(tmp_path / "all" / "strip.png") as strip:
        assert strip.size == (2 * 34, 10 * 34)


def test_a_strip_is_no_image_to_edit(sample_runs, tmp_path):
    words = ["run=small", f"output_dir={sample_runs}", "steps=2"]
    assert run(["sample", *words, "num_samples=2", "strip=true", f"output={tmp_path / 'some'}"]) == 0
    given = [f"input={tmp_path / 'some'}", f"output={tmp_path / 'edited'}"]
    assert run(["edit", *words, "edit=img2img", *given]) == 0
    assert sorted(file.name for file in (tmp_path / "edited").glob("*.png")) == [
        "000000.png",
        "000001.png",
        "grid.png",
    ]


def test_a_grid_shows_all_images_of_its_folder(sample_runs, tmp_path):
    assert sample(sample_runs, f"output={tmp_path}/out", "run=small", "num_samples=9") == 0
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        nine = grid.size
    whole = (tmp_path / "out" / "grid.png").read_bytes()
    assert sample(sample_runs, f"output={tmp_path}/out", "run=small", "num_samples=1", "seed=3") == 0
    assert (tmp_path / "out" / "grid.png").read_bytes() == whole
    assert sample(sample_runs, f"output={tmp_path}/out", "run=small", "num_samples=1", "seed=50") == 0
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.size > nine


def test_a_grid_that_cannot_show_all_images_says_which_it_shows(sample_runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("diffusion_cli.commands.sample.GRID_IMAGES", 4)
    grid, words = tmp_path / "grid.png", ["run=small", f"output={tmp_path}", "steps=1"]
    pictures = []
    cases = ((0, 4, ""), (4, 2, "folder"), (3, 5, "command"), (0, 1, "folder"), (3, 4, "command"))
    for seed, count, whose in cases:
        of = f" of the first 4 images of the {whose}" if whose else ""
        assert sample(sample_runs, *words, f"seed={seed}", f"num_samples={count}") == 0
        assert f"\nGrid{of}: {grid}\n" in capsys.readouterr().out
        pictures.append(grid.read_bytes())
    assert pictures[0] == pictures[1] == pictures[3]
    assert pictures[2] == pictures[4] != pictures[0]


@pytest.mark.parametrize(
    "command", ["sample", "edit edit=img2img input=val num_images=1", "compare steps=[1,2]"]
)
def test_a_picture_as_output_is_refused(sample_runs, tmp_path, capsys, command):
    output = tmp_path / "grid.PNG"
    assert run([*command.split(), f"output_dir={sample_runs}", "run=small", f"output={output}"]) == 2
    expected = f"output={output}: names a picture, but the results are a folder; leave .PNG out: output={tmp_path}/grid"
    assert f"diffuse: {expected}\n" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError(), RuntimeError("can't allocate memory"), MemoryError()]
)
@pytest.mark.parametrize(
    ("size", "remedy"), [("4", "try batch_size=2, or auto"), ("1", "one image does not fit")]
)
def test_memory_that_runs_out_in_sampling_names_the_batch_size(
    sample_runs, tmp_path, monkeypatch, capsys, error, size, remedy
):
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(Denoiser, "forward", refuse)
    assert sample(sample_runs, f"output={tmp_path}/out", "run=small", f"batch_size={size}") == 2
    words = [
        "edit",
        f"output_dir={sample_runs}",
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
def test_the_batch_size_is_found_and_said_and_changes_no_image(sample_runs, tmp_path, capsys):
    assert sample(sample_runs, f"output={tmp_path}/found", "batch_size=auto") == 0
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("batch_size="))
    assert int(line.removeprefix("batch_size=")) in (1, 2, 4)
    assert sample(sample_runs, f"output={tmp_path}/given", "batch_size=6") == 0
    assert_alike(tmp_path / "found", tmp_path / "given")


def assert_alike(one, other) -> None:
    assert pngs(one).keys() == pngs(other).keys() != set()
    for name in pngs(one):
        mine, theirs = (np.array(Image.open(place / name)).astype(int) for place in (one, other))
        assert abs(mine - theirs).max() <= 1


@pytest.mark.slow
def test_a_compiled_network_makes_the_same_images_compiled_once(sample_runs, tmp_path):
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    words = ["precision=fp32", "batch_size=4", "sampler=ddpm", "strip=true"]
    assert sample(sample_runs, f"output={tmp_path}/compiled", "compile=true", *words) == 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert sample(sample_runs, f"output={tmp_path}/written", *words) == 0
    assert_alike(tmp_path / "compiled", tmp_path / "written")


def test_a_network_that_cannot_be_compiled_here_is_said_to_be_the_option(
    sample_runs, tmp_path, monkeypatch, capsys
):
    from torch._dynamo.exc import TorchDynamoException

    def failing(*arguments):
        raise TorchDynamoException("No working C++ compiler found\nin a long text")

    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **how: setattr(self, "_compiled_call_impl", failing)
    )
    assert sample(sample_runs, f"output={tmp_path}/out", "compile=true") == 2
    assert (
        "diffuse: compile=true: torch cannot compile the network here (No working" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "words",
    [
        ["sample", "num_samples=3"],
        ["edit", "edit=reconstruct", "input=val", "num_images=3"],
        ["eval", "metric=fid", "features=classifier", "num_samples=380", "force=true"],
    ],
)
def test_progress_advances_within_a_batch(sample_runs, tmp_path, monkeypatch, words):
    shown: list[float] = []
    update = ProgressBar.update

    def noted(bar: ProgressBar, n: float | None = 1) -> bool | None:
        done = update(bar, n)
        if bar.desc.startswith(("sample", "reconstruct", "evaluating samples")):
            shown.append(bar.n)
        return done

    monkeypatch.setattr(ProgressBar, "update", noted)
    more = ["steps=5", "batch_size=1000", "run=small", f"output_dir={sample_runs}"]
    output = [f"cache_dir={tmp_path}"] if words[0] == "eval" else [f"output={tmp_path}/{words[0]}"]
    assert run([*words, *more, *output]) == 0
    assert len({n for n in shown if 0 < n < max(shown)}) >= 4
    assert max(shown) == (380 if words[0] == "eval" else 3)


def test_a_run_keeps_a_picture_of_training_images_in_rows_of_classes(edit_runs):
    images = Digits("data", val_fraction=0.2, flip=False).load("train")
    assert images.labels is not None
    with Image.open(edit_runs / "told" / "previews" / "real.png") as picture:
        rows = np.array(picture)[:, -3 * 34 :].reshape(10, 34, 3, 34)
    for label in range(10):
        first = int((images.labels == label).nonzero()[0])
        shown = rows[label, 1:33:4, 0, 1:33:4]
        assert np.array_equal(shown, images[torch.tensor([first])][0, 0].numpy())
    for name in ("plain", "judge"):
        assert (edit_runs / name / "previews" / "real.png").is_file()
