"""Files of strangers: none runs code, leaves its folder, or takes all memory; each ends in one line of ours.

Each test of mutated files tries 100 inputs; HYPOTHESIS_PROFILE=many tries 10,000.
"""

import copy
import io
import json
import os
import resource
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.lib import format as npy
from PIL import Image, ImageCms

from diffusion_cli import config
from diffusion_cli.charts import svg
from diffusion_cli.commands.inputs import read_input
from diffusion_cli.commands.outputs import parsed
from diffusion_cli.config import check_node, load
from diffusion_cli.data import Array, Folder, given_images
from diffusion_cli.data.decoding import ImageDecoder, form_of_files
from diffusion_cli.errors import FormatError, MachineError, UsageError
from diffusion_cli.formats import Dicom, Uint8Image
from diffusion_cli.formats.dicom import read_scan
from diffusion_cli.formats.files import opened
from diffusion_cli.formats.pixel_readers import depth_of, mode_with_opacity, read_numbers, read_with_opacity
from diffusion_cli.images import read_images
from diffusion_cli.metrics import Report, Result, history_table, read_history
from diffusion_cli.networks import UNet
from diffusion_cli.report.page import page, panels
from diffusion_cli.report.record import read_record
from diffusion_cli.runs.checkpoint import LAST, read
from diffusion_cli.runs.curves import read_curves
from diffusion_cli.runs.load import load_model
from diffusion_cli.runs.migrate import FORMAT
from diffusion_cli.runs.schema import check_built, parse_info
from diffusion_cli.system import untrusted as foreign

