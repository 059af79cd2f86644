"""`diffuse runs`, and completion of runs and paths: from small files, without torch."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from diffusion_cli.cli import run
from diffusion_cli.config import complete
from diffusion_cli.runs import overview


@pytest.fixture
def root(tmp_path):
    """A folder with an evaluated run, an older classifier, a damaged run and other folders."""
    for name, date, files in (
        ("photos", 3e8, ["last.ckpt", "step_00000400.ckpt", "step_00000900.ckpt"]),
        ("judge", 2e8, ["last.ckpt"]),
        ("broken", 1e8, ["step_00000005.ckpt"]),
        ("unfinished", 0, ["other.ckpt"]),
    ):
        for file in files:
            path = tmp_path / name / "checkpoints" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bytes(10))
            os.utime(path, (date, date))
    dataset = {"_target_": "diffusion_cli.data.Folder", "path": "my photos"}
    objective = {"_target_": "diffusion_cli.diffusion.objectives.Simple"}
    write = {"dataset": dataset, "objective": objective, "max_steps": 1000}
    (tmp_path / "photos" / "config.yaml").write_text(yaml.safe_dump(write))
    write["objective"] = {
        "_target_": "diffusion_cli.objective.CrossEntropy"
    }  # the module of an earlier version
    write["dataset"] = {"_target_": "diffusion_cli.data.FashionMNIST"}
    (tmp_path / "judge" / "config.yaml").write_text(yaml.safe_dump(write))
    (tmp_path / "judge" / "metrics.csv").write_text("step,loss\n50,0.5\n70,0.4\n")
    (tmp_path / "broken" / "config.yaml").write_text("{")
    (tmp_path / "broken" / "metrics.json").write_text("[3]")
    results = [
        [{"name": "fid", "value": value}, {"name": f"kid{value}", "value": 1}] for value in (12.5, 11.25)
    ]
    reports = [{"results": each, "notes": []} for each in results]
    (tmp_path / "photos" / "metrics.json").write_text(json.dumps(reports))
    (tmp_path / "notes").mkdir()
    return tmp_path


def test_runs_are_listed_newest_first(root, capsys):
    assert run(["runs", f"output_dir={root}"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["run", "data", "task", "step", "newest", "results", "size", "date"]
    assert [row.split()[0] for row in rows] == ["photos", "judge", "broken"]
    assert (
        "folder my photos  diffusion   900/1000  fid 11.25, kid12.5 1, kid11.25 1  0.0 MB  1979-07-05"
        in rows[0]
    )
    assert "fashion_mnist     classifier  70/1000   -" in rows[1]
    assert rows[2].split()[1:4] == ["?", "?", "5"]


def test_a_result_of_another_step_names_it(root, capsys):
    parts = [{"sampling": {"step": 400}}, {"model": {"step": 900}}, {"sampling": "?"}]
    results = [{"name": f"m{n}", "value": n, "protocol": part} for n, part in enumerate(parts)]
    (root / "photos" / "metrics.json").write_text(json.dumps([{"results": results, "notes": []}]))
    assert run(["runs", f"output_dir={root}"]) == 0
    assert "  m0 0 at step 400, m1 1, m2 2  " in capsys.readouterr().out
    assert run(["runs", f"output_dir={root}", "format=json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["result_steps"] == {"m0": 400, "m1": 900}


def test_runs_are_listed_for_programs(root, capsys):
    assert run(["runs", f"output_dir={root}", "format=json"]) == 0
    first, *_ = json.loads(capsys.readouterr().out)
    assert (first["name"], first["step"], first["results"]["fid"]) == ("photos", 900, 11.25)
    assert first["bytes"] >= 30
    assert run(["runs", f"output_dir={root / 'notes'}", "format=json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert run(["runs", f"output_dir={root / 'notes'}"]) == 2
    assert "contains no runs; train one with: diffuse train" in capsys.readouterr().err


def test_option_files_without_a_class_of_their_own_do_not_end_the_list(root, tmp_path, monkeypatch, capsys):
    parent = "# @package _global_\ndataset:\n  _target_: diffusion_cli.data.FashionMNIST\n"
    files = {
        "garments": parent,
        "few": "defaults: [garments]\ndataset:\n  split: a\n",
        "damaged": "{",
        "empty": "",
    }
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    options = {name: tmp_path / f"{name}.yaml" for name in files}
    monkeypatch.setattr("diffusion_cli.config.catalogue.options", lambda group: options)
    overview._option.cache_clear()
    assert run(["runs", f"output_dir={root}"]) == 0
    overview._option.cache_clear()
    out = capsys.readouterr().out
    assert " fashion_mnist " in out  # by the name of the class
    assert " folder my photos " in out


def test_listing_runs_imports_no_torch(root):
    code = (
        "import sys; from diffusion_cli.cli import run; run(sys.argv[1:]); "
        "print([m for m in ('torch', 'numpy', 'lightning', 'PIL') if m in sys.modules])"
    )
    words = [sys.executable, "-c", code, "runs", f"output_dir={root}"]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[-1] == "[]"


def test_runs_and_paths_are_completed(root, monkeypatch):
    monkeypatch.chdir(root)
    (root / "images.zip").touch()
    (root / ".hidden").touch()
    assert complete(["sample", "output_dir=.", "run=p"]) == ["run=photos", "run=photos/"]
    assert complete(["sample", f"output_dir={root}", "run=j"]) == ["run=judge", "run=judge/"]
    assert complete(["eval", "samples=i"]) == ["samples=images.zip"]
    assert complete(["sample", "run=i"]) == []
    assert complete(["train", f"dataset.path={root}/im"]) == [f"dataset.path={root}/images.zip"]
    assert complete(["train", "dataset.path=photos/"]) == ["dataset.path=photos/checkpoints/"] + [
        f"dataset.path=photos/{name}" for name in ("config.yaml", "metrics.json")
    ]
    assert ".hidden" not in " ".join(complete(["edit", "input="]))
    assert complete(["edit", "input=nowhere/x"]) == []
    assert complete(["train", "batch_size=i"]) == []
    assert complete(["sample", "run=~no_such_user/x"]) == []
    assert complete(["sample", "output_dir=~no_such_user/x", "run=n"]) == ["run=notes/"]
