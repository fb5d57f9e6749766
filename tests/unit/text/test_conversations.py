"""Conversations: both forms are the same messages, the template's text is the model's, and each token counts as it should."""

import json
import os

import datasets
import datasets.config
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from everyscope.base.errors import TextError
from everyscope.text.blocks import Cursor, pack, read_blocks
from everyscope.text.config import TextConfig
from everyscope.text.conversations import messages_of, rendered, spans_of
from everyscope.text.corpora import read_documents
from everyscope.text.documents import Document
from everyscope.text.markers import has_bos_per_document, markers_of
from everyscope.text.tokenizer import load_tokenizer

SMOLLM2 = os.environ.get("EVERYSCOPE_TEST_SMOLLM2", "")
"""A local folder of SmolLM2-Instruct, whose BOS and EOS are the markers of turns."""
START, END = "<|im_start|>", "<|im_end|>"
WORDS = [START, END, "<unk>", "<bos>", "\n", " ", *["system", "user", "assistant", "hi", "ho", "ha", "be", "brief", "sure"]]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content | trim + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OPENAI = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi ho"},
    {"role": "assistant", "content": " sure ha\n"},
]
SHAREGPT = [{"from": "system", "value": "be brief"}, {"from": "human", "value": "hi ho"}, {"from": "gpt", "value": " sure ha\n"}]


def chat_tokenizer(template=CHATML, **special):
    """A token a word, space or line end; SmolLM2-Instruct's markers, which are BOS, EOS and padding as well."""
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s|\S+"), "isolated")
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": "<unk>"} | special
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = template
    return tokenizer


def conversation(messages=OPENAI, name="a chat"):
    found = messages_of(messages, name)
    assert found is not None
    return Document(name, "", name, found)


def plain(text, name="a text"):
    return Document(name, text, name)


def blocks_of(tokenizer, documents, **fields):
    return list(pack(documents, TextConfig(source="files", paths=("x",), column="messages", **fields), tokenizer, Cursor()))


def tokens_of(tokenizer, block):
    return tokenizer.convert_ids_to_tokens(block.input_ids.tolist())


# forms


def test_both_forms_are_the_same_messages():
    want = tuple(OPENAI)
    table = {"role": [message["role"] for message in OPENAI], "content": [message["content"] for message in OPENAI]}
    parts = [message | {"content": [{"type": "text", "text": message["content"]}]} for message in OPENAI]
    nulls = [message | {"tool_calls": None} for message in OPENAI]  # as Parquet fills what other rows have
    for form in (OPENAI, SHAREGPT, table, parts, nulls):
        assert messages_of(form, "x") == want


def test_what_else_a_message_has_is_for_the_template():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    assert messages_of([OPENAI[1], call], "x") == (OPENAI[1], call | {"content": ""})


@pytest.mark.parametrize(
    "empty", [[], [{"role": "user", "content": " "}], [{"from": "gpt", "value": ""}], {"role": [], "content": []}]
)
def test_a_conversation_in_which_nothing_is_said_is_none(empty):
    assert messages_of(empty, "x") is None


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        (
            [OPENAI[0], {"speaker": "me", "text": "hi"}],
            r"a\.jsonl:3: message 2 is \['speaker', 'text'\]; expected an object",
        ),
        (["hi"], r"a\.jsonl:3: message 1 is str"),
        ([{"role": "user", "content": 5}], r"message 1 has role 'user' and content of type int"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"content of type list"),
        ({"body": "x"}, r"a\.jsonl:3: an object with \['body'\], not a conversation"),
    ],
)
def test_other_cells_are_named(cell, words):
    with pytest.raises(TextError, match=words):
        messages_of(cell, "a.jsonl:3")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "dataset"])
@pytest.mark.parametrize("messages", [OPENAI, SHAREGPT])
def test_conversations_come_from_every_kind_of_file(tmp_path, monkeypatch, kind, messages):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "corpus"
    folder.mkdir()
    if kind == "parquet":
        pq.write_table(pa.table({"chat": [messages, None]}), folder / "a.parquet")
    else:
        rows = [{"chat": messages}, {"chat": None}]
        (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    where = {"source": "dataset", "dataset": str(folder)} if kind == "dataset" else {"source": "files", "paths": (folder,)}
    (document,) = read_documents(TextConfig(column="chat", **where))
    assert document.messages == tuple(OPENAI)
    assert document.text == "be brief\nhi ho\n sure ha\n"


def test_the_split_is_that_of_what_is_said(tmp_path):
    keys = set()
    for name, messages in (("a", OPENAI), ("b", SHAREGPT)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"messages": messages}))
        (document,) = read_documents(TextConfig(source="files", paths=(tmp_path / f"{name}.jsonl",), column="messages"))
        keys.add(document.split_key)
    assert len(keys) == 1


