"""`diffuse eval metric=bits_per_dim` and metric=inversion."""

import json

import pytest

from diffusion_cli.cli import run

SMALL = [
    "model.channels=8", "model.norm_groups=4", "model.num_heads=1", "model.head_channels=null", "batch_size=64",
    "max_steps=20", "logger=csv", "trainer=cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("outputs")
    words = [*SMALL, f"output_dir={root}"]
    assert run(["train", *words, "name=discrete", "schedule.num_timesteps=10", "preview_steps=5"]) == 0
    assert run(["train", *words, "name=continuous", "schedule=vp"]) == 0
    real = ["dataset=gaussian_mixture", "model.channel_mult=[1,2]"]
    assert run(["train", *words, *real, "name=real", "schedule=rectified", "parameterization=flow"]) == 0
    return root


def evaluate(root, name, *words):
    return run(["eval", f"run={name}", f"output_dir={root}", "device=cpu", "batch_size=8", *words])


def results(root, name):
    return {
        r["name"]: r
        for entry in json.loads((root / name / "metrics.json").read_text())
        for r in entry["results"]
    }


BOTH = ["metric=bits_per_dim", "metric.bound.num_images=12", "metric.flow_likelihood.num_images=12",
        "metric.flow_likelihood.rtol=0.01", "metric.flow_likelihood.atol=0.01"]  # fmt: skip


@pytest.mark.slow
def test_both_bits_per_dim_of_a_run(runs, capsys):
    assert evaluate(runs, "discrete", *BOTH) == 0
    found = results(runs, "discrete")
    bound, flow = found["bits_per_dim_bound"], found["bits_per_dim_flow"]
    parts = bound["details"]
    assert bound["value"] == pytest.approx(parts["prior"] + parts["decoder"] + parts["middle"])
    assert parts["middle"] == pytest.approx(sum(parts[f"middle_{i}"] for i in range(10)))
    assert bound["details"]["images"] == flow["details"]["images"] == 12
    assert 0 < flow["value"] < 100
    assert bound["protocol"]["model"]["weights_sha256"]
    best = min(("bits_small", "bits_large"), key=parts.get)
    per_image = [
        bits
        for file in sorted((runs / "discrete" / "bits_per_dim_bound").glob("*/*.json"))
        for bits in json.loads(file.read_text())[best]
    ]
    assert len(per_image) == 12
    assert sum(per_image) / 12 == pytest.approx(bound["value"])


@pytest.mark.slow
def test_shards_and_a_stopped_run_give_the_same_numbers(runs, capsys):
    words = ["metric=bound", "metric.bound.num_images=20", "seed=3"]
    assert evaluate(runs, "discrete", *words, "metric.bound.num_shards=2", "metric.bound.shard=1") == 0
    assert "2 of 3 batches are left to other shards" in capsys.readouterr().out
    assert evaluate(runs, "discrete", *words, "metric.bound.num_shards=2") == 0
    halves = results(runs, "discrete")["bits_per_dim_bound"]
    for file in (runs / "discrete" / "bits_per_dim_bound").glob("*/000008.json"):
        file.unlink()
    assert evaluate(runs, "discrete", *words) == 0
    assert results(runs, "discrete")["bits_per_dim_bound"]["value"] == halves["value"]
    assert evaluate(runs, "discrete", *words, "metric.bound.shard=1") == 2
    assert "metric.bound.shard=1" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"bits": [1]}', '{"bits": ["x", 1, 1, 1]}', "[" * 5000, "one digit"]
)
def test_a_damaged_batch_is_measured_anew_with_one_line(runs, capsys, text):
    words = ["metric=bound", "metric.bound.num_images=12", "seed=9"]
    assert evaluate(runs, "discrete", *words) == 0
    before = results(runs, "discrete")["bits_per_dim_bound"]["value"]
    newest = max((runs / "discrete" / "bits_per_dim_bound").glob("*"), key=lambda path: path.stat().st_mtime)
    file = newest / "000008.json"
    file.write_text(file.read_text().replace(".", ".5", 1) if text == "one digit" else text)
    capsys.readouterr()
    assert evaluate(runs, "discrete", *words) == 0
    assert f"diffuse: {file}: is damaged (" in capsys.readouterr().err
    assert results(runs, "discrete")["bits_per_dim_bound"]["value"] == before


@pytest.mark.slow
def test_batches_of_another_size_are_not_taken_for_these(runs):
    words = ["metric=bound", "metric.bound.num_images=20", "seed=5"]
    found, folders = [], len(list((runs / "discrete" / "bits_per_dim_bound").glob("*")))
    for extra in ("batch_size=12", "batch_size=5"):
        assert evaluate(runs, "discrete", *words, extra) == 0
        found.append(results(runs, "discrete")["bits_per_dim_bound"])
        assert found[-1]["details"]["images"] == 20
    assert found[0]["value"] == pytest.approx(found[1]["value"], rel=1e-4)
    assert len(list((runs / "discrete" / "bits_per_dim_bound").glob("*"))) == folders + 2


@pytest.mark.slow
def test_a_model_is_asked_in_full_precision_whatever_samples_are_made_in(runs, capsys, monkeypatch):
    words = [
        "metric=[bound,inversion]",
        "metric.bound.num_images=20",
        "metric.inversion.num_images=10",
        "metric.inversion.steps=5",
    ]
    found = []
    for fast in (False, True):
        monkeypatch.setattr("diffusion_cli.system.precision.has_fast_bf16", lambda device, fast=fast: fast)
        assert evaluate(runs, "discrete", *words) == 0
        found.append(results(runs, "discrete"))
    for name in ("bits_per_dim_bound", "inversion_rmse"):
        slow, fast = (each[name] for each in found)
        assert slow["value"] == fast["value"]
        assert slow["protocol"]["model"]["precision"] == fast["protocol"]["model"]["precision"] == "fp32"
    assert evaluate(runs, "discrete", *words, "precision=bf16") == 2
    assert "precision=bf16: metrics of the model itself are computed in fp32" in capsys.readouterr().err


@pytest.mark.slow
def test_what_has_no_bound_says_why_and_has_a_flow(runs, capsys):
    assert evaluate(runs, "continuous", *BOTH) == 0
    assert "bits_per_dim_bound: needs discrete timesteps; the VP schedule" in capsys.readouterr().out
    assert set(results(runs, "continuous")) == {"bits_per_dim_flow"}
    assert evaluate(runs, "real", *BOTH, "metric.flow_likelihood.trace=exact") == 0
    assert results(runs, "real")["bits_per_dim_flow"]["details"]["images"] == 12


@pytest.mark.slow
def test_inversion_of_a_run(runs):
    assert evaluate(runs, "discrete", "metric=inversion", "metric.inversion.steps=5") == 0
    found = results(runs, "discrete")["inversion_rmse"]
    assert found["value"] > 0
    assert found["details"]["images"] == 359
