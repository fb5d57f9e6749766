"""Local text files, by one rule for all kinds: .txt (a document a file), .jsonl and .parquet (a document a row).

    encoding       UTF-8, or UTF-16 and UTF-32 where the first bytes show it; a byte order mark is no text
    bad bytes      become U+FFFD, are counted and reported
    line ends      of documents are LF, also where a file or a cell has CRLF
    no text        rows with null, or nothing but space, are left out; a row without the column too, but it is reported by line
    anything else  a line that is not JSON, a cell that is neither text nor a conversation: TextError with file and line
    folders        are searched; hidden files and folders, as .git and macOS's ._notes.txt, are skipped; .TXT is .txt

Files can be read in pieces, so that a shuffle need not hold a file in memory.
"""

import json
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from everyscope.base.errors import TextError
from everyscope.text.tally import Tally

REPLACEMENT = "\ufffd"
PARQUET_ROWS = 256
"""Rows of a Parquet file held in memory at once [rows]."""
PIECE_BYTES = 1 << 22
"""Bytes of a .jsonl that are read together where pieces are shuffled, up to the next line end [bytes]."""
MAX_WITHOUT = 1000
"""Rows without the column, from the first on, after which a file is refused [rows]."""

Row = tuple[str, Any]
"""The name of a document, and the cell that holds it."""
Piece = Callable[["Repairs"], Iterator[Row]]
"""Reads a part of a file."""


@dataclass(frozen=True)
class Repairs:
    """What was repaired in all files."""

    bad_bytes: Tally
    missing: Tally

    @classmethod
    def of_column(cls, column: str) -> "Repairs":
        """Nothing repaired yet."""
        return cls(
            Tally("bytes that are not in the file's encoding", f"each is read as {REPLACEMENT}"),
            Tally(f"rows without {column!r}", "they are left out"),
        )

    def close(self) -> None:
        """Report the totals."""
        self.bad_bytes.close()
        self.missing.close()


def files_at(path: Path) -> list[Path]:
    """The files that `path` stands for, in order of name; TextError where there are none, or of no kind that is read."""
    kinds = "expected .txt, .jsonl or .parquet"
    if path.is_dir():
        found = (file for file in path.rglob("*") if file.suffix.lower() in PIECES and not file.is_dir())
        files = sorted(file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts))
        if not files:
            raise TextError(f"{path}: holds no .txt, .jsonl or .parquet file; name another folder, or files")
    else:
        if not path.exists():
            raise TextError(f"{path}: no such file or folder; give .txt, .jsonl or .parquet files, or a folder that holds some")
        if path.suffix.lower() not in PIECES:
            raise TextError(f"{path}: cannot read {path.suffix or 'a file without ending'}; {kinds}")
        files = [path]
    odd = next((file for file in files if file.exists() and not stat.S_ISREG(file.stat().st_mode)), None)
    if odd is not None:
        raise TextError(f"{odd}: is a pipe or a device, not a file; {kinds}")
    return files


def pieces_of(path: Path, column: str, is_cut: bool) -> list[Piece]:
    """What reads the file, in order: one piece, or where `is_cut` several that can be read in any order."""
    return PIECES[path.suffix.lower()](path, column, is_cut)


def encoding_of(head: bytes) -> str:
    """The encoding that the first bytes of a file show: UTF-8 unless there is a byte order mark, or NUL between the letters."""
    return json.detect_encoding(head[:4])


def decoded(data: bytes, encoding: str, name: str, bad_bytes: Tally) -> str:
    """`data` as text, with U+FFFD for what is not in the encoding."""
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        text = data.decode(encoding, "replace")
        own = data.count(REPLACEMENT.encode()) if encoding.startswith("utf-8") else 0
        bad_bytes.add(max(1, text.count(REPLACEMENT) - own), name)
        return text


def json_row(line: str, name: str, example: str) -> dict[str, Any]:
    """The JSON object in a line; TextError, with `name` for the line, where it is none."""
    try:
        row = json.loads(line)
    except ValueError as error:  # a number of more digits than Python reads is no JSONDecodeError
        raise TextError(f"{name}: not JSON ({error}); every line must be one JSON object") from error
    except RecursionError as error:
        raise TextError(f"{name}: nested too deeply to be read; every line must be one JSON object with {example}") from error
    if not isinstance(row, dict):
        raise TextError(f"{name}: a JSON {type(row).__name__}; every line must be one JSON object, as in {{{example}: ...}}")
    return row