# masks


HAND_MADE = [  # (token, counts, counts with roles=("assistant",))
    (START, 0, 0),  # the first of the block: a BOS, whatever else it is
    ("system", 1, 0),
    ("\n", 1, 0),
    ("be", 1, 0),
    (" ", 1, 0),
    ("brief", 1, 0),
    (END, 1, 0),
    ("\n", 1, 0),
    (START, 1, 0),
    ("user", 1, 0),
    ("\n", 1, 0),
    ("hi", 1, 0),
    (" ", 1, 0),
    ("ho", 1, 0),
    (END, 1, 0),
    ("\n", 1, 0),
    (START, 1, 0),
    ("assistant", 1, 0),
    ("\n", 1, 0),
    ("sure", 1, 1),
    (" ", 1, 1),
    ("ha", 1, 1),
    (END, 1, 0),
    ("\n", 1, 0),
    (END, 0, 0),  # closes the document
    (START, 1, 0),  # of the next one, within the block: a turn
    ("user", 1, 0),
    ("\n", 1, 0),
    ("ho", 1, 0),
    (END, 1, 0),
    ("\n", 1, 0),
    (END, 0, 0),
    (END, 0, 0),  # padding
    (END, 0, 0),
]


@pytest.mark.parametrize("roles", [None, ("assistant",)])
def test_masks_are_those_made_by_hand(roles):
    tokenizer = chat_tokenizer()
    documents = [conversation(), conversation([{"role": "user", "content": "ho"}])]
    (block,) = blocks_of(tokenizer, documents, context=len(HAND_MADE), roles=roles)
    column = 1 if roles is None else 2
    assert list(zip(tokens_of(tokenizer, block), block.mask.tolist(), strict=True)) == [
        (row[0], bool(row[column])) for row in HAND_MADE
    ]
    assert block.document.tolist() == [-1] + [0] * 24 + [1] * 7 + [-1] * 2


@pytest.mark.parametrize("context", [5, 12, 34])
@pytest.mark.parametrize("bos", ["block", "document"])
def test_messages_and_rendered_text_are_the_same_ids(context, bos):
    tokenizer = chat_tokenizer()
    chats = [conversation(), conversation([{"role": "user", "content": "ho"}]), conversation()]
    texts = [plain(tokenizer.apply_chat_template(list(chat.messages or ()), tokenize=False)) for chat in chats]
    for one, other in zip(*(blocks_of(tokenizer, docs, context=context, bos=bos) for docs in (chats, texts)), strict=True):
        assert one.input_ids.tolist() == other.input_ids.tolist()
        assert one.mask.tolist() == other.mask.tolist()
        assert one.after == other.after


def test_a_block_begins_with_one_bos_and_ids_are_those_of_the_template():
    tokenizer = chat_tokenizer()
    ids = tokenizer.apply_chat_template(OPENAI, tokenize=True, return_dict=False)
    (block,) = blocks_of(tokenizer, [conversation()], context=64)
    assert block.input_ids[: len(ids)].tolist() == ids
    assert block.input_ids[len(ids) :].tolist() == [tokenizer.eos_token_id] * (64 - len(ids))
    assert not block.mask[len(ids) :].any()


def test_behind_a_prefix_the_first_turn_keeps_its_marker():
    tokenizer = chat_tokenizer()
    (block,) = blocks_of(tokenizer, [conversation()], context=64, prefix="be brief")
    assert tokens_of(tokenizer, block)[:6] == [START, "be", " ", "brief", START, "system"]
    assert block.mask[:6].tolist() == [False] * 4 + [True] * 2


