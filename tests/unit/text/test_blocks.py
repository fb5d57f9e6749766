"""Laws of packing: every token once and in order, one mask, and a cursor from which the rest follows bit by bit."""

import hashlib
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest

from everyscope.base.errors import TextError
from everyscope.text.blocks import NO_DOCUMENT, Cursor, pack, read_blocks
from everyscope.text.config import TextConfig
from everyscope.text.documents import Document
from everyscope.text.encoding import encoded
from everyscope.text.markers import markers_of
from everyscope.text.tokenizer import load_tokenizer

TEXTS = (
    "def first(items):\n    return items[0]\n",
    "x",
    "A longer document, so that it is cut by the end of a block at least once. " * 6,
    "class Empty:\n    pass\n",
    "\n",
    "import os, sys\n" * 9,
)
DOCUMENTS = [Document(f"{number}.py", text, text) for number, text in enumerate(TEXTS)]
FRAMINGS = [{}, {"prefix": "<start_of_turn>user\n"}, {"suffix": "<end_of_turn>\n"}, {"prefix": "user: ", "suffix": " :model"}]


def config(context=16, **fields):
    return TextConfig(source="standard_library", context=context, **fields)


def blocks_of(tokenizer, config, start=None, documents=DOCUMENTS):
    return list(pack(documents, config, tokenizer, start or Cursor()))


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def text_part(block, config, tokenizer):
    """The slice of a block that holds documents, without BOS, prefix, suffix and padding."""
    head, tail = 1 + len(ids_of(tokenizer, config.prefix)), len(ids_of(tokenizer, config.suffix))
    end = int(np.flatnonzero(block.document != NO_DOCUMENT)[-1]) + 1 - tail
    return slice(head, end)


@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("context", [12, 16, 33, 500])
def test_every_token_of_every_document_once_and_in_order(tokenizer, context, framing):
    cfg = config(context, **framing)
    want = [(number, token) for number, text in enumerate(TEXTS) for token in [*ids_of(tokenizer, text), tokenizer.eos_token_id]]
    got = []
    for block in blocks_of(tokenizer, cfg):
        part = text_part(block, cfg, tokenizer)
        got += zip(block.document[part].tolist(), block.input_ids[part].tolist(), strict=True)
    assert got == want


@pytest.mark.parametrize("framing", FRAMINGS)
def test_every_block_is_framed(tokenizer, framing):
    cfg = config(20, **framing)
    prefix, suffix = ids_of(tokenizer, cfg.prefix), ids_of(tokenizer, cfg.suffix)
    blocks = blocks_of(tokenizer, cfg)
    for block in blocks:
        part = text_part(block, cfg, tokenizer)
        assert block.input_ids.shape == block.document.shape == block.mask.shape == (20,)
        assert block.input_ids.dtype == block.document.dtype == np.int32
        assert block.input_ids[: part.start].tolist() == [tokenizer.bos_token_id, *prefix]
        assert block.document[: part.start].tolist() == [NO_DOCUMENT] * part.start
        behind = part.stop + len(suffix)
        assert block.input_ids[part.stop : behind].tolist() == suffix
        assert set(block.document[part.stop : behind]) <= {block.document[part.stop - 1]}
        assert set(block.input_ids[behind:]) <= {tokenizer.pad_token_id}
    assert all(text_part(block, cfg, tokenizer).stop + len(suffix) == 20 for block in blocks[:-1]), "only the last is padded"


@pytest.mark.parametrize("framing", FRAMINGS)
def test_the_mask_is_false_exactly_on_bos_eos_padding_and_prefix(tokenizer, framing):
    cfg = config(20, **framing)
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    head = 1 + len(ids_of(tokenizer, cfg.prefix))
    for block in blocks_of(tokenizer, cfg):
        want = [index >= head and token not in special for index, token in enumerate(block.input_ids.tolist())]
        assert block.mask.tolist() == want


def test_the_suffix_is_measured(tokenizer):
    suffix = ids_of(tokenizer, "<end_of_turn>\n")
    block = blocks_of(tokenizer, config(20, suffix="<end_of_turn>\n"))[0]
    assert block.mask[-len(suffix) :].all()


