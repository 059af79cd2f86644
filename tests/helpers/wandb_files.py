"""Records of an offline run of W&B: blocks as in LevelDB's log, with records of its protobuf types."""

import json
import struct
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7
FULL, FIRST, LAST = 1, 2, 4


def records(file: Path) -> Iterator[Any]:
    """Yield the complete records of a `.wandb` file."""
    protocol: Any = import_module("wandb.proto.wandb_internal_pb2")
    data, place, parts = file.read_bytes(), HEADER, b""
    while place + HEADER <= len(data):
        if BLOCK - place % BLOCK < HEADER:  # padding at the end of a block
            place += BLOCK - place % BLOCK
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + HEADER])
        part = data[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind not in range(FULL, LAST + 1) or len(part) < length:  # the process was killed here
            return
        parts = part if kind in (FULL, FIRST) else parts + part
        if kind in (FULL, LAST):
            record = protocol.Record()
            record.ParseFromString(parts)
            yield record


def history(file: Path) -> list[dict[str, Any]]:
    """The rows that a run logged."""
    rows = [record.history.item for record in records(file) if record.HasField("history")]
    return [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows
    ]


def config(file: Path) -> dict[str, Any]:
    """The configuration of a run."""
    found = {}
    for record in records(file):
        for part in (record.run.config, record.config):
            found |= {item.key: json.loads(item.value_json) for item in part.update if item.key}
    return found


def run_id(file: Path) -> str:
    """The identity of a run."""
    return next(record.run.run_id for record in records(file) if record.HasField("run"))