def test_gemmas_turns_as_the_bundled_model_has_them(tmp_path):
    """Its template begins with <bos>, which is no turn: wherever packing wants a BOS, there is one, and never two."""
    tokenizer = load_tokenizer("tiny-it")
    messages = [{"role": "user", "content": "def f(x):"}, {"role": "assistant", "content": "return x"}]
    text = "<start_of_turn>user\ndef f(x):<end_of_turn>\n<start_of_turn>model\nreturn x<end_of_turn>\n"
    of_text = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    forms = ([conversation(messages)] * 2, [plain(text)] * 2, [plain("<bos>" + text)] * 2)
    for where, between in (("block", []), ("document", [bos]), ("by_family", [])):
        for documents in forms:
            (block,) = blocks_of(tokenizer, documents, context=80, bos=where)
            want = [bos, *of_text, eos, *between, *of_text, eos]
            assert block.input_ids[: len(want)].tolist() == want
            assert block.mask[: len(want)].tolist() == [token not in (bos, eos) for token in want]
    assert markers_of(tokenizer).turns == set()


def test_several_roles_and_words_that_stick_to_markers():
    """A token counts if any of its characters is said by a wanted role."""
    tokenizer = load_tokenizer("tiny-it")
    messages = [{"role": "user", "content": "\nreturn the sum\n"}, {"role": "assistant", "content": "a + b"}]
    (both,) = blocks_of(tokenizer, [conversation(messages)], context=64, roles=("user", "assistant"))
    (one,) = blocks_of(tokenizer, [conversation(messages)], context=64, roles=("assistant",))
    assert tokenizer.decode(one.input_ids[one.mask]) == "a + b"
    assert tokenizer.decode(both.input_ids[both.mask]).replace("\n", "") == "return the suma + b"


@pytest.mark.skipif(not SMOLLM2, reason="needs a real chat model: set EVERYSCOPE_TEST_SMOLLM2 to a folder of SmolLM2-Instruct")
def test_smollm2_masks_and_ids():
    tokenizer = load_tokenizer(SMOLLM2)
    assert markers_of(tokenizer).turns == {tokenizer.bos_token_id, tokenizer.eos_token_id}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "It is 4."},
    ]
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    size = len(ids) + 1
    for documents in ([conversation(messages)] * 2, [plain(text)] * 2):
        (block,) = blocks_of(tokenizer, documents, context=2 * size + 3)
        eos = tokenizer.eos_token_id
        assert block.input_ids.tolist() == [*ids, eos, *ids, eos, eos, eos, eos]
        # All that is not measured: the block's first token, the EOS behind each document, and padding.
        assert np.flatnonzero(~block.mask).tolist() == [0, size - 1, 2 * size - 1, 2 * size, 2 * size + 1, 2 * size + 2]
    (block,) = blocks_of(tokenizer, [conversation(messages)], context=size, roles=("assistant",))
    counted = [tokenizer.decode([token]) for token in block.input_ids[block.mask]]
    assert counted == ["It", " is", " ", "4", "."]


# packing


@pytest.mark.parametrize("roles", [None, ("user",)])
@pytest.mark.parametrize("bos", ["block", "document"])
@pytest.mark.parametrize("context", [4, 9, 30])
def test_the_rest_follows_from_any_cursor(roles, bos, context):
    tokenizer = chat_tokenizer()
    documents = [conversation(), conversation([{"role": "user", "content": "ho"}]), conversation(OPENAI[1:])]
    fields = {"roles": roles, "bos": bos, "context": context}
    whole = blocks_of(tokenizer, documents, **fields)
    config = TextConfig(source="files", paths=("x",), column="messages", **fields)
    for index, block in enumerate(whole):
        rest = list(pack(documents, config, tokenizer, block.after))
        assert len(rest) == len(whole) - index - 1
        for one, other in zip(rest, whole[index + 1 :], strict=True):
            assert one.after == other.after
            assert all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("input_ids", "document", "mask"))


