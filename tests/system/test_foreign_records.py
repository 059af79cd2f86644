"""Untrusted checkpoints, configurations, manifests and results: each ends in one line of ours."""

import copy
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from diffusion_cli import config
from diffusion_cli.commands.outputs import parsed
from diffusion_cli.config import check_node, load
from diffusion_cli.metrics import read_history
from diffusion_cli.report.page import page
from diffusion_cli.report.record import read_record
from diffusion_cli.runs.checkpoint import LAST, read
from diffusion_cli.system import untrusted as foreign
from helpers.foreign import HISTORY, MANIFEST, PNG, clean, loaded, zipped

pytestmark = pytest.mark.usefixtures("memory")

# --- Checkpoints ------------------------------------------------------------

NOT_A_SCHEDULE = ": not a class of diffusion_cli for schedule"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (["global_step"], "3", "global_step"),
        (["global_step"], 10**30, "global_step"),
        (["callbacks"], [], "its weights"),
        (["callbacks", "EMA", "network", "stem.weight"], torch.zeros(1).expand(2**40), "its weights"),
        (["callbacks", "EMA", "network", "stem.weight"], torch.zeros(3), "do not fit the model"),
        (["diffuse", "config"], [], "config"),
        (["diffuse", "format"], torch.zeros(1).expand(2**40), "is not a checkpoint that diffuse can read"),
        (["diffuse", "shape"], ["1", 8, 8], "shape"),
        (["diffuse", "shape"], [1, 2**20, 2**20], "too large"),
        (["diffuse", "form"], {"kind": "painting"}, r"form\.kind=painting: no such format"),
        (["diffuse", "form"], {"kind": "picture", "levels": 3}, r"form\.levels"),
        (["diffuse", "stages"], [{"first": 0, "shape": [1, 4]}], "stages"),
        (["diffuse", "stages"], [{"first": 0, "shape": [1, 2**20, 2**20], "batch_size": 1}], "contradict the shape"),
        (["diffuse", "stages"], [{"first": 3, "shape": [1, 8, 8], "batch_size": 1}], "contradict the shape"),
        (["diffuse", "stages"], [None], r"stages\.0=null: must be a mapping"),
        (["diffuse", "latent"], "x", r"latent=x: must be a mapping {key: value} or null"),
        (["diffuse", "config", "schedule"], "x", r"config\.schedule=x: must be a mapping {key: value}"),
        (["diffuse", "num_classes"], 10**12, "num_classes"),
        (["diffuse", "class_names"], ["a"], "num_classes"),
        (["diffuse", "config", "model", "channels"], 10**12, "larger than"),
        (["diffuse", "config", "model", "channels"], 10**6, "cannot be built"),
        (["diffuse", "config", "model", "num_res_blocks"], 10**6, "more than the"),
        (["diffuse", "config", "model", "channel_mult"], [1] * 10**5, "cannot be built"),
        (["diffuse", "config", "schedule", "num_timesteps"], 10**12, "larger than"),
        (["diffuse", "config", "schedule", "beta_end"], 1e300, "cannot be built"),
        (["diffuse", "config", "schedule", "_target_"], "diffusion_cli.cli.run", NOT_A_SCHEDULE),
        (["diffuse", "config", "schedule", "_target_"], "diffusion_cli.networks.UNet", NOT_A_SCHEDULE),
        (["diffuse", "config", "schedule", "_target_"], "diffusion_cli./etc/x.y", NOT_A_SCHEDULE),
        (["diffuse", "config", "schedule", "_target_"], ["x"], NOT_A_SCHEDULE),
    ],
)  # fmt: skip
def test_a_checkpoint_is_held_to_its_word_before_anything_is_built(
    tmp_path, checkpoint, place, value, message
):
    changed = copy.deepcopy(checkpoint)
    node = changed
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    (tmp_path / LAST).parent.mkdir()
    torch.save(changed, tmp_path / LAST)
    with pytest.raises(ValueError, match=rf"last\.ckpt: .*{message}"):
        loaded(tmp_path)


