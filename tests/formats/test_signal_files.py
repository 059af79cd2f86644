"""Files and plots of signals: what is read is what was written."""

import io
import re
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion_cli.formats import Signal, form_of
from diffusion_cli.formats.signal import HEIGHT, MARGIN, WIDTH, read_signal
from helpers.data import damaged

RNG = np.random.default_rng(0)
REAL = Signal("float32", [-2.0], [3.0])
SOUND = Signal("int16", [-32768.0], [32767.0], ".wav", 8000)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def wav(numbers: np.ndarray, rate: int = 8000, width: int = 2) -> bytes:
    """A WAV file of numbers [C, L]."""
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(len(numbers))
        sound.setsampwidth(width)
        sound.setframerate(rate)
        sound.writeframes(np.ascontiguousarray(numbers.T).tobytes())
    return file.getvalue()


@pytest.mark.parametrize("form", [SOUND, Signal("int16", [-32768.0], [32767.0])], ids=["wav", "npy"])
def test_every_number_of_sixteen_bits_comes_back(tmp_path, form):
    numbers = np.arange(-32768, 32768, dtype=np.int16).reshape(2, -1)
    sample = form.samples(numbers)
    assert (sample.min(), sample.max()) == (-1, 1)
    assert torch.equal(form.quantize(sample), sample)
    form.write(sample, tmp_path / "x")
    data = (tmp_path / "x").read_bytes()
    np.testing.assert_array_equal(read_signal(data).values, numbers)
    assert torch.equal(form.read(data, (2, 32768)), sample)
    if form.rate:
        with wave.open(io.BytesIO(data)) as sound:
            assert (sound.getframerate(), sound.getnchannels(), sound.getsampwidth()) == (8000, 2, 2)
        with pytest.raises(ValueError, match="has 16000 values per second; expected 8000, so resample it"):
            form.read(wav(numbers, 16000), (2, 32768))


@pytest.mark.parametrize("channels", [1, 3])
def test_real_values_are_in_the_units_of_the_data(tmp_path, channels):
    values = RNG.uniform(-2, 3, (channels, 50)).astype(np.float32)
    sample = REAL.samples(values)
    np.testing.assert_allclose(sample, (values.astype(np.float64) + 2) / 2.5 - 1, atol=1e-7)
    REAL.write(sample, tmp_path / "x.npy")
    held = np.load(tmp_path / "x.npy")
    assert held.dtype == np.float32
    assert held.shape == ((50,) if channels == 1 else (3, 50))
    np.testing.assert_allclose(np.atleast_2d(held), values, atol=1e-6)
    assert REAL.samples(np.array([[-9.0, 9.0]])).tolist() == [[-1, 1]]
    with pytest.raises(ValueError, match="not finite"):
        REAL.samples(np.array([[np.nan]]))


def test_channels_may_have_ranges_of_their_own():
    form = Signal("float64", [0.0, -100.0], [1.0, 100.0])
    assert form.samples(np.array([[0.5, 1.0], [50.0, -100.0]])).tolist() == [[0, 1], [0.5, -1]]
    assert form.half_range == 1
    assert form_of(form.to_dict()) == form


def test_known_values_outside_the_range_come_back_as_they_were(tmp_path):
    values = np.array([[0.123456789, 7.5, 0.5, -2.0]])
    known = torch.tensor([[True, True, False, False]])
    original = REAL.original(npy(values))
    completed = REAL.completed(torch.zeros(1, 4), original, known)
    completed.write(tmp_path / "x.npy")
    held = np.load(tmp_path / "x.npy")
    assert held.dtype == np.float64
    np.testing.assert_array_equal(held, [0.123456789, 7.5, 0.5, 0.5])
    assert not completed.errors.any()


