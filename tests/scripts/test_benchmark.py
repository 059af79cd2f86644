"""The arithmetic of `scripts/benchmark.py`; what it times is not timed here."""

import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import benchmark
from benchmarks.ours import PARAMETERS, WORDS, Training, configured, count, denoiser_of
from benchmarks.peers import OF_LUCIDRAINS, Diffusers, Lucidrains, imported, unet_2d
from benchmarks.race import Contestant, NetworkClock, Table, compared, flops, race, raced, timed
from benchmarks.roofline import Operations, draw

CPU = torch.device("cpu")
SHAPES = {"ddpm": (3, 32, 32), "small": (1, 16, 16)}


class FakeClock:
    """A clock that stands still but for the work done under it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> Callable[[], None]:
        def work() -> None:
            self.now += seconds

        return work


def test_contestants_take_turns() -> None:
    turns: list[str] = []

    def once(name: str) -> float:
        turns.append(name)
        return float(len(turns))

    results = race({"a": lambda: once("a"), "b": lambda: once("b")}, rounds=3)
    assert turns == ["a", "b"] * 3
    assert results == {"a": [1, 3, 5], "b": [2, 4, 6]}


def test_a_round_is_the_mean_of_its_repeats() -> None:
    clock, calls = FakeClock(), []
    once = timed(lambda: (calls.append(0), clock.work(0.25)()), CPU, repeats=4, clock=clock)
    assert once() == 0.25
    assert len(calls) == 4


def test_a_table_holds_medians_ratios_and_shares() -> None:
    peer = Contestant("peer", lambda: 0, images=8, flops=100 * 10**9)
    ours = Contestant("ours", lambda: 0, images=8, flops=100 * 10**9, precision="bf16")
    results = {"peer": [2.0, 1.0, 9.0], "ours": [0.5, 0.4, 7.0]}  # a disturbed round moves no median
    table = compared("A race.", [peer, ours], results, {"fp32": 200e9, "bf16": 800e9})
    assert table.rows == [
        ("peer", "2000", "4", "1.00", "50", "25 %"),
        ("ours", "500", "16", "4.00", "200", "25 %"),
    ]
    assert len(table.head) == len(table.rows[0])
    assert "fp32 200, bf16 800" in table.caption
    assert table.measured["contestants"]["ours"]["seconds"] == [0.5, 0.4, 7.0]
    json.dumps(table.measured)


def test_ratios_are_of_images_a_second_where_work_differs() -> None:
    clock = FakeClock()
    many = Contestant("many", timed(clock.work(2.0), CPU, clock=clock), images=100)
    few = Contestant("few", timed(clock.work(1.0), CPU, clock=clock), images=25)
    rows = raced("", [many, few], rounds=2).rows
    assert [row[3] for row in rows] == ["1.00", "0.50"]


def test_the_ceiling_is_the_highest_of_all_rounds() -> None:
    clock, seen = FakeClock(), iter([1e9, 4e9, 2e9])
    peer = Contestant("peer", timed(clock.work(2.0), CPU, clock=clock), images=1, flops=2 * 10**9)
    table = raced("", [peer], rounds=3, ceilings={"fp32": lambda: next(seen)})
    assert table.rows == [("peer", "2000", "0.5", "1.00", "1", "25 %")]
    assert table.measured["ceilings"] == {"fp32": 4e9}


def test_markdown_of_a_table() -> None:
    table = Table("Caption.", ("a",), [("1",), ("2",)], {}).with_column("b", ["3", "4"])
    assert table.markdown() == "Caption.\n\n| a | b |\n| --- | --- |\n| 1 | 3 |\n| 2 | 4 |"


def test_the_clock_of_a_network_runs_within_its_calls_and_those_of_its_copies() -> None:
    network = nn.Linear(2, 2)
    clock, ticks = NetworkClock(network, CPU), iter([1.0, 3.0, 10.0, 15.0])
    clock._now = lambda: next(ticks)  # pyright: ignore[reportAttributeAccessIssue]
    network(torch.zeros(1, 2))
    deepcopy(network)(torch.zeros(1, 2))
    assert clock.seconds == 2 + 5


def test_operations_of_a_convolution_are_two_a_tap() -> None:
    layer = nn.Conv2d(3, 5, 3, padding=1)
    assert flops(lambda: layer(torch.zeros(2, 3, 8, 8))) == 2 * 2 * 5 * 3 * 9 * 8 * 8


def test_operations_know_the_bytes_they_move() -> None:
    layer, x = nn.Conv2d(3, 5, 3, padding=1), torch.zeros(2, 3, 8, 8)
    with torch.no_grad(), Operations(CPU) as operations:
        layer(x).mul_(2)
    (convolution,) = operations.counted  # the product by 2 is no operation that is counted
    result = 4 * 2 * 5 * 8 * 8
    assert convolution.flops == 2 * 2 * 5 * 3 * 9 * 8 * 8
    assert convolution.bytes == x.nbytes + layer.weight.nbytes + 4 * 5 + result
    assert operations.bytes == convolution.bytes + 2 * result


def test_a_roofline_is_drawn(tmp_path) -> None:
    call = {"flops": 100, "bytes": 10, "seconds": 1e-9}
    part = {"ceiling": 1e11, "operations": [call], "forward": call}
    draw({"batch": 1, "bytes_per_second": 1e10, "fp32": part, "bf16": part}, tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size > (500, 300)


@pytest.mark.parametrize("name", WORDS)
def test_networks_have_the_parameters_that_captions_name(name: str) -> None:
    assert count(denoiser_of(configured(WORDS[name]), SHAPES[name])) == PARAMETERS[name]


@pytest.mark.parametrize("name", WORDS)
def test_diffusers_network_is_as_large(name: str) -> None:
    assert count(unet_2d(name, SHAPES[name])) == PARAMETERS[name]


@pytest.mark.parametrize("name", OF_LUCIDRAINS)
def test_the_other_peers_network_is_near_in_size(name: str) -> None:
    pytest.importorskip("denoising_diffusion_pytorch")
    size = count(Lucidrains(name, SHAPES[name], CPU).network)
    assert size == pytest.approx(PARAMETERS[name], rel=0.02)


def test_peers_steps_move_weights_and_average() -> None:
    training = Diffusers("small", (1, 8, 8), CPU, "bf16")
    before = deepcopy(training.network.state_dict())
    for _ in range(2):  # the learning rate rises from zero
        training.step(torch.randn(4, 1, 8, 8))
    moved = [not torch.equal(value, before[name]) for name, value in training.network.state_dict().items()]
    assert all(moved)
    assert training.ema.optimization_step == 2


def test_our_step_is_that_of_diffuse_train(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusion_cli.commands.train import train
    from diffusion_cli.config import build
    from diffusion_cli.data import Batches
    from diffusion_cli.runs.checkpoint import LAST, read

    words = [
        f"output_dir={tmp_path}", "name=run", "max_steps=3", "batch_size=8", "precision=fp32", "trainer=cpu",
        "dataset.val_fraction=0", "logger=csv", "preview_every=1000",
    ]  # fmt: skip
    checked = configured(words)
    train(checked)
    trained = read(tmp_path / "run" / LAST).state["state_dict"]
    training = Training(checked, (1, 8, 8), CPU, "fp32")
    batches: Iterator = iter(Batches(build(checked.dataset, "").load("train"), 8, checked.seed, flip=False))
    for _ in range(3):
        batch = next(batches)
        training.step(batch.images, batch.number)
    for name, weight in training.denoiser.state_dict().items():
        assert torch.equal(weight, trained[f"model.{name}"]), name


def test_an_absent_peer_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SystemExit, match=r"^diffusers: .*pip install '\.\[bench\]'$"):
        imported("diffusers")


def test_a_run_writes_its_tables_and_every_round(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    class Part:
        @staticmethod
        def tables(rounds: int, device: torch.device) -> Iterator[Table]:
            contestant = Contestant("peer", lambda: 0.5, images=1)
            yield raced("A race.", [contestant], rounds)

    monkeypatch.setitem(benchmark.BENCHMARKS, "part", Part)
    monkeypatch.setattr(
        sys,
        "argv",
        ["benchmark.py", "part", "--rounds", "3", "--device", "cpu", "--json", f"{tmp_path}/a.json"],
    )
    benchmark.main()
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["machine"]["threads"] == torch.get_num_threads()
    assert record["machine"]["torch"] == torch.__version__.partition("+")[0]
    assert record["tables"]["part"][0]["contestants"]["peer"]["seconds"] == [0.5] * 3
    assert "| peer | 500 | 2 | 1.00 |" in capsys.readouterr().out


# --- scripts/check_gpu.sh --------------------

CHECK = Path(__file__).parents[2] / "scripts" / "check_gpu.sh"


def check_gpu(*words: str, out: Path, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": python, "OUT": str(out), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(["bash", str(CHECK), *words], env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_check_of_a_gpu_runs_in_miniature(tmp_path) -> None:
    images = tmp_path / "images.zip"
    with zipfile.ZipFile(images, "w") as file:
        for number in range(12):
            data = io.BytesIO()
            Image.new("RGB", (32, 32), (20 * number, 90, 200)).save(data, "PNG")
            file.writestr(f"{number}.png", data.getvalue())
    done = check_gpu("--dry-run", str(images), out=tmp_path / "out")
    assert done.returncode == 0, done.stdout
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        "machine", "tests", "train", "sample", "benchmark", "training", "all",
    ]  # fmt: skip
    assert "images/s (median), loss " in done.stdout
    made = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"summary.txt", "metrics.csv", "grid.png", "benchmark.json", "tests.log"} <= made


def test_the_check_of_a_gpu_names_what_failed(tmp_path) -> None:
    (tmp_path / "images.zip").touch()
    done = check_gpu("--dry-run", str(tmp_path / "images.zip"), out=tmp_path / "out", python="false")
    assert done.returncode == 1
    assert "failed: machine tests train sample benchmark; see " in done.stdout


def test_the_check_of_a_gpu_needs_images(tmp_path) -> None:
    done = check_gpu(str(tmp_path / "missing.zip"), out=tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert "is not a file; give a ZIP of 32x32 colour images" in done.stderr
