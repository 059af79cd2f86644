"""Compare settings of `diffuse train` after equal training times, with several seeds: a table and a plot.

    python scripts/study.py scripts/studies/digits.yaml --output outputs/digits --plot digits.png

A study is a YAML file:

    seconds: 90                    # training time of each run; or steps: 2400
    seeds: [0, 1, 2]
    base: [dataset=digits]         # words of `diffuse train` for all settings
    judge: [num_samples=2000]      # words of `diffuse eval` for all runs
    settings:                      # words of `diffuse train` by the name of the setting
      default: []
      muon: [optimizer=muon]

The decay of the learning rate, its warm-up and the EMA length follow from `max_steps`. A time limit would end a run
in the middle of them, so the time becomes a number of steps before: short trainings of all settings in turn, at a
learning rate of nearly zero, give the steps per second. The fastest of two counts, because other work on the machine
only slows a training. All seeds of a setting take as many steps. The table has the seconds that they really took,
without the start of the program. Times are kept, so a folder belongs to one machine, which should have no other work.

Runs go through all settings with the first seed, then with the next one, so that a slow hour of the machine meets all
settings and an unfinished study has a table too. Times, runs and results are kept by a hash of their words: the same
command continues a stopped study, and changed words make new runs. A diverged training is a row of the table.
"""

import argparse
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)

from diffusion_cli import config
from diffusion_cli.errors import NO_VALUE, USER_ERROR, MachineError, Problem, UsageError, lines_of
from diffusion_cli.system.files import atomic_write
from diffusion_cli.system.locks import folder_lock
from diffusion_cli.system.signals import UNFINISHED
from timed_training import QUIET, Pace, diffuse, timed

OWN_KEYS = ("name", "output_dir", "run", "seed", "max_steps", "max_epochs", "max_time")
"""Keys of `diffuse train` that a study sets."""
ROUNDS = 2
"""Number of short trainings that time a setting."""
WIDE = 10
"""Ratio of the ends of an axis, from which on it is logarithmic."""
PLOTS = (".png", ".pdf", ".svg")
"""Suffixes of plots."""
DIVERGED, FAILED = "diverged", "failed"
"""Why a run has no values: a loss or a weight that is not finite, or another reason, named in its log."""


class Study(BaseModel):
    """The content of a study file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    steps: PositiveInt | None = None
    seeds: list[NonNegativeInt] = Field(min_length=1)
    base: list[str] = []
    judge: list[str] = []
    settings: dict[str, list[str]] = Field(min_length=1)

    @model_validator(mode="after")
    def _one_budget(self) -> "Study":
        if (self.seconds is None) == (self.steps is None):
            raise ValueError("has no budget, or two; set seconds or steps")
        if len({*self.seeds}) < len(self.seeds):
            raise ValueError("has the same seed twice")
        return self

    def words(self, setting: str) -> list[str]:
        """Return the words of `diffuse train` for a setting."""
        return [*self.base, *self.settings[setting]]

    def key(self, setting: str) -> str:
        """Return a name for the runs of a setting, by its name and words."""
        return f"{slug(setting)}_{config.fingerprint({'words': self.words(setting)})}"


def read_study(path: Path) -> Study:
    """Read and check a study file; UsageError, with a line for each mistake."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            problem = "has no keys of a study"
            raise UsageError(
                path, NO_VALUE, problem, "write seconds, seeds and settings, as scripts/studies does"
            )
        study = Study.model_validate(content)
    except OSError as error:
        problem, remedy = (
            f"cannot be read ({error.strerror})",
            "name a study file, such as scripts/studies/digits.yaml",
        )
        raise UsageError(path, NO_VALUE, problem, remedy) from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(path, NO_VALUE, "is not a YAML file: " + " ".join(str(error).split())) from error
    except ValidationError as error:
        raise UsageError.several(
            Problem(
                ": ".join(filter(None, [str(path), ".".join(map(str, each["loc"]))])),
                NO_VALUE,
                each["msg"].removeprefix("Value error, "),
            )
            for each in error.errors()
        ) from error
    problems: list[Problem] = []
    for name in study.settings:
        words = study.words(name)
        problems += _mistakes(f"{path}: settings.{name}", "train", [*words, "name=study", "max_steps=60"])
        problems += _own(path, words, OWN_KEYS)
    problems += _mistakes(f"{path}: judge", "eval", [*study.judge, "run=study"])
    problems += _own(path, study.judge, ("run",))
    if problems:
        raise UsageError.several(problems)
    return study


