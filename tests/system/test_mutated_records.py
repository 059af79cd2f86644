"""Records, tables and settings with random changes are read or refused; HYPOTHESIS_PROFILE=many tries 10,000 a test."""

import copy
import json
import warnings
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_cli import config
from diffusion_cli.charts import svg
from diffusion_cli.commands.outputs import parsed
from diffusion_cli.config import load
from diffusion_cli.metrics import history_table, read_history
from diffusion_cli.report.page import panels
from diffusion_cli.report.record import read_record
from diffusion_cli.runs.checkpoint import LAST
from diffusion_cli.runs.curves import read_curves
from diffusion_cli.runs.schema import check_built, parse_info
from diffusion_cli.system import untrusted as foreign
from helpers.foreign import FUZZ, HISTORY, MANIFEST, clean, loaded, mutated

pytestmark = pytest.mark.usefixtures("memory")

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.sampled_from([2**31, 2**63, -1, 0, 1, 10**12, "diffusion_cli.cli.run", "", "???", "${oc.env:HOME}"]),
)  # fmt: skip
TREES = st.recursive(
    SCALARS,
    lambda part: st.one_of(
        st.lists(part, max_size=3), st.dictionaries(st.text(max_size=4), part, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def changed(draw: st.DrawFn, tree: Any, values: st.SearchStrategy[Any] = TREES) -> Any:
    """A tree of plain data with some parts taken out, doubled, or put in the place of others."""
    root = {"root": copy.deepcopy(tree)}
    for _ in range(draw(st.integers(1, 3))):
        node: Any = root
        key: Any = "root"
        while isinstance(node[key], dict | list) and node[key] and draw(st.integers(0, 6)):
            node = node[key]
            key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        match draw(st.sampled_from(["put", "put", "drop", "add"])):
            case "drop" if node is not root:
                del node[key]
            case "add" if isinstance(node, dict) and node is not root:
                node[draw(st.text(max_size=4))] = draw(values)
            case _:
                node[key] = draw(values)
        if not isinstance(root["root"], dict | list):
            break
    return root["root"]


TENSORS = st.sampled_from([
    torch.zeros(1), torch.zeros(1).expand(2**40), torch.zeros(0), torch.zeros(4, 4).t(),
    torch.zeros(3, dtype=torch.int8), torch.zeros(2, dtype=torch.complex64).conj().imag,
    torch.zeros(3, requires_grad=True),
])  # fmt: skip


@pytest.mark.slow
@FUZZ
@given(st.data())
def test_mutated_checkpoints(place, checkpoint, run, data):
    path = place / LAST
    path.parent.mkdir(exist_ok=True)
    if data.draw(st.booleans()):
        tree = data.draw(changed(checkpoint, st.one_of(TREES, TENSORS)))
        with warnings.catch_warnings(action="ignore"):
            torch.save(tree, path)
    else:
        path.write_bytes(data.draw(mutated([(run / LAST).read_bytes()])))
    clean(loaded, place)
    clean(read_record, place, "x")


@settings(FUZZ, max_examples=FUZZ.max_examples // 4)  # drawing is slow
@given(st.data())
def test_mutated_manifests(data):
    tree = data.draw(changed(MANIFEST))
    content = json.dumps(tree).encode()
    clean(parsed, content if data.draw(st.booleans()) else data.draw(mutated([content])))


@FUZZ
@given(st.data())
def test_mutated_histories(place, data):
    content = json.dumps(data.draw(changed(HISTORY * 2))).encode()
    path = place / "metrics.json"
    path.write_bytes(content if data.draw(st.integers(0, 2)) else data.draw(mutated([content])))
    clean(lambda: history_table({"a": read_history(path), "b": HISTORY}, False))


CURVES = [b"step,loss,val_loss\n1,0.5,\n2,0.25,0.75\n", b"step,fid\n5,1e9\n"]
CELLS = st.one_of(
    SCALARS.map(str), st.sampled_from(["1", "2", "step", "loss", "1e400", "nan", '"', "1,2", "\r"])
)
TABLES = st.lists(st.lists(CELLS, max_size=4), max_size=4).map(
    lambda rows: ("step,loss\n" + "\n".join(map(",".join, rows))).encode(errors="replace")
)


@settings(FUZZ, max_examples=FUZZ.max_examples // 5)  # drawing is slow
@given(st.one_of(mutated(CURVES), TABLES))
def test_mutated_curves(place, data):
    path = place / "metrics.csv"
    path.write_bytes(data)
    curves: dict[str, Any] = {}
    clean(lambda: curves.update(read_curves(path)))
    assert all(svg(panel) for panel in panels({"x": curves}))


@pytest.mark.slow
@FUZZ
@given(st.data())
def test_mutated_configurations(place, checkpoint, data):
    about = data.draw(changed(checkpoint["diffuse"]))
    if isinstance(about, dict) and not clean(lambda: parse_info(about)):
        check_built(parse_info(about))
    text = yaml.safe_dump(about["config"] if isinstance(about, dict) and "config" in about else about)
    path = place / "config.yaml"
    path.write_bytes(data.draw(mutated([text.encode()])))
    clean(foreign.read_yaml, path)


KEYS = [key for key, _, _ in config.documented(config.CONF / "train.yaml")] + [
    *config.defaults("train"),
    "model.channels",
]
WORDS = st.builds(
    lambda key, sign, value: f"{key}{sign}{value}",
    st.one_of(st.sampled_from(KEYS), st.text(max_size=6)),
    st.sampled_from(["=", "=", "=", "", "+=", "~", "=="]),
    st.one_of(CELLS, TREES.map(str), st.sampled_from(["cosine", "[1,2]", "{a:1}", "${seed}", "1,2", "range(1)", "x'"])),
)  # fmt: skip


@settings(FUZZ, max_examples=FUZZ.max_examples // 5)  # each is composed by Hydra, which takes long
@given(st.sampled_from(["train", "plot", "report"]), st.lists(WORDS, min_size=1, max_size=3))
def test_mutated_words(command, words):
    clean(load, command, words)