def test_bos_per_document_and_every_other_token_once():
    tokenizer = chat_tokenizer(None, bos_token="<bos>", eos_token="<unk>", pad_token="<unk>")
    texts = ["hi ho", "ha", "be brief sure", "hi", "ho ho ho"]
    bos = tokenizer.bos_token_id
    for context in (4, 5, 7, 40):
        blocks = blocks_of(tokenizer, [plain(text) for text in texts], context=context, bos="document")
        seen = []
        for block in blocks:
            ids, numbers = block.input_ids.tolist(), block.document.tolist()
            assert ids[0] == bos
            assert numbers[0] == -1
            assert bos != ids[1], "a document that begins with the block needs no second one"
            assert not block.mask[block.input_ids == bos].any()
            begins = [place for place in range(2, context) if numbers[place] != numbers[place - 1] and numbers[place] >= 0]
            assert [place for place in range(1, context) if ids[place] == bos] == begins
            seen += [(number, token) for number, token in zip(numbers, ids, strict=True) if number >= 0 and token != bos]
        assert seen == [
            (number, token)
            for number, text in enumerate(texts)
            for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        ]


def test_gemmas_tokenizers_have_bos_per_document_by_default():
    class GemmaTokenizerFast:
        pass

    config = TextConfig()
    assert has_bos_per_document(config, GemmaTokenizerFast())
    assert not has_bos_per_document(config.model_copy(update={"bos": "block"}), GemmaTokenizerFast())
    assert not has_bos_per_document(config, chat_tokenizer())
    assert has_bos_per_document(config.model_copy(update={"bos": "document"}), chat_tokenizer())
    assert not has_bos_per_document(config, load_tokenizer("tiny"))


# templates


def test_without_a_template_the_document_is_named():
    with pytest.raises(
        TextError, match=r"a chat: holds messages, but tokenizer .* has no chat template; take an instruction-tuned"
    ):
        blocks_of(chat_tokenizer(template=None), [conversation()], context=32)


def test_what_a_template_refuses_is_named():
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    with pytest.raises(
        TextError, match=r"a chat: .* refuses the conversation \(System role not supported\); its roles are system, user"
    ):
        blocks_of(chat_tokenizer(template), [conversation()], context=32)


def test_a_template_runs_in_a_sandbox():
    with pytest.raises(TextError, match="refuses the conversation"):
        blocks_of(chat_tokenizer("{{ messages.__class__.__mro__[1].__subclasses__() }}"), [conversation()], context=32)


def test_the_date_in_a_template_is_always_the_same():
    tokenizer = chat_tokenizer(
        "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{{ strftime_now( \"%H\" ) }}{% endif %}"
    )
    assert rendered(tokenizer, tuple(OPENAI), "x") == "01 Jan 202500"


def test_roles_are_found_or_the_template_is_named():
    messages = tuple(OPENAI)
    tokenizer = chat_tokenizer()
    text = rendered(tokenizer, messages, "x")
    said = [text[start:stop] for start, stop in spans_of(tokenizer, messages, text, lambda role: True, "x")]
    assert said == ["be brief", "hi ho", "sure ha"]
    for template in (
        "{{ messages[0].content }}",  # drops messages
        "{% for message in messages %}{{ message.content | upper }}{% endfor %}",  # changes them
        "{% for message in messages %}{{ message.content }}{{ message.content }}{% endfor %}",  # writes them twice
    ):
        with pytest.raises(TextError, match=r"x: the chat template .* does not write every message as it is.*leave roles out"):
            spans_of(
                chat_tokenizer(template), messages, rendered(chat_tokenizer(template), messages, "x"), lambda role: True, "x"
            )


def test_roles_of_plain_text_are_an_error():
    with pytest.raises(TextError, match=r"a text: holds text, not messages, so that roles=\('user',\) mean nothing"):
        blocks_of(chat_tokenizer(), [plain("hi")], context=32, roles=("user",))


def test_conversations_in_files_are_split_and_shuffled_as_any_document(tmp_path):
    rows = [{"messages": [{"role": "user", "content": " ".join(["hi"] * number)}]} for number in range(1, 60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TextConfig(source="files", paths=(tmp_path,), column="messages", context=16, held_out_fraction=0.3, roles=("user",))
    for seed in (None, 1):
        shuffled = config.model_copy(update={"shuffle_seed": seed})
        blocks = [block for split in ("train", "held_out") for block in read_blocks(shuffled, chat_tokenizer(), split)]
        counted = [token for block in blocks for token in tokens_of(chat_tokenizer(), block)[1:]]
        assert sum(block.mask.sum() for block in blocks) == sum(2 * number - 1 for number in range(1, 60))
        assert counted.count("hi") == sum(range(1, 60))
