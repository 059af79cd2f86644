"""scripts/study.py: study files, the keys of runs, the order of a grid, kept results, and the table."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import study
from diffusion_cli.errors import UsageError
from diffusion_cli.system.files import writing
from diffusion_cli.system.locks import run_lock
from diffusion_cli.system.signals import UNFINISHED
from study import Study, StudyRuns, draw, main, read_study, spread, table
from timed_training import Pace

ROOT = Path(__file__).parents[2]
DIVERGES = "optimizer.lr=1e30"
FILE = """
steps: 2
seeds: [3, 4]
base: [dataset=digits, model.class_conditional=true, batch_size=8, precision=fp32]
judge: [num_samples=70, label=all, steps=2, features=classifier]
settings:
  default: []
  "too fast!": [optimizer.lr=1e30]
"""


def written(folder: Path, text: str = FILE) -> Path:
    path = folder / "study.yaml"
    path.write_text(text)
    return path


def small(**changes) -> Study:
    content = {"steps": 2, "seeds": [0], "settings": {"a": ["batch_size=8"], "b": []}}
    return Study(**{**content, **changes})


def test_a_study_file_is_read(tmp_path):
    found = read_study(written(tmp_path))
    assert (found.steps, found.seconds, found.seeds) == (2, None, [3, 4])
    assert found.words("too fast!") == [*found.base, DIVERGES]


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("steps: 2", "", "study.yaml: has no budget, or two; set seconds or steps"),
        ("steps: 2", "steps: 2\nseconds: 4", "study.yaml: has no budget, or two"),
        ("steps: 2", "steps: many", "study.yaml: steps: Input should be a valid integer"),
        ("seeds: [3, 4]", "seeds: [3, 3]", "study.yaml: has the same seed twice"),
        ("seeds: [3, 4]", "seeds: []", "study.yaml: seeds: List should have at least 1 item"),
        ("judge:", "jugde:", "study.yaml: jugde: Extra inputs are not permitted"),
        ("default: []", "default: [{a: b}]", "study.yaml: settings.default.0: Input should be a valid string"),
        ("default: []", "default: [optimizr=muon]", "settings.default: optimizr"),
        ("default: []", "default: [seed=1]", "study.yaml: seed=1: is set by the study; leave it out"),
        ("label=all", "run=x", "study.yaml: run=x: is set by the study; leave it out"),
        ("label=all", "labels=all", "study.yaml: judge: labels=all: unknown key; did you mean label?"),
        ("default: []", "default: [", "study.yaml: is not a YAML file: "),
        ("steps: 2", "seconds: 0", "study.yaml: seconds: Input should be greater than 0"),
        ("steps: 2", "seconds: .inf", "study.yaml: seconds: Input should be a finite number"),
        ("seeds: [3, 4]", "seeds: [-3]", "study.yaml: seeds.0: Input should be greater than or equal to 0"),
        (FILE.replace('  "too fast!": [optimizer.lr=1e30]\n', ""), "", "study.yaml: has no keys of a study; write"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_study_file_is_one_line(tmp_path, capsys, old, new, line):
    path = written(tmp_path, FILE.replace('  "too fast!": [optimizer.lr=1e30]\n', "").replace(old, new))
    assert main([str(path), "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip()
    assert line in error
    assert "\n" not in error


def test_a_plot_that_cannot_be_written_is_named_before_the_study(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(written(tmp_path, FILE)), "--output", str(tmp_path / "o"), "--plot", "study.jpeg2"])
    assert "--plot=study.jpeg2: has another suffix than .png, .pdf, .svg" in capsys.readouterr().err


def test_a_missing_study_file_is_named(tmp_path):
    with pytest.raises(
        UsageError, match=r"missing\.yaml: cannot be read \(No such file.*; name a study file"
    ):
        read_study(tmp_path / "missing.yaml")


def test_other_words_are_another_run_and_another_judge_only_another_result(tmp_path):
    def places(content: Study) -> tuple[Path, Path]:
        runs = StudyRuns(content, tmp_path)
        return runs.run_folder("a", 0), runs.result_file("a", 0)

    run, result = places(small())
    assert places(small(seeds=[0, 1], settings={"b": ["x=1"], "a": ["batch_size=8"]})) == (run, result)
    for change in ({"base": ["precision=fp32"]}, {"settings": {"a": ["batch_size=9"]}}, {"steps": 3}):
        assert places(small(**change))[0] != run
    other = places(small(judge=["steps=9"]))
    assert other[0] == run
    assert other[1] != result


def test_the_pace_of_a_run_leaves_out_its_start(tmp_path):
    (tmp_path / "config.yaml").write_text("batch_size: 10\n")
    lines = ["step,loss,images_per_second", "1,1,5", "11,1,100", "11,,", "31,1,50"]  # in 2, 1 and 4 seconds
    (tmp_path / "metrics.csv").write_text("\n".join(lines) + "\n")
    assert Pace.of(tmp_path) == Pace(31, 7.0, 310 / 7)
    assert Pace.of(tmp_path, first=1) == Pace(30, 5.0, 60.0)
    assert Pace.of(tmp_path, first=1).steps_per_second == 6.0


@pytest.fixture
def commands(monkeypatch) -> list[tuple[str, str]]:
    """The commands that a study ran, with the runs: each run takes 0.5 s a step and has the distance 1."""
    done: list[tuple[str, str]] = []

    def diffuse(words: Sequence[str], log: Path) -> int:
        keys = dict(word.split("=", 1) for word in words if "=" in word)
        folder = Path(keys.get("run") or Path(keys["output_dir"], keys["name"]))
        done.append((words[0], folder.name))
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("diffuse: loss: not a finite number at step 1, learning rate 1e+30; ...\n")
        if words[0] == "eval":
            entry = {"results": [{"name": "fid", "value": float(keys["metric.fid.infinity"])}]}
            history = folder / "metrics.json"
            earlier = json.loads(history.read_text()) if history.is_file() else []
            history.write_text(json.dumps([*earlier, entry]))
            return 0
        if DIVERGES in words:
            return 2
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text("batch_size: 4\n")
        rows = [f"{step},8" for step in (1, int(keys["max_steps"]))]
        (folder / "metrics.csv").write_text("\n".join(["step,images_per_second", *rows]) + "\n")
        return 0

    monkeypatch.setattr(study, "diffuse", diffuse)
    monkeypatch.setattr("timed_training.diffuse", diffuse)
    return done


def test_all_settings_have_a_run_before_the_next_seed_and_results_are_kept(tmp_path, commands):
    content = small(seeds=[0, 1], judge=["metric.fid.infinity=1"])
    runs = StudyRuns(content, tmp_path)
    runs.run()
    order = [(setting, seed) for seed in (0, 1) for setting in ("a", "b")]
    names = [runs.run_folder(setting, seed).name for setting, seed in order]
    assert commands == [(command, name) for name in names for command in ("train", "eval")]
    commands.clear()
    runs.run()
    assert commands == []
    runs.result_file("b", 0).unlink()
    runs.run()
    assert [name for _, name in commands] == [names[1]] * 2
    commands.clear()
    StudyRuns(content.model_copy(update={"seeds": [0, 1, 2]}), tmp_path).run()
    assert len(commands) == 4


def test_seconds_become_the_steps_of_the_fastest_of_two_short_trainings(tmp_path, commands):
    runs = StudyRuns(small(steps=None, seconds=50.0, judge=["metric.fid.infinity=1"]), tmp_path)
    runs.run()
    first = [name for _, name in commands[:4]]
    assert first == [runs.study.key("a"), runs.study.key("b")] * 2  # in turn
    assert runs.speeds("a") == [2.0, 2.0]
    assert runs.steps("a") == 100
    runs.speeds_file("a").write_text("[1.5, 3.0]")
    assert runs.steps("a") == 150
    assert not any((tmp_path / "timed").iterdir())


def test_a_diverged_training_is_a_row_that_is_kept_and_a_failed_one_is_tried_again(
    tmp_path, commands, monkeypatch, capsys
):
    content = small(settings={"a": [DIVERGES], "b": []}, judge=["metric.fid.infinity=1"])
    runs = StudyRuns(content, tmp_path)
    runs.run()
    assert runs.rows()["a"] == [{"failure": "diverged"}]
    assert "| a | 1 | diverged |" in (tmp_path / "table.md").read_text()
    commands.clear()
    runs.run()
    assert commands == []
    monkeypatch.setattr(study, "diverged", lambda log: False)
    runs.result_file("a", 0).unlink()
    runs.run()
    runs.run()
    assert [command for command, _ in commands] == ["train", "train"]
    assert runs.rows()["a"] == [{"failure": "failed"}]


def test_the_table_has_mean_and_deviation_over_the_seeds():
    good = {"steps": 10, "seconds": 4.0, "images_per_second": 160.0}
    rows = {
        "three": [{**good, "values": {"fid": value}} for value in (1.0, 1.5, 2.0)],
        "mixed": [{**good, "values": {"fid": 1.25}}, {"failure": "diverged"}, {"failure": "failed"}],
        "none": [],
    }
    assert table(rows).splitlines() == [
        "| setting | seeds | fid | steps | images/s | seconds |",
        "|---|---|---|---|---|---|",
        "| three | 3 | 1.50 ± 0.50 | 10 | 160 | 4 |",
        "| mixed | 3 | 1.25, 1 diverged, 1 failed | 10 | 160 | 4 |",
        "| none | 0 |  |  |  |  |",
    ]
    assert table({"a": [{"failure": "diverged"}]}).splitlines()[2] == "| a | 1 | diverged |  |  |  |"


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([0.123456], "0.1235"),
        ([2.0, 2.0], "2"),
        ([0.40, 0.41, 0.43], "0.413 ± 0.015"),
        ([100.0, 300.0], "200 ± 141"),
        ([], ""),
    ],
)
def test_a_mean_has_the_digits_of_its_deviation(values, text):
    assert spread(values) == text


def test_a_stopped_study_shows_the_results_that_it_has(tmp_path, commands, monkeypatch, capsys):
    done = study.diffuse

    def stopped(words: Sequence[str], log: Path) -> int:
        if len(commands) == 2:
            raise KeyboardInterrupt
        return done(words, log)

    monkeypatch.setattr(study, "diffuse", stopped)
    path = written(tmp_path, FILE.replace("num_samples=70", "metric.fid.infinity=7"))
    plot = tmp_path / "plot.svg"
    assert main([str(path), "--output", str(tmp_path), "--plot", str(plot)]) == UNFINISHED
    shown = capsys.readouterr()
    assert "stopped; the same command continues" in shown.err
    assert "| default | 1 | 7 | 2 |" in shown.out
    assert "too fast!" in plot.read_text()


def test_a_study_that_is_stopped_while_its_file_is_checked_is_one_line(tmp_path, monkeypatch, capsys):
    def stopped(path: Path) -> Study:
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "read_study", stopped)
    assert main([str(written(tmp_path)), "--output", str(tmp_path)]) == UNFINISHED
    assert capsys.readouterr().err == "stopped; the same command continues\n"


def test_an_output_that_is_a_file_is_one_line(tmp_path, capsys):
    path = written(tmp_path)
    assert main([str(path), "--output", str(path)]) == 2
    error = capsys.readouterr().err
    assert "cannot be used (File exists); choose another --output or --plot" in error
    assert error.count("\n") == 1


def test_an_output_of_a_running_study_is_one_line(tmp_path, commands, capsys):
    with run_lock(tmp_path / "out"):
        assert main([str(written(tmp_path)), "--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"--output={tmp_path / 'out'}: is used by process {os.getpid()} on host ")
    assert commands == []


def test_a_full_disk_is_one_line(tmp_path, commands, monkeypatch, capsys):
    def full(path: Path, text: str) -> None:
        with writing(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(study, "_write", full)
    path = written(tmp_path, FILE.replace("num_samples=70", "metric.fid.infinity=7"))
    assert main([str(path), "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "cannot be written (No space left on device); free some space" in error
    assert error.count("\n") == 1


def test_a_damaged_result_is_named(tmp_path, commands, capsys):
    path = written(tmp_path, FILE.replace("num_samples=70", "metric.fid.infinity=7"))
    result = StudyRuns(read_study(path), tmp_path).result_file("default", 3)
    result.parent.mkdir()
    result.write_text("{")
    assert main([str(path), "--output", str(tmp_path)]) == 2
    assert (
        capsys.readouterr().err == f"{result}: is damaged; remove it, and the same command makes it again\n"
    )


def test_the_plot_has_a_panel_for_each_value(tmp_path):
    rows = {
        "a": [{"values": {"fid": 1.0}}, {"failure": "diverged"}],
        "b": [{"values": {"fid": 200.0, "kid": 0.1}}],
    }
    draw(rows, tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    assert ">fid<" in text
    assert ">kid<" in text


def test_a_judge_without_values_leaves_an_empty_row(tmp_path, monkeypatch, capsys):
    """As a metric that is undefined for the model: the evaluation succeeds, and stores no entry."""
    runs = StudyRuns(small(settings={"a": []}), tmp_path)
    monkeypatch.setattr(runs, "trained", lambda *_: {"values": {}, **Pace(2, 1.0, 8.0)._asdict()})
    runs.run()
    assert "[1/1] a, seed 0: no values" in capsys.readouterr().err
    assert "| a | 1 |  | 2 | 8 | 1 |" in (tmp_path / "table.md").read_text()


def test_a_signal_during_the_start_of_a_command_reaches_it(tmp_path, monkeypatch):
    sent: list[int] = []

    class Command:
        def __init__(self, *_, **__):
            os.kill(os.getpid(), signal.SIGINT)

        def send_signal(self, number: int) -> None:
            sent.append(number)

        def wait(self) -> int:
            return UNFINISHED

    monkeypatch.setattr(subprocess, "Popen", Command)
    with pytest.raises(KeyboardInterrupt):
        study.diffuse(["train"], tmp_path / "log")
    assert sent == [signal.SIGINT]


# --- with real trainings -------------------------------------------------------------------------------------------


def start(path: Path, folder: Path) -> subprocess.Popen[str]:
    words = [
        str(ROOT / "scripts" / "study.py"),
        str(path),
        "--output",
        str(folder),
        "--plot",
        str(folder / "plot.png"),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=folder.parent,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 200
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
def test_a_study_continues_after_ctrl_c_and_has_a_row_for_each_setting(tmp_path):
    folder = tmp_path / "out"
    path = written(
        tmp_path, FILE.replace("seeds: [3, 4]", "seeds: [3]").replace("steps: 2\nseeds", "steps: 40\nseeds")
    )
    process = start(path, folder)
    wait_for(lambda: any("1/40 steps" in log.read_text() for log in folder.glob("logs/*.log")), process)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == UNFINISHED
    (log,) = folder.glob("logs/*.log")
    assert any(folder.glob("runs/*/checkpoints/last.ckpt"))
    process = start(path, folder)
    output, error = process.communicate(timeout=400)
    assert process.returncode == 0, error
    assert "Continuing" in log.read_text()
    rows = [line.split(" | ") for line in output.splitlines()]
    assert rows[0][2] == "frechet_classifier"
    assert rows[2][:2] == ["| default", "1"]
    assert float(rows[2][2]) > 0
    assert rows[2][3] == "40"
    assert rows[3][:3] == ["| too fast!", "1", "diverged"]
    assert output == (folder / "table.md").read_text()
    assert (folder / "plot.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", sorted((ROOT / "scripts" / "studies").glob("*.yaml")), ids=lambda path: path.stem
)
def test_the_words_of_the_studies_are_valid(path):
    found = read_study(path)
    assert not found.settings["default"]
    assert len({found.key(setting) for setting in found.settings}) == len(found.settings)
