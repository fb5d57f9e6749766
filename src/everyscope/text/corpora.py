"""Documents from wherever they lie: the running interpreter's own library, local files, Hugging Face datasets, or a generator.

A corpus is an iterator of documents in an order that depends on nothing but the text, so that a cursor into it keeps its
meaning. Every document carries the content by which it is split: two documents made from one file never part.
"""

import ast
import os
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow

from everyscope.base.errors import TextError, first_line
from everyscope.base.extras import import_extra
from everyscope.base.ids import unit_interval
from everyscope.text.arithmetic import PAGES, arithmetic_page
from everyscope.text.chats import chat, chats_of
from everyscope.text.config import TextConfig
from everyscope.text.conversations import messages_of, plain_text, split_key
from everyscope.text.documents import Document
from everyscope.text.files import Repairs, Row, files_at, pieces_of, require_column
from everyscope.text.order import permuted, shuffled

SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"})
"""Parts of the library that not every machine has, or that hold little but fixtures."""


def read_documents(config: TextConfig) -> Iterator[Document]:
    """All documents of the corpus, those of both splits; TextError where there is nothing to read."""
    if config.source in GIVEN:
        return GIVEN[config.source]()
    documents = local_files(config) if config.source == "files" else hugging_face(config)
    return documents if config.shuffle_seed is None else shuffled(documents, config.shuffle_seed)


def library_files() -> dict[str, Path]:
    """The source files of the running interpreter's library by name, in no order."""
    root, found = Path(sysconfig.get_paths()["stdlib"]), list[Path]()
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - SKIPPED_FOLDERS)  # never entered: site-packages can hold 100,000 files
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return {path.relative_to(root).as_posix(): path for path in found}


def standard_library() -> Iterator[Document]:
    """The source files of the running interpreter's library, ordered by a hash of their content.

    The hash mixes the modules, so that any stretch of the stream is a fair sample of the whole.
    """
    found = []
    for name, path in library_files().items():
        with _readable(str(path)):
            text = path.read_text(encoding="utf-8", errors="replace")
        if text.strip():
            found.append(Document(name, text, text))
    if not found:
        raise TextError(
            f'{sysconfig.get_paths()["stdlib"]}: no library sources on this machine; give text of your own with source="files"'
        )
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
"""The corpora that every machine has."""


def local_files(config: TextConfig) -> Iterator[Document]:
    """The documents of .txt, .jsonl and .parquet files, in the order given, or in an order of pieces drawn by the shuffle's seed.

    TextError before the first document where a path is missing or of another kind; later where a file cannot be read.
    """
    files = [file for path in config.paths for file in files_at(path)]
    is_cut, repairs, pieces = config.shuffle_seed is not None, Repairs.of_column(config.column), []
    for file in files:
        with _readable(str(file)):
            pieces += [(file, piece) for piece in pieces_of(file, config.column, is_cut)]
    try:
        for file, piece in pieces if config.shuffle_seed is None else permuted(pieces, config.shuffle_seed):
            with _readable(str(file)):
                yield from _documents(piece(repairs), config.column)
    finally:
        repairs.close()


def hugging_face(config: TextConfig) -> Iterator[Document]:
    """The rows of a Hugging Face dataset, streamed: nothing is downloaded beyond what is read.

    Shuffling reads the files of a dataset in another order. TextError where it cannot be loaded or has no such column,
    MissingExtra where `datasets` is not installed.
    """
    datasets = import_extra("datasets", "data", "Reading a Hugging Face dataset")
    name, column = config.dataset, config.column
    origin = f"dataset {name!r}, config {config.dataset_config!r}, split {config.dataset_split!r}"
    with _readable(origin, datasets.exceptions.DatasetsError, RuntimeError):
        try:
            rows = datasets.load_dataset(
                name, config.dataset_config, split=config.dataset_split, revision=config.dataset_revision, streaming=True
            )
        except StopIteration as error:  # which `datasets` lets through, and which would end this generator
            raise TextError(f"{origin}: its first file is empty; leave that file out") from error
        if config.shuffle_seed is not None:
            rows = rows.shuffle(seed=config.shuffle_seed, buffer_size=1)  # of its files; documents go through our own buffer
        yield from _documents(_dataset_cells(rows, column, str(name), origin), column)


def _dataset_cells(rows: Iterable[dict[str, Any]], column: str, name: str, origin: str) -> Iterator[Row]:
    for number, row in enumerate(rows, start=1):
        require_column(row, column, origin)
        yield f"{name}:{number}", row[column]


def _documents(rows: Iterable[Row], column: str) -> Iterator[Document]:
    """Cells become documents; those without text (null, nothing but space, no message) do not."""
    for name, cell in rows:
        if isinstance(cell, list | dict):
            messages = messages_of(cell, name)
            if messages is not None:
                yield Document(name, _encodable(plain_text(messages)), _encodable(split_key(messages)), messages)
        elif isinstance(cell, str):
            text = _with_plain_line_ends(_encodable(cell))
            if text.strip():
                yield Document(name, text, text)
        elif cell is not None:
            raise TextError(
                f"{name}: column {column!r} holds {type(cell).__name__}, not text or messages; name another with column=..."
            )


def _with_plain_line_ends(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _encodable(text: str) -> str:
    """`text` with "?" for lone surrogates, which JSON and Python can escape but UTF-8, and so a tokenizer, cannot hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


@contextmanager
def _readable(origin: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn what the system or another library says about unreadable text into a TextError."""
    try:
        yield
    except (OSError, ValueError, pyarrow.ArrowException, *errors) as error:  # UnicodeDecodeError is a ValueError
        raise TextError(f"{origin}: cannot be read: {first_line(error)}; repair it, or leave it out") from error
