"""Identities made from content, so that equal things have equal names on every machine."""

import hashlib
import json
from typing import Any

IDENTITY = "identity"
"""The key under which a JSON object holds the `content_id` of all else that it holds."""


def content_id(value: Any) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of `value` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def unit_interval(text: str) -> float:
    """A number in [0, 1) that depends on `text` alone: its SHA-256, read as a fraction."""
    bits = int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")
    return (bits >> 11) / 2**53  # 53 bits are what a float holds: with 64 the largest would round to 1
