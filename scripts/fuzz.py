"""Fuzz the readers of untrusted files, guided by code coverage; needs `pip install atheris`.

    python scripts/fuzz.py image -max_total_time=300 corpus/

Targets are image, zip and npy. The corpus folder collects inputs that reach new code. An error that the command line
would not report as one line is written to crash-*, and ends the search. Other options are those of libFuzzer; -help=1
lists them.
"""

import io
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import atheris  # pyright: ignore

with atheris.instrument_imports(include=["diffusion_cli", "PIL", "zipfile", "numpy.lib"]):  # pyright: ignore
    import zipfile

    import numpy as np
    import torch
    from PIL import Image

    from diffusion_cli.data import Array, Folder
    from diffusion_cli.data.decoding import ImageDecoder

PLACE = Path(tempfile.mkdtemp())
KINDS = ("PNG", "JPEG", "WEBP", "TIFF")


def encoded(kind: str) -> bytes:
    """Return a small image file."""
    buffer = io.BytesIO()
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(buffer, format=kind)
    return buffer.getvalue()


def zipped(name: str, content: bytes) -> bytes:
    """Return an archive with one entry."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


def array() -> bytes:
    """Return a small .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((2, 8, 8), np.uint8))
    return buffer.getvalue()


def read_image(data: bytes) -> None:
    """Decode a file."""
    ImageDecoder((3, 8, 8), "white", True)(data)


def read_zip(data: bytes) -> None:
    """Load an archive as a dataset."""
    path = PLACE / "x.zip"
    path.write_bytes(data)
    Folder(
        "", path=str(path), masks=None,
        resolution=8, channels=3, range=None, depth="auto", labels="auto", background="white",
        flip=False, val_fraction=0.0, in_memory=True, num_workers=0,
    ).load("train")  # fmt: skip


def read_npy(data: bytes) -> None:
    """Load a NumPy file as a dataset."""
    path = PLACE / ("x.npz" if data[:2] == b"PK" else "x.npy")
    path.write_bytes(data)
    dataset = Array("", path=str(path), range=None, flip=False, val_fraction=0.0, in_memory=None)
    dataset.load("train")[torch.tensor([0])]


TARGETS: dict[str, tuple[Callable[[bytes], None], list[bytes]]] = {
    "image": (read_image, [encoded(kind) for kind in KINDS]),
    "zip": (read_zip, [zipped("x.png", encoded("PNG"))]),
    "npy": (read_npy, [array(), zipped("images.npy", array())]),
}


def main() -> None:
    """Search until a crash, or until the limits of the options."""
    target, seeds = TARGETS[sys.argv.pop(1)]
    corpus = Path(sys.argv[-1])
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds):
        (corpus / f"seed{number}").write_bytes(seed)

    def attempt(data: bytes) -> None:
        with suppress(ValueError, OSError):
            target(data)

    atheris.Setup(sys.argv, attempt)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
