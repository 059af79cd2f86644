"""Array files: the bytes of numpy, written in parts."""

import io
import tracemalloc

import numpy as np
import pytest

from diffusion_cli.system.files import write_npy


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype=np.int16).reshape(2, 3, 4),
        np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        np.arange(40, dtype=np.float32).reshape(4, 10)[::2, 1::3],
        np.zeros((3, 0), np.uint8),
        np.array(7, np.int64),
    ],
    ids=["volume", "fortran", "strided", "empty", "scalar"],
)
def test_a_file_has_the_bytes_of_numpy(tmp_path, array):
    expected = io.BytesIO()
    np.save(expected, array)
    write_npy(tmp_path / "a.npy", array)
    assert (tmp_path / "a.npy").read_bytes() == expected.getvalue()


def test_a_large_array_is_written_in_parts(tmp_path):
    array = np.zeros(2**23)  # 64 MiB
    tracemalloc.start()
    try:
        write_npy(tmp_path / "a.npy", array)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "a.npy").stat().st_size > array.nbytes
    assert most < 2**25
