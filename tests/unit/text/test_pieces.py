"""The bytes of tokens, put together, are the text: for each way in which tokenizers write bytes."""

import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from everyscope.describe.sequences import write_vocabulary
from everyscope.text.pieces import byte_alphabet, special_tokens, token_pieces
from everyscope.text.tokenizer import load_tokenizer

TEXTS = ["def f(x):\n\treturn  x", "naïve café – 東京 🗼🏽", "\x00\x1f\x7f<script>", " leading, trailing ", "a\u200bb\r\n"]


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Gemma's and Llama's: a character where the vocabulary has it, else the bytes of its UTF-8; spaces are written ▁."""
    names = ["<pad>", "<eos>", "<bos>", *(f"<0x{byte:02X}>" for byte in range(256)), *"abcdefilnrtx():,▁é"]
    backend = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, [], byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def metaspace() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE({name: number for number, name in enumerate(["<bos>", "▁", "a", "b"])}, []))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>")


@pytest.mark.parametrize("tokenizer", [load_tokenizer("tiny"), sentencepiece()], ids=["byte level", "byte fallback"])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_spell_the_text_byte_by_byte(tokenizer, text):
    pieces = token_pieces(tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(pieces[number] for number in ids) == text.encode()


def test_metaspace_writes_spaces():
    tokenizer = metaspace()
    pieces = token_pieces(tokenizer)
    assert b"".join(pieces[number] for number in tokenizer("a b", add_special_tokens=False)["input_ids"]) == b"a b"


def test_a_tokenizer_that_cannot_say_is_decoded():
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    assert token_pieces(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]"))[1] == b"play"


def test_added_tokens_are_spelt_as_they_are_written():
    """Those of byte-level tokenizers are no byte-level text themselves: GPT-NeoX adds runs of spaces."""
    tokenizer = load_tokenizer("tiny")
    tokenizer.add_tokens(["   Ġé"])
    assert token_pieces(tokenizer)[-1] == "   Ġé".encode()
    assert len(tokenizer) - 1 not in special_tokens(tokenizer)
    assert token_pieces(tokenizer)[tokenizer.bos_token_id] == b"<bos>"
    assert {0, 1, 2} <= special_tokens(tokenizer)


def test_half_a_character_stays_half_a_character(tmp_path):
    tokenizer = load_tokenizer("tiny")
    write_vocabulary(tmp_path / "vocabulary.parquet", tokenizer)
    rows = pyarrow.parquet.read_table(tmp_path / "vocabulary.parquet").to_pylist()
    assert [row["token"] for row in rows] == list(range(len(tokenizer)))
    halves = [row for row in rows if row["piece"] == b"\xe2"]
    assert [row["text"] for row in halves] == ["�"]
    assert all(row["text"] == row["piece"].decode("utf-8", "replace") for row in rows)
    assert {row["token"] for row in rows if row["is_special"]} == special_tokens(tokenizer)


def test_the_byte_alphabet_is_one_to_one():
    assert sorted(byte_alphabet().values()) == list(range(256))
    assert byte_alphabet()["Ġ"] == ord(" ")
    assert byte_alphabet()["Ċ"] == ord("\n")