def _mistakes(place: str, command: str, words: Sequence[str]) -> list[Problem]:
    """Return the mistakes in the words of a command."""
    try:
        config.load(command, words)
    except UsageError as error:
        return [problem._replace(key=f"{place}: {problem.key}") for problem in error.problems]
    return []


def _own(path: Path, words: Sequence[str], keys: Sequence[str]) -> list[Problem]:
    """Return a problem for each word that sets a key of the study."""
    own = [word for word in words if word.lstrip("+").partition("=")[0] in keys]
    return [Problem(f"{path}: {word}", NO_VALUE, "is set by the study", "leave it out") for word in own]


def slug(name: str) -> str:
    """Return a name in the letters of a file name."""
    return re.sub("[^a-z0-9]+", "_", name.lower()).strip("_")


class StudyRuns:
    """The runs of a study in a folder.

    Args:
        study: content of the study file.
        folder: folder of runs, results and logs.
        data_dir: words that name the folder of datasets, for training and evaluation.
    """

    def __init__(self, study: Study, folder: Path, data_dir: Sequence[str] = ()) -> None:
        self.study, self.folder, self.data_dir = study, folder, [*data_dir]

    def run(self) -> None:
        """Time, train and evaluate what is missing, and write the table after each result."""
        self.measure_times()
        pairs = [(setting, seed) for seed in self.study.seeds for setting in self.study.settings]
        for number, (setting, seed) in enumerate(pairs, start=1):
            # A failure without divergence may be that of the machine.
            if (self.result(setting, seed) or {"failure": FAILED}).get("failure") != FAILED:
                continue
            result = self.trained(setting, seed)
            _write(self.result_file(setting, seed), json.dumps(result, indent=1))
            _write(self.folder / "table.md", table(self.rows()))
            values = ", ".join(f"{key} {value:.4g}" for key, value in result.get("values", {}).items())
            print(
                f"[{number}/{len(pairs)}] {setting}, seed {seed}: {values or result.get('failure', 'no values')}",
                file=sys.stderr,
            )

    def measure_times(self) -> None:
        """Time each setting `ROUNDS` times, in turn."""
        for number in range(ROUNDS if self.study.seconds is not None else 0):
            for setting in self.study.settings:
                speeds = self.speeds(setting)
                if len(speeds) > number:
                    continue
                words, key = [*self.study.words(setting), *self.data_dir], self.study.key(setting)
                speed = timed(words, self.folder / "timed" / key, self.log(key))
                if speed is not None:
                    _write(self.speeds_file(setting), json.dumps([*speeds, speed]))
                    print(f"{setting}: {speed:.3g} steps/s", file=sys.stderr, flush=True)

    def speeds_file(self, setting: str) -> Path:
        """Return the file of the measured steps per second of a setting."""
        return self.folder / "speeds" / f"{self.study.key(setting)}.json"

    def speeds(self, setting: str) -> list[float]:
        """Return the measured steps per second of a setting."""
        return _read(self.speeds_file(setting)) or []

    def steps(self, setting: str) -> int | None:
        """Return the steps of the runs of a setting; None if it could not be timed."""
        if self.study.seconds is None:
            return self.study.steps
        speeds = self.speeds(setting)
        return max(1, round(self.study.seconds * max(speeds))) if speeds else None

    def run_folder(self, setting: str, seed: int) -> Path:
        """Return the folder of a run; its steps are a part of the name."""
        return self.folder / "runs" / f"{self.study.key(setting)}_{self.steps(setting)}_seed{seed}"

    def result_file(self, setting: str, seed: int) -> Path:
        """Return the file of a result, named by the run and the words of the judge."""
        judge = config.fingerprint({"words": self.study.judge})
        return self.folder / "results" / f"{self.run_folder(setting, seed).name}_{judge}.json"

    def result(self, setting: str, seed: int) -> dict[str, Any] | None:
        """Return a stored result: its values and pace, or its failure; None if there is none."""
        return _read(self.result_file(setting, seed))

    def log(self, name: str) -> Path:
        """Return the log of the commands of a setting or a run."""
        return self.folder / "logs" / f"{name}.log"

    def trained(self, setting: str, seed: int) -> dict[str, Any]:
        """Train and evaluate a run; return its result."""
        run, steps = self.run_folder(setting, seed), self.steps(setting)
        if steps is None:
            return {"failure": FAILED}
        own = [f"name={run.name}", f"output_dir={run.parent}", f"seed={seed}", f"max_steps={steps}"]
        words, log = [*self.study.words(setting), *self.data_dir], self.log(run.name)
        if diffuse(["train", *words, *QUIET, *own], log):
            return {"failure": DIVERGED if diverged(log) else FAILED}
        history = run / "metrics.json"
        before = len(_read(history) or [])
        if diffuse(["eval", f"run={run}", *self.study.judge, *self.data_dir], log):
            return {"failure": FAILED}
        entries = _read(history)[before:]
        values = {result["name"]: result["value"] for entry in entries for result in entry["results"]}
        return {"values": values, **Pace.of(run)._asdict()}

    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """Return the stored results by setting, a list over the seeds."""
        return {
            setting: [found for seed in self.study.seeds if (found := self.result(setting, seed)) is not None]
            for setting in self.study.settings
        }


