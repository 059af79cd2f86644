"""`diffuse edit` with wrong inputs, clashing names and several processes."""

import json
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from PIL import Image

from diffusion_cli.cli import run
from diffusion_cli.commands import edit as editing
from diffusion_cli.commands import inputs
from diffusion_cli.commands.outputs import keep_results
from diffusion_cli.data.listing import stem
from helpers.editing import edit, pixels


def test_images_that_do_not_fit_are_refused_or_fitted(edit_runs, tmp_path, capsys):
    colour = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(colour).save(tmp_path / "photo.png")
    (tmp_path / "broken.png").write_text("no image")
    assert edit(edit_runs, f"input=[{tmp_path}/photo.png,{tmp_path}/broken.png,{tmp_path}/none.png]") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "photo.png: is 30 x 20 colour, but must be 8 x 8 gray; convert it, or set fit=true" in lines[0]
    assert "broken.png: is not an image in PNG" in lines[1]
    assert "none.png: is not a file" in lines[2]
    assert edit(edit_runs, f"input={tmp_path}/photo.png", "fit=true", f"output={tmp_path}/out") == 0
    assert pixels(tmp_path / "out" / "photo.png").shape == (8, 8)


def test_files_of_one_name_do_not_overwrite_each_other(edit_runs, tmp_path):
    for name in ("a.png", "a.tif", "x/a.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 7, dtype=np.uint8)).save(tmp_path / "in" / name)
    assert edit(edit_runs, "edit=reconstruct", f"input={tmp_path}/in", f"output={tmp_path}/out") == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("*a*.png")) == [
        "a.png.png",
        "a.tif.png",
        "x-a.png",
    ]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["cats/1.jpg", "dogs/2.jpg"], ["1", "2"]),
        (["cats/1.jpg", "dogs/1.jpg", "dogs/2.jpg"], ["cats-1", "dogs-1", "dogs-2"]),
        (["set/cats/1.jpg", "set/dogs/1.jpg"], ["cats-1", "dogs-1"]),
        (["1.jpg", "dogs/1.jpg"], ["1", "dogs-1"]),
        (["/home/x/1.png", "../y/1.png"], ["home-x-1", "y-1"]),
        (["a/1.jpg", "a/1.png", "a/2.png"], ["1.jpg", "1.png", "2"]),
        (["maps.png", "before.png", "a.png"], ["00000_maps", "00001_before", "a"]),
        (["a-b/1.jpg", "a/b-1.jpg", "a/1.jpg"], ["00000_a-b-1.jpg", "00001_a-b-1.jpg", "a-1"]),
    ],
)
def test_results_of_files_with_one_name_begin_with_their_folders(files, expected):
    paths = [PurePosixPath(file) for file in files]
    assert inputs._names(paths, stem, inputs._folders(paths, stem)) == expected


