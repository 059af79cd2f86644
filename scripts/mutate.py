"""Mutation testing: change one line of a copy of the program at a time, and check that the named tests fail.

    python scripts/mutate.py                                  # every mutant of scripts/mutants.toml
    python scripts/mutate.py --only likelihood                # mutants with this word in their file or description
    python scripts/mutate.py --table docs/results/mutants.md  # then write the table into a page
    python scripts/mutate.py --table docs/results/mutants.md --new  # only mutants that the page lacks

A mutant is a text that occurs once in a file, its replacement, a description, and tests. The tests must pass on the
unchanged code, which is checked first. Results are stored in outputs/mutants.json: an interrupted run resumes, and
changed code starts anew. The exit code is 1 unless every mutant is caught.
"""

import argparse
import compileall
import hashlib
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import tomllib
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from py_compile import PycInvalidationMode
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
TIMEOUT = 300.0  # seconds for the tests of one mutant
CAUGHT, SURVIVED, STALE, UNCLEAR = "caught", "survived", "stale", "unclear"


@dataclass(frozen=True)
class Mutant:
    """A mutant."""

    file: str
    """Path of the changed file from the root."""
    text: str
    """Replaced text, which occurs exactly once in the file."""
    becomes: str
    mistake: str
    """Description of the mistake in one sentence."""
    tests: tuple[str, ...]
    """Node ids of pytest."""

    def applied(self, root: Path) -> str | None:
        """Return the changed source, or None if the text does not occur exactly once."""
        path = root / self.file
        source = path.read_text() if path.is_file() else ""
        return source.replace(self.text, self.becomes) if source.count(self.text) == 1 else None


@dataclass(frozen=True)
class Table:
    """The mutants, the files to copy, and modules of other packages to import in advance."""

    copied: tuple[str, ...]
    imported: tuple[str, ...]
    mutants: tuple[Mutant, ...]


@dataclass(frozen=True)
class Job:
    """Tests to run in a copy, with or without a mutant."""

    tests: tuple[str, ...]
    mutant: Mutant | None = None

    @property
    def key(self) -> str:
        """Return a hash that identifies the job."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]


def read_table(path: Path) -> Table:
    """Read the TOML file of mutants."""
    table = tomllib.loads(path.read_text())
    mutants = tuple(Mutant(**{**each, "tests": tuple(each["tests"])}) for each in table["mutant"])
    return Table(tuple(table["copied"]), tuple(table["imported"]), mutants)


def files(root: Path, copied: Iterable[str]) -> Iterator[Path]:
    """Yield the files of a copy in a fixed order."""
    for name in copied:
        paths = sorted((root / name).rglob("*")) if (root / name).is_dir() else [root / name]
        yield from (path for path in paths if path.is_file() and "__pycache__" not in path.parts)


def digest(root: Path, copied: Iterable[str]) -> str:
    """Return a hash of the names and contents of the files of a copy."""
    state = hashlib.sha256()
    for path in files(root, copied):
        state.update(f"{path.relative_to(root)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return state.hexdigest()


def copy(root: Path, copied: Iterable[str], target: Path) -> None:
    """Copy the program with compiled modules, which are identified by the hash of their source, not its date."""
    for path in files(root, copied):
        place = target / path.relative_to(root)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
    compileall.compile_dir(target, quiet=2, invalidation_mode=PycInvalidationMode.CHECKED_HASH)


# --- One process of tests --------------------


class Failures:
    """pytest plugin that collects the names of failed tests."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.names.append(report.nodeid)


def run_tests(folder: Path, tests: Sequence[str], packages: Iterable[str], output: Path) -> int:
    """Start a process that runs tests in a folder and writes `output`.json and .txt; return its process id."""
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        sink = os.open(output.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(sink, stream)
        os.chdir(folder)
        os.environ |= {"PYTHONPATH": str(folder), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        sys.path.insert(0, str(folder))
        failures = Failures()
        code = int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *tests], plugins=[failures]))
        for name in packages:
            place = Path(importlib.import_module(name).__file__ or "")
            if not place.is_relative_to(folder):
                raise ImportError(f"{name} comes from {place}, not from the copy")
        output.with_suffix(".json").write_text(json.dumps({"code": code, "failed": failures.names}))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(0)


