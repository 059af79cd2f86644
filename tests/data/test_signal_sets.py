"""Signals from arrays, files and formulas, and their way through every command."""

import re
import zipfile

import numpy as np
import pytest
import torch

from diffusion_cli.cli import run
from diffusion_cli.data import Signals
from diffusion_cli.data.heartbeats import NOISE, RATE, WAVES, heartbeats
from diffusion_cli.formats import Signal
from diffusion_cli.formats.signal import read_signal

RNG = np.random.default_rng(0)


def signals(path=None, **changes) -> Signals:
    options = {"size": 60, "val_fraction": 0.25}
    return Signals("", path=None if path is None else str(path), **(options | changes))


# --- Built-in signals -------------------------


def beat(t: np.ndarray, waves: dict[str, tuple[float, float, float]]) -> np.ndarray:
    return np.sum([a * np.exp(-0.5 * ((t - c) / s) ** 2) for c, s, a in waves.values()], 0)


def test_heartbeats_are_sums_of_their_waves_and_noise():
    peaks = []
    for number in range(0, 60, 2):  # normal ones
        signal = heartbeats(number, 8 * RATE)
        tops = [
            t
            for t in range(40, len(signal) - 60)
            if signal[t] > 0.6 and signal[t] == signal[t - 9 : t + 10].max()
        ]
        intervals = np.diff(tops) / RATE
        assert 60 / 125 < intervals.min() <= intervals.max() < 60 / 45
        assert intervals.std() < 0.06 * intervals.mean()
        peaks += [signal[t - 35 : t + 50] for t in tops]
    t = np.arange(-35, 50) / RATE
    assert np.corrcoef(np.mean(peaks, 0), beat(t, WAVES))[0, 1] > 0.995
    flat = np.concatenate([heartbeats(number, 2)[:1] for number in range(0, 4000, 2)])
    assert abs(np.diff(np.sort(flat)[400:1600]).mean()) < NOISE  # no beat for most of the time


def test_a_premature_beat_is_early_and_wide():
    normal, premature = (
        np.mean([(heartbeats(n, 256) > 0.5).sum() / max(1, (np.diff((heartbeats(n, 256) > 0.5).astype(int)) > 0).sum())
                 for n in range(first, 200, 2)])
        for first in (0, 1)
    )  # fmt: skip
    assert premature > 1.5 * normal


def test_built_in_signals_are_balanced_split_and_always_the_same():
    dataset = signals()
    train, val = dataset.load("train"), dataset.load("val")
    assert dataset.class_names == ("normal", "premature")
    assert len(train) + len(val) == 60
    assert 5 < len(val) < 25
    assert train.labels is not None
    assert val.labels is not None
    assert torch.bincount(torch.cat([train.labels, val.labels])).tolist() == [30, 30]
    assert train.shape == (1, 256)
    assert torch.equal(signals().load("train").pixels, train.pixels)
    assert train.pixels.abs().max() < 1  # the range clips nothing
    assert signals(labels="none").class_names is None
    with pytest.raises(ValueError, match=r"dataset.labels=csv: applies to files; use auto or none"):
        signals(labels="csv")


# --- Arrays -----------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64", "int16"])
@pytest.mark.parametrize("shape", [(20, 30), (20, 2, 30)])
def test_arrays_of_signals_are_read(tmp_path, dtype, shape):
    values = (RNG.uniform(-5, 5, shape) * (1000 if dtype == "int16" else 1)).astype(dtype)
    np.save(tmp_path / "ecg.npy", values)
    bound = 5000 if dtype == "int16" else 5
    dataset = signals(tmp_path / "ecg.npy", range=[-bound, bound], length=25)
    assert dataset.shape == (*shape[1:-1], 25)[-2:] if len(shape) == 3 else (1, 25)
    train, val = dataset.load("train").pixels, dataset.load("val").pixels
    assert (len(train), len(val)) == (15, 5)
    expected = values.reshape(20, -1, 30)[..., :25].astype(np.float64) / bound
    found = torch.cat([train, val]).numpy()
    order = [np.abs(found - row).reshape(20, -1).max(1).argmin() for row in expected]
    assert sorted(order) == [*range(20)]
    np.testing.assert_allclose(found[order], expected, atol=1e-6)
    assert dataset.form == Signal(dtype, [-bound], [bound])
    assert torch.equal(
        signals(tmp_path / "ecg.npy", range=[-bound, bound], length=25).load("val").pixels, val
    )


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_npz_has_classes_and_marks(tmp_path, save):
    values = RNG.integers(-9, 9, (6, 16)).astype(np.int16)
    marks = np.array([0, 1, 0, 0, 1, 0], bool)
    save(tmp_path / "x.npz", signals=values, labels=[0, 1, 0, 1, 1, 0], class_names=["a", "b"], val=marks)
    dataset = signals(tmp_path / "x.npz", val_fraction=None)
    assert dataset.class_names == ("a", "b")
    val = dataset.load("val")
    assert val.labels is not None
    assert val.labels.tolist() == [1, 1]
    np.testing.assert_array_equal(dataset.decoder.form.values(val.pixels).round()[:, 0], values[marks])