settings.register_profile("few", max_examples=100)
settings.register_profile("many", max_examples=10_000)
FUZZ = settings(
    settings.get_profile(os.environ.get("HYPOTHESIS_PROFILE", "few")),
    derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
MOST_MEMORY = 2**20 * 2  # KiB by which a module's worth of bad files may raise the peak
TINY = [
    "schedule=linear", "schedule.num_timesteps=10", "model.channels=4", "model.channel_mult=[1]",
    "model.num_res_blocks=1", "model.norm_groups=2", "model.num_heads=1", "model.head_channels=null",
    "model.attention_resolutions=[]",
]  # fmt: skip


def clean(work: Callable[..., Any], *arguments: Any) -> str | None:
    """The error of bad input, None for good input; fails for errors that the command line does not show in one line."""
    try:
        work(*arguments)
    except (UsageError, FormatError) as error:
        return str(error)
    except OSError as error:
        if not (error.errno or isinstance(error, MachineError)):
            raise
        return str(error)
    return None


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_MEMORY


@pytest.fixture(scope="session")
def checkpoint() -> dict[str, Any]:
    """A small checkpoint as training writes it."""
    checked = load("train", TINY).model_dump()
    arguments = {key: value for key, value in checked["model"].items() if key != "_target_"}
    network = UNet((1, 8, 8), None, **arguments)
    state = {key: value.clone() for key, value in network.state_dict().items()}
    return {
        "global_step": 3,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": {f"model.network.{key}": value for key, value in state.items()},
        "callbacks": {"EMA": {"network": state}},
        "diffuse": {
            "task": "diffusion", "num_images": 20, "labels_sha256": None, "format": FORMAT, "config": checked,
            "shape": [1, 8, 8], "form": {"kind": "picture"}, "latent": None, "stages": None,
            "num_classes": None, "class_names": None,
        },
    }  # fmt: skip


@pytest.fixture(scope="session")
def run(tmp_path_factory, checkpoint) -> Path:
    """A folder with that checkpoint."""
    folder = tmp_path_factory.mktemp("outputs") / "run"
    (folder / LAST).parent.mkdir(parents=True)
    torch.save(checkpoint, folder / LAST)
    return folder


def loaded(folder: Path) -> None:
    load_model(folder, "ema", torch.device("cpu"))


def folder(path: Path, **changes: Any) -> Folder:
    arguments = {
        "masks": None,
        "resolution": 8, "channels": 3, "range": None, "depth": "auto", "labels": "auto", "background": "white",
        "flip": False, "val_fraction": 0.0, "in_memory": True, "num_workers": 0,
    }  # fmt: skip
    return Folder("", path=str(path), **(arguments | changes))


def array(path: Path) -> None:
    dataset = Array("", path=str(path), range=None, flip=False, val_fraction=0.0, in_memory=None)
    dataset.load("train")[torch.tensor([0])]


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


PIXELS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
COLOUR = Image.fromarray(PIXELS)
PNG = encoded(COLOUR, "PNG")


# --- Archives ------------------------------------------------------------


def declared(data: bytes, name: str, size: int) -> bytes:
    """A ZIP with an entry `name` that claims to inflate to `size` bytes, in both of its headers."""
    changed = bytearray(data)
    for signature, place in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        at = changed.find(signature)
        assert name.encode() in changed[at : at + 80]
        changed[at + place : at + place + 4] = struct.pack("<I", size)
    return bytes(changed)


def zipped(path: Path, *entries: tuple[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(path, "w", method) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("size", "message"), [(2**31, "larger than"), (1000, "CRC")])
def test_an_entry_that_inflates_to_more_than_may_be_is_not_inflated(tmp_path, size, message):
    """Not beyond what it declares either: 2^30 zeros are a megabyte."""
    bomb = zlib.compressobj(9, zlib.DEFLATED, -15)
    zeros = b"".join([*(bomb.compress(bytes(2**20)) for _ in range(2**10)), bomb.flush()])
    path = zipped(tmp_path / "x.zip", ("x.png", zeros), method=zipfile.ZIP_STORED)
    data = bytearray(declared(path.read_bytes(), "x.png", size))
    data[8:10] = struct.pack("<H", zipfile.ZIP_DEFLATED)
    central = data.rfind(b"PK\x01\x02")
    data[central + 10 : central + 12] = struct.pack("<H", zipfile.ZIP_DEFLATED)
    path.write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=rf"x\.png \(.*{message}"):
        folder(path).load("train")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_that_inflate_without_bounds_are_refused(tmp_path, method):
    path = zipped(tmp_path / "x.zip", ("x.png", PNG), method=method)
    with pytest.raises(ValueError, match="a compression other than deflate"):
        folder(path).load("train")


def test_names_that_leave_the_archive_name_nothing_outside_it(tmp_path):
    (tmp_path / "inner").mkdir()
    names = ["../escaped.png", f"{tmp_path}/absolute.png", "a/../../b.png"]
    path = zipped(tmp_path / "inner" / "x.zip", *((name, PNG) for name in names))
    link = zipfile.ZipInfo("link.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, "/etc/hostname")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"1 of the images.*link\.png \(is not an image"):
        folder(path).load("train")
    assert sorted(tmp_path.rglob("*")) == before


def test_two_entries_of_one_name_are_refused(tmp_path):
    path = zipped(tmp_path / "x.zip", ("x.png", PNG), ("x.png", PNG))
    with pytest.raises(ValueError, match="two entries with the same name"):
        folder(path)


def test_encrypted_entries_and_names_that_are_no_unicode_are_said(tmp_path):
    path = zipped(tmp_path / "x.zip", ("x.png", PNG))
    data = bytearray(path.read_bytes())
    for signature, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.find(signature) + place] |= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.png \(.*encrypted"):
        folder(path).load("train")
    path = zipped(tmp_path / "y.zip", ("é.png", PNG))
    path.write_bytes(path.read_bytes().replace("é".encode(), b"\xff\xff"))
    with pytest.raises(ValueError, match="neither a folder nor a readable"):
        folder(path)


@pytest.mark.slow
def test_a_million_entries_are_listed_in_bounded_memory(tmp_path):
    names = [(f"{number}.png", b"") for number in range(100_000)]
    path = zipped(tmp_path / "x.zip", *names, method=zipfile.ZIP_STORED)
    with pytest.raises(ValueError, match="cannot use 100000 of the images"):
        folder(path, labels="none").load("train")


# --- Images ------------------------------------------------------------


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunk(*each) for each in chunks) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "data",
    [
        png(2**31 - 1, 2**31 - 1, (b"IDAT", zlib.compress(bytes(100)))),
        png(50_000, 50_000, (b"IDAT", zlib.compress(bytes(100)))),
        png(0, 8, (b"IDAT", zlib.compress(b""))),
        png(8, 8, (b"zTXt", b"a\0\0" + zlib.compress(bytes(2**28))), (b"IDAT", zlib.compress(bytes(200)))),
        png(8, 8, (b"iCCP", b"a\0\0" + zlib.compress(bytes(2**28))), (b"IDAT", zlib.compress(bytes(100)))),
        encoded(COLOUR, "PNG")[:60],
        encoded(COLOUR, "JPEG")[:300],
        encoded(COLOUR, "TIFF").replace(struct.pack("<HHIHH", 256, 4, 1, 8, 0), struct.pack("<HHII", 256, 4, 1, 2**31)),
        encoded(Image.new("F", (8, 8)), "TIFF"),
        encoded(Image.new("LAB", (8, 8)), "TIFF"),
    ],
    ids=["huge", "large", "empty", "text", "profile", "cut png", "cut jpeg", "tiff", "float", "lab"],
)  # fmt: skip
def test_a_bad_image_is_one_line_of_ours(data):
    assert clean(ImageDecoder((1, 8, 8), "white", True), data)


def test_only_the_first_frame_of_many_is_read():
    frames = [Image.new("RGB", (8, 8), (number, 0, 0)) for number in range(50)]
    for kind in ("TIFF", "WEBP", "PNG"):
        image = opened(encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True))
        assert image.convert("RGB").getpixel((0, 0)) == (0, 0, 0)