@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("context", [12, 40])
def test_the_rest_follows_from_any_cursor(tokenizer, context, framing):
    cfg = config(context, **framing)
    whole = blocks_of(tokenizer, cfg)
    for index, block in enumerate(whole):
        rest = blocks_of(tokenizer, cfg, block.after)
        assert len(rest) == len(whole) - index - 1
        for one, other in zip(rest, whole[index + 1 :], strict=True):
            assert one.after == other.after
            assert all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("input_ids", "document", "mask"))


def test_cursors_advance_and_end_behind_the_last_document(tokenizer):
    cursors = [(block.after.documents, block.after.tokens) for block in blocks_of(tokenizer, config())]
    assert cursors == sorted(set(cursors))
    assert cursors[-1] == (len(DOCUMENTS), 0)


def test_a_block_that_ends_with_its_document_points_to_the_next(tokenizer):
    length = len(ids_of(tokenizer, TEXTS[0])) + 1
    blocks = blocks_of(tokenizer, config(1 + length), documents=[DOCUMENTS[0], DOCUMENTS[0]])
    assert [block.after for block in blocks] == [Cursor(1, 0), Cursor(2, 0)]
    assert all((block.input_ids != tokenizer.pad_token_id).all() for block in blocks)


def test_a_cursor_of_another_text_is_caught(tokenizer):
    with pytest.raises(AssertionError, match="another text or tokenizer"):
        blocks_of(tokenizer, config(), Cursor(1, 1000))


def test_no_room_beside_prefix_and_suffix(tokenizer):
    with pytest.raises(TextError, match="context=8 leaves no room"):
        blocks_of(tokenizer, config(8, prefix="a b c d e f g h i j"))


def fake_tokenizer(bos, eos, pad):
    return SimpleNamespace(bos_token_id=bos, eos_token_id=eos, pad_token_id=pad, name_or_path="fake")


@pytest.mark.parametrize(
    ("bos", "eos", "pad", "first", "fill", "masked"),
    [
        (2, 1, 0, 2, 0, {0, 1, 2}),  # Gemma
        (None, 5, None, 5, 5, {5}),  # GPT-2, GPT-NeoX: EOS stands for all three
        (2, None, None, 2, 2, {2}),
        (0, 1, None, 0, 0, {0, 1}),  # ids of 0 are ids
    ],
)
def test_markers(bos, eos, pad, first, fill, masked):
    markers = markers_of(fake_tokenizer(bos, eos, pad))
    assert (markers.bos, markers.eos, markers.pad) == (first, eos, fill)
    assert set(markers.always_masked) == masked


def test_a_tokenizer_without_markers_is_refused():
    with pytest.raises(TextError, match="neither BOS nor EOS"):
        markers_of(fake_tokenizer(None, None, 0))


def test_blocks_of_generated_text_have_the_bits_they_always_had(tokenizer):
    """Arithmetic is the same on every machine; the hashes are of blocks from before fields were added to TextConfig."""
    for split, want in (("train", "c9c0d919eec023d1"), ("held_out", "3d33c40577fb8bac")):
        digest = hashlib.sha256()
        for block in islice(read_blocks(TextConfig(source="arithmetic", context=64), tokenizer, split), 3000):
            digest.update(block.input_ids.tobytes() + block.document.tobytes() + block.mask.tobytes() + str(block.after).encode())
        assert digest.hexdigest()[:16] == want


@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("skip", [1, 3, 7])
def test_skipped_positions_are_read_and_not_measured(tokenizer, framing, skip):
    measured, skipped = (
        blocks_of(tokenizer, config(20, **framing)),
        blocks_of(tokenizer, config(20, skip_positions=skip, **framing)),
    )
    for one, other in zip(measured, skipped, strict=True):
        assert one.input_ids.tolist() == other.input_ids.tolist()
        assert one.after == other.after
        assert other.mask.tolist() == [False] * (1 + skip) + one.mask[1 + skip :].tolist()


