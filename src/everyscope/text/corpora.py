"""Documents from wherever they lie: the running interpreter's own library, local files, Hugging Face datasets, or a generator.

A corpus is an iterator of documents in an order that depends on nothing but the text, so that a cursor into it keeps its
meaning. Every document carries the content by which it is split: two documents made from one file never part.
"""

import ast
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet

from everyscope.base.errors import TextError, first_line
from everyscope.base.extras import import_extra
from everyscope.base.ids import unit_interval
from everyscope.text.arithmetic import PAGES, arithmetic_page
from everyscope.text.chats import chat, chats_of
from everyscope.text.config import Split, TextConfig

SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"})
"""Parts of the library that not every machine has, or that hold little but fixtures."""
PARQUET_ROWS = 256
"""Rows of a Parquet file held in memory at once [rows]."""


@dataclass(frozen=True)
class Document:
    """One document: its name for people, its text, and the content whose hash decides its split."""

    name: str
    text: str
    split_key: str

    def split(self, held_out_fraction: float) -> Split:
        """`held_out` for about `held_out_fraction` of all documents, always the same ones."""
        return "held_out" if unit_interval(self.split_key) < held_out_fraction else "train"


def read_documents(config: TextConfig) -> Iterator[Document]:
    """All documents of the corpus, those of both splits; TextError where there is nothing to read."""
    if config.source in GIVEN:
        return GIVEN[config.source]()
    if config.source == "files":
        return local_files(config.paths, config.column)
    assert config.dataset is not None
    return hugging_face(config.dataset, config.dataset_config, config.dataset_split, config.column)


def standard_library() -> Iterator[Document]:
    """The source files of the running interpreter's library, ordered by a hash of their content.

    The hash mixes the modules, so that any stretch of the stream is a fair sample of the whole.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - SKIPPED_FOLDERS)  # never entered: site-packages can hold 100,000 files
        for path in (Path(folder, name) for name in names if name.endswith(".py")):
            with _readable(str(path)):
                text = path.read_text(encoding="utf-8", errors="replace")
            if text.strip():
                found.append(Document(path.relative_to(root).as_posix(), text, text))
    if not found:
        raise TextError(f'{root}: no library sources on this machine; give text of your own with source="files"')
    return iter(sorted(found, key=lambda document: (unit_interval("order " + document.text), document.name)))


def standard_library_docstrings() -> Iterator[Document]:
    """The docstrings of each library file, joined: English about Python. A file's docstrings share its split."""
    for document in standard_library():
        try:
            tree = ast.parse(document.text)
        except (SyntaxError, ValueError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docstrings = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        text = "\n\n".join(docstring for docstring in docstrings if docstring)
        if text.strip():
            yield Document(document.name, _encodable(text), document.split_key)


def standard_library_instructions() -> Iterator[Document]:
    """A document for each request about a library function and its answer, in Gemma's turns. They share their file's split."""
    for document in standard_library():
        for number, (request, answer) in enumerate(chats_of(document.text), start=1):
            yield Document(f"{document.name}:{number}", _encodable(chat(request, answer)), document.split_key)


def arithmetic() -> Iterator[Document]:
    """Pages of problems with their answers, the same on every machine."""
    for number in range(PAGES):
        page = arithmetic_page(number)
        yield Document(f"page {number}", page, page)


GIVEN = {
    "standard_library": standard_library,
    "standard_library_docstrings": standard_library_docstrings,
    "standard_library_instructions": standard_library_instructions,
    "arithmetic": arithmetic,
}
"""The corpora that are there on every machine."""


def local_files(paths: tuple[Path, ...], column: str) -> Iterator[Document]:
    """The documents of .txt, .jsonl and .parquet files, in the order given; folders are searched, in order of name.

    TextError before the first document where a path is missing or of another kind; later where a file cannot be read.
    """
    for file in [file for path in paths for file in _files_at(path)]:
        with _readable(str(file)):
            yield from _documents(READERS[file.suffix](file, column), column)


def hugging_face(dataset: str, config: str | None, split: str, column: str) -> Iterator[Document]:
    """The rows of a Hugging Face dataset, streamed: nothing is downloaded beyond what is read.

    TextError where it cannot be loaded or has no such column, MissingExtra where `datasets` is not installed.
    """
    datasets = import_extra("datasets", "data", "Reading a Hugging Face dataset")
    origin = f"dataset {dataset!r}, config {config!r}, split {split!r}"
    with _readable(origin, datasets.exceptions.DatasetsError):
        rows = datasets.load_dataset(dataset, config, split=split, streaming=True)
        texts = ((f"{dataset}:{number}", _cell(row, column, origin)) for number, row in enumerate(rows, start=1))
        yield from _documents(texts, column)


def _files_at(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in READERS and not file.is_dir())
        if not files:
            raise TextError(f"{path}: holds no .txt, .jsonl or .parquet file; name another folder, or files")
        return files
    if not path.exists():
        raise TextError(f"{path}: no such file or folder; give .txt, .jsonl or .parquet files, or a folder that holds some")
    if path.suffix not in READERS:
        raise TextError(f"{path}: cannot read {path.suffix or 'a file without ending'}; expected .txt, .jsonl or .parquet")
    return [path]


def _read_txt(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    yield path.name, path.read_text(encoding="utf-8", errors="replace")


def _read_jsonl(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            name = f"{path}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise TextError(f"{name}: not JSON ({error}); every line must be one JSON object") from error
            if not isinstance(row, dict):
                raise TextError(
                    f"{name}: a JSON {type(row).__name__}; every line must be one JSON object, as in {{{column!r}: ...}}"
                )
            yield name, _cell(row, column, name)


def _read_parquet(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    with pyarrow.parquet.ParquetFile(path) as file:
        _cell(dict.fromkeys(file.schema_arrow.names), column, str(path))
        texts = (text for batch in file.iter_batches(PARQUET_ROWS, columns=[column]) for text in batch.column(0).to_pylist())
        for number, text in enumerate(texts, start=1):
            yield f"{path}:{number}", text


READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
"""How each kind of file is read: (path, column) to the name and the text, or what stands in its place, of each document."""


def _cell(row: dict[str, Any], column: str, origin: str) -> Any:
    if column not in row:
        raise TextError(f"{origin}: no column {column!r}, only {sorted(row)}; name the one that holds the text with column=...")
    return row[column]


def _documents(texts: Iterable[tuple[str, Any]], column: str) -> Iterator[Document]:
    """Rows become documents; rows without text (null, or nothing but space) do not."""
    for name, text in texts:
        if text is not None and not isinstance(text, str):
            raise TextError(f"{name}: column {column!r} holds {type(text).__name__}, not text; name another with column=...")
        if text is not None and text.strip():
            text = _encodable(text)
            yield Document(name, text, text)


def _encodable(text: str) -> str:
    """`text` with "?" for lone surrogates, which JSON and Python can escape but UTF-8, and so a tokenizer, cannot hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


@contextmanager
def _readable(origin: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn what the system or another library says about unreadable text into a TextError."""
    try:
        yield
    except (OSError, ValueError, pyarrow.ArrowException, *errors) as error:  # UnicodeDecodeError is a ValueError
        raise TextError(f"{origin}: cannot be read: {first_line(error)}; mend it, or leave it out") from error