def test_wrong_arrays_are_refused_in_a_line(tmp_path):
    def refused(array, problem: str, **options):
        np.save(tmp_path / "x.npy", array)
        with pytest.raises(ValueError, match=re.escape(problem)) as caught:
            signals(tmp_path / "x.npy", **options).load("train")
        assert "\n" not in str(caught.value)

    real = np.linspace(-2, 3, 40, dtype=np.float32).reshape(4, 10)
    refused(
        real,
        "dataset.range=null: floating-point signals need a range; "
        "give [low,high] of all signals; 4 of them have values from -2 to 3",
    )
    refused(real[None, None], "has float32 of shape (1, 1, 4, 10); signals are [N,L] or [N,C,L]")
    refused(real.astype(np.uint8), "has uint8 of shape (4, 10); signals are [N,L] or [N,C,L] of float32")
    refused(real, "dataset.length=11: the signals have only 10 values; use a smaller length", length=11)
    refused(np.full_like(real, np.nan), "has values that are not finite; repair or remove it", range=[0, 1])
    with pytest.raises(ValueError, match=r"dataset.path=.*none.npy: no such file"):
        signals(tmp_path / "none.npy")


def test_remarks_name_likely_mistakes(tmp_path):
    np.save(tmp_path / "x.npy", RNG.normal(size=(8, 40, 2)))
    (line, clipped) = signals(tmp_path / "x.npy", range=[-1, 1]).remarks()
    assert "read as 8 signals of 40 channels and length 2; if this is wrong, save [N,C,L]" in line
    assert re.search(r"dataset.range=\[-1,1\]: clips \d+% of the values of 8 signals examined", clipped)


# --- Files ------------------------------------


