"""Everything a language model was asked and answered, kept so that nothing is paid for twice.

    replies.jsonl      while requests are under way: one answer a line, written as it comes
    replies.parquet    when an SAE is done: all of them, in order of key

A killed run leaves the first, which the next one reads; a last line that was cut off is dropped.
"""

import json
import threading
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from everyscope.base.errors import DamagedData
from everyscope.base.files import storage_errors
from everyscope.base.logs import JsonLines
from everyscope.base.tables import check_table, write_table

REPLIES_FILE, JOURNAL_FILE = "replies.parquet", "replies.jsonl"
ANSWERED = "answered"
"""Status of a reply with an answer; every other status names what went wrong."""
MALFORMED = "malformed"
"""Status of a reply that came whole and well, but is no chat completion: it may have been paid for, and is not asked again."""


@dataclass(frozen=True)
class Reply:
    """One attempt: what was asked, and what came back."""

    key: str
    """Hash of all that decides the answer: model, messages, seed, limits."""
    purpose: str
    """explain, detection or fuzzing."""
    latent: int
    """The latent whose windows were shown."""
    label_of: int
    """The latent whose label was judged: another one for the null, -1 where a label was asked for."""
    prompt: str
    """The messages, as JSON."""
    seed: int
    status: str
    """`answered`, `malformed`, or what went wrong, as in `HTTP 500`."""
    raw: str
    """The body of the reply, as it came."""
    text: str
    """The answer in it, "" where there is none."""
    prompt_tokens: int
    """As the endpoint counted them, else estimated; 0 where nothing was answered [tokens]."""
    completion_tokens: int
    """The same of completions [tokens]."""

    @property
    def is_paid(self) -> bool:
        """Whether it came back well, so that asking again would cost again."""
        return self.status in (ANSWERED, MALFORMED)


SCHEMA = pyarrow.schema([(field.name, pyarrow.int64() if field.type is int else pyarrow.string()) for field in fields(Reply)])


class Replies:
    """The replies of one SAE's folder. Safe to add to from several threads."""

    def __init__(self, folder: Path) -> None:
        """Read what an earlier run left; DamagedData where that cannot be read, for throwing it away would mean paying again."""
        self._folder, self._lock = folder, threading.Lock()
        journal = folder / JOURNAL_FILE
        rows = _read_parquet(folder / REPLIES_FILE)
        lines, kept = _read_journal(journal)
        self._rows: list[Reply] = rows + lines
        self._paid = {reply.key: reply for reply in self._rows if reply.is_paid}
        self._journal = JsonLines(journal, kept)

    def paid(self, key: str) -> Reply | None:
        """The answer to a question that was answered before."""
        return self._paid.get(key)

    def add(self, reply: Reply) -> None:
        """Keep a reply; it is with the operating system before this returns, so killing us loses none."""
        with self._lock:
            self._journal.write(asdict(reply))
            self._rows.append(reply)
            if reply.is_paid:
                self._paid[reply.key] = reply

    def seal(self) -> None:
        """Write all replies as Parquet and drop the journal."""
        rows = [asdict(reply) for reply in sorted(self._rows, key=lambda reply: (reply.key, reply.status, reply.raw))]
        write_table(self._folder / REPLIES_FILE, pyarrow.Table.from_pylist(rows, schema=SCHEMA), compression="zstd")
        self._journal.close()
        (self._folder / JOURNAL_FILE).unlink()

    def close(self) -> None:
        """Leave the journal as it is, for the next run."""
        self._journal.close()


def num_paid(folder: Path) -> int:
    """Answers that lie in a folder already."""
    rows = _read_parquet(folder / REPLIES_FILE) + _read_journal(folder / JOURNAL_FILE)[0]
    return len({reply.key for reply in rows if reply.is_paid})


def _read_parquet(path: Path) -> list[Reply]:
    if not path.exists():
        return []
    remedy = "its answers are paid for: put it back, or delete it"
    check_table(path, remedy)
    try:
        return [Reply(**row) for row in pyarrow.parquet.read_table(path).to_pylist()]
    except (OSError, pyarrow.ArrowException, TypeError) as error:
        raise DamagedData(f"{path}: cannot be read ({error}); {remedy}") from error


def _read_journal(path: Path) -> tuple[list[Reply], int]:
    """The replies of a journal, and the bytes that hold them: a last line without its end is a killed run's."""
    if not path.exists():
        return [], 0
    with storage_errors(path):
        whole = path.read_bytes()
    whole = whole[: whole.rfind(b"\n") + 1]
    try:
        rows: list[dict[str, Any]] = [json.loads(line) for line in whole.splitlines()]
        return [Reply(**row) for row in rows], len(whole)
    except (ValueError, TypeError) as error:
        raise DamagedData(f"{path}: cannot be read ({error}); its answers are paid for: restore it, or delete it") from error
