"""Laws of the corpora: the same documents in the same order wherever they lie, split by content, and clear refusals."""

import json
import sys
from itertools import islice

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from everyscope.base.errors import MissingExtra, ModelError, TextError
from everyscope.text.config import TextConfig
from everyscope.text.corpora import read_documents, standard_library, standard_library_docstrings
from everyscope.text.documents import Document
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
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl: cannot be read: 'utf-8' codec"),
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