@pytest.fixture
def folder(tmp_path):
    for name in ("calm/a.csv", "calm/b.csv", "wild/c.npy"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        values = RNG.uniform(-1, 1, (2, 12))
        if path.suffix == ".npy":
            np.save(path, values)
        else:
            np.savetxt(path, values.T, delimiter=",", header="left,right", comments="")
    return tmp_path / "in"


def test_files_of_a_folder_or_an_archive_are_one_set(folder, tmp_path):
    images = signals(folder, range=[-1, 1], val_fraction=0.0).load("train")
    assert images.shape == (2, 12)
    assert images.labels is not None
    assert images.labels.tolist() == [0, 0, 1]
    expected = np.loadtxt(folder / "calm" / "b.csv", delimiter=",", skiprows=1).T
    np.testing.assert_allclose(images.pixels[1], expected, atol=1e-6)
    with zipfile.ZipFile(tmp_path / "same.zip", "w") as archive:
        for name in ("calm/a.csv", "calm/b.csv", "wild/c.npy"):
            archive.write(folder / name, name)
    packed = signals(tmp_path / "same.zip", range=[-1, 1], val_fraction=0.0).load("train")
    assert torch.equal(packed.pixels, images.pixels)


def test_a_table_of_labels_is_no_signal(folder):
    (folder / "labels.csv").write_text("file,label\ncalm/a.csv,x\ncalm/b.csv,y\nwild/c.npy,y\n")
    dataset = signals(folder, range=[-1, 1], val_fraction=0.0)
    assert dataset.files == ["calm/a.csv", "calm/b.csv", "wild/c.npy"]
    assert dataset.class_names == ("x", "y")


def test_files_that_cannot_be_used_are_named(folder):
    np.save(folder / "d.npy", RNG.normal(size=(3, 12)))
    np.save(folder / "e.npy", RNG.normal(size=(2, 9)))
    (folder / "f.csv").write_text("1,2\n3\n")
    dataset = signals(folder, range=[-1, 1], val_fraction=0.0)
    with pytest.raises(ValueError, match="cannot use 3 of the signals; repair or remove") as caught:
        dataset.load("train")
    for words in [
        "d.npy (has 3 channels; expected 2)", "e.npy (has 9 values per channel, fewer than the length of 12)",
        "f.csv (has lines of 2 and 1 columns)",
    ]:  # fmt: skip
        assert words in str(caught.value)
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no signals; expected files with \.npy \.csv \.wav"):
        signals(folder / "empty")


def test_a_file_of_other_units_is_named(folder):
    np.save(folder / "wild" / "d.npy", RNG.integers(-9, 9, (2, 12)).astype(np.int16))
    np.save(folder / "wild" / "e.npy", RNG.normal(size=(2, 12)).astype(np.float32))
    with pytest.raises(
        ValueError,
        match=r"cannot use 1 of the signals; .* wild/d\.npy \(has int16 values; expected float64, as in the dataset",
    ):
        signals(folder, range=[-1, 1], val_fraction=0.0).load("train")


@pytest.mark.parametrize("packed", [False, True])
def test_files_beyond_the_range_are_named(folder, tmp_path, packed):
    for number in range(20):
        scale = {7: 3.0, 13: 1.1}.get(number, 0.99)
        np.save(folder / "calm" / f"{number:02d}.npy", scale * np.linspace(-1, 1, 24).reshape(2, 12))
    if packed:
        with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
            for file in sorted(folder.rglob("*.*")):
                archive.write(file, file.relative_to(folder))
    path = tmp_path / "in.zip" if packed else folder
    assert signals(path, range=[-3, 3]).remarks() == []
    (line,) = signals(path, range=[-1, 1]).remarks()
    assert line == (
        "dataset.range=[-1,1]: clips 67% of the values of calm/07.npy and over 1% of 1 other file; "
        "give dataset.range=[low,high] of all signals if this is not intended"
    )
    (folder / "calm" / "13.npy").unlink()
    (line,) = signals(folder, range=[-1, 1]).remarks()
    assert "clips 67% of the values of calm/07.npy; give" in line
    (line,) = signals(folder, range=[-99, 99]).remarks()
    assert "only 1.0% of it is used by the values of 8 signals examined" in line


# --- From a file to samples -------------------


TINY = [
    "model.channels=8",
    "model.norm_groups=4",
    "model.head_channels=8",
    "batch_size=8",
    "trainer=cpu",
    "logger=csv",
]


def test_edits_of_signals_map_anomalies_and_refuse_what_needs_images(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = [
        "dataset=signals",
        "dataset.size=20",
        "dataset.length=32",
        "max_steps=1",
        "trainer=cpu",
        "logger=csv",
    ]
    assert run(["train", *data, "model=set_tiny", "name=a"]) == 2
    assert (
        "ignores the order of values, so it cannot model signals; use model=unet1d_tiny"
        in capsys.readouterr().err
    )
    assert run(["train", *data, *TINY, "preview_every=null", "name=a"]) == 0
    capsys.readouterr()
    for words, said in [
        (["edit=outpaint", "edit.right=8"], "edit=outpaint: needs images or volumes; use edit=inpaint"),
        (["edit=colorize"], "edit=colorize: needs images"),
        (
            ["edit=inpaint", "edit.mask=[20,40]"],
            "edit.mask=[20, 40]: must be [start,end] in values within 32",
        ),
        (["edit=inpaint", "edit.mask=[1,2,3,4]"], "must be [start,end] in values within 32"),
    ]:
        assert run(["edit", *words, "input=val", "steps=2"]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "edit" in line]
        assert said in line
    capsys.readouterr()
    truth = np.arange(32) > 25
    np.save("truth.npy", truth.astype(np.float32))
    np.save("signal.npy", np.sin(np.arange(32, dtype=np.float32)))
    words = ["edit=anomaly", "input=signal.npy", "edit.truth=truth.npy", "steps=2", "output=maps"]
    assert run(["edit", *words]) == 0
    values = np.load("maps/maps/signal.npy")
    assert (values.shape, values.dtype) == ((32,), np.float32)
    assert "Scores of values: AUROC" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_sounds_are_trained_on_sampled_and_continued(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    form = Signal("int16", [-1000.0], [1000.0], ".wav", 4000)
    (tmp_path / "in").mkdir()
    for number in range(12):
        form.write(form.samples(RNG.uniform(-900, 1100, (2, 43))), tmp_path / "in" / f"{number}.wav")
    data = ["dataset=signals", "dataset.path=in", "dataset.range=[-1000,1000]", *TINY]
    steps = ["max_steps=4", "validate_every=4", "preview_every=4", "preview_steps=2"]
    assert run(["train", *data, *steps, "name=a"]) == 0
    assert list((tmp_path / "outputs" / "a" / "previews").glob("*.png"))
    assert run(["sample", "num_samples=3", "steps=2", "output=made"]) == 0
    made = read_signal((tmp_path / "made" / "000000.wav").read_bytes())
    assert (made.values.shape, made.rate) == ((2, 43), 4000)
    assert np.abs(made.values).max() <= 1000
    # The last 13 values are forecast, and the others stay as they were.
    given = form.samples(RNG.uniform(-900, 1000, (2, 43)))
    form.write(given, tmp_path / "x.wav")
    words = ["edit=inpaint", "edit.mask=[30,43]", "input=x.wav", "steps=2", "output=ed"]
    assert run(["edit", *words]) == 0
    np.save(tmp_path / "mask.npy", (np.arange(43) >= 30).astype(np.float32))
    assert run(["edit", "edit=inpaint", "edit.mask=mask.npy", *words[2:-1], "output=same"]) == 0
    assert (tmp_path / "same" / "x.wav").read_bytes() == (tmp_path / "ed" / "x.wav").read_bytes()
    before, after = (read_signal((tmp_path / name).read_bytes()).values for name in ("x.wav", "ed/x.wav"))
    np.testing.assert_array_equal(before[:, :30], after[:, :30])
    assert np.abs(before[:, 30:] - after[:, 30:]).min(1).max() > 0
