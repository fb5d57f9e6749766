"""Every token's own bytes, exactly where the tokenizer can say, so that half a character stays half a character.

Decoding ids one by one loses SentencePiece's leading spaces and turns bytes that are no UTF-8 alone into question marks.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""How SentencePiece writes a byte that has no token of its own."""


def byte_alphabet() -> dict[str, int]:
    """The byte behind each printable character that byte-level BPE (GPT-2) writes for it."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + number): byte for number, byte in enumerate(others)}


def token_pieces(tokenizer: Any) -> list[bytes]:
    """The bytes of every token, by id; empty for ids that stand for nothing. Special tokens are spelt as they are written."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    decoders = list(_decoders(tokenizer))
    kinds = {decoder["type"] for decoder in decoders}
    spaces = {decoder["replacement"] for decoder in decoders if decoder["type"] == "Metaspace"}
    replaced = [decoder for decoder in decoders if decoder["type"] == "Replace" and decoder.get("content") == " "]
    spaces |= {decoder["pattern"]["String"] for decoder in replaced if "String" in decoder["pattern"]}
    alphabet = byte_alphabet()

    def piece(token: int, name: str | None) -> bytes:
        if name is None:
            return b""
        if token in added:
            return str(added[token].content).encode("utf-8", "replace")
        if "ByteLevel" in kinds and all(character in alphabet for character in name):
            return bytes(alphabet[character] for character in name)
        if "ByteFallback" in kinds and (match := BYTE_PIECE.fullmatch(name)):
            return bytes([int(match[1], 16)])
        if spaces:
            for space in spaces:
                name = name.replace(space, " ")
            return name.encode("utf-8", "replace")
        return tokenizer.decode([token]).encode("utf-8", "replace")

    return [piece(token, name) for token, name in enumerate(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))))]


def _decoders(tokenizer: Any) -> Iterator[dict[str, Any]]:
    """The steps by which a fast tokenizer turns tokens into text, flat; none for a slow one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    waiting = [json.loads(backend.to_str()).get("decoder")] if backend is not None else []
    while waiting:
        decoder = waiting.pop(0)
        if decoder is not None and decoder["type"] == "Sequence":
            waiting = [*decoder["decoders"], *waiting]
        elif decoder is not None:
            yield decoder


def special_tokens(tokenizer: Any) -> set[int]:
    """The ids that frame text and are never in it."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return set(tokenizer.all_special_ids) | {token for token, its in added.items() if its.special}
