"""Laws of the corpora: the same documents in the same order wherever they lie, split by content, and clear refusals."""

import json
import os
import sys
from itertools import islice

import datasets
import datasets.config
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from everyscope.base.errors import MissingExtra, ModelError, TextError
from everyscope.text.blocks import read_blocks
from everyscope.text.config import TextConfig
from everyscope.text.corpora import read_documents, standard_library, standard_library_docstrings
from everyscope.text.documents import Document
from everyscope.text.order import shuffled
from everyscope.text.tokenizer import load_tokenizer

TEXTS = ["first document", "zweites Dokument: äöü", "third\nwith two lines", "last one"]


@pytest.fixture(scope="module")
def library():
    return list(standard_library())


@pytest.fixture(scope="module")
def docstrings():
    return list(islice(standard_library_docstrings(), 150))


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")


def files(*paths, column="text"):
    return list(read_documents(TextConfig(source="files", paths=paths, column=column)))


def dataset(folder, **fields):
    return list(read_documents(TextConfig(source="dataset", dataset=str(folder), **fields)))


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path, columns):
    pq.write_table(pa.table(columns), path)
    return path


def texts_of(documents):
    return [document.text for document in documents]


# splits


def test_a_split_is_stable_and_near_its_fraction():
    documents = [Document(str(number), "", f"content {number}") for number in range(4000)]
    first = [document.split(0.1) for document in documents]
    assert first == [Document("renamed", "", document.split_key).split(0.1) for document in documents]
    share = first.count("held_out") / len(first)
    assert abs(share - 0.1) < 4 * (0.1 * 0.9 / 4000) ** 0.5
    wider = [document.split(0.2) for document in documents]
    assert all(two == "held_out" for one, two in zip(first, wider, strict=True) if one == "held_out")


def test_docstrings_share_the_split_of_their_file(library, docstrings):
    splits = {document.name: document.split(0.3) for document in library}
    assert len(docstrings) == 150
    assert {document.split(0.3) for document in docstrings} == {"train", "held_out"}
    assert all(document.split(0.3) == splits[document.name] for document in docstrings)


# the library


def test_the_library_is_there_and_ordered_by_content(library):
    names = [document.name for document in library]
    assert {"ast.py", "json/decoder.py", "asyncio/events.py"} <= set(names)
    assert len(set(names)) == len(names)
    assert names != sorted(names)
    assert names == [document.name for document in standard_library()]
    assert not [name for name in names if {"site-packages", "test", "tests"} & set(name.split("/"))]


def test_docstrings_are_english_of_the_sources(library, docstrings):
    sources = {document.name: document.text for document in library}
    # a docstring with escapes stands in the source in another form, so not quite all are found as they are
    found = [document.text.splitlines()[0].strip() in sources[document.name] for document in docstrings]
    assert sum(found) > 0.98 * len(found)
    assert all(0 < len(document.text) < len(sources[document.name]) for document in docstrings)


# local files


def test_every_kind_of_file_gives_the_same_documents(tmp_path):
    folder = tmp_path / "txt"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    jsonl = write_jsonl(tmp_path / "a.jsonl", [{"text": text, "id": 1} for text in TEXTS])
    parquet = write_parquet(tmp_path / "a.parquet", {"id": [1, 2, 3, 4], "text": TEXTS})
    assert texts_of(files(folder)) == texts_of(files(jsonl)) == texts_of(files(parquet)) == TEXTS
    assert texts_of(files(parquet, folder)) == TEXTS + TEXTS


def test_a_folder_is_searched_in_order_of_name(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "2.txt").write_text("three")
    (tmp_path / "a.txt").write_text("one")
    write_jsonl(tmp_path / "b" / "1.jsonl", [{"text": "two"}])
    (tmp_path / "notes.md").write_text("not read")
    (tmp_path / "folder.txt").mkdir()
    assert texts_of(files(tmp_path)) == ["one", "two", "three"]


def test_another_column_can_hold_the_text(tmp_path):
    rows = [{"content": text} for text in TEXTS]
    assert texts_of(files(write_jsonl(tmp_path / "a.jsonl", rows), column="content")) == TEXTS