def json_lines(
    path: Path, bad_bytes: Tally, start: int = 0, stop: int | None = None, number: int = 1
) -> Iterator[tuple[str, str]]:
    """Name and text of every line of a .jsonl that is not empty, from byte `start`, where line `number` begins, up to `stop`."""
    with path.open("rb") as file:
        encoding = encoding_of(file.read(4))
        if not encoding.startswith("utf-8"):
            with path.open(encoding=encoding, errors="replace", newline="\n") as lines:
                for number, line in enumerate(lines, start=1):
                    bad_bytes.add(line.count(REPLACEMENT), f"{path}:{number}")
                    if line.strip():
                        yield f"{path}:{number}", line
            return
        file.seek(start)
        while (stop is None or start < stop) and (line := file.readline()):
            name = f"{path}:{number}"
            text = decoded(line, "utf-8-sig" if start == 0 else "utf-8", name, bad_bytes)
            start, number = start + len(line), number + 1
            if text.strip():
                yield name, text


def _txt(path: Path, column: str, is_cut: bool) -> list[Piece]:
    def read(repairs: Repairs) -> Iterator[Row]:
        data = path.read_bytes()
        yield path.name, decoded(data, encoding_of(data), str(path), repairs.bad_bytes)

    return [read]


def _jsonl(path: Path, column: str, is_cut: bool) -> list[Piece]:
    def read(repairs: Repairs, start: int, stop: int | None, number: int) -> Iterator[Row]:
        lines = json_lines(path, repairs.bad_bytes, start, stop, number)
        rows = ((name, json_row(line, name, repr(column))) for name, line in lines)
        yield from with_column(rows, column, repairs.missing)

    borders = list(_line_borders(path)) if is_cut else [(0, 1)]
    stops = [start for start, _ in borders[1:]]
    return [
        partial(read, start=start, stop=stop, number=number)
        for (start, number), stop in zip(borders, [*stops, None], strict=True)
    ]


def _line_borders(path: Path) -> Iterator[tuple[int, int]]:
    """Where pieces of a .jsonl begin, and the number of the first line of each; only UTF-8 is cut."""
    yield 0, 1
    with path.open("rb") as file:
        if not encoding_of(file.read(4)).startswith("utf-8"):
            return
        file.seek(0)
        number = 1
        while data := file.read(PIECE_BYTES):
            rest = file.readline()
            number += data.count(b"\n") + rest.endswith(b"\n")
            if rest.endswith(b"\n"):
                yield file.tell(), number


def _parquet(path: Path, column: str, is_cut: bool) -> list[Piece]:
    def read(repairs: Repairs, groups: list[int], number: int) -> Iterator[Row]:
        with pyarrow.parquet.ParquetFile(path) as file:
            require_column(file.schema_arrow.names, column, str(path))
            for batch in file.iter_batches(PARQUET_ROWS, row_groups=groups, columns=[column]):
                for cell in _cells(batch.column(0)):
                    name = f"{path}:{number}"
                    yield name, decoded(cell, "utf-8", name, repairs.bad_bytes) if isinstance(cell, bytes) else cell
                    number += 1

    with pyarrow.parquet.ParquetFile(path) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
    if not is_cut:
        return [partial(read, groups=list(range(len(sizes))), number=1)]
    return [partial(read, groups=[group], number=1 + sum(sizes[:group])) for group in range(len(sizes))]


def _cells(column: pyarrow.Array) -> list[Any]:
    """The values of a column; text as bytes, for it may be no UTF-8."""
    is_text = pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)
    return (column.cast(pyarrow.large_binary()) if is_text else column).to_pylist()


PIECES: dict[str, Callable[[Path, str, bool], list[Piece]]] = {".txt": _txt, ".jsonl": _jsonl, ".parquet": _parquet}
"""How each kind of file is read."""


def with_column(rows: Iterable[tuple[str, dict[str, Any]]], column: str, missing: Tally) -> Iterator[Row]:
    """The cells of one column; rows without it are left out, unless all of the first MAX_WITHOUT are such: TextError."""
    first: tuple[str, dict[str, Any]] | None = None
    without, is_found = 0, False
    for name, row in rows:
        if column in row:
            if first is not None and not is_found:
                missing.add(without, first[0])
            is_found = True
            yield name, row[column]
        elif is_found:
            missing.add(1, name)
        else:
            first, without = first or (name, row), without + 1
            if without == MAX_WITHOUT:
                break
    if first is not None and not is_found:
        require_column(first[1], column, first[0])


def require_column(names: Iterable[str], column: str, origin: str) -> None:
    """TextError unless `column` is one of `names`."""
    if column not in names:
        known = sorted(names)
        hint = next((name for name in ("messages", "conversations") if name in known), None)
        example = f"column={hint!r}" if hint else "column=..."
        raise TextError(f"{origin}: no column {column!r}, only {known}; name the one that holds the text with {example}")