class Slot:
    """A copy of the program that runs one job at a time."""

    def __init__(self, root: Path, table: Table, folder: Path) -> None:
        self.output, self.folder = folder / "result", folder / "copy"
        self.packages = {mutant.file.split("/")[0] for mutant in table.mutants}
        self.job: Job | None = None
        copy(root, table.copied, self.folder)

    def start(self, job: Job) -> bool:
        """Start a job; return False if its mutant is stale."""
        if job.mutant is not None:
            source = job.mutant.applied(self.folder)
            if source is None:
                return False
            self.right = (self.folder / job.mutant.file).read_text()
            (self.folder / job.mutant.file).write_text(source)
        self.output.with_suffix(".json").unlink(missing_ok=True)
        self.job, self.started = job, time.monotonic()
        self.process = run_tests(self.folder, job.tests, self.packages, self.output)
        return True

    def result(self) -> dict[str, Any] | None:
        """Return the result of the job after restoring the copy; None while it runs."""
        assert self.job is not None
        seconds = time.monotonic() - self.started
        if os.waitpid(self.process, os.WNOHANG)[0] == 0:
            if seconds < TIMEOUT:
                return None
            self.stop()
        mutant, self.job = self.job.mutant, None
        if mutant is not None:
            (self.folder / mutant.file).write_text(self.right)
        written = self.output.with_suffix(".json")
        found = json.loads(written.read_text()) if written.is_file() else {"code": None, "failed": []}
        outcomes = {pytest.ExitCode.OK: SURVIVED, pytest.ExitCode.TESTS_FAILED: CAUGHT}
        outcome = outcomes.get(found["code"], UNCLEAR)
        by = found["failed"][0] if found["failed"] else None
        if outcome == UNCLEAR:
            print(self.output.with_suffix(".txt").read_text()[-3000:], file=sys.stderr)
        return {"outcome": outcome, "by": by, "seconds": round(seconds, 1)}

    def stop(self) -> None:
        """End the process group of the job."""
        if self.job is not None:
            os.killpg(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)


# --- All of them --------------------