@pytest.mark.parametrize("named", [True, False])
def test_a_folder_with_the_names_of_an_earlier_version_is_continued(
    edit_runs, tmp_path, monkeypatch, capsys, named
):
    for place, level in (("cats", 7), ("dogs", 9)):
        (tmp_path / "in" / place).mkdir(parents=True)
        Image.fromarray(np.full((8, 8), level, dtype=np.uint8)).save(tmp_path / "in" / place / "1.png")
    words = ["edit=reconstruct", f"input={tmp_path}/in", *([f"output={tmp_path}/out"] if named else [])]
    with monkeypatch.context() as earlier:
        earlier.setattr(inputs, "_folders", lambda paths, stem: [""] * len(paths))
        assert edit(edit_runs, *words) == 0
    folder = Path(capsys.readouterr().out.partition("Before and after: ")[2].splitlines()[0]).parent
    (folder / "00001_1.png.png").unlink()
    assert edit(edit_runs, *words) == 0
    said = capsys.readouterr()
    assert f"{folder} has 1 of 2 results; computing the rest" in said.err
    assert sorted(path.name for path in folder.glob("*.png")) == [
        "00000_1.png.png",
        "00001_1.png.png",
        "grid.png",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["input=null"], " needs images; give a file, a folder, or val for the"),
        (["input=/nowhere"], "input=/nowhere: is not a file"),
        (["input=test"], "a list of images, or input=val for images of the run's dataset"),
        (["edit.mask=/nowhere.png"], "edit.mask=/nowhere.png: does not exist"),
        (["edit.mask=MASK"], "has 4 x 4 pixels, but the images have 8 x 8"),
        (
            ["edit.mask=[2,2,9,9]"],
            "edit.mask=[2, 2, 9, 9]: must be [left,top,right,bottom] in pixels within 8 x 8",
        ),
        (["label=12"], "label=12: out of range; use a class from 0 to 9"),
        (["label=frog"], "label=frog: unknown class; choose from 0, 1"),
        (["run=plain", "label=3"], "label=3: the model is not class-conditional"),
        (["run=plain", "guidance=cfg"], "guidance=cfg: the model is not class-conditional"),
        (["run=judge"], "was trained with task=classifier"),
        (["guidance=cfg"], "label: guidance=cfg needs a class"),
        (["guidance=auto"], "guidance=auto: needs a weaker model"),
        (["guidance=auto", "guidance.step=11"], "guidance.step=11: "),
        (
            ["guidance=auto", "guidance.run=plain", "guidance.interval=[3,1]"],
            "guidance.interval=[3, 1]: must be",
        ),
        (["guidance=classifier", "guidance.run=plain", "label=1"], "was trained with task=diffusion"),
        (
            ["restoration=null"],
            "restoration=null: unknown option; choose from diffpir, dps, pigdm, repaint, replacement",
        ),
        (["edit=img2img", "restoration=dps"], "restoration: not used by edit=img2img"),
        (["edit=attribute"], "label=null: edit=attribute needs a target class"),
        (
            ["edit=attribute", "label=1", "edit.source=12"],
            "edit.source=12: out of range; use a class from 0 to 9",
        ),
        (["edit=colorize"], "edit=colorize: the model generates gray images"),
        (["edit=super_resolution", "edit.factor=3"], "edit.factor=3: does not divide 8 x 8"),
        (["edit=outpaint"], "edit.left=0: there is no side to extend"),
        (
            ["edit=interpolate", "num_images=3"],
            "3 images were given, but each result of edit=interpolate needs 2; give 2 or 4 images",
        ),
        (["edit=interpolate", "edit.seeds=[1]"], "edit.seeds=[1]: must be pairs"),
        (["edit=attribute", "label=1", "variations=2"], "variations=2: edit=attribute is deterministic with"),
        (
            ["edit=interpolate", "edit.seeds=[0,1]"],
            "edit.seeds: cannot be combined with input, num_images or fit",
        ),
        (
            ["edit=reconstruct", "sampler=ddpm"],
            "sampler: edit=reconstruct requires a deterministic sampler",
        ),
        (
            ["edit=interpolate", "edit.seeds=[0,4294967296]"],
            "edit.seeds.1=4294967296: must be at most 4294967295",
        ),
        (["seed=4294967290"], "seed=4294967290: the seed of the last result exceeds"),
        (
            [
                "run=plain",
                "edit=attribute",
                "label=1",
                "guidance=classifier",
                "guidance.run=judge",
                "edit.source=2",
            ],
            "edit.source=2: the model is not class-conditional",
        ),
        (["edit=img2img", "edit.strength=1.5"], "edit.strength=1.5: must be at most 1"),
    ],
)
def test_wrong_input_gets_one_line(edit_runs, tmp_path, capsys, words, expected):
    Image.fromarray(np.full((4, 4), 255, dtype=np.uint8)).save(tmp_path / "mask.png")
    words = [word.replace("MASK", str(tmp_path / "mask.png")) for word in words]
    given = [] if any(word.startswith("input=") for word in words) else ["input=val"]
    assert edit(edit_runs, *given, *words) == 2
    # `run=` is given twice, which is remarked on.
    (line,) = (line for line in capsys.readouterr().err.splitlines() if ": ignored, because " not in line)
    assert expected in line


