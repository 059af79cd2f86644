"""Snapshots of power averages: their files, and weights of other lengths from them."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from diffusion_cli.errors import UsageError
from diffusion_cli.runs.snapshots import LENGTHS as LENGTHS_KEY
from diffusion_cli.runs.snapshots import (
    StoredAverages,
    remove_later,
    save_snapshot,
    snapshot_file,
    snapshot_steps,
    state_key,
)
from diffusion_cli.runs.weights import save_weights
from diffusion_cli.system.tensors import read_tensors
from diffusion_cli.training.ema import EMA, PowerAverage

LENGTHS = [0.05, 0.1]
OTHER, STEPS, EVERY = 0.075, 240, 20


class Net(nn.Module):
    """A trained weight, a frozen one, and a buffer of whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 2))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("calls", torch.tensor(0))


def checkpoint(averages: list[EMA], step: int, **ema: object) -> SimpleNamespace:
    """What a reconstruction needs of a checkpoint."""
    states = {average.state_key: average.state_dict() for average in averages}
    settings = {"profile": "power", "lengths": LENGTHS, **ema}
    return SimpleNamespace(
        step=step, state={"callbacks": states}, info=SimpleNamespace(config=SimpleNamespace(ema=settings)),
        weights=lambda kind: states["EMA"]["network"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, list[EMA], Tensor]:
    """A run folder with snapshots, the averages at the end, and the weight of a length that has no snapshots."""
    folder, network = tmp_path_factory.mktemp("run"), Net()
    generator = torch.Generator().manual_seed(0)
    averages = [
        EMA(network, PowerAverage(length), key=state_key(LENGTHS, i)) for i, length in enumerate(LENGTHS)
    ]
    direct = EMA(network, PowerAverage(OTHER))
    for step in range(1, STEPS + 1):
        with torch.no_grad():
            network.weight.add_(0.01 * torch.randn(3, 2, generator=generator))
            network.get_buffer("calls").add_(1)
        for average in (*averages, direct):
            average.update(network)
        if step % EVERY == 0:
            states = (average.state_dict()["network"] for average in averages)
            weights = {length: {"weight": of["weight"]} for length, of in zip(LENGTHS, states, strict=True)}
            save_snapshot(folder, step, weights)
    return folder, averages, direct.network.get_parameter("weight")


def copied(trained: tuple[Path, list[EMA], Tensor], folder: Path) -> StoredAverages:
    """The averages of a copy of a run, to be spoilt."""
    (folder / "ema").mkdir()
    for file in (trained[0] / "ema").iterdir():
        (folder / "ema" / file.name).write_bytes(file.read_bytes())
    return StoredAverages(folder, checkpoint(trained[1], STEPS))  # pyright: ignore[reportArgumentType]


def refusal(act) -> str:
    with pytest.raises(UsageError) as error:
        act()
    return str(error.value)


def test_another_length_equals_the_average_that_was_tracked_directly(trained, tmp_path):
    state, _ = copied(trained, tmp_path).reconstruct(OTHER)
    direct = trained[2]
    assert (state["weight"] - direct).norm() < 2e-3 * direct.norm()
    assert (state["weight"] - trained[1][0].network.weight).norm() > 0.02 * direct.norm()


def test_a_tracked_length_gives_the_stored_average(trained, tmp_path):
    stored = copied(trained, tmp_path)
    for length, average in zip(LENGTHS, trained[1], strict=True):
        torch.testing.assert_close(
            stored.reconstruct(length).state["weight"], average.network.weight.detach()
        )


def test_weights_that_are_not_trained_are_those_of_the_checkpoint(trained, tmp_path):
    state, _ = copied(trained, tmp_path).reconstruct(OTHER)
    assert state["calls"].item() == STEPS
    assert torch.equal(state["frozen"], torch.ones(2))
    assert state["weight"].dtype == torch.float32


def test_the_digest_names_the_length_and_all_that_is_stored(trained, tmp_path):
    stored = copied(trained, tmp_path)
    first, again, other = (stored.reconstruct(length).digest for length in (OTHER, OTHER, 0.08))
    assert first == again != other
    path = snapshot_file(tmp_path, EVERY)
    weights = read_tensors(path)
    save_snapshot(
        tmp_path, EVERY, {length: {"weight": weights[f"{i}/weight"] + 1} for i, length in enumerate(LENGTHS)}
    )
    assert stored.reconstruct(OTHER).digest != first


def test_snapshots_have_half_precision_unless_a_number_is_too_large(tmp_path):
    save_snapshot(tmp_path, 1, {0.05: {"a": torch.tensor([1 / 3]), "b": torch.tensor([1e6])}})
    found = read_tensors(snapshot_file(tmp_path, 1))
    assert found["0/a"].dtype == torch.float16
    assert found["0/b"].tolist() == [1e6]


def test_a_training_that_begins_earlier_removes_later_snapshots(trained, tmp_path):
    copied(trained, tmp_path)
    remove_later(tmp_path, 3 * EVERY)
    assert snapshot_steps(tmp_path) == [EVERY, 2 * EVERY, 3 * EVERY]


def test_only_snapshots_before_the_checkpoint_count(trained, tmp_path):
    copied(trained, tmp_path)
    half = StoredAverages(tmp_path, checkpoint(trained[1], STEPS // 2))  # pyright: ignore[reportArgumentType]
    assert half.steps == [*range(EVERY, STEPS // 2, EVERY)]


def test_too_few_snapshots_are_refused_with_the_lengths_within_reach(trained, tmp_path):
    stored = copied(trained, tmp_path)
    remove_later(tmp_path, 2 * EVERY)
    few = StoredAverages(tmp_path, stored.checkpoint)
    line = refusal(lambda: few.reconstruct(0.02))
    assert "residual of" in line
    assert f"choose a length from {few.within_reach[0]} to {few.within_reach[-1]}" in line
    remove_later(tmp_path, 0)
    assert "no snapshots of the averages before step 240" in refusal(
        lambda: StoredAverages(tmp_path, stored.checkpoint)
    )


def test_a_run_of_another_profile_is_refused(trained, tmp_path):
    for settings in ({"profile": "exponential"}, {"lengths": None}, {"lengths": [0.1, 7]}):
        old = checkpoint(trained[1], STEPS, **settings)
        line = refusal(lambda old=old: StoredAverages(tmp_path, old))  # pyright: ignore[reportArgumentType]
        assert line.startswith("ema_length: ")
        assert line.endswith("train a run with ema.profile=power")


def test_damaged_and_foreign_snapshots_are_refused(trained, tmp_path):
    stored, path = copied(trained, tmp_path), snapshot_file(tmp_path, EVERY)
    whole = read_tensors(path)["0/weight"]
    for spoilt, why in (
        ({0.05: {"weight": whole}}, "other lengths"),
        ({length: {"bias": whole} for length in LENGTHS}, "other weights than the run"),
        ({length: {"weight": whole[:1]} for length in LENGTHS}, "does not fit"),
        ({length: {"weight": whole * torch.nan} for length in LENGTHS}, "not finite"),
    ):
        apart = {length: {name: each.clone() for name, each in of.items()} for length, of in spoilt.items()}
        save_snapshot(tmp_path, EVERY, apart)
        assert why in refusal(lambda: stored.reconstruct(OTHER))
    path.write_bytes(b"\0" * 100)
    line = refusal(lambda: stored.reconstruct(OTHER))
    assert line.startswith(f"{path}: invalid or damaged snapshot")
    save_weights({}, path, (LENGTHS_KEY, "[" * 100_000))
    assert "is not JSON" in refusal(lambda: stored.reconstruct(OTHER))
    of_8_bits = {f"{number}/weight": whole.to(torch.float8_e4m3fn) for number in range(len(LENGTHS))}
    save_weights(of_8_bits, path, (LENGTHS_KEY, str(LENGTHS)))
    assert "does not fit" in refusal(lambda: stored.reconstruct(OTHER))


def test_files_of_other_names_are_left_alone(trained, tmp_path):
    """Such as a copy that a file manager made."""
    stored = copied(trained, tmp_path)
    for name in (
        "step_7.safetensors",
        f"step_{EVERY}.safetensors",
        "step_00000020 (1).safetensors",
        "step_٣.safetensors",
    ):
        (tmp_path / "ema" / name).touch()
    (tmp_path / "ema" / "step_00000003.safetensors").symlink_to("missing")
    assert snapshot_steps(tmp_path) == [*range(EVERY, STEPS + 1, EVERY)]
    assert stored.bytes > 0
    remove_later(tmp_path, 0)
    assert len([*(tmp_path / "ema").iterdir()]) == 5