def test_rows_without_text_are_left_out(tmp_path):
    cells = ["one", None, "", " \n", "two"]
    jsonl = write_jsonl(tmp_path / "a.jsonl", [{"text": cell} for cell in cells])
    parquet = write_parquet(tmp_path / "a.parquet", {"text": cells})
    assert texts_of(files(jsonl)) == texts_of(files(parquet)) == ["one", "two"]


def test_text_is_always_encodable(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "half a pair: \\ud800"}\n')
    (tmp_path / "b.txt").write_bytes(b"latin: \xe4")
    assert [text.encode() for text in texts_of(files(tmp_path))] == [b"half a pair: ?", "latin: \ufffd".encode()]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n')
    assert texts_of(files(tmp_path)) == ["one"]


def corpus_of(tmp_path, kind, cells):
    """The same cells, as bytes, in one kind of file."""
    folder = tmp_path / kind
    folder.mkdir()
    if kind == "txt":
        for number, cell in enumerate(cells):
            (folder / f"{number}.TXT").write_bytes(cell)
    elif kind == "jsonl":
        lines = [b'{"text": "' + cell.replace(b"\r", b"\\r").replace(b"\n", b"\\n") + b'"}\r\n' for cell in cells]
        (folder / "a.JSONL").write_bytes(b"".join(lines))
    else:
        column = pa.array(cells, pa.binary()).view(pa.string())  # as a careless writer would
        pq.write_table(pa.table({"text": column}), folder / "a.parquet")
    return folder


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_one_rule_for_bytes_in_every_kind_of_file(tmp_path, kind, capsys):
    cells = ["one\r\ntwo äöü\r".encode(), b"bad \xff\xfe byte", b" \r\n", "a real \ufffd".encode()]
    assert texts_of(files(corpus_of(tmp_path, kind, cells))) == ["one\ntwo äöü\n", "bad \ufffd\ufffd byte", "a real \ufffd"]
    first, total = capsys.readouterr().err.splitlines()
    place = {"txt": "1.TXT", "jsonl": "a.JSONL:2", "parquet": "a.parquet:2"}[kind]
    assert first == f"{tmp_path / kind / place}: bytes that are not in the file's encoding; each is read as \ufffd"
    assert (
        total
        == f"2 bytes that are not in the file's encoding in all, the first in {tmp_path / kind / place}; each is read as \ufffd"
    )


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("seed", [None, 0])
def test_encodings_are_recognised(tmp_path, encoding, seed):
    texts = ["Eins, zwei", "drei äöü 東"]
    (tmp_path / "a.jsonl").write_bytes(
        "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode(encoding)
    )
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_bytes(text.encode(encoding))
    config = TextConfig(source="files", paths=(tmp_path,), shuffle_seed=seed)
    assert sorted(texts_of(read_documents(config))) == sorted(2 * texts)


