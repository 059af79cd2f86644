"""Identity of a frozen text encoder besides its weights and vocabulary: settings of the network, and the tokenizer."""

import json
from hashlib import sha256
from typing import Any

SETTINGS = {
    "clip": ("hidden_act", "num_attention_heads", "layer_norm_eps"),
    "t5": (
        "num_heads",
        "d_kv",
        "dense_act_fn",
        "is_gated_act",
        "relative_attention_num_buckets",
        "relative_attention_max_distance",
        "layer_norm_epsilon",
    ),
}
"""Settings that change features without another shape of weights; other settings differ between library versions."""
PROBES = (
    "A red Seven, above the blue THREE!",
    "don't  stop\tnow\n(12,345 + 6.7) a_b-c",
    "caf\u00e9 cafe\u0301 \ufb01ne stra\u00dfe \u0416 \u65e5\u672c \U0001f600",
    "  <|startoftext|> <|endoftext|> <pad> </s> <unk> <extra_id_0>  ",
    "internationalization pneumonoultramicroscopic zzzzzzqqqq",
)
"""Texts whose tokens reveal how a tokenizer normalizes and splits texts."""


def settings_digest(encoder: str, config: Any, tokenizer: Any) -> str:
    """Return the SHA-256 (hex) of the settings and the tokenizer of an encoder.

    It covers the merges, the scores of the vocabulary and the tokens of `PROBES`, but not the stored form of the
    tokenizer, which differs between library versions.

    Args:
        encoder: architecture, clip or t5.
        config: configuration of the network in transformers.
        tokenizer: tokenizer of transformers.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = {} if backend is None else json.loads(backend.to_str())["model"]
    # Older versions of the library write each merge as one text.
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or ()]
    scores = model["vocab"] if isinstance(model.get("vocab"), list) else []
    tokens = tokenizer(list(PROBES), truncation=False, verbose=False)["input_ids"]
    settings = [getattr(config, name, None) for name in SETTINGS[encoder]]
    return sha256(json.dumps([settings, merges, scores, tokens]).encode()).hexdigest()


def same_encoder(one: str, other: str) -> bool:
    """Return whether two stored states are those of one encoder; states of earlier versions end before the settings."""
    return one == other or one.startswith(f"{other} ") or other.startswith(f"{one} ")