@pytest.mark.parametrize(
    "text", ["1,2\n3,4\n-5e-1,6\n", "a,b\n1,2\n3,4\n-.5,6", "\ufeff1;2\r\n3;4\r\n\r\n-0.5;6\r\n"]
)
def test_columns_of_a_table_are_channels(text):
    held = read_signal(text.encode())
    np.testing.assert_array_equal(held.values, [[1, 3, -0.5], [2, 4, 6]])
    assert held.dtype == "float64"


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "has no values"),
        (b"time\n", "has no values"),
        (b"1,2\n3\n", "has lines of 2 and 1 columns"),
        (b"1,2\n3,x\n", "has a line that is not of numbers: '3,x'"),
        (npy(np.zeros((2, 3, 4), np.float32)), "has float32 of shape (2, 3, 4); a signal is [L] or [C, L]"),
        (npy(np.zeros(4, np.complex64)), "has complex64 of shape (4,)"),
        (npy(np.zeros(99))[:-8], "too few for (99,) of float64"),
        (wav(np.zeros((1, 6), np.uint8), width=1), "has 8 bits per value; convert it to 16-bit PCM"),
        (wav(np.zeros((2, 9), np.int16))[:-4], "ends before its 9 values per channel"),
    ],
    ids=["empty", "header", "ragged", "word", "axes", "complex", "short", "bits", "cut"],
)
def test_other_files_are_refused_in_a_line(data, problem):
    with pytest.raises(ValueError, match=re.escape(problem)) as caught:
        read_signal(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "good",
    [npy(np.arange(9.0)), wav(np.zeros((2, 9), np.int16)), b"a,b\n1,2\n3,4\n"],
    ids=["npy", "wav", "csv"],
)
def test_damaged_files_are_read_or_refused_in_a_line(good):
    draw = np.random.RandomState(0)
    for _ in range(200):
        try:
            held = read_signal(damaged(good, draw))
        except ValueError as error:
            assert "\n" not in str(error)  # noqa: PT017
        else:
            assert held.values.ndim == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"low": [1.0], "high": [1.0]},
        {"low": [0.0, 1.0]},
        {"file": ".wav"},
        {"rate": 8000},
        {"file": ".wav", "rate": 8000, "dtype": "float32"},
        {"dtype": "uint8"},
    ],
    ids=["empty", "pairs", "no_rate", "rate", "real_sound", "dtype"],
)
def test_a_format_that_contradicts_itself_is_refused(changes):
    with pytest.raises(ValueError, match=r"form|range|WAV"):
        form_of({"kind": "signal", "dtype": "int16", "low": [0.0], "high": [9.0]} | changes)


def test_plots_show_each_value_at_its_place():
    wanted = (1, 2 * HEIGHT, WIDTH)
    assert SOUND.picture_shape((2, 500)) == wanted
    ramp = torch.linspace(-1, 1, 500)
    (picture,) = SOUND.to_rgb(torch.stack([ramp, -ramp])[None])
    assert picture.shape == wanted
    dark = 255 - picture[0].double()
    rows = (dark[:HEIGHT] * torch.arange(HEIGHT)[:, None]).sum(0) / dark[:HEIGHT].sum(0)
    # The line rises from the bottom margin to the top one.
    place = (torch.arange(WIDTH) + 0.5) / WIDTH
    expected = HEIGHT - MARGIN - place * (HEIGHT - 2 * MARGIN) - 0.5
    assert (rows - expected).abs().max() < 0.1
    assert torch.equal(picture[:, HEIGHT:].flip(1), picture[:, :HEIGHT])  # the other channel falls
    spike = torch.zeros(1, 1, 5000)
    spike[..., 2500] = 1  # one of 20 values per pixel
    assert SOUND.to_rgb(spike)[0, 0, MARGIN + 3, WIDTH // 2 - 1 : WIDTH // 2 + 1].min() < 60


def test_files_are_named_like_their_type():
    assert (REAL.suffix, SOUND.suffix) == (".npy", ".wav")
    assert Path("x.csv").suffix in REAL.suffixes
