"""Figures: the numbers behind curves and strips, and the files that they are written to."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_cli.captions import Captions
from diffusion_cli.cli import run
from diffusion_cli.config import PlotConfig, load
from diffusion_cli.data import Digits
from diffusion_cli.figures import Forward, Losses, Previews, Schedules, read_metrics
from diffusion_cli.generate import frame_places
from diffusion_cli.images import read_images, save_grid, save_rows

ROWS = """step,loss,loss_q1,lr,val_loss
1,0.5,0.7,0.1,
2,0.25,0.5,0.1,0.4
"""


@pytest.fixture
def runs(tmp_path):
    """Two runs with only the files that figures read."""
    for name in ("a", "b"):
        for part in ("checkpoints", "previews"):
            (tmp_path / name / part).mkdir(parents=True)
        (tmp_path / name / "checkpoints" / "last.ckpt").touch()
        (tmp_path / name / "metrics.csv").write_text(ROWS)
        for step in range(1, 8):
            grey = torch.full((4, 1, 8, 8), 10 * step, dtype=torch.uint8)
            save_grid(grey, tmp_path / name / "previews" / f"step_{step:08d}.png")
    return tmp_path


def plot(*words: str) -> int:
    return run(["plot", *words])


def test_curves_of_schedules_are_the_published_numbers(schedules):
    panels = Schedules(points=11).panels({name: schedules[name] for name in ("linear", "vp")})
    alpha_bar, beta, log_snr = panels
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    assert [curve.label for curve in beta.curves] == ["linear"]  # VP has no table
    assert np.allclose(beta.curves[0].y, betas, rtol=1e-9)
    assert beta.curves[0].x[0] == 1 / 1000
    assert alpha_bar.curves[0].y[-1] == pytest.approx(torch.prod(1 - betas).item())
    assert alpha_bar.curves[1].y[-1] == pytest.approx(np.exp(-10.05))
    for of_alpha, of_snr in zip(alpha_bar.curves, log_snr.curves, strict=True):
        share = np.array(of_alpha.y)
        assert np.allclose(of_snr.y, np.log(share / (1 - share)))


def test_a_process_that_does_not_keep_the_variance_is_not_shown_by_alpha_bar(schedules):
    panels = Schedules(points=11).panels({"cosine": schedules["cosine"], "edm": schedules["edm"]})
    assert [panel.y_label for panel in panels[:3]] == [r"$\alpha_t$", r"$\sigma_t$", r"$\beta_t$"]
    assert panels[0].curves[1].y == [1] * 11
    assert (panels[1].curves[1].y[0], panels[1].curves[1].y[-1]) == pytest.approx((0.002, 80))


def test_only_finite_numbers_are_drawn(schedules):
    *_, beta, log_snr = Schedules(points=11).panels({"zero": schedules["zero_snr"]})
    assert beta.curves[0].y[-1] == 1
    assert len(log_snr.curves[0].y) == 10  # without t = 1, where it is -inf


@pytest.mark.parametrize("schedule", ["cosine", "edm"])
def test_a_strip_goes_from_the_image_to_the_noise(schedule):
    config = load("plot", [f"schedule={schedule}", "image=3"])
    assert isinstance(config, PlotConfig)
    forward = Forward(dataset="digits", split="val", frames=4)
    row = forward.row(config)
    images = Digits("data", val_fraction=0.2, flip=False).load("val")
    assert torch.equal(row[0], images[torch.tensor([3])][0])
    noise = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(3))
    expected = noise.add(1).mul(127.5).clamp(0, 255)
    assert (row[-1] - expected).abs().max() < 3  # with sigma 80 too, for it is divided by


def test_losses_of_one_run_share_a_panel_and_of_several_have_one_each(runs):
    curves = read_metrics(runs / "a")
    (panel,) = Losses(log=True).panels({"a": curves})
    assert panel.log_y
    assert [(curve.label, curve.points) for curve in panel.curves] == [
        ("training", [(1, 0.5), (2, 0.25)]),
        ("1st quartile (least noise)", [(1, 0.7), (2, 0.5)]),
        ("validation", [(2, 0.4)]),
    ]
    panels = Losses(log=True).panels({"a": curves, "b": curves})
    assert [panel.title for panel in panels] == ["training", "1st quartile (least noise)", "validation"]
    assert [curve.label for curve in panels[0].curves] == ["a", "b"]
    assert not Losses(log=True).panels({"a": {"loss": [(1, 0.1), (2, -0.2)]}})[0].log_y


def test_a_dollar_in_the_name_of_a_run_begins_no_mathematics(runs):
    hostile = "$\\frac$"
    (runs / "a").rename(runs / hostile)
    for words in (f'run="{hostile}"', f'run=[b,"{hostile}"]'):
        assert plot("loss", words, f"output_dir={runs}", f"output={runs}/x.svg", "force=true") == 0
        assert f">{hostile}</text>" in (runs / "x.svg").read_text()


def test_where_a_run_grew_is_between_the_sizes_on_record(runs):
    rows = ["step,loss,size", "5,0.5,4", "10,0.4,4", "15,0.9,8", "20,0.8,8"]
    (runs / "a" / "metrics.csv").write_text("\n".join(rows))
    (grown,), (other,) = (Losses(log=True).panels({name: read_metrics(runs / name)}) for name in "ab")
    assert (grown.marks, other.marks) == ([10], [])
    assert plot("loss", "run=a", f"output_dir={runs}", f"output={runs}/loss.svg") == 0


def test_previews_are_evenly_chosen_and_end_with_the_last(runs):
    found = Previews(frames=3).previews(runs / "a")
    assert {step: int(image.min()) for step, image in found.items()} == {1: 10, 4: 40, 7: 70}
    assert frame_places(3, 10) == [0, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [["schedule"], ["forward", "image=[1,2]"], ["loss", "run=[a,b]"], ["previews", "run=a"]]
)
def test_the_same_command_draws_to_the_same_file_and_another_to_another(runs, words):
    place = f"output_dir={runs}"
    assert plot(*words, place) == plot(*words, place) == 0
    (file,) = (runs / "figures").iterdir()
    with Image.open(file) as image:
        assert image.format == "PNG"
    assert plot(*words, "schedule=ve", place) == 0
    assert len(list((runs / "figures").iterdir())) == 2


@pytest.mark.slow
def test_the_suffix_is_the_format_and_no_file_of_the_users_is_lost(tmp_path, runs, capsys):
    words = ["loss", "run=a", f"output_dir={runs}"]
    for suffix, beginning in (("pdf", b"%PDF"), ("svg", b"<?xml")):
        assert plot(*words, f"output={tmp_path}/x.{suffix}") == 0
        assert (tmp_path / f"x.{suffix}").read_bytes().startswith(beginning)
    assert b">validation</text>" in (tmp_path / "x.svg").read_bytes()
    assert plot(*words, f"output={tmp_path}/x.svg") == 2
    assert "already exists; choose another name, or set force=true" in capsys.readouterr().err
    assert plot(*words, f"output={tmp_path}/x.svg", "force=true") == 0
    assert plot(*words, f"output={tmp_path}/x.jpg") == 2
    assert (
        "unsupported file format for figure=loss; use the suffix png or pdf or svg" in capsys.readouterr().err
    )


def test_previews_with_and_without_names_of_classes_are_drawn_together(runs):
    first, last = (runs / "a" / "previews" / f"step_{step:08d}.png" for step in (1, 7))
    old = read_images([first])[0]
    rows = list(torch.full((4, 1, 8, 8), 70, dtype=torch.uint8).split(2))
    save_rows(rows, last, Captions(["cat", "dog"]))
    found = Previews(frames=2).previews(runs / "a")
    assert found[1].shape == found[7].shape
    down, across = old.shape[1:]
    assert torch.equal(found[1][:, -down - 4 : -4, -across - 4 : -4], old)
    assert plot("previews", "run=[a,b]", f"output_dir={runs}", f"output={runs}/x.png") == 0
    assert plot("previews", "run=a", f"output_dir={runs}", f"output={runs}/x.gif") == 0


@pytest.mark.parametrize("words", [["forward", "image=[1,2]"], ["previews", "run=[a,b]"]])
def test_words_of_figures_can_be_left_out(runs, words):
    sizes = []
    for said in ("true", "false"):
        file = runs / f"{said}.png"
        assert plot(*words, f"figure.captions={said}", f"output_dir={runs}", f"output={file}") == 0
        with Image.open(file) as image:
            sizes.append(image.size)
    assert sizes[0] > sizes[1]


def test_an_animation_shows_one_run(tmp_path, runs, capsys):
    words = ["previews", "figure.frames=3", f"output={tmp_path}/x.gif", f"output_dir={runs}"]
    assert plot(*words, "run=[a,b]") == 2
    assert "an animation shows a single run" in capsys.readouterr().err
    assert plot(*words, "run=a") == 0
    with Image.open(tmp_path / "x.gif") as image:
        assert getattr(image, "n_frames", 1) == 4  # there and back


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["schedule", "run=[a,b]"], "run: figure=schedule takes lists of schedule only; give one value"),
        (["schedule", "figure.points=[9,10]"], "figure.points: figure=schedule takes lists of schedule only"),
        (["forward", "image=9999"], "image=9999: digits has 359 images in its val split"),
        (
            ["forward", "figure.dataset=digit"],
            "figure.dataset=digit: cannot be loaded by name (dataset=digit",
        ),
        (["loss", "run=c"], "run=c: does not exist"),
    ],
)
def test_a_figure_says_what_it_is_not_of(runs, capsys, words, said):
    assert plot(*words, f"output_dir={runs}") == 2
    assert said in capsys.readouterr().err


def test_runs_without_records_are_refused(runs, capsys):
    (runs / "a" / "metrics.csv").unlink()
    for file in (runs / "a" / "previews").iterdir():
        file.unlink()
    assert plot("loss", "run=a", f"output_dir={runs}") == 2
    assert "has no metrics.csv; train with logger=csv" in capsys.readouterr().err
    assert plot("previews", "run=a", f"output_dir={runs}") == 2
    assert "has no previews" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"\xff\xfe", "is not CSV in UTF-8"),
        (b"step,loss\n1,\x1b[2J\nx,1\n2,nan\n3,1e300\n4", "has no losses"),
        (b"", "has no column step"),
    ],
)
def test_a_table_without_losses_is_one_line(runs, capsys, text, message):
    (runs / "a" / "metrics.csv").write_bytes(text)
    assert plot("loss", "run=a", f"output_dir={runs}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"diffuse: {runs}/a/metrics.csv: {message}")