def test_what_is_not_finite_is_not_saved(edit_runs, tmp_path, capsys):
    assert (
        edit(
            edit_runs,
            "restoration=dps",
            "restoration.scale=1e38",
            "input=val",
            "num_images=1",
            f"output={tmp_path}/a",
        )
        == 2
    )
    assert "images: sampling produced values that are not finite; try a smaller" in capsys.readouterr().err
    words = [f"output_dir={edit_runs}", "run=told", "steps=2", "num_samples=1", "label=1", "clip_x0=false"]
    assert run(["sample", *words, "guidance=cfg", "guidance.scale=1e39", f"output={tmp_path}/b"]) == 2
    assert not list((tmp_path / "b").glob("*.png"))


def test_names_that_would_clash_or_match_others(edit_runs, tmp_path):
    (tmp_path / "in").mkdir()
    names = ["grid", "img[1]", "n" * 220]
    for name in names:
        Image.fromarray(np.full((8, 8), 7, dtype=np.uint8)).save(tmp_path / "in" / f"{name}.png")
    places = [f"input={tmp_path}/in", f"output={tmp_path}/out"]
    assert edit(edit_runs, "edit=reconstruct", *places, "captions=false") == 0
    assert pixels(tmp_path / "out" / "00000_grid.png").shape == (8, 8)
    assert pixels(tmp_path / "out" / "grid.png").shape == (3 * 34, 3 * 34)
    assert (tmp_path / "out" / "img[1].png").is_file()


def test_two_edits_at_work_in_one_folder_keep_the_numbers_of_both(edit_runs, tmp_path, monkeypatch):
    words = [f"input={edit_runs}/images", "edit=img2img", f"output={tmp_path}/out", "batch_size=3"]
    save = editing.save_results

    def beside(output, *arguments, **options):
        save(output, *arguments, **options)
        keep_results(
            output, {"of another": {"rmse": 1.0}}
        )  # as a process does that claimed the folder before

    monkeypatch.setattr(editing, "save_results", beside)
    assert edit(edit_runs, *words) == 0
    results = json.loads((tmp_path / "out" / "manifest.json").read_text())["results"]
    assert sorted(results) == ["a", "b", "c", "of another"]


def test_results_put_together_from_names_do_not_meet(edit_runs, tmp_path):
    words = [
        "edit=interpolate",
        "edit.seeds=[0,1,0,1]",
        "label=[4,9]",
        "edit.frames=2",
        f"output={tmp_path}/a",
    ]
    assert edit(edit_runs, *words) == 0
    assert len([path for path in (tmp_path / "a").glob("[!.]*") if path.is_dir()]) == 2
    (tmp_path / "in").mkdir()
    for name in ("a-b", "c", "a", "b-c"):
        Image.fromarray(np.full((8, 8), 7, dtype=np.uint8)).save(tmp_path / "in" / f"{name}.png")
    files = ",".join(f"{tmp_path}/in/{name}.png" for name in ("a-b", "c", "a", "b-c"))
    assert (
        edit(edit_runs, "edit=interpolate", "edit.frames=2", f"input=[{files}]", f"output={tmp_path}/b") == 0
    )
    assert len(list((tmp_path / "b").glob("*.gif"))) == 2


def test_results_within_the_input_are_not_input(edit_runs, tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(np.full((8, 8), 7, dtype=np.uint8)).save(tmp_path / "in" / "one.png")
    for _ in range(2):
        assert edit(edit_runs, "edit=reconstruct", f"input={tmp_path}/in", f"output={tmp_path}/in/out") == 0
    assert len(list((tmp_path / "in" / "out").glob("*.png"))) == 2


def test_a_null_class_that_was_never_trained_is_refused(edit_runs, tmp_path, capsys):
    words = ["train", "max_steps=2", "logger=csv", "trainer=cpu", f"output_dir={tmp_path}", "name=sure"]
    assert run([*words, "model.class_conditional=true", "objective.label_dropout=0"]) == 0
    for command in (["sample", "label=none"], ["edit", "edit=reconstruct", "input=val"]):
        assert run([*command, f"output_dir={tmp_path}", "steps=2"]) == 2
        assert (
            "label=null: unconditional sampling needs a model trained with objective.label_dropout > 0"
            in capsys.readouterr().err
        )
    assert run(["edit", "edit=attribute", "label=3", "input=val", f"output_dir={tmp_path}", "steps=2"]) == 2
    assert "edit.source=null: unconditional sampling needs" in capsys.readouterr().err
