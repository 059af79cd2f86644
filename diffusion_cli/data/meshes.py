"""Meshes from files, or exact solids, as signed distance volumes."""

import hashlib
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from diffusion_cli.data.base import Images, Split
from diffusion_cli.data.decoding import NoResize, key_text
from diffusion_cli.data.file_images import FileImages
from diffusion_cli.data.file_names import RULES
from diffusion_cli.data.file_set import FileSet, Labels
from diffusion_cli.data.memory import fits_in_memory
from diffusion_cli.data.solids import SOLIDS, solid_distances
from diffusion_cli.errors import UsageError
from diffusion_cli.formats import Shape, SignedDistance
from diffusion_cli.formats.signed_distance import MARGIN, SUFFIXES
from diffusion_cli.formats.surface import require_marching_cubes
from diffusion_cli.system.cache import optional
from diffusion_cli.system.files import atomic_write

VERSION = 2
"""Version of the conversion, in the keys of kept volumes; another one for each change of their values."""
VOLUMES = "volumes"
"""Folder of converted meshes, below the folder of downloaded datasets."""


class Meshes(FileSet["KeptVolumes"]):
    """Meshes as truncated signed distances [1, S, S, S], see `SignedDistance`.

    With a `path`, these are all meshes of `SUFFIXES` in the folder or ZIP archive, at any depth, with classes as in
    `Folder`. Each is converted once, and kept in `data_dir`. Without a path, they are `size` solids of six kinds, see
    `solid_distances`, which are the classes.

    Args:
        data_dir: folder of downloaded datasets, for the copy of a URL and for converted meshes.
        rules: version of the rules that select files.
        path: folder or .zip file, or its URL; None: built-in solids.
        resolution: voxels S along each axis.
        truncation: largest distance, in voxels.
        half_side: largest coordinate, which becomes 1; None: each mesh is centred and scaled.
        labels: source of the classes, as in `Folder`; for built-in solids `auto` or `none`.
        size: number of built-in solids.
        val_fraction: fraction of the meshes for validation, in [0, 1).
        group: groups of files, as in `Folder`; None: each file by itself.
        unreadable: `error`, or `skip` files that cannot be converted. They are found by converting all files once, and
            listed in `data_dir`.

    Raises:
        UsageError: the path is missing, not an archive, or has no meshes; requested labels are missing; the built-in
            solids do not fit in memory; or scikit-image is not installed. `load` raises it for files that cannot be
            used, such as meshes that are not watertight.
    """

    noun = "meshes"

    def __init__(
        self,
        data_dir: str,
        rules: int = RULES,
        *,
        path: str | None = None,
        resolution: Annotated[int, Field(ge=8, le=256)] = 32,
        truncation: Annotated[float, Field(ge=1, le=64)] = 3.0,
        half_side: PositiveFloat | None = None,
        labels: Labels = "auto",
        size: Annotated[int, Field(ge=1, le=10**5)] = 2000,
        val_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1,
        group: str | None = None,
        unreadable: Literal["error", "skip"] = "error",
    ) -> None:
        super().__init__(data_dir, rules, path, labels, group, val_fraction)
        require_marching_cubes()  # which samples need
        self.shape = (1, resolution, resolution, resolution)
        self.truncation, self.form = truncation, SignedDistance(truncation=truncation, half_side=half_side)
        self.decoder = KeptVolumes(NoResize(self.form, self.shape), self.data_dir / VOLUMES)
        if self.path is None:
            _check_memory(size, resolution)
            self.choose_built_in("solids", size, SOLIDS)
        else:
            self.choose_files(SUFFIXES, unreadable)

    def load(self, split: Split) -> Images:
        images = self.stream(split)
        return images.loaded(None) if isinstance(images, FileImages) else images

    def built_in(self, rows: list[int]) -> Tensor:
        volumes = torch.empty(len(rows), *self.shape)
        for place, row in enumerate(rows):
            distances = solid_distances(row, self.shape[-1], self.shape[-1] / 2 - MARGIN)
            volumes[place, 0] = torch.from_numpy(distances / self.truncation)
        return self.form.quantize(volumes)


class KeptVolumes:
    """Decoder whose results are kept in a folder, each under a hash of its file and of the decoder.

    Args:
        decoder: decoder to float32 [1, S, S, S] with values of float16.
        folder: folder of the results.
    """

    def __init__(self, decoder: NoResize, folder: Path) -> None:
        self.decoder, self.folder = decoder, folder

    @property
    def shape(self) -> Shape:
        """Shape of the arrays, [1, S, S, S]."""
        return self.decoder.shape

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the arrays, float32."""
        return self.decoder.dtype

    def __repr__(self) -> str:
        return key_text(self.decoder)

    def __call__(self, data: bytes) -> np.ndarray:
        """Return the volume of a mesh; FormatError as `SignedDistance.read`."""
        key = hashlib.sha256(f"{VERSION} {self!r}".encode() + data).hexdigest()[:32]
        path = self.folder / f"{key}.f16.zlib"
        count = int(np.prod(self.shape))
        with suppress(OSError, ValueError, zlib.error):  # not converted yet, or damaged
            content = zlib.decompressobj().decompress(path.read_bytes(), 2 * count + 1)
            return np.frombuffer(content, np.float16).reshape(self.shape).astype(np.float32)
        volume = self.decoder(data)
        with optional(), atomic_write(path) as temporary:
            temporary.write_bytes(zlib.compress(volume.astype(np.float16).tobytes()))
        return volume


def _check_memory(size: int, resolution: int) -> None:
    """Raise UsageError for built-in solids that do not fit in memory, where all of them are."""
    each = 4 * resolution**3
    if not fits_in_memory(size * each):
        problem = (
            f"that many volumes of {resolution}^3 voxels take {size * each / 1e9:.3g} GB, more than a quarter of the "
            "free memory"
        )
        remedy = "use a smaller size or a lower resolution"
        raise UsageError("dataset.size", size, problem, remedy)