def run_jobs(jobs: Sequence[Job], slots: Sequence[Slot]) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Run jobs, one per slot at a time, and yield each with its result when it ends."""
    waiting = list(reversed(jobs))
    try:
        while waiting or any(slot.job for slot in slots):
            for slot in slots:
                if slot.job is None and waiting:
                    job = waiting.pop()
                    if not slot.start(job):
                        yield job, {"outcome": STALE, "by": None, "seconds": 0.0}
                elif (job := slot.job) is not None and (result := slot.result()) is not None:
                    yield job, result
            time.sleep(0.02)
    finally:
        for slot in slots:
            slot.stop()


class Results:
    """Results by job key, stored in a file that is valid for one version of the code."""

    def __init__(self, path: Path, code: str) -> None:
        self.path, self.code = path, code
        kept = json.loads(path.read_text()) if path.is_file() else {}
        self.found: dict[str, dict[str, Any]] = kept["results"] if kept.get("code") == code else {}

    def add(self, job: Job, result: dict[str, Any]) -> None:
        """Add a result, and write the file."""
        mutant = job.mutant
        self.found[job.key] = result | ({"file": mutant.file, "mistake": mutant.mistake} if mutant else {})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"code": self.code, "results": self.found}, indent=1))
        temporary.replace(self.path)


def measure(root: Path, table: Table, mutants: Sequence[Mutant], results: Results, workers: int) -> None:
    """Run the missing tests, on the unchanged code and then with each mutant."""
    os.environ["OMP_NUM_THREADS"] = "1"  # before the import of torch, because processes share the cores
    unchanged = [Job(tests) for tests in dict.fromkeys(mutant.tests for mutant in mutants)]
    for name in table.imported:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        slots = [Slot(root, table, Path(folder, str(number)).resolve()) for number in range(workers)]
        for jobs in (unchanged, [Job(mutant.tests, mutant) for mutant in mutants]):
            left = [job for job in jobs if job.key not in results.found]
            for done, (job, result) in enumerate(run_jobs(left, slots), 1):
                if job.mutant is None and result["outcome"] != SURVIVED:
                    raise ValueError(
                        f"{' '.join(job.tests)}: do not pass on the unchanged code ({result['by']})"
                    )
                results.add(job, result)
                passed = f"passed without a mutant: {' '.join(job.tests)}"
                name = f"{result['outcome']}: {job.mutant.mistake}" if job.mutant else passed
                print(f"{done}/{len(left)} {name} ({result['seconds']} s)", flush=True)


def description(mutant: Mutant) -> str:
    """Return the first cells of the row of a mutant."""
    change = f"{_code(mutant.text)} | {_code(mutant.becomes)}"
    return f"| {mutant.mistake} | {_code(mutant.file)} | {change} | "


def _code(text: str) -> str:
    words = " ".join(text.split())
    return f"`{words}`".replace("|", "\\|") if words else "nothing"


def shown(page: Path, mutant: Mutant) -> str | None:
    """Return the row of a mutant in a Markdown page; None if the page lacks it or describes it otherwise."""
    lines = page.read_text().splitlines()
    return next((line for line in lines if line.startswith(description(mutant))), None)


def rows(mutants: Sequence[Mutant], results: Results, page: Path) -> list[str]:
    """Return the lines of the Markdown table; mutants that did not run keep their row of the page."""
    lines = ["| mistake | file | right | wrong | outcome | first test to fail |", "|---|---|---|---|---|---|"]
    for mutant in mutants:
        result = results.found.get(Job(mutant.tests, mutant).key)
        if result is None:
            lines.append(shown(page, mutant) or "")
            continue
        test = (result["by"] or "").split("::")[-1].split("[")[0]
        lines.append(f"{description(mutant)}{result['outcome']} | {_code(test)} |")
    return lines


def write_table(page: Path, lines: Sequence[str]) -> None:
    """Replace the table at the end of a Markdown page."""
    before, _, _ = page.read_text().partition("\n|")
    page.write_text(before.rstrip("\n") + "\n\n" + "\n".join(lines) + "\n")


def main(words: Sequence[str] | None = None) -> int:
    """Run the mutants and print their outcomes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="root of the program")
    parser.add_argument(
        "--mutants", type=Path, default=None, help="table of mutants (default scripts/mutants.toml)"
    )
    parser.add_argument(
        "--results", type=Path, default=None, help="results file (default outputs/mutants.json)"
    )
    parser.add_argument("--only", default="", help="text in the file or description of the mutants to run")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="number of processes")
    parser.add_argument("--table", type=Path, default=None, help="Markdown page to update")
    parser.add_argument(
        "--new", action="store_true", help="run only mutants without a row in the page of --table"
    )
    given = parser.parse_args(words)
    if given.only and given.table:
        parser.error("--table: needs the results of all mutants; leave out --only")
    if given.new and not given.table:
        parser.error("--new: needs the page of --table")
    root = given.root.resolve()
    table = read_table(given.mutants or root / "scripts" / "mutants.toml")
    mutants = [m for m in table.mutants if given.only.lower() in f"{m.file} {m.mistake}".lower()]
    if given.new:
        mutants = [mutant for mutant in mutants if shown(given.table, mutant) is None]
    results = Results(given.results or root / "outputs" / "mutants.json", digest(root, table.copied))
    try:
        measure(root, table, mutants, results, given.workers)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    counts = Counter[str]()
    for mutant in mutants:
        outcome = results.found[Job(mutant.tests, mutant).key]["outcome"]
        counts[outcome] += 1
        if outcome != CAUGHT:
            print(f"{outcome}: {mutant.file}: {mutant.mistake}")
    print(", ".join(f"{counts[name]} {name}" for name in (CAUGHT, SURVIVED, STALE, UNCLEAR)))
    if given.table is not None:
        write_table(given.table, rows(table.mutants, results, given.table))
    return int(counts[CAUGHT] < len(mutants))


if __name__ == "__main__":
    sys.exit(main())
