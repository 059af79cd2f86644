"""Names of layers that diffusers changed. This module does not import torch."""

import re

RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Layers of attention blocks: old name to present name."""
OLD = re.compile(rf"(?<=\.)({'|'.join(RENAMED)})(?=\.(weight|bias)$)")


def present_name(name: str) -> str:
    """Return the present name of a tensor, which published files may have under an old one."""
    return OLD.sub(lambda match: RENAMED[match[0]], name)
