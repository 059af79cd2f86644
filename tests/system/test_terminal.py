"""Output for a terminal: what may reach it, and what happens if it is full or closed."""

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest

from diffusion_cli.cli import run
from diffusion_cli.metrics import Report, Result
from diffusion_cli.system.progress import ProgressBar
from diffusion_cli.system.terminal import Output, guarded, lost_output, table

LONG = "text\n" * 20_000  # more than a pipe or a buffer holds


@pytest.fixture
def closed_pipe() -> Iterator:
    """A pipe that nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        yield stream


@pytest.fixture
def full() -> Iterator:
    """A file on a full disk."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with Path("/dev/full").open("w") as stream:
        yield stream


def test_text_commands_no_terminal_but_keeps_its_lines():
    stream = StringIO()
    text = "a\tß█\r\n\x1b[31mred\x1b]0;title\x07\x9b2J\u202e\udc80"
    assert Output(stream).write(text) == len(text)
    assert stream.getvalue() == "a\tß█\r\n\\x1b[31mred\\x1b]0;title\\x07\\x9b2J\\u202e\\udc80"


@pytest.mark.parametrize("text", ["real\x1b[A\rfalse", "\rfalse", "\x1b[A\x1b[A"])
def test_text_writes_over_no_other_line(text):
    stream = StringIO()
    print("run:", text, file=Output(stream))
    assert stream.getvalue() == "run: " + text.replace("\x1b", "\\x1b").replace("\r", "\\r") + "\n"


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_bars_move_among_their_lines(monkeypatch):
    monkeypatch.setattr("diffusion_cli.system.progress.REDRAW", 0)
    streams = Terminal(), Terminal()
    for stream, stderr in zip(streams, (streams[0], Output(streams[1])), strict=True):
        monkeypatch.setattr(sys, "stderr", stderr)
        with (
            ProgressBar(total=2, desc="a\rb\x1b[A") as outer,
            ProgressBar(total=2, position=1) as inner,
        ):
            inner.update(2)
            ProgressBar.write("between", file=stderr)  # pyright: ignore[reportArgumentType]
            outer.update(2)
        assert "a\\rb\\x1b[A" in stream.getvalue()
    moves = re.compile(r"\x1b\[A|[\r\n]")
    # tqdm clears the bars of a stream in the order of a set, which differs from time to time.
    plain, guarded_moves = (Counter(moves.findall(stream.getvalue())) for stream in streams)
    assert guarded_moves == plain
    assert "\x1b[A" in plain


@pytest.mark.parametrize("kind", ["full", "closed_pipe"])
def test_work_continues_behind_an_output_that_fails(request, monkeypatch, kind):
    stream = request.getfixturevalue(kind)
    monkeypatch.setattr(sys, "stdout", stream)
    with guarded():
        print(LONG)
        print(LONG, flush=True)
        lost = lost_output()
    assert sys.stdout is stream
    assert (
        lost
        == {
            "full": "stdout: cannot be written (No space left on device); the printed text is lost",
            "closed_pipe": None,
        }[kind]
    )


@pytest.mark.parametrize(("kind", "code"), [("full", 2), ("closed_pipe", 0)])
def test_a_command_reports_a_full_output_and_accepts_a_closed_one(request, monkeypatch, capsys, kind, code):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", request.getfixturevalue(kind))
        assert run(["--help"]) == code
    assert capsys.readouterr().err == code // 2 * (
        "diffuse: stdout: cannot be written (No space left on device); the printed text is lost\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", ["--help | head -1", "--help >&-", "nonsense 2>&-", "--help 2>&- | head -1"]
)
def test_streams_may_be_closed_by_the_shell(words):
    script = f"set -o pipefail; {sys.executable} -m diffusion_cli {words}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.returncode == (2 if "nonsense" in words else 0)
    assert done.stderr == ""


def test_a_report_of_others_keeps_to_its_lines():
    report = Report([Result("fid\nis  1.0", 2.0, {"\x1b[2J": 1.0}, {})], ["first\nnote: second"])
    assert len(report.table().splitlines()) == 3
    assert report.table().replace("\n", "").isprintable()


def test_a_table_has_columns_without_control_characters():
    assert table([["a", "\x1b[2J", ""], ["long", "b", ""]]) == "a     \\x1b[2J\nlong  b"