def test_hidden_files_are_not_searched_but_may_be_named(tmp_path):
    for name in (".git/x.txt", "._b.txt", "a/.cache/c.jsonl", "a/b.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts_of(files(tmp_path)) == ["a/b.txt"]
    assert texts_of(files(tmp_path / "._b.txt")) == ["._b.txt"]


def test_pipes_are_refused(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    for path in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(TextError, match=r"a\.txt: is a pipe or a device"):
            files(path)


@pytest.mark.parametrize("rows", [[{"text": "x"}, {}, {"text": "y"}, {}], [{}, {}, {"text": "x"}, {"text": "y"}]])
def test_rows_without_the_column_are_left_out_and_reported(tmp_path, rows, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    assert texts_of(files(path)) == ["x", "y"]
    assert capsys.readouterr().err.splitlines() == [
        f"{path}:{1 + rows.index({})}: rows without 'text'; they are left out",
        f"2 rows without 'text' in all, the first in {path}:{1 + rows.index({})}; they are left out",
    ]


def test_the_column_of_conversations_is_proposed(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": [], "id": 5}])
    with pytest.raises(TextError, match=r"a\.jsonl:1: no column 'text', only \['id', 'messages'\].*column='messages'"):
        files(path)


# order


@pytest.fixture
def mixed(tmp_path, monkeypatch):
    """Files of every kind, 900 documents in many pieces."""
    monkeypatch.setattr("everyscope.text.files.PIECE_BYTES", 500)
    monkeypatch.setattr("everyscope.text.order.BUFFER_DOCUMENTS", 50)
    folder = tmp_path / "mixed"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", [{"text": f"jsonl {number}" + " long" * (number % 90)} for number in range(400)])
    pq.write_table(pa.table({"text": [f"parquet {number}" for number in range(450)]}), folder / "b.parquet", row_group_size=60)
    for number in range(50):
        (folder / f"c{number:02d}.txt").write_text(f"txt {number}")
    return TextConfig(source="files", paths=(folder,))


def test_a_shuffle_has_every_document_once_under_its_own_name(mixed):
    stored = list(read_documents(mixed))
    orders = [list(read_documents(mixed.model_copy(update={"shuffle_seed": seed}))) for seed in (0, 0, 1)]
    assert len(stored) == 900
    by_name = sorted(stored, key=lambda document: document.name)
    assert all(sorted(order, key=lambda document: document.name) == by_name for order in orders)
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    places = {document.name: place for place, document in enumerate(stored)}
    for order in orders[1:]:
        where = np.array([places[document.name] for document in order])
        assert abs(np.corrcoef(where, np.arange(900))[0, 1]) < 0.5
        kinds = [document.text.split()[0] for document in order[:300]]
        assert {kinds.count(kind) > 5 for kind in ("jsonl", "parquet")} == {True}


def test_a_shuffle_holds_a_bounded_number_of_documents():
    alive, most = 0, 0

    def documents():
        nonlocal alive, most
        for number in range(1000):
            alive += 1
            most = max(most, alive)
            yield Document(str(number), "x" * 100, str(number))

    for limit in ({"BUFFER_DOCUMENTS": 64}, {"BUFFER_CHARACTERS": 6400}):
        alive, most, found = 0, 0, []
        with pytest.MonkeyPatch.context() as patch:
            for name, value in limit.items():
                patch.setattr(f"everyscope.text.order.{name}", value)
            for document in shuffled(documents(), 0):
                alive -= 1
                found.append(document.name)
        assert most <= 66
        assert sorted(found, key=int) == list(map(str, range(1000)))


def test_reading_a_shuffled_corpus_resumes_from_any_cursor(mixed):
    config, tokenizer = mixed.model_copy(update={"shuffle_seed": 3, "context": 64}), load_tokenizer("tiny")
    for split in ("train", "held_out"):
        whole = list(read_blocks(config, tokenizer, split))
        for index in range(0, len(whole), 29):
            rest = list(read_blocks(config, tokenizer, split, whole[index].after))
            assert [block.input_ids.tolist() for block in rest] == [block.input_ids.tolist() for block in whole[index + 1 :]]
    names = {document.name for document in read_documents(mixed) if document.split(0.05) == "held_out"}
    assert names == {document.name for document in read_documents(config) if document.split(0.05) == "held_out"}


def test_a_shuffled_dataset_has_every_row_once(tmp_path, monkeypatch):
    monkeypatch.setattr("everyscope.text.order.BUFFER_DOCUMENTS", 10)
    folder = tmp_path / "corpus"
    folder.mkdir()
    for part in range(4):
        write_parquet(folder / f"train-{part}.parquet", {"text": [f"part {part} row {row}" for row in range(50)]})
    stored = texts_of(dataset(folder))
    orders = [texts_of(dataset(folder, shuffle_seed=seed)) for seed in (0, 0, 1)]
    assert all(sorted(order) == sorted(stored) for order in orders)
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in (stored, *orders)}) == 3


def test_many_rows_keep_their_order(tmp_path):
    texts = [f"row {number}" for number in range(1000)]
    assert texts_of(files(write_parquet(tmp_path / "a.parquet", {"text": texts}))) == texts


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "fine"}\n{"text": \n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b'["text"]\n', r"a\.jsonl:1: a JSON list"),
        ("a.jsonl", b'{"body": "x"}\n', r"no column 'text', only \['body'\].*column=\.\.\."),
        ("a.jsonl", b'{"text": 5}\n', r"a\.jsonl:1: column 'text' holds int, not text"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000, r"a\.jsonl:1: nested too deeply"),
        ("a.jsonl", b'{"text": "x", "n": ' + b"1" * 5000 + b"}", r"a\.jsonl:1: not JSON"),
        ("a.jsonl", b'{"body": "x"}\n' * 2000 + b'{"text": "x"}', r"a\.jsonl:1: no column 'text', only \['body'\]"),
        ("a.parquet", b"no parquet at all", r"a\.parquet: cannot be read"),
        ("a.csv", b"text\nx\n", r"cannot read \.csv; expected \.txt, \.jsonl or \.parquet"),
        ("README", b"x", "cannot read a file without ending"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=words) as caught:
        files(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_bad_parquet_columns_are_named(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"body": TEXTS, "number": [1, 2, 3, 4]})
    with pytest.raises(TextError, match=r"no column 'text', only \['body', 'number'\]"):
        files(path)
    with pytest.raises(TextError, match="'number' holds int"):
        files(path, column="number")


def test_a_cut_parquet_file_is_named(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"text": [f"row {number}" for number in range(5000)]})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(TextError, match=r"a\.parquet: cannot be read"):
        files(path)