def test_saved_pictures_that_are_none_are_named(tmp_path):
    (tmp_path / "x.png").write_bytes(PNG)
    (tmp_path / "y.png").write_bytes(encoded(Image.new("L", (9, 8)), "PNG"))
    (tmp_path / "z.png").write_bytes(PNG[:50])
    np.testing.assert_array_equal(read_images([tmp_path / "x.png"])[0].permute(1, 2, 0), PIXELS)
    for name, message in (("y.png", "has 9 x 8 pixels; expected 8 x 8"), ("z.png", "truncated|broken")):
        with pytest.raises(ValueError, match=rf"{name}: .*({message}).*move it away"):
            read_images([tmp_path / "x.png", tmp_path / name])


# --- Folders ------------------------------------------------------------


def test_links_that_go_round_are_followed_once(tmp_path):
    inner, outside = tmp_path / "data" / "a", tmp_path / "elsewhere"
    for place in (inner, outside):
        place.mkdir(parents=True)
        (place / f"{place.name}.png").write_bytes(PNG)
    (inner / "up").symlink_to(tmp_path / "data")
    (inner / "self").symlink_to(inner)
    (tmp_path / "data" / "b").symlink_to(outside)
    (tmp_path / "data" / "c").symlink_to(outside)
    assert folder(tmp_path / "data").files == ["a/a.png", "b/elsewhere.png"]


@pytest.mark.parametrize("kind", ["pipe", "device", "dangling", "loop"])
def test_what_is_no_regular_file_is_not_waited_for(tmp_path, kind):
    path = tmp_path / "x.png"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"device": "/dev/zero", "dangling": "nowhere", "loop": path}[kind])
    assert clean(folder(tmp_path).load, "train")
    assert clean(given_images, tmp_path, "samples")
    assert clean(read_input, str(path), [(3, 8, 8)], False, None, Uint8Image())
    assert clean(read_images, [path])
    assert clean(foreign.read_json, path)
    assert clean(read, path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read all")
def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path):
    (tmp_path / "x.png").write_bytes(PNG)
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(PermissionError, match="closed"):
        folder(tmp_path)


