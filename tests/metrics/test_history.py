"""The record of results and their comparison."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from diffusion_cli.metrics import (
    InceptionScore,
    Report,
    Result,
    append_history,
    history_table,
    read_history,
    unlike,
)
from helpers.metrics import DATA, Projection, measured, pixels

CPU = torch.device("cpu")


def test_history_grows_and_is_never_clobbered(tmp_path) -> None:
    path = tmp_path / "metrics.json"
    first, second, third = (Report([Result("fid", value, {}, {})], []).to_dict() for value in (1.5, 2.5, 3.5))
    append_history(path, first)
    append_history(path, second)
    assert read_history(path) == [first, second]
    for content in ("[{", '{"value": 1}', "[1]", "[{}]", '[{"results": [{"name": "x"}], "notes": []}]'):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"metrics.json: is not"):
            append_history(path, third)
        assert path.read_text() == content
    path.unlink()
    with pytest.raises(ValueError, match="JSON"):
        append_history(path, {"value": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_entries_added_at_the_same_time_are_all_kept(tmp_path) -> None:
    path = tmp_path / "metrics.json"
    entries = [Report([Result("fid", float(value), {}, {})], []).to_dict() for value in range(20)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda entry: append_history(path, entry), entries))
    assert sorted(entry["results"][0]["value"] for entry in read_history(path)) == list(range(20))


def test_samples_of_other_classes_or_weights_are_unlike() -> None:
    """Where both are known; another sampler is what one compares."""
    about = {"weights": "ema", "labels": [0, 1], "steps": 5, "precision": "fp32", "clip_x0": True}
    for change, expected in (
        ({"weights": "raw"}, ["sampling.weights"]),
        ({"ema_length": 0.1}, ["sampling.ema_length"]),
        ({"labels": [3]}, ["sampling.labels"]),
        ({"labels": None, "steps": 9}, []),
        ({"label_shares": [19, 1]}, ["sampling.label_shares"]),
        ({"label_shares": [19, 1], "labels": None}, []),
        ({"precision": "bf16"}, ["sampling.precision"]),
        ({"clip_x0": False}, ["sampling.clip_x0"]),
        ({"precision": None, "clip_x0": None}, []),
    ):
        assert unlike({"sampling": about}, {"sampling": about | change}) == expected


def history_of(value: float, sampling: dict | None, **protocol) -> list[dict]:
    made = {} if sampling is None else {"sampling": sampling}
    return [Report([Result("fid", value, {}, {"samples": 9, **made, **protocol})], []).to_dict()]


DDIM = {
    "sampler": {"_target_": "diffusion_cli.samplers.DDIM", "eta": 0.0},
    "steps": 50,
    "precision": "fp32",
    "run": "a",
}
UNIPC = DDIM | {"sampler": {"_target_": "diffusion_cli.samplers.UniPC", "order": 3}, "run": "b"}


def test_a_table_marks_every_difference_of_sampling() -> None:
    rows = history_table({"a": history_of(1, DDIM), "b": history_of(2, UNIPC)}, force=False).splitlines()
    assert rows == ["| run | sampler | fid |", "|---|---|---|", "| a | DDIM | 1 |", "| b | UniPC | 2 |"]
    noisy = DDIM | {"sampler": DDIM["sampler"] | {"eta": 1.0}, "steps": 20, "lossy": {"JPEG": 9}}
    rows = history_table({"a": history_of(1, DDIM), "b": history_of(2, noisy)}, force=False).splitlines()
    assert rows[0] == "| run | sampler.eta | steps | lossy.JPEG | fid |"
    assert rows[3] == "| b | 1.0 | 20 | 9 | 2 |"
    assert rows[2] == "| a | 0.0 | 50 | none | 1 |"


def test_a_table_refuses_another_precision_or_clipping_unless_forced() -> None:
    for key, value in (("precision", "bf16"), ("clip_x0", False)):
        both = {
            "a": history_of(1, DDIM | {"clip_x0": True}),
            "b": history_of(2, DDIM | {"clip_x0": True, key: value}),
        }
        with pytest.raises(ValueError, match=rf"fid of a and b: sampling\.{key}\).*set force=true"):
            history_table(both, force=False)
        rows = history_table(both, force=True).splitlines()
        assert rows[0] == f"| run | {key} | fid |"
        assert rows[3].endswith("| 2* |")


def test_a_table_marks_only_what_differs_for_one_name_and_reads_old_protocols() -> None:
    other = Report([Result("bound", 3, {}, {"model": {"weights": "ema", "precision": "fp32"}})], []).to_dict()
    quick = DDIM | {"precision": "bf16"}
    rows = history_table(
        {"a": [*history_of(1, quick), other], "b": history_of(2, quick)}, force=False
    ).splitlines()
    assert rows[0] == "| run | fid | bound |"
    old = history_table(
        {"a": history_of(1, {"steps": 50}), "b": history_of(2, DDIM), "c": history_of(3, None)}, False
    )
    assert old.splitlines()[0] == "| run | fid |"
    models = [history_of(1, None, model={"weights": weights}) for weights in ("ema", "raw")]
    with pytest.raises(ValueError, match=r"model\.weights"):
        history_table({"a": models[0], "b": models[1]}, force=False)


def test_protocols_are_unlike_by_how_they_measure_not_by_what(tmp_path) -> None:
    protocols = []
    for count, steps, splits in ((100, 10, 4), (100, 20, 4), (90, 10, 5)):
        metrics = {"is": InceptionScore(splits=splits)}
        report = measured(metrics, Projection(), pixels(count, 2), DATA, tmp_path, made={"steps": steps})
        protocols.append(report.results[0].protocol)
    assert unlike(protocols[0], protocols[1]) == []
    assert unlike(protocols[0], protocols[2]) == ["samples", "splits"]
    assert unlike({"split": "val", "model": {"step": 1}}, {"split": "train", "model": {"step": 2}}) == [
        "split"
    ]
