"""Settings, files and checks of the tests of untrusted files."""

import io
import os
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from numpy.lib import format as npy
from PIL import Image

from diffusion_cli.data import Array, Folder
from diffusion_cli.errors import FormatError, MachineError, UsageError
from diffusion_cli.metrics import Report, Result
from diffusion_cli.runs.load import load_model

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


def zipped(path: Path, *entries: tuple[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(path, "w", method) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return path


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunk(*each) for each in chunks) + chunk(b"IEND", b"")


def npy_file(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    text = header.encode("latin1").ljust(118 - 10) + b"\n"
    length = struct.pack("<H" if version == b"\x01\x00" else "<I", len(text))
    return npy.MAGIC_PREFIX + version + length + text + data


def described(shape: Any, dtype: Any = "|u1", fortran: Any = False) -> str:
    return repr({"descr": dtype, "fortran_order": fortran, "shape": shape})


MANIFEST = {
    "settings": {"weights": "ema", "labels": [0, 1], "sampler": {"_target_": "x", "eta": 0.0}}, "step": 3,
    "model": {}, "versions": {"torch": "2"}, "seeds": [[0, 1], 5], "results": {"x": {"rmse": 0.5}}, "network_calls": 5,
}  # fmt: skip
HISTORY = [
    Report(
        [Result("fid", 1.5, {"reference_distance": 1.0}, {"n": 2, "sampling": {"weights": "ema"}})],
        ["a note"],
    ).to_dict()
]
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