def test_an_unreadable_file_is_named(tmp_path):
    (tmp_path / "a.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(TextError, match=r"a\.txt: cannot be read"):
        files(tmp_path)


def test_missing_paths_show_before_anything_is_read(tmp_path):
    there = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}])
    documents = read_documents(TextConfig(source="files", paths=(there, tmp_path / "missing")))
    with pytest.raises(TextError, match="missing: no such file or folder"):
        next(documents)
    (tmp_path / "empty").mkdir()
    with pytest.raises(TextError, match=r"holds no \.txt, \.jsonl or \.parquet"):
        files(tmp_path / "empty")


# Hugging Face datasets


def test_a_dataset_of_parquet_is_streamed(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_parquet(folder / "train.parquet", {"text": [*TEXTS, None, " "]})
    write_parquet(folder / "test.parquet", {"text": ["kept apart"]})
    assert texts_of(dataset(folder)) == TEXTS
    assert texts_of(dataset(folder, dataset_split="test")) == ["kept apart"]


def test_a_dataset_of_jsonl_is_streamed(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [{"body": text} for text in TEXTS])
    assert texts_of(dataset(folder, column="body")) == TEXTS
    assert texts_of(islice(read_documents(TextConfig(source="dataset", dataset=str(folder), column="body")), 2)) == TEXTS[:2]


def test_a_bad_dataset_is_named(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [{"body": text} for text in TEXTS])
    with pytest.raises(TextError, match=r"no column 'text', only \['body'\]"):
        dataset(folder)
    with pytest.raises(TextError, match=r"split 'validation'.* cannot be read"):
        dataset(folder, dataset_split="validation")
    with pytest.raises(TextError, match=r"config 'other'.* cannot be read"):
        dataset(folder, dataset_config="other")
    with pytest.raises(TextError, match="cannot be read"):
        dataset(tmp_path / "nowhere")
    (folder / "train.jsonl").write_text("")
    with pytest.raises(TextError, match="split 'train': its first file is empty"):
        dataset(folder, column="body")
    (folder / "train.jsonl").write_text('{"body": "x"}\nno json\n')
    with pytest.raises(TextError, match="cannot be read"):
        dataset(folder, column="body")


def test_without_datasets_the_pip_command_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"pip install 'everyscope\[data\]'"):
        dataset(tmp_path)


# tokenizers


def test_a_tokenizer_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ModelError, match="no tokenizer for model") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ModelError, match="no tokenizer for model"):
        load_tokenizer(str(tmp_path))
