"""`diffuse sample` with mappings in `label=`, and with prompts: samples, records and refusals."""

import json

import pytest

from diffusion_cli.cli import run
from helpers.sampling import pngs


def sample(root, output, *words):
    return run(["sample", f"output_dir={root}", "steps=2", "num_samples=4", f"output={output}", *words])


def test_a_mapping_of_the_class_gives_what_its_name_gives(edit_runs, tmp_path):
    for name, words in {"plain": ["label=[3,5]"], "mapping": ["label.label=[3,5]"]}.items():
        assert sample(edit_runs, tmp_path / name, "run=told", *words) == 0
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("plain", "mapping")]
    assert manifests[0]["settings"] == manifests[1]["settings"]
    assert pngs(tmp_path / "plain") == pngs(tmp_path / "mapping")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["label={age: 3}"], "label.age: the model is conditioned on classes only; write label=<class>"),
        (["label.label=[3,null]"], "label=null: unknown class"),
        (["prompt=a red, big seven"], "prompt: the model has no text condition; train one with text=learned"),
        (["prompts=a.txt"], "prompts=a.txt: the model has no text condition; train one with text=learned"),
        (["negative_prompt=blurry"], "negative_prompt: the model has no text condition; train one with"),
    ],
)
def test_conditions_that_a_model_of_classes_lacks_are_refused(edit_runs, tmp_path, capsys, words, line):
    assert sample(edit_runs, tmp_path / "out", "run=told", *words) == 2
    assert line in capsys.readouterr().err
