"""Labels of text, character by character, and what they say about a model's tokens.

The built-in ones need no download: the classes of Python's own tokens, from the `tokenize` module of the standard library.
"""

import ast
import io
import json
import keyword
import tokenize
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from everyscope.base.errors import TextError, first_line
from everyscope.text.config import TextConfig
from everyscope.text.corpora import read_documents
from everyscope.text.documents import Document

NO_LABEL = -1
"""Stands where a character or token has no label."""
PYTHON_CLASSES = ("keyword", "name", "number", "operator", "string", "docstring", "comment", "indentation")
"""Labels of Python sources, by number."""
STRING_PARTS = {
    getattr(tokenize, name) for name in ("STRING", "FSTRING_START", "FSTRING_MIDDLE", "FSTRING_END") if hasattr(tokenize, name)
}
"""Kinds of tokens inside a string's quotes; from Python 3.12 on, f-strings come in parts."""


Labels = Int[np.ndarray, " chars"]
"""For each character of a text the number of its label, or NO_LABEL."""


@dataclass(frozen=True)
class LabelledCorpus:
    """Documents, and how each is labelled when its turn comes."""

    names: tuple[str, ...]
    """What the numbers stand for."""
    documents: Callable[[], Iterator[Document]]
    """All documents, those of both splits."""
    label: Callable[[Document], Labels | None]
    """The labels of one document; None where it cannot be labelled, and is left out."""


def labelled_python(config: TextConfig) -> LabelledCorpus:
    """The documents of a corpus of Python sources, with the classes of Python's own tokens."""
    return LabelledCorpus(PYTHON_CLASSES, lambda: read_documents(config), lambda document: python_labels(document.text))


def python_labels(source: str) -> Labels | None:
    """The class of each character of a Python source, int8; None where it cannot be parsed.

    A docstring is the string that opens a module, class or function. Indentation is the space before a line's first token,
    also inside brackets. Other space, and line ends, have no label.
    """
    # tokenize and ast count \r\n and \f otherwise than str.splitlines: sources in which that matters are left out.
    if "\r" in source or "\f" in source:
        return None
    try:
        docstrings = _docstring_places(ast.parse(source))
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (SyntaxError, ValueError, tokenize.TokenError):
        return None
    starts = np.cumsum([0, *(len(line) for line in io.StringIO(source))])
    labels = np.full(len(source), NO_LABEL, np.int8)
    is_line_seen: set[int] = set()
    for token in tokens:
        name = _class_of(token, docstrings)
        if name is None:
            continue
        (line, column), (last_line, last_column) = token.start, token.end
        start, stop = starts[line - 1] + column, starts[last_line - 1] + last_column
        if line not in is_line_seen and not source[starts[line - 1] : start].strip():
            labels[starts[line - 1] : start] = PYTHON_CLASSES.index("indentation")
        is_line_seen.update(range(line, last_line + 1))
        labels[start:stop] = PYTHON_CLASSES.index(name)
    return labels


def _docstring_places(tree: ast.AST) -> set[tuple[int, int]]:
    """Line and column [bytes] where a docstring begins."""
    places = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or not node.body:
            continue
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            places.add((first.value.lineno, first.value.col_offset))
    return places


def _class_of(token: tokenize.TokenInfo, docstrings: set[tuple[int, int]]) -> str | None:
    """The class of one token; None for line ends, INDENT and the like."""
    if token.type in STRING_PARTS:
        return "docstring" if token.start in docstrings else "string"
    if token.type == tokenize.NAME:
        return "keyword" if keyword.iskeyword(token.string) else "name"
    return {tokenize.NUMBER: "number", tokenize.OP: "operator", tokenize.COMMENT: "comment"}.get(token.type)


def read_labelled(path: Path) -> LabelledCorpus:
    """Labels from a .jsonl: in each line an object with `text` and `labels`, a list with one name or null per character.

    TextError, naming the line, for anything else.
    """
    rows = list(_rows(path))
    names = tuple(sorted({label for _, labels in rows for label in labels if label is not None}))
    if not names:
        raise TextError(
            f"{path}: holds no label; every line must be an object with text and labels, one name or null per character"
        )
    numbers = {None: NO_LABEL} | {name: number for number, name in enumerate(names)}
    texts = [Document(f"{path}:{place}", text, text) for place, (text, _) in enumerate(rows, start=1)]
    found = {
        document.name: np.array([numbers[label] for label in labels], np.int16)
        for document, (_, labels) in zip(texts, rows, strict=True)
    }
    return LabelledCorpus(names, lambda: iter(texts), lambda document: found[document.name])


def _rows(path: Path) -> Iterator[tuple[str, list[str | None]]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"{path}: cannot be read: {first_line(error)}; give a .jsonl of labelled text") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text, labels = row["text"], row["labels"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise TextError(f"{path}:{number}: expected a JSON object with text and labels, got {line[:40]!r}") from error
        is_sound = isinstance(text, str) and isinstance(labels, list) and all(isinstance(one, str | None) for one in labels)
        if not is_sound or len(labels) != len(text):
            raise TextError(f"{path}:{number}: labels must be a list with one name or null for each character of text")
        yield text, labels


def token_labels(text: str, labels: Labels, spans: Sequence[tuple[int, int]]) -> Int[np.ndarray, " tokens"]:
    """The label of each token, of which `spans` says the characters: the one that most of them have, of equals the first.

    Characters without a label do not vote, nor does space beside anything else: tokens carry the space before them. A token
    of nothing else has no label.
    """
    found = np.full(len(spans), NO_LABEL, np.int64)
    for place, (start, stop) in enumerate(spans):
        is_space = np.array([character.isspace() for character in text[start:stop]], bool)
        votes = labels[start:stop] if is_space.all() else labels[start:stop][~is_space]
        votes = votes[votes != NO_LABEL]
        if len(votes):
            names, first, count = np.unique(votes, return_index=True, return_counts=True)
            found[place] = names[np.lexsort((first, -count))[0]]
    return found