def test_a_table_of_labels_is_no_longer_than_its_images_allow(tmp_path):
    (tmp_path / "x.png").write_bytes(PNG)
    (tmp_path / "labels.csv").write_text("file,label\n" + "x.png,1\n" * 10_000)
    with pytest.raises(ValueError, match=r"labels\.csv cannot be read \(is larger than"):
        folder(tmp_path)


# --- NumPy files ------------------------------------------------------------


def npy_file(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    text = header.encode("latin1").ljust(118 - 10) + b"\n"
    length = struct.pack("<H" if version == b"\x01\x00" else "<I", len(text))
    return npy.MAGIC_PREFIX + version + length + text + data


def described(shape: Any, dtype: Any = "|u1", fortran: Any = False) -> str:
    return repr({"descr": dtype, "fortran_order": fortran, "shape": shape})


@pytest.mark.parametrize(
    "header",
    [
        described((2**62, 8, 8)), described((2**31, 2**31, 8)), described((-1, 8, 8)), described((5, 0, 8)),
        described((10**30, 8, 8)), described((5, 8, 8), "|O"), described((5, 8, 8), [("a", "|u1")]),
        described((5, 8, 8), "|u1", "x"), described(()), described((5, 8, 8), "<U9999999"),
        "{" * 100, "[" * 100, "__import__('os').abort()",
    ],
)  # fmt: skip
@pytest.mark.parametrize("compressed", [None, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_array_is_no_larger_than_its_file(tmp_path, header, compressed):
    data = npy_file(header, bytes(100))
    path = tmp_path / ("x.npy" if compressed is None else "x.npz")
    if compressed is None:
        path.write_bytes(data)
    else:
        zipped(path, ("images.npy", data), method=compressed)
    assert clean(array, path)
    assert clean(given_images, path, "samples")


def test_labels_up_to_absurd_numbers_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", images=np.zeros((2, 8, 8), np.uint8), labels=np.array([0, 2**62]))
    with pytest.raises(ValueError, match=r"labels up to 4611686018427387904; the largest supported label"):
        array(tmp_path / "x.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_either_order_are_read_as_numpy_does(tmp_path, save, order):
    images = np.asarray(np.random.default_rng(1).integers(0, 256, (5, 6, 7), dtype=np.uint8), order=order)
    save(tmp_path / "x.npz", images=images)
    given = given_images(tmp_path / "x.npz", "samples").images
    np.testing.assert_array_equal(given[torch.arange(5)][:, 0].numpy(), images)


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
        (b"", "damaged checkpoint"),
    ],
    ids=["bytearray", "tensor", "tuples", "tuples again", "list", "empty stack", "nothing"],
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


MANIFEST = {
    "settings": {"weights": "ema", "labels": [0, 1], "sampler": {"_target_": "x", "eta": 0.0}}, "step": 3,
    "model": {}, "versions": {"torch": "2"}, "seeds": [[0, 1], 5], "results": {"x": {"rmse": 0.5}}, "network_calls": 5,
}  # fmt: skip


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


HISTORY = [
    Report(
        [Result("fid", 1.5, {"reference_distance": 1.0}, {"n": 2, "sampling": {"weights": "ema"}})],
        ["a note"],
    ).to_dict()
]


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


# --- Mutated files ------------------------------------------------------------

INTERESTING = [0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]


@st.composite
def mutated(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A valid file with a few bytes changed, cut off, repeated, or taken from another."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(["flip", "number", "cut", "drop", "repeat", "splice", "insert"])):
            case "flip" if data:
                data[place] ^= 1 << draw(st.integers(0, 7))
            case "number":
                size, end = draw(
                    st.sampled_from([(1, "little"), (2, "little"), (4, "little"), (2, "big"), (4, "big")])
                )
                number = draw(st.sampled_from(INTERESTING)) & (2 ** (8 * size) - 1)
                data[place : place + size] = number.to_bytes(size, end)
            case "cut":
                del data[place:]
            case "drop":
                del data[place : place + draw(st.integers(1, 16))]
            case "repeat":
                data[place:place] = data[place : place + draw(st.integers(1, 64))]
            case "splice":
                other = draw(st.sampled_from(seeds))
                start = draw(st.integers(0, len(other)))
                data[place : place + 32] = other[start : start + 32]
            case "insert":
                data[place:place] = draw(st.binary(max_size=16))
    return bytes(data)


def with_sums(data: bytes) -> bytes:
    """A PNG with the checksums of its chunks made right, so that what they hold is looked at."""
    fixed, place = bytearray(data), 8
    while place + 12 <= len(fixed):
        (length,) = struct.unpack_from(">I", fixed, place)
        end = place + 8 + length
        if end + 4 > len(fixed):
            break
        struct.pack_into(">I", fixed, end, zlib.crc32(fixed[place + 4 : end]))
        place = end + 4
    return bytes(fixed)


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


IMAGES = [
    PNG,
    encoded(COLOUR.convert("L"), "PNG"),
    encoded(COLOUR.convert("RGBA"), "PNG", exif=turned()),
    encoded(COLOUR.quantize(16), "PNG", transparency=1),
    encoded(Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8)), "PNG"),
    encoded(COLOUR, "PNG", pnginfo=None, icc_profile=b"profile" * 9),
    encoded(COLOUR, "JPEG", exif=turned()),
    encoded(COLOUR.convert("CMYK"), "JPEG", progressive=True),
    encoded(COLOUR, "WEBP", exif=turned()),
    encoded(COLOUR.convert("RGBA"), "WEBP", lossless=True),
    encoded(COLOUR, "WEBP", save_all=True, append_images=[COLOUR.rotate(90)]),
    encoded(COLOUR, "PNG", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
    encoded(COLOUR, "BMP"),
    encoded(COLOUR.quantize(16), "BMP"),
    encoded(COLOUR, "GIF", save_all=True, append_images=[COLOUR.rotate(90)], transparency=1),
    encoded(COLOUR, "PPM"),
    b"P2 # as text\n8 8 15\n" + b" ".join(b"%d" % (number % 16) for number in range(64)),
    encoded(COLOUR.convert("RGBA"), "JPEG2000"),
    encoded(COLOUR, "JPEG2000", tile_size=(4, 4), no_jp2=True),
    encoded(COLOUR, "TIFF"),
    encoded(COLOUR, "TIFF", compression="tiff_lzw", exif=turned()),
    encoded(COLOUR, "TIFF", compression="tiff_deflate", save_all=True, append_images=[COLOUR]),
    encoded(COLOUR.convert("1"), "TIFF", compression="group4"),
    encoded(Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8)), "TIFF"),
    encoded(COLOUR.convert("LAB"), "TIFF"),
]


@pytest.mark.slow
@FUZZ
@given(mutated(IMAGES), st.booleans(), st.sampled_from([1, 3]))
def test_mutated_images(data, fix, channels):
    clean(ImageDecoder((channels, 8, 8), "white", True), with_sums(data) if fix else data)


def tiff(numbers: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, numbers, **options)
    return buffer.getvalue()


def scan() -> bytes:
    buffer = io.BytesIO()
    numbers = np.arange(64, dtype=np.int16).reshape(1, 8, 8)
    SCAN.write(SCAN.from_numbers(numbers), buffer)  # pyright: ignore[reportArgumentType]  # pydicom takes both
    return buffer.getvalue()


SCAN = Dicom("int16", 16, 1.0, 0.0, [-100.0], [100.0])
DEEP = [
    tiff(np.arange(64, dtype=np.uint16).reshape(8, 8)),
    tiff(np.arange(192, dtype=np.float32).reshape(8, 8, 3), photometric="rgb"),
    tiff(np.arange(320, dtype=np.int16).reshape(5, 8, 8), photometric="minisblack", compression="zlib"),
    tiff(np.zeros((32, 32), np.uint16), tile=(16, 16), bigtiff=True),
    png(8, 8, (b"IDAT", zlib.compress(bytes(8 * 49)))).replace(b"\x08\x02\0\0\0", b"\x10\x02\0\0\0"),
    *IMAGES[-3:],
    *IMAGES[2:4],
    encoded(Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8)), "JPEG2000"),
    b"P5 8 8 4095\n" + bytes(128),
]


