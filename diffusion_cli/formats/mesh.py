"""Vertices and triangles of meshes in OBJ, PLY, STL, OFF and GLB files, read by trimesh."""

import logging
import re
from collections.abc import Iterator
from io import BytesIO
from struct import unpack_from
from typing import Any, NamedTuple

import numpy as np

from diffusion_cli.errors import FormatError
from diffusion_cli.formats.ply import element_counts, read_ply
from diffusion_cli.system.untrusted import from_json, reason

SUFFIXES = (".obj", ".stl", ".off", ".glb")
MOST_TRIANGLES = 2 * 10**6
LONGEST_TEXT = 2**25  # bytes; text takes up to 30 times as much memory
FACET, STL_HEADER = 50, 84  # bytes of a triangle, and in front of the first one
MOST_NODES = 10**4  # of a scene; the time of trimesh grows with the square of their depth
JSON_START = 20  # of the description in a GLB file

# trimesh logs about broken files, which get an error of this package.
logging.getLogger("trimesh").setLevel(logging.CRITICAL)


def mesh_type(data: bytes) -> str | None:
    """Return the type of a mesh by its content: obj, stl, off or glb; None for other files."""
    if data.startswith(b"glTF"):
        return "glb"
    if re.match(rb"(?:\s|#[^\n]*\n)*C?OFF", data[:4096]):
        return "off"
    if _is_binary_stl(data) or re.match(rb"\s*solid\b", data[:4096]):
        return "stl"
    return "obj" if re.search(rb"^v[ \t]", data, re.MULTILINE) else None


def read_mesh(data: bytes, kind: str) -> np.ndarray:
    """Return the distinct vertices of a mesh of a type of `mesh_type`, sorted, float64 [N, 3].

    The meshes of a GLB scene are placed by its nodes. Materials and files that a mesh names are not read.

    Raises:
        FormatError: the file is malformed, too large as text, or declares more than it contains.
    """
    return np.unique(_checked(np.concatenate([part.vertices for part in _parts(data, kind)])), axis=0)


class Triangles(NamedTuple):
    """Triangles of a mesh."""

    vertices: np.ndarray
    """Coordinates, float64 [V, 3]."""
    faces: np.ndarray
    """Three indices of vertices each, int64 [F, 3]."""


def read_triangles(data: bytes) -> Triangles:
    """Return the triangles of a mesh in an OBJ, PLY, STL, OFF or GLB file; polygons are divided.

    The meshes of a GLB scene are placed by its nodes. Materials and files that a mesh names are not read.

    Raises:
        FormatError: as `read_mesh`, or the file has no triangles, or more than MOST_TRIANGLES.
    """
    kind = "ply" if data.startswith(b"ply") else mesh_type(data)
    if kind is None:
        raise FormatError("is not a mesh in OBJ, PLY, STL, OFF or GLB")
    parts = _parts(data, kind)
    starts = np.cumsum([0, *(len(part.vertices) for part in parts)])
    faces = np.concatenate([part.faces + start for part, start in zip(parts, starts, strict=False)])
    if not 0 < len(faces) <= MOST_TRIANGLES:
        raise FormatError(f"has {len(faces)} triangles; must have 1 to {MOST_TRIANGLES}")
    vertices = _checked(np.concatenate([part.vertices for part in parts]))
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise FormatError("has triangles of vertices that do not exist")
    return Triangles(vertices, faces)


def _parts(data: bytes, kind: str) -> list[Triangles]:
    """Return the meshes of a file, placed; FormatError as `read_mesh`."""
    import trimesh  # slow import

    if kind == "glb":
        _check_scene(data)
    elif kind == "ply":
        read_ply(data)  # checks the header and the vertices
        if sum(element_counts(data)) > len(data):
            raise FormatError("declares more elements than it contains")
    if kind not in ("glb", "ply") and not _is_binary_stl(data) and len(data) > LONGEST_TEXT:
        raise FormatError(f"has more than {LONGEST_TEXT} bytes of text; convert it to binary PLY")
    try:
        scene = trimesh.load_scene(BytesIO(data), file_type=kind, process=False, skip_materials=True)
        parts: list[Any] = scene.dump()
        return [
            Triangles(
                np.asarray(part.vertices, np.float64),
                np.asarray(getattr(part, "faces", np.empty((0, 3))), np.int64),  # none of points and lines
            )
            for part in parts
        ] or [Triangles(np.empty((0, 3)), np.empty((0, 3), np.int64))]
    except Exception as error:  # trimesh raises errors of many types for broken data
        raise FormatError(f"is not a readable {kind.upper()} file ({reason(error)})") from error


def _checked(points: np.ndarray) -> np.ndarray:
    if points.ndim != 2 or points.shape[1] != 3 or not len(points) or not np.isfinite(points).all():
        raise FormatError("has vertices that are not three finite coordinates")
    return points


def _is_binary_stl(data: bytes) -> bool:
    return (
        len(data) >= STL_HEADER
        and len(data) == STL_HEADER + FACET * unpack_from("<I", data, STL_HEADER - 4)[0]
    )


def _check_scene(data: bytes) -> None:
    """Raise FormatError for a GLB scene that would take much more memory than its file.

    A scene may use the same numbers in many places, and leave out numbers that are zero.
    """
    if len(data) < JSON_START:
        raise FormatError("is truncated")
    (length,) = unpack_from("<I", data, 12)
    scene = from_json(data[JSON_START : JSON_START + length])
    try:
        arrays = scene.get("accessors", [])
        if scene.get("extensionsRequired") or any(
            "sparse" in each or "bufferView" not in each for each in arrays
        ):
            raise FormatError("has compressed or sparse arrays; export it without them")
        counts = [abs(int(each["count"])) for each in arrays]
        used = [sum(_numbers(mesh, counts)) for mesh in scene.get("meshes", [])]
        nodes = scene.get("nodes", [])
        placed = [used[node["mesh"]] for node in nodes if "mesh" in node]
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise FormatError(f"has a malformed scene ({reason(error)})") from error
    if len(nodes) > MOST_NODES:
        raise FormatError(f"has {len(nodes)} nodes; at most {MOST_NODES} are supported")
    if max(sum(counts), sum(used), sum(placed)) > len(data):
        raise FormatError("declares more numbers than it contains, or repeats them; export it as binary PLY")


def _numbers(mesh: dict[str, Any], counts: list[int]) -> Iterator[int]:
    """Yield the size of each array that a mesh of a GLB scene uses."""
    for part in mesh["primitives"]:
        yield from (counts[place] for place in part["attributes"].values())
        yield counts[part["indices"]] if "indices" in part else 0
