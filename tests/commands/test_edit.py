"""`diffuse edit`: its files, manifests, masks and labels."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_cli.cli import run
from diffusion_cli.commands import edit as editing
from diffusion_cli.commands.inputs import Input
from diffusion_cli.commands.masks import read_masks
from helpers.editing import edit, pixels

ANY = Input("any", torch.zeros(1, 16, 16))


def mask_file(edit_runs, kind):
    """A 16 x 16 mask of one kind, and where it is to be painted."""
    pixels = np.zeros((16, 16, 4), np.uint8)
    inner = np.zeros((16, 16), bool)
    inner[4:8, 4:8] = True
    if kind.endswith("strokes"):
        pixels[inner] = {
            "white": 255,
            "gray": [200, 200, 200, 255],
            "red": [255, 0, 0, 255],
            "black": [0, 0, 0, 255],
        }[kind.split()[0]]
    elif kind == "strokes and gray pixels":
        pixels[inner] = 255
        pixels[8, 4:8] = [100, 100, 100, 255]
    elif kind == "black and white with a transparent border":
        pixels[2:12, 2:12] = [0, 0, 0, 255]
        pixels[inner] = 255
    elif kind == "page with a hole":
        inner = ~inner
        pixels[inner] = 255
    elif kind == "photograph":
        pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 4), np.uint8)
        pixels[:3, :, :3] = 250 + pixels[:3, :, :3] // 50  # a bright sky
        pixels[..., 3] = np.where(inner, 0, 255)
    elif kind == "digit":  # gray on black, with a part erased
        pixels[..., :3] = np.pad(np.arange(8 * 8).reshape(8, 8, 1) * 4, ((4, 4), (4, 4), (0, 0)))
        pixels[..., 3] = np.where(inner, 0, 255)
    else:  # opaque or transparent all over
        pixels[inner] = 255
        pixels[..., 3] = 255 * (kind == "opaque")
        inner &= kind != "transparent"
    Image.fromarray(pixels[..., 0] if kind == "without opacity" else pixels).save(edit_runs / "mask.png")
    return edit_runs / "mask.png", inner


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("white strokes", "the white part is painted"),
        ("black and white with a transparent border", "the white part is painted"),
        ("page with a hole", "the white part is painted"),
        ("photograph", "the transparent part is painted"),
        ("opaque", "white is painted, 6.25 % of the pixels\n"),
        ("without opacity", "white is painted, 6.25 % of the pixels\n"),
    ],
)  # fmt: skip
def test_a_mask_is_white_or_an_erased_part_of_a_photograph(tmp_path, capsys, kind, said):
    file, expected = mask_file(tmp_path, kind)
    assert (read_masks(str(file), [ANY], [16, 16])[0, 0].numpy() == expected).all()
    assert capsys.readouterr().err.startswith(f"diffuse: edit.mask={file}: {said}")


@pytest.mark.parametrize(
    "kind", ["strokes and gray pixels", "gray strokes", "red strokes", "black strokes", "digit"]
)
def test_a_mask_whose_transparent_part_may_mean_either_is_refused(tmp_path, kind):
    file, _ = mask_file(tmp_path, kind)
    with pytest.raises(
        ValueError, match=r"mask.png: .*; save the mask as black and white without transparency$"
    ):
        read_masks(str(file), [ANY], [16, 16])


@pytest.mark.slow
def test_edits_are_files_named_by_input_with_a_manifest(edit_runs, tmp_path, capsys):
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[2:5, 3:8] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    words = [
        f"input={edit_runs}/images",
        f"edit.mask={tmp_path}/mask.png",
        f"output={tmp_path}/out",
        "seed=5",
    ]
    assert edit(edit_runs, *words, "variations=2") == 0
    assert "at most 0 of 255" in capsys.readouterr().out
    names = sorted(file.name for file in (tmp_path / "out").glob("*.png"))
    assert names == ["a_0.png", "a_1.png", "b_0.png", "b_1.png", "c_0.png", "c_1.png", "grid.png"]
    for name in "abc":
        before = pixels(edit_runs / "images" / f"{name}.png")
        for variation in "01":
            after = pixels(tmp_path / "out" / f"{name}_{variation}.png")
            assert (after == before)[mask == 0].all()
            assert (after != before)[mask > 0].any()
    assert (pixels(tmp_path / "out" / "a_0.png") != pixels(tmp_path / "out" / "a_1.png")).any()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["settings"]["seed"] == 5
    assert [name for name, _ in manifest["settings"]["inputs"]] == ["a", "b", "c"]
    assert manifest["results"]["a_0"].keys() == {"rmse", "largest", "rmse_sampled"}
    assert manifest["results"]["a_0"]["largest"] == 0
    assert manifest["results"]["a_0"]["rmse_sampled"] > 0
    # The same command with another drawing in the file does not take these results for its own.
    Image.fromarray(255 - mask).save(tmp_path / "mask.png")
    assert edit(edit_runs, *words, "variations=2") == 2
    assert "read_sha256.mask=" in capsys.readouterr().err


def test_an_interrupted_edit_keeps_and_counts_its_finished_batches(edit_runs, tmp_path, capsys, monkeypatch):
    compute, batches = editing.edited_batch, []

    def interrupted(*arguments):
        batches.append(arguments)
        if len(batches) == 3:
            raise KeyboardInterrupt
        return compute(*arguments)

    words = ["edit=reconstruct", "input=val", "num_images=40", f"output={tmp_path}/out", "captions=false"]
    with monkeypatch.context() as patch:
        patch.setattr(editing, "edited_batch", interrupted)
        assert edit(edit_runs, *words) == 75
    assert f"{tmp_path}/out has 32 of 40 results\n" in capsys.readouterr().err
    assert edit(edit_runs, *words) == 0
    said = capsys.readouterr()
    assert "has 32 of 40 results; computing the rest" in said.err
    assert "grid.png (first 10 of 40)\n" in said.out


def test_a_series_names_its_frames_and_calls(edit_runs, tmp_path, capsys):
    words = ["edit=interpolate", "edit.frames=3", "num_images=2", "input=val", f"output={tmp_path}/out"]
    assert edit(edit_runs, *words) == 0
    assert "1 result of interpolate, 3 frames in at most " in capsys.readouterr().out


def test_a_stopped_edit_is_completed_whatever_the_batch(edit_runs, tmp_path, capsys):
    words = [f"input={edit_runs}/images", "restoration.num_resamples=2"]
    edit(edit_runs, *words, f"output={tmp_path}/whole")
    edit(edit_runs, *words, f"output={tmp_path}/parts", "batch_size=1")
    (tmp_path / "parts" / "b.png").unlink()
    kept = (tmp_path / "parts" / "a.png").stat().st_mtime_ns
    edit(edit_runs, *words, f"output={tmp_path}/parts", "batch_size=2")
    assert "has 2 of 3 results" in capsys.readouterr().err
    assert (tmp_path / "parts" / "a.png").stat().st_mtime_ns == kept
    for name in "abc":
        one, other = (pixels(tmp_path / place / f"{name}.png") for place in ("whole", "parts"))
        assert abs(one - other).max() <= 1
    assert edit(edit_runs, *words, f"output={tmp_path}/whole", "seed=3") == 2
    assert "contains images made with other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["edit=outpaint", "edit.right=3"],
        ["edit=outpaint", "edit.top=2", "edit.canvas=keep"],
        ["edit=super_resolution", "restoration=dps", "restoration.scale=0.3"],
        ["edit=img2img", "label=3", "guidance=cfg"],
        ["edit=img2img", "label=[0,3]", "guidance=classifier", "guidance.run=judge"],
        ["edit=img2img", "guidance=auto", "guidance.step=10"],
        ["edit=reconstruct"],
        ["edit=attribute", "edit.source=4", "label=9", "guidance=cfg"],
        ["edit=interpolate", "edit.frames=4"],
        ["restoration=replacement", "sampler=unipc"],
    ],
)
def test_every_kind_of_edit_of_real_images(edit_runs, tmp_path, words):
    out = f"output={tmp_path}/out"
    assert edit(edit_runs, *words, "input=val", "num_images=4", out) == 0
    with_words = pixels(tmp_path / "out" / "grid.png")
    assert edit(edit_runs, *words, "input=val", "num_images=4", out, "captions=false") == 0
    grid = pixels(tmp_path / "out" / "grid.png")
    assert grid.shape[0] % (2 if "edit=interpolate" in words else 4) == 0
    assert grid.std() > 0
    assert all(more > less for more, less in zip(with_words.shape, grid.shape, strict=True))


def test_images_before_an_edit_without_names_leave_the_names_of_results_above_these(
    edit_runs, tmp_path, monkeypatch
):
    drawn = []
    monkeypatch.setattr(
        "diffusion_cli.commands.edit_results.save_rows", lambda rows, path, words: drawn.append(words)
    )
    monkeypatch.setattr("diffusion_cli.editing.transform.Img2Img.before_names", ("noised",))
    words = ["edit=img2img", "input=val", "num_images=1", "steps=2", f"output={tmp_path}/out"]
    assert edit(edit_runs, *words) == 0
    assert drawn[0].columns == ["", "noised", "result"]


def test_an_interpolation_is_a_strip_and_an_animation(edit_runs, tmp_path):
    words = ["edit=interpolate", "edit.seeds=[2,7]", "edit.frames=4", f"output={tmp_path}/out"]
    assert edit(edit_runs, *words) == 0
    (series,) = [path for path in (tmp_path / "out").glob("[!.]*") if path.is_dir()]
    assert [file.name for file in sorted(series.iterdir())] == [
        "000.png",
        "001.png",
        "002.png",
        "003.png",
        "strip.png",
    ]
    (animation,) = (tmp_path / "out").glob("*.gif")
    assert getattr(Image.open(animation), "n_frames", 1) == 6  # there and back
    run(
        [
            "sample",
            f"output_dir={edit_runs}",
            "run=told",
            "steps=4",
            "label=none",
            "num_samples=8",
            f"output={tmp_path}/s",
        ]
    )
    for frame, seed in (("000", 2), ("003", 7)):
        assert abs(pixels(series / f"{frame}.png") - pixels(tmp_path / "s" / f"{seed:06d}.png")).max() <= 1


def test_labels_are_given_to_inputs_in_turn(edit_runs, tmp_path):
    """Whatever the number of variations: input 1 gets the second label."""
    words = [f"input={edit_runs}/images", "edit=img2img", "edit.strength=1.0", "variations=2"]
    words += ["guidance=cfg", "guidance.scale=200"]  # so that few steps of training distinguish labels
    for place, label in (("one", "[4,2,7]"), ("other", "[1,2,3]")):
        assert edit(edit_runs, *words, f"label={label}", f"output={tmp_path}/{place}") == 0

    def same(name):
        return (pixels(tmp_path / "one" / name) == pixels(tmp_path / "other" / name)).all()

    assert same("b_0.png")
    assert same("b_1.png")
    assert not same("a_1.png")
    assert not same("c_0.png")


def test_results_of_a_command_are_input_of_the_next(edit_runs, tmp_path):
    words = [f"output_dir={edit_runs}", "run=told", "steps=2", "num_samples=3", "label=3"]
    assert run(["sample", *words, f"output={tmp_path}/threes"]) == 0
    assert edit(edit_runs, "edit=reconstruct", f"input={tmp_path}/threes", f"output={tmp_path}/one") == 0
    assert edit(edit_runs, "edit=reconstruct", f"input={tmp_path}/one", f"output={tmp_path}/two") == 0
    made = sorted(file.name for file in (tmp_path / "two").glob("*.png"))
    assert made == ["000000.png", "000001.png", "000002.png", "grid.png"]


def test_the_order_of_the_input_is_part_of_an_edit(edit_runs, tmp_path, capsys):
    files = [f"{edit_runs}/images/{name}.png" for name in "ab"]
    words = ["edit=reconstruct", f"output={tmp_path}/out"]
    assert edit(edit_runs, *words, f"input=[{','.join(files)}]") == 0
    assert edit(edit_runs, *words, f"input=[{','.join(reversed(files))}]") == 2
    assert "inputs=" in capsys.readouterr().err


def test_a_series_with_a_frame_missing_is_made_again(edit_runs, tmp_path, capsys):
    words = ["edit=interpolate", "edit.seeds=[2,7]", "edit.frames=3", f"output={tmp_path}/out"]
    assert edit(edit_runs, *words) == 0
    frame = tmp_path / "out" / "seed_2-seed_7" / "001.png"
    before = frame.read_bytes()
    frame.unlink()
    assert edit(edit_runs, *words) == 0
    assert frame.read_bytes() == before


def test_labels_are_chosen_by_name_number_list_and_all(edit_runs, tmp_path):
    def sample(*words):
        return run(["sample", f"output_dir={edit_runs}", "run=told", "steps=2", "num_samples=6", *words])

    def manifest(place):
        return json.loads((tmp_path / place / "manifest.json").read_text())["settings"]["labels"]

    for label, numbers in (
        ("7", [7]),
        ("[4,2]", [4, 2]),
        ("all", list(range(10))),
        ("null", list(range(10))),
    ):
        place = label.strip("[]").replace(",", "_")
        assert sample(f"label={label}", f"output={tmp_path}/{place}", "captions=false") == 0
        assert manifest(place) == numbers
    assert sample("label=none", f"output={tmp_path}/none") == 0
    assert manifest("none") is None
    two = pixels(tmp_path / "4_2" / "grid.png")
    assert two.shape == (2 * 34, 3 * 34)  # a row a class


def test_the_newest_run_is_that_of_a_denoiser(edit_runs, capsys):
    (edit_runs / "judge" / "checkpoints" / "last.ckpt").touch()
    assert run(["sample", f"output_dir={edit_runs}", "steps=2", "num_samples=2"]) == 0
    assert "judge" not in capsys.readouterr().out


def test_a_classifier_run_shows_its_accuracy_by_noise_level(edit_runs):
    header = (edit_runs / "judge" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"val_accuracy", "val_accuracy_q1", "val_accuracy_q4", "val_loss"} <= set(header)


def test_an_edit_names_the_repetitions_of_steps_and_results_that_are_there(edit_runs, capsys):
    words = [
        "edit",
        f"output_dir={edit_runs}",
        "run=plain",
        "edit=inpaint",
        "input=val",
        "num_images=1",
        "steps=2",
    ]
    said = []
    for _ in range(2):
        capsys.readouterr()
        assert run([*words, "restoration.num_resamples=3"]) == 0
        out, err = capsys.readouterr()
        said.append((out.partition(", in ")[0], "inpaint: 0%" in err))
    assert said == [
        ("1 result of inpaint, at most 6 network calls each (steps=2, restoration.num_resamples=3)", True),
        ("1 result of inpaint already there", False),
    ]