@FUZZ
@given(mutated(DEEP), st.booleans(), st.sampled_from([1, 3, 4]))
def test_mutated_deep_images(data, fix, channels):
    data = with_sums(data) if fix else data
    clean(depth_of, data)
    clean(read_numbers, data)
    clean(read_with_opacity, data, "RGBA")
    clean(mode_with_opacity, data, channels)
    clean(form_of_files, data, channels, [0, 100], "auto", 2)


@FUZZ
@given(mutated([scan()]))
def test_mutated_scans(data):
    clean(read_scan, data)
    clean(SCAN.decode, data)
    clean(form_of_files, data, 1, "window", "auto", 2)


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """Where the files of one input after the other lie."""
    return tmp_path_factory.mktemp("inputs")


def archive(*entries: tuple[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, data in entries:
            file.writestr(name, data)
    return buffer.getvalue()


TABLE = ("labels.csv", b"file,label\na/x.png,1\nb/y.png,2\n")
ARCHIVES = [
    archive(("a/x.png", PNG), ("b/y.png", PNG)),
    archive(("a/x.png", PNG), ("b/y.png", PNG), TABLE, method=zipfile.ZIP_STORED),
    archive(("x.png", PNG), ("../y.png", b""), method=zipfile.ZIP_LZMA),
]
NAMES = st.one_of(
    st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=8),
    st.sampled_from(["a/x.png", "../x.png", "/x.png", "a/labels.csv", "a//b.png"]),
)


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    """An archive of any names and contents, some of them mutated images and tables."""
    content = st.one_of(mutated([PNG, TABLE[1]]), st.just(PNG))
    entries = draw(st.lists(st.tuples(NAMES, content), max_size=4))
    method = draw(
        st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    )
    with warnings.catch_warnings(action="ignore"):
        return archive(
            *((name.encode(errors="replace").decode(), data) for name, data in entries), method=method
        )


@FUZZ
@given(st.one_of(mutated(ARCHIVES), archives()))
def test_mutated_archives(place, data):
    path = place / "x.zip"
    path.write_bytes(data)
    clean(lambda: folder(path).load("train"))
    clean(lambda: given_images(path, "samples").images[torch.tensor([0])])


def arrays(**content: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **content)
    return buffer.getvalue()


def stored(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


ARRAYS = [
    stored(np.zeros((3, 8, 8), np.uint8)),
    stored(np.asfortranarray(np.zeros((3, 8, 8, 3), np.uint8))),
    arrays(images=np.zeros((3, 8, 8), np.uint8), labels=np.arange(3)),
    archive(("arr_0.npy", stored(np.zeros((3, 8, 8), np.uint8))), method=zipfile.ZIP_STORED),
]
LENGTH = st.one_of(
    st.integers(-2, 9), st.integers(), st.sampled_from([2**31, 2**62, 2**63, 2**64]), st.booleans()
)
DTYPES = st.sampled_from(
    ["|u1", "|O", "<f8", "<i8", "|V8", "<M8[ns]", "|S0", ">u2", "x", 3, [("a", "|u1")], "|b1", ""]
)
HEADERS = st.builds(
    lambda shape, dtype, order, data: npy_file(described(tuple(shape), dtype, order)[:107], data),
    st.lists(LENGTH, max_size=4), DTYPES, st.sampled_from([True, False, None, 1]), st.binary(max_size=600),
)  # fmt: skip


@FUZZ
@given(
    st.one_of(mutated(ARRAYS), HEADERS, HEADERS.map(lambda data: archive(("x.npy", data), ("y.npy", data))))
)
def test_mutated_arrays(place, data):
    path = place / ("x.npz" if data[:2] == b"PK" else "x.npy")
    path.write_bytes(data)
    clean(array, path)
    clean(lambda: given_images(path, "samples").images[torch.tensor([0])])


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


@FUZZ
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
