"""Points in PLY files, the Stanford polygon format (Turk 1994)."""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffusion_cli.errors import FormatError

LONGEST_HEADER = 2**16  # bytes
FORMATS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}
TYPES = {
    "char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4", "float": "f4",
    "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4",
    "float32": "f4", "float64": "f8",
}  # fmt: skip
AXES = ("x", "y", "z")


class _Header(NamedTuple):
    order: str  # byte order of numbers; empty for text
    vertices: int
    properties: list[tuple[str, str]]  # name and type of each vertex property
    start: int  # offset of the first vertex in bytes


def read_ply(data: bytes) -> np.ndarray:
    """Return x, y and z of the vertices in a PLY file, float64 [N, 3]; other elements are ignored.

    Allocates no more than the file could fill.

    Raises:
        FormatError: the file is malformed or truncated, coordinates are not finite, or vertices come after other
            elements or have list properties.
    """
    header = _header(data)
    names = [name for name, _ in header.properties]
    if any(names.count(axis) != 1 for axis in AXES):
        raise FormatError(f"has vertices with {', '.join(names)[:80]}; expected one x, y and z each")
    read = _binary if header.order else _text
    points = np.stack([read(data, header)[axis] for axis in AXES], axis=1).astype(np.float64)
    if not np.isfinite(points).all():
        raise FormatError("has coordinates that are not finite")
    return points


def element_counts(data: bytes) -> list[int]:
    """Return the number of vertices, faces and other elements that the header of a PLY file declares."""
    return [
        int(count)
        for count in re.findall(rb"^element\s+\S+\s+(\d+)", data[: _header(data).start], re.MULTILINE)
    ]


def write_ply(points: np.ndarray, path: Path) -> None:
    """Write points [N, 3] as binary PLY of float32."""
    properties = "".join(f"property float {axis}\n" for axis in AXES)
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(points)}\n{properties}end_header\n"
    path.write_bytes(header.encode() + np.ascontiguousarray(points, "<f4").tobytes())


def _header(data: bytes) -> _Header:
    ending = re.search(rb"\nend_header[ \t]*\r?\n", data[:LONGEST_HEADER])
    if not data.startswith(b"ply") or ending is None:
        raise FormatError("is not a PLY file")
    lines = [line.split() for line in data[: ending.start()].decode("ascii", "replace").splitlines()[1:]]
    lines = [words for words in lines if words and words[0] not in ("comment", "obj_info")]
    match lines[:2]:
        case [["format", kind, _], ["element", "vertex", count]] if kind in FORMATS and count.isdecimal():
            pass
        case _:
            raise FormatError("does not start with a known format and its vertices")
    properties = []
    for words in lines[2:]:
        match words:
            case ["property", type_, name] if type_ in TYPES:
                properties.append((name, TYPES[type_]))
            case ["element", *_]:
                break
            case _:
                raise FormatError(f"has a vertex property that is not a number: '{' '.join(words)[:80]}'")
    if len({name for name, _ in properties}) < len(properties):
        raise FormatError("has two vertex properties with the same name")
    return _Header(FORMATS[kind], int(count), properties, ending.end())


def _binary(data: bytes, header: _Header) -> np.ndarray:
    vertex = np.dtype([(name, header.order + kind) for name, kind in header.properties])
    if header.vertices * vertex.itemsize > len(data) - header.start:
        raise FormatError(f"ends before its {header.vertices} vertices")
    return np.frombuffer(data, vertex, header.vertices, header.start)


def _text(data: bytes, header: _Header) -> dict[str, np.ndarray]:
    wanted, width = header.vertices * len(header.properties), len(header.properties)
    if 2 * wanted - 1 > len(data) - header.start:  # at least a digit and a blank each
        raise FormatError(f"ends before its {header.vertices} vertices")
    try:
        numbers = np.array(data[header.start :].split(maxsplit=wanted)[:wanted], np.float64)
    except ValueError as error:
        raise FormatError("has vertices that are not numbers") from error
    if len(numbers) < wanted:
        raise FormatError(f"ends before its {header.vertices} vertices")
    columns = numbers.reshape(-1, width).T
    return {name: column for (name, _), column in zip(header.properties, columns, strict=True)}