def test_data_that_would_grow_without_end_is_refused(tmp_path, checkpoint):
    laughs: dict[str, Any] = {"x": 1}
    deep: list[Any] = []
    for _ in range(25):
        laughs = {"a": laughs, "b": laughs}
        deep = [[deep]]
    cycle: dict[str, Any] = {}
    cycle["self"] = cycle
    for value, message in ((laughs, "more than"), (deep, "deeper"), (cycle, "deeper"), ({1: 2}, "not text")):
        torch.save(checkpoint | {"diffuse": checkpoint["diffuse"] | {"more": value}}, tmp_path / "x.ckpt")
        with pytest.raises(ValueError, match=rf"x\.ckpt: .*{message}"):
            read(tmp_path / "x.ckpt")


def test_the_first_problem_of_a_checkpoint_is_quoted_with_one_remedy(tmp_path, checkpoint):
    torch.save(checkpoint | {"global_step": "3", "pytorch-lightning_version": "1.9.0"}, tmp_path / "x.ckpt")
    why = r"\(global_step: is not a number of steps\); choose another run$"
    with pytest.raises(ValueError, match=rf"x\.ckpt: is not a valid checkpoint of diffuse {why}"):
        read(tmp_path / "x.ckpt")


def pickled(path: Path, program: bytes, method: int = zipfile.ZIP_STORED) -> Path:
    return zipped(
        path, ("x/data.pkl", program), ("x/byteorder", b"little"), ("x/version", b"3"), method=method
    )


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85R.", "names builtins bytearray"),
        (b"\x80\x02ctorch\nTensor\n\x8a\x05\x00\x00\x00\x00\x10\x85R.", "names torch Tensor"),
        (b"\x80\x02}" + b")" + b"\x85" * 10**6 + b"Ns.", "tuples nested deeper"),
        (b"\x80\x02}" + b")" + b"q\x00\x85h\x00\x86" * 10**6 + b"Ns.", "tuples nested deeper"),
        (b"\x80\x02" + b"]" * 10 + b"a" * 9 + b".", "is not a checkpoint that diffuse can read"),
        (b"\x80\x02s.", "damaged checkpoint"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x01x\x85R.", "has pickle protocol 4, and only protocol 2 is read"),
        (b"\x80\x02\x8c\x02os\x8c\x06system\x93.", "operation SHORT_BINUNICODE, which torch.save does not write"),
        (b"\x80\x02X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93.", "has the pickle operation STACK_GLOBAL"),
        (b"(X\x01\x00\x00\x00xios\nsystem\n.", "has the pickle operation INST"),
        (b"\x80\x02ccollections\nOrderedDict\n)N\x92.", "has the pickle operation NEWOBJ_EX"),
        (b"\x80\x02\x82\x01.", "has the pickle operation EXT1"),
        (b"\x80\x02]N\x85b.", r"\(has other objects than tensors and plain data\)"),
        (b"", "damaged checkpoint"),
    ],
    ids=["bytearray", "tensor", "tuples", "tuples again", "list", "empty stack", "protocol 4", "name of protocol 4",
         "global from the stack", "instance", "arguments by name", "extension", "state", "nothing"],
)  # fmt: skip
def test_a_pickle_takes_no_memory_and_no_stack(tmp_path, program, message):
    with pytest.raises(ValueError, match=rf"x\.ckpt: .*{message}"):
        read(pickled(tmp_path / "x.ckpt", program))


def test_a_checkpoint_that_inflates_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is compressed"):
        read(pickled(tmp_path / "x.ckpt", b"\x80\x02N." + bytes(2**27), zipfile.ZIP_DEFLATED))


@pytest.mark.parametrize("group", sorted(file.name for file in config.CONF.iterdir() if file.is_dir()))
def test_a_node_names_only_what_the_options_of_its_group_name(group):
    for target in (
        "diffusion_cli.cli.run",
        "diffusion_cli.data.relabelled",
        "os.system",
        "",
        None,
        3,
        [],
        {},
    ):
        (line,) = check_node(group, {"_target_": target})
        assert "use the _target_ of an option" in line


# --- Text ------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "[" * 10**6, '{"a":' * 10**5, "[NaN]", "[-Infinity]", "[1e999]", "9" * 5000, "", "\xff", '{"a": "\\ud800"',
        json.dumps([0] * (foreign.MOST_VALUES + 1)),
    ],
)  # fmt: skip
def test_bad_json_is_one_line_of_ours(tmp_path, text):
    (tmp_path / "x.json").write_bytes(text.encode("latin1"))
    assert clean(foreign.read_json, tmp_path / "x.json")
    assert clean(read_history, tmp_path / "x.json")


LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [*{a}, *{a}]}}\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        LAUGHS, MERGES, "&a [*a]", "[" * 10**5, "- " * 10**5, "a: !!python/object/apply:os.system [true]", "1: 2",
        "a: " + ":".join(["1"] * 10**5), "a: 2020-01-01", "a: !!binary x", "? {a: 1}\n: 2", "a: 2020-99-99", "\x00",
        "a: " + "9" * 4000, "%YAML 9.9", "a: .nan\nb: [", "!!set {a}", "\t", "x" * (foreign.LONGEST_YAML + 1),
    ],
)  # fmt: skip
def test_bad_yaml_is_one_line_of_ours(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    assert clean(foreign.read_yaml, tmp_path / "x.yaml")


def test_a_runs_configuration_reads_as_it_was_written(tmp_path):
    checked = load("train", []).model_dump()
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(checked))
    assert foreign.read_yaml(tmp_path / "x.yaml") == checked


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("settings", []), ("settings", {"labels": []}), ("settings", {"labels": ["a"]}), ("settings", {"labels": [-1]}),
        ("versions", None), ("seeds", {}), ("seeds", [0.5]), ("seeds", [True]), ("seeds", [[1, 0]]), ("seeds", [[0]]),
        ("step", "3"), ("results", {"x": 1}),
        ("results", {"x": {"rmse": None}}), ("network_calls", -1),
    ],
)  # fmt: skip
def test_a_manifest_holds_what_it_should(key, value):
    assert parsed(json.dumps(MANIFEST).encode()) == MANIFEST
    assert clean(parsed, json.dumps(MANIFEST | {key: value}).encode())


@pytest.mark.parametrize(
    "change",
    [
        {"name": 1}, {"value": "1"}, {"value": None}, {"details": []}, {"details": {"a": "b"}}, {"protocol": []},
        {"more": 1},
    ],
)  # fmt: skip
def test_a_result_holds_what_it_should(tmp_path, change):
    (tmp_path / "metrics.json").write_text(json.dumps(HISTORY))
    assert read_history(tmp_path / "metrics.json") == HISTORY
    result = HISTORY[0]["results"][0] | change
    (tmp_path / "metrics.json").write_text(json.dumps([{"results": [result], "notes": []}]))
    with pytest.raises(ValueError, match=r"metrics\.json: is not a list of results"):
        read_history(tmp_path / "metrics.json")


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "step,loss\n99999999999999999999999999,1\n", "step,loss\n-1,1\n", "step,loss\n" + "9" * 5000 + ",1\n",
        "loss\n1\n", "step\n", "", "step,loss\n1,x\n", "step,loss\nNaN,1\n", 'step,"a\n1,2\n', "\0,step\n1,1\n",
        "step," + "x," * 300 + "\n1\n", "step,loss\n1\n2,3,4\n", "step,loss\n1,1e308\n2,-1e308\n",
        "step,loss\n1,5e-324\n", "step,step\n1,1\n", "loss,step\n1,1\n2", "step,loss\n1,1e-99\n2,1e99\n",
    ],
)  # fmt: skip
def test_any_table_of_losses_leaves_a_page(tmp_path, run, text):
    (tmp_path / LAST).parent.mkdir()
    (tmp_path / LAST).symlink_to(run / LAST)
    (tmp_path / "metrics.csv").write_text(text)
    assert "<html" in page([read_record(tmp_path, "x")])


def test_a_page_shows_no_file_that_is_no_picture(tmp_path, run):
    (tmp_path / LAST).parent.mkdir()
    (tmp_path / LAST).symlink_to(run / LAST)
    (tmp_path / "secret").write_text("the key")
    (tmp_path / "previews").mkdir()
    (tmp_path / "previews" / "step_1.png").symlink_to(tmp_path / "secret")
    (tmp_path / "previews" / "step_2.png").write_bytes(PNG)
    record = read_record(tmp_path, "x")
    assert list(record.previews) == [2]
    assert "step_1.png cannot be read (is not an image" in record.remarks[0]
