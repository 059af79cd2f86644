"""Progress: bars on a terminal, lines in a log, and estimates of long work."""

import re
import sys
from io import StringIO

import pytest

from diffusion_cli.system.progress import ProgressBar


class Clock:
    """A clock that the test sets, in place of that of tqdm."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        for place in ("tqdm.std.time", "diffusion_cli.system.progress.time.time"):
            monkeypatch.setattr(place, lambda: self.now)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def log(monkeypatch: pytest.MonkeyPatch, terminal: bool = False) -> StringIO:
    stream = StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def test_a_log_gets_a_line_every_15_seconds(monkeypatch, clock):
    stream = log(monkeypatch)
    with ProgressBar(total=100, desc="sample", unit="image") as bar:
        for _ in range(100):
            clock.now += 1
            bar.update()
    lines = stream.getvalue().split("\n")
    assert lines.pop() == ""
    assert len(lines) == 1 + 100 // 15 + 1
    assert lines[0] == "sample: 0%, 0/100 images [00:00<?, ?image/s]"
    assert lines[1] == "sample: 15%, 15/100 images [00:15<01:25,  1.00s/image]".replace("s/image", "image/s")
    assert lines[-1].startswith("sample: 100%, 100/100 images [01:40<00:00,")
    assert not any(re.search(r"[\r\x1b]", line) for line in lines)


def test_a_message_in_a_log_is_one_line_alone(monkeypatch, clock):
    stream = log(monkeypatch)
    with ProgressBar(total=2, desc="train", unit="step"), ProgressBar(total=2, desc="preview", unit="image"):
        stream.truncate(0)
        ProgressBar.write("diffuse: careful", file=sys.stderr)
        assert stream.getvalue().lstrip("\0") == "diffuse: careful\n"


def test_work_without_an_end_counts_on(monkeypatch, clock):
    stream = log(monkeypatch)
    with ProgressBar(desc="train", unit="step") as bar:
        clock.now += 20
        bar.update(40)
    assert "train: 40 steps [00:20,  2.00step/s]\n" in stream.getvalue()


def test_parts_of_a_batch_move_the_bar_and_whole_items_are_shown(monkeypatch, clock):
    stream = log(monkeypatch, terminal=True)
    with ProgressBar(total=4, desc="sample", unit="image") as bar:
        for _ in range(2):
            with bar.batch(2) as advance:
                for _ in range(4):
                    clock.now += 1
                    advance(0.3)  # more than the batch, as after a restart of its steps
    shown = re.findall(r"(\d+)%\|[^|]*\| (\d)/4", stream.getvalue())
    assert shown == [
        ("0", "0"), ("15", "0"), ("30", "1"), ("45", "1"), ("50", "2"), ("65", "2"), ("80", "3"), ("95", "3"),
        ("100", "4"), ("100", "4"),
    ]  # fmt: skip


def test_a_terminal_of_unknown_width_gets_a_bar(monkeypatch, clock):
    stream = log(monkeypatch, terminal=True)
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda _: (0, 0))
    with ProgressBar(total=4, desc="sample"):
        assert "sample:   0%" in stream.getvalue()


def test_a_failed_batch_does_not_count(monkeypatch, clock):
    log(monkeypatch)
    with ProgressBar(total=4) as bar:
        with pytest.raises(KeyboardInterrupt), bar.batch(2):
            raise KeyboardInterrupt
        assert bar.n == 0


@pytest.mark.parametrize(
    ("total", "line"),
    [
        (4000, "diffuse: sample: about 17 minutes for the remaining 3,979 images\n"),
        (100_000, "diffuse: sample: about 7 hours for the remaining 99,979 images\n"),
        (400, ""),
    ],
)
def test_long_work_is_estimated_once(monkeypatch, clock, total, line):
    stream = log(monkeypatch, terminal=True)
    with ProgressBar(total=total, desc="sample", unit="image") as bar:
        for _ in range(30):
            clock.now += 0.25
            bar.update()
    lines = [text for text in stream.getvalue().splitlines(keepends=True) if text.startswith("diffuse:")]
    assert "".join(lines) == line


def test_a_limit_of_time_replaces_the_estimate(monkeypatch, clock):
    stream = log(monkeypatch)
    with ProgressBar(total=1000, desc="train", unit="step", seconds_left=lambda: 110.0) as bar:
        for _ in range(20):
            clock.now += 1
            bar.update()
    lines = [line for line in stream.getvalue().splitlines() if line.startswith("diffuse: ")]
    assert lines == ["diffuse: train: max_time ends it at about step 125 of 1,000"]


def test_no_work_has_no_bar(monkeypatch):
    stream = log(monkeypatch)
    with ProgressBar(total=0, desc="sample", unit="image") as bar:
        bar.update(0)
    assert stream.getvalue() == ""
