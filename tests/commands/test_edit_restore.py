"""`diffuse edit edit=restore`: measurements, their noise, and methods that do not take them."""

import json

import pytest

from helpers.editing import edit, pixels


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["restoration=repaint"], "restoration=repaint: works with measurements with an inverse only"),
        (
            ["measurement=clipping", "restoration=pigdm"],
            "restoration=pigdm: works with linear measurements only, unlike Clipping; use restoration=dps",
        ),
        (["measurement=mri", "edit.photons=10"], "edit.photons=10: the measurement can be negative"),
        (["edit=inpaint", "measurement=ct"], "measurement: not used by edit=inpaint; use edit=restore"),
        (["measurement=null"], "measurement=null: unknown option; choose from clipping, ct"),
        (["measurement=ct", "measurement.angles=0"], "measurement.angles=0: "),
        (["edit.sigma_y=-1"], "edit.sigma_y=-1: "),
        (
            ["restoration=diffpir", "sampler=ddpm"],
            "restoration.zeta=0.3: the sampler adds noise already; set 0, or use a sampler such as ddim",
        ),
    ],
)
def test_a_restoration_that_has_no_meaning_is_refused(edit_runs, capsys, words, error):
    kind = [] if words[0].startswith("edit=") else ["edit=restore"]
    assert edit(edit_runs, *kind, *words, "input=val", "num_images=1") == 2
    assert error in capsys.readouterr().err


def test_variations_share_a_measurement_that_does_not_depend_on_their_number(edit_runs, tmp_path, capsys):
    words = [
        "edit=restore",
        "measurement=ct",
        "measurement.angles=3",
        "restoration=diffpir",
        "edit.sigma_y=0.2",
    ]
    words += [f"input={edit_runs}/images"]
    for count in (1, 2):
        assert edit(edit_runs, *words, f"variations={count}", f"output={tmp_path}/{count}") == 0
    assert "Error on the known values: root mean square " in capsys.readouterr().out

    def shown(place, name):
        return pixels(tmp_path / place / "before" / f"{name}.1.png")

    assert (shown("2", "b_0") == shown("2", "b_1")).all()
    assert (shown("2", "b_0") == shown("1", "b")).all()
    assert (shown("2", "a_0") != shown("2", "b_0")).any()
    assert (pixels(tmp_path / "2" / "b_0.png") != pixels(tmp_path / "2" / "b_1.png")).any()
    settings = json.loads((tmp_path / "2" / "manifest.json").read_text())["settings"]
    assert settings["measurement"]["angles"] == 3
    assert edit(edit_runs, *words, "measurement.angles=4", "variations=2", f"output={tmp_path}/2") == 2
    assert "contains images made with other settings" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["dps", "pigdm"])
def test_methods_with_gradients_restore_by_the_command(edit_runs, tmp_path, method):
    words = ["edit=restore", "measurement=mri", f"restoration={method}", "input=val", "num_images=2"]
    assert edit(edit_runs, *words, f"output={tmp_path}/out") == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 3