def diverged(log: Path) -> bool:
    """Return whether the last command of a log ended by a loss or a weight that is not finite."""
    return "not a finite number at step" in "".join(log.read_text(errors="replace").splitlines()[-1:])


def spread(values: Sequence[float]) -> str:
    """Return mean and standard deviation with two digits of the latter; a single value with four digits."""
    deviation = stdev(values) if len(values) > 1 else 0.0
    if deviation == 0:
        return "" if not values else f"{mean(values):.4g}"
    digits = max(0, 1 - math.floor(math.log10(deviation)))
    return f"{mean(values):.{digits}f} ± {deviation:.{digits}f}"


def names(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Return the names of all measured values, in order."""
    return [
        *dict.fromkeys(name for row in rows.values() for result in row for name in result.get("values", ()))
    ]


def table(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return the results of each setting, one for each seed, as a Markdown table."""
    measured = names(rows) or ["result"]
    lines = [f"| {' | '.join(['setting', 'seeds', *measured, 'steps', 'images/s', 'seconds'])} |"]
    lines.append("|---" * (len(measured) + 5) + "|")
    for setting, row in rows.items():
        good = [result for result in row if "values" in result]
        cells = [
            spread([result["values"][name] for result in good if name in result["values"]])
            for name in measured
        ]
        failures = Counter(result["failure"] for result in row if "failure" in result)
        for what, number in failures.items():
            shown = what if number == len(row) else f"{number} {what}"
            cells[0] = f"{cells[0]}, {shown}".removeprefix(", ")
        for key in ("steps", "images_per_second", "seconds"):
            cells.append(f"{mean(result[key] for result in good):.0f}" if good else "")
        lines.append(f"| {' | '.join([setting.replace('|', '/'), str(len(row)), *cells])} |")
    return "\n".join(lines) + "\n"


def draw(rows: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Plot each measured value by setting: a point for each seed, and their mean with its standard deviation."""
    from diffusion_cli.charts import Curve, Panel, canvas, draw_panel, line_style  # imports torch

    measured, settings = names(rows), [*rows]
    width = 0.085 * max(map(len, settings)) + 3.5 * len(measured)
    with canvas(width, 0.8 + 0.25 * len(settings)) as figure:
        panels = figure.subplots(1, len(measured), sharey=True, squeeze=False)[0]
        for axes, name in zip(panels, measured, strict=True):
            curves: list[Curve] = []
            for place, row in enumerate(rows.values()):
                values = [result["values"][name] for result in row if name in result.get("values", ())]
                if values:
                    axes.errorbar(
                        mean(values), place, xerr=stdev(values) if len(values) > 1 else None,
                        fmt="o", capsize=4, markersize=7, color=line_style(1).colour, zorder=1.5,
                    )  # fmt: skip
                    curves.append(Curve("", [(value, place) for value in values], 0))
            everything = [value for curve in curves for value in curve.x]
            log_x = 0 < WIDE * min(everything) <= max(everything)
            draw_panel(axes, Panel("", "", curves, log_x=log_x), [])
            axes.set_xlabel(name)
        panels[0].set_yticks(range(len(settings)), settings)
        panels[0].set_ylim(len(settings) - 0.5, -0.5)
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format=path.suffix[1:])


def _read(path: Path) -> Any:
    """Return the content of a JSON file; None if it is missing, UsageError if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise UsageError(
            path, NO_VALUE, "is damaged", "remove it, and the same command makes it again"
        ) from error


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def main(words: Sequence[str] | None = None) -> int:
    """Run a study, print its table and draw its plot; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path, help="study file, such as scripts/studies/digits.yaml")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/study"), help="folder of runs and results"
    )
    parser.add_argument(
        "--data-dir", type=Path, help="folder with datasets such as MNIST; not a part of a run"
    )
    parser.add_argument("--plot", type=Path, help="output PNG, PDF or SVG")
    given = parser.parse_args(words)
    if given.plot and given.plot.suffix not in PLOTS:
        parser.error(f"--plot={given.plot}: has another suffix than {', '.join(PLOTS)}")
    try:
        return _run(given.study, given.output, given.data_dir, given.plot)
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return UNFINISHED
    except UsageError as error:
        print(error, file=sys.stderr)
    except MachineError as error:
        print(*lines_of(error), file=sys.stderr)
    except OSError as error:
        place = given.output if error.filename is None else error.filename
        print(
            f"{place}: cannot be used ({error.strerror}); choose another --output or --plot", file=sys.stderr
        )
    return USER_ERROR


def _run(path: Path, output: Path, data_dir: Path | None, plot: Path | None) -> int:
    """Run a study as `main` does.

    Raises UsageError for a mistake in the study file or an output that another study uses, OSError if the output cannot
    be written, and KeyboardInterrupt before the first training.
    """
    runs = StudyRuns(read_study(path), output, [] if data_dir is None else [f"data_dir={data_dir}"])
    stopped = False
    try:
        with folder_lock(output, lambda process: _in_use(output, process)):
            runs.run()
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        stopped = True
    rows = runs.rows()
    print(table(rows), end="")
    if plot and names(rows):
        draw(rows, plot)
    failed = [result for row in rows.values() for result in row if result.get("failure") == FAILED]
    if failed:
        print(
            f"{len(failed)} runs failed, see {output / 'logs'}; the same command tries them again",
            file=sys.stderr,
        )
    return UNFINISHED if stopped else int(bool(failed))


def _in_use(output: Path, process: str) -> UsageError:
    """Return the error for a folder that another study uses."""
    remedy = "wait for that study, or choose another folder"
    return UsageError("--output", output, f"is used by {process}", remedy)


if __name__ == "__main__":
    sys.exit(main())
