"""`diffuse edit edit=anomaly`: its maps, their scores, and what has no map."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_cli.commands.anomaly_maps import rows_with_maps, scores_of
from diffusion_cli.commands.edit_jobs import EditJob
from diffusion_cli.editing import Anomaly
from diffusion_cli.formats import HighDepthImage, Uint8Image
from helpers.editing import edit, pixels


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.astype(np.uint8)).save(path)
    return path


def map_of(path):
    values = np.load(path, allow_pickle=False)
    assert values.dtype == np.float32
    return values


@pytest.fixture
def masks(tmp_path):
    """Masks of the three inputs of `edit_runs`; `b` has no anomaly."""
    for name, part in (("a", slice(2, 4)), ("b", slice(0, 0)), ("c", slice(5, 8))):
        mask = np.zeros((8, 8))
        mask[part, 3:5] = 255
        save(tmp_path / "masks" / f"{name}.png", mask)
    return tmp_path / "masks"


def test_maps_are_mean_distances_to_reconstructions(edit_runs, tmp_path, capsys):
    words = ["edit=anomaly", f"input={edit_runs}/images", "variations=3", f"output={tmp_path}/out"]
    assert edit(edit_runs, *words) == 0
    said = capsys.readouterr().out
    assert f"Anomaly maps: {tmp_path}/out/maps; largest and mean value of each: " in said
    assert "AUROC" not in said
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores.keys() == {"inputs"}
    for name in "abc":
        given = pixels(edit_runs / "images" / f"{name}.png")
        found = map_of(tmp_path / "out" / "maps" / f"{name}.npy")
        made = [pixels(tmp_path / "out" / f"{name}_{number}.png") for number in range(3)]
        each = [
            map_of(tmp_path / "out" / "maps" / "variations" / f"{name}_{number}.npy") for number in range(3)
        ]
        assert all(np.abs(abs(given - one) - own).max() <= 0.501 for one, own in zip(made, each, strict=True))
        assert (made[0] != made[1]).any()
        np.testing.assert_allclose(found, np.mean(each, 0), rtol=1e-5)
        assert (each[0] % 1 != 0).any()  # not rounded as the pixels of a file
        assert scores["inputs"][name]["largest"] == pytest.approx(float(found.max()))
        assert scores["inputs"][name]["mean"] == pytest.approx(float(found.mean()))


def test_masks_score_the_results_that_are_there(edit_runs, tmp_path, masks, capsys):
    words = ["edit=anomaly", f"input={edit_runs}/images", f"output={tmp_path}/out", "edit.blur=0.7"]
    assert edit(edit_runs, *words) == 0
    kept = (tmp_path / "out" / "a.png").stat().st_mtime_ns
    plain = pixels(tmp_path / "out" / "grid.png")
    (tmp_path / "out" / "maps" / "b.npy").unlink()
    assert edit(edit_runs, *words, f"edit.truth={masks}") == 0
    said = capsys.readouterr()
    assert "has 2 of 3 results; computing the rest" in said.err
    assert f"edit.truth={masks}: white is anomalous (3 masks), 5.21 % of the pixels" in said.err
    assert (tmp_path / "out" / "a.png").stat().st_mtime_ns == kept
    assert pixels(tmp_path / "out" / "grid.png").shape[1] > plain.shape[1]
    maps = {name: map_of(tmp_path / "out" / "maps" / f"{name}.npy") for name in "abc"}
    truth = torch.stack([torch.from_numpy(pixels(masks / f"{name}.png") > 0) for name in "abc"])
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores == scores_of(maps, [0, 1, 2], truth[:, None])
    assert f"Scores of pixels: AUROC {scores['pixels']['auroc']:.3f}" in said.out
    assert "chosen on these masks" in said.out
    assert f"Scores of inputs by the largest value: AUROC {scores['images']['auroc']:.3f}" in said.out
    assert [scores["inputs"][name]["anomalous"] for name in "abc"] == [4 / 64, 0, 6 / 64]


def test_scores_by_hand():
    """Pixels: of 2 x 6 pairs 10 are in order and 1 is equal. Inputs: the anomalous one has the largest value."""
    maps = {"x": np.array([[4, 1], [0, 3]], np.float32), "y": np.array([[2, 1], [0, 1]], np.float32)}
    truth = torch.tensor([[[[True, False], [False, False]]], [[[False, False], [False, False]]]])
    truth[0, 0, 0, 1] = True
    scores = scores_of(maps, [0, 1], truth)
    assert scores["pixels"]["auroc"] == (6 + 2 + 2 / 2) / 12
    assert scores["images"]["auroc"] == 1
    assert scores["inputs"]["x"] == {"largest": 4.0, "mean": 2.0, "anomalous": 0.5}
    both = scores_of(maps, [0, 1], truth[:1])  # the same region in both
    assert "images" not in both
    assert both["inputs"]["y"]["anomalous"] == 0.5


@pytest.mark.parametrize("form", [Uint8Image(), HighDepthImage("uint8", [0.0], [255.0], "png", "LA")])
def test_pictures_have_one_scale_for_all_maps(form):
    image = torch.zeros(2 if isinstance(form, HighDepthImage) else 1, 2, 2)
    image = image if isinstance(form, HighDepthImage) else image.to(torch.uint8)
    jobs = [EditJob(name, 0, place, [image], form) for place, name in enumerate("xy")]
    maps = [np.array([[0, 2], [4, 0]], np.float32), np.array([[0, 0], [0, 1]], np.float32)]
    first, second = rows_with_maps(jobs, [image[None]] * 2, maps, Anomaly((1, 2, 2)))
    assert first.shape == second.shape == (3, 1, 2, 2)
    assert first[2, 0].tolist() == [[0, 128], [255, 0]]
    assert second[2, 0].tolist() == [[0, 0], [0, 64]]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["edit.strength=0"], "edit.strength=0: "),
        (["edit.strength=1.5"], "edit.strength=1.5: "),
        (["edit.blur=0"], "edit.blur=0: "),
        (
            ["edit.invert=true", "sampler=ddim"],
            "edit.invert=true: the way back has neither label nor guidance, so it leads to the input itself; "
            "set label= or guidance=, or edit.invert=false",
        ),
        (
            ["edit.invert=true", "label=3"],
            "sampler: edit=anomaly requires a deterministic sampler",
        ),
        (
            ["edit.invert=true", "label=3", "sampler=ddim", "variations=2"],
            "variations=2: edit=anomaly is deterministic with this sampler",
        ),
        (["restoration=dps"], "restoration: not used by edit=anomaly"),
        (["edit.truth=nowhere"], "edit.truth=nowhere: does not exist; give a folder or ZIP of masks"),
    ],
)
def test_options_without_a_meaning_are_refused(edit_runs, capsys, words, error):
    assert edit(edit_runs, "edit=anomaly", *words, f"input={edit_runs}/images") == 2
    assert error in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (
            lambda masks: (masks / "b.png").unlink(),
            "masks: has no mask for 'b.png'; give each image one mask",
        ),
        (lambda masks: save(masks / "b.png", np.zeros((9, 8))), "b.png: has 8 x 9 pixels, but the images"),
        (
            lambda masks: [save(masks / f"{name}.png", np.ones((8, 8))) for name in "abc"],
            "masks: its masks have no anomaly; mark anomalies in white (128 to 255)",
        ),
        (
            lambda masks: [save(masks / f"{name}.png", np.full((8, 8), 255)) for name in "abc"],
            "masks: its masks have an anomaly everywhere",
        ),
    ],
    ids=["missing", "size", "empty", "full"],
)
def test_masks_that_cannot_score_are_refused_before_the_edit(
    edit_runs, tmp_path, masks, capsys, change, error
):
    change(masks)
    words = [f"input={edit_runs}/images", f"edit.truth={masks}", f"output={tmp_path}/out"]
    assert edit(edit_runs, "edit=anomaly", *words) == 2
    assert error in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_one_mask_is_of_one_input(edit_runs, masks, capsys):
    words = [f"input={edit_runs}/images", f"edit.truth={masks}/a.png"]
    assert edit(edit_runs, "edit=anomaly", *words) == 2
    assert "a.png: is one mask for 3 inputs; give a folder or ZIP" in capsys.readouterr().err
    assert edit(edit_runs, "edit=anomaly", "input=val", "num_images=2", f"edit.truth={masks}") == 2
    assert "masks of a folder are matched with input files by name" in capsys.readouterr().err


def test_an_inversion_towards_a_label_is_an_edit(edit_runs, tmp_path):
    words = [
        "edit=anomaly",
        "edit.invert=true",
        "label=3",
        "guidance=cfg",
        "sampler=ddim",
        f"input={edit_runs}/images",
    ]
    assert edit(edit_runs, *words, f"output={tmp_path}/out") == 0
    assert map_of(tmp_path / "out" / "maps" / "a.npy").max() > 0