def test_tokens_that_the_model_does_not_know_are_replaced_and_not_measured(capsys):
    """Gemma 3's tokenizer has a token for images that its smaller models have no embedding for."""
    tokenizer = load_tokenizer("tiny")
    assert tokenizer.convert_tokens_to_ids("<unk>") == 3
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    assert tokenizer.convert_tokens_to_ids("<image_soft_token>") == 4096
    texts = ["look at <image_soft_token> here", "x = 1", "<image_soft_token><image_soft_token>"]
    documents = [Document(f"{number}.txt", text, text) for number, text in enumerate(texts)]
    (block,) = blocks_of(tokenizer, config(32), documents=documents)
    ids = [token for text in texts for token in [*ids_of(tokenizer, text), tokenizer.eos_token_id]]
    unknown = [place for place, token in enumerate(ids) if token == 4096]
    assert len(unknown) == 3
    assert block.input_ids[1 : 1 + len(ids)].tolist() == [3 if token == 4096 else token for token in ids]
    assert block.mask[1 : 1 + len(ids)].tolist() == [token not in (4096, tokenizer.eos_token_id) for token in ids]
    place = "0.txt: '<image_soft_token>' is token 4096, the model has 4096"
    what = "tokens that the model has no embedding for"
    assert capsys.readouterr().err.splitlines() == [
        f"{place}: {what}; they are replaced and not measured",
        f"3 {what} in all, the first in {place}; they are replaced and not measured",
    ]


def test_what_was_read_before_an_error_is_given_out_before_it(tmp_path, tokenizer):
    """Documents are tokenised many at a time: a bad one must not take those before it with it."""
    path = jsonl(tmp_path, [f"document number {number} is here" for number in range(50)])
    with path.open("a") as file:
        file.write("no json\n")
    cfg = TextConfig(source="files", paths=(path,), context=8, held_out_fraction=1e-9)
    seen = []
    with pytest.raises(TextError, match=r"text\.jsonl:51: not JSON"):
        seen.extend(block.after.documents for block in read_blocks(cfg, tokenizer, "train"))
    assert seen[-1] >= 49


def test_batches_of_documents_are_the_documents_one_by_one(tokenizer):
    documents = [Document(str(number), TEXTS[number % len(TEXTS)] * (1 + number % 5), "") for number in range(300)]
    seen = list(encoded(enumerate(documents), config(), tokenizer))
    assert [number for number, _, _ in seen] == list(range(300))
    assert all(its.ids.tolist() == [*ids_of(tokenizer, document.text), tokenizer.eos_token_id] for _, document, its in seen)


def jsonl(tmp_path, texts):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    return path


def test_the_two_splits_hold_every_document_once(tmp_path, tokenizer):
    texts = [f"document number {number}" for number in range(40)]
    cfg = TextConfig(source="files", paths=(jsonl(tmp_path, texts),), context=16, held_out_fraction=0.3)
    found = []
    for split in ("train", "held_out"):
        ids = [token for block in read_blocks(cfg, tokenizer, split) for token in block.input_ids.tolist()]
        found += [text for text in tokenizer.decode([token for token in ids if token not in (0, 2)]).split("<eos>") if text]
    assert sorted(found) == sorted(texts)


def test_reading_resumes_from_a_cursor(tmp_path, tokenizer):
    cfg = TextConfig(source="files", paths=(jsonl(tmp_path, [f"document {n}" * 5 for n in range(20)]),), context=16)
    whole = list(read_blocks(cfg, tokenizer, "train"))
    rest = list(read_blocks(cfg, tokenizer, "train", start=whole[2].after))
    assert [block.input_ids.tolist() for block in rest] == [block.input_ids.tolist() for block in whole[3:]]
    assert list(read_blocks(cfg, tokenizer, "train", start=whole[-1].after)) == []


def test_empty_text_is_refused(tmp_path, tokenizer):
    cfg = TextConfig(source="files", paths=(jsonl(tmp_path, ["", "  "]),), context=16)
    with pytest.raises(TextError, match=r"text\.jsonl: holds no text"):
        list(read_blocks(cfg, tokenizer, "train"))


def test_a_split_without_documents_is_refused(tmp_path, tokenizer):
    cfg = TextConfig(source="files", paths=(jsonl(tmp_path, ["a", "b"]),), context=16, held_out_fraction=1e-9)
    with pytest.raises(TextError, match="none of its 2 documents is held_out"):
        list(read_blocks(cfg, tokenizer, "held_out"))
