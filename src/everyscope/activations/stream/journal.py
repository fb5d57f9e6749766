"""Which chunk a trainer got at which place: the file that makes an order chosen by chance one that can be repeated.

    line 1     JSON, padded with spaces to 512 bytes: what is journalled, and a random id that names this order
    records    16 bytes each: chunk (uint64), place (uint32, its lower bits), CRC-32 of id, place and chunk

A record is on the disk before its chunk is used. A kill may leave a torn last record, which is cut off; any other damage is
refused, for a hole would give rows twice or never.
"""

import fcntl
import json
import os
import struct
import zlib
from pathlib import Path

from everyscope.activations.stream.order import Chunks
from everyscope.base.errors import ConfigError, DamagedData, DataError
from everyscope.base.files import make_folder, storage_errors, whole_file

HEADER_BYTES = 512
RECORD = struct.Struct("<QII")


class Journal:
    """The chunks one trainer got, in order, over all epochs. One process at a time holds it."""

    def __init__(self, path: Path, identity: str, chunks: Chunks) -> None:
        """Open the journal at `path`, or begin it.

        ConfigError while another process holds it; DataError where it is of other activations or other chunks; DamagedData.
        """
        make_folder(path.parent)
        self._path = path
        what: dict[str, str | int] = {"identity": identity, "num_rows": chunks.num_rows, "chunk_rows": chunks.chunk_rows}
        with storage_errors(path):
            self._lock = path.with_name(path.name + ".lock").open("w")
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._lock.close()
                raise ConfigError(f"{path}: another trainer writes this journal; give each trainer its own") from None
            try:
                if not path.exists():
                    with whole_file(path) as partial:
                        partial.write_bytes(_header(what | {"id": os.urandom(8).hex()}))
                self.id = self._read_header(what)
                self.chunks = self._read_records(chunks.num_chunks)
                self._file = path.open("r+b")
                self._file.truncate(HEADER_BYTES + len(self.chunks) * RECORD.size)
                self._file.seek(0, os.SEEK_END)
            except BaseException:
                self._lock.close()
                raise

    def append(self, chunk: int) -> None:
        """Add the next place's chunk and wait until the disk has it; StorageError on a full disk."""
        with storage_errors(self._path):
            self._file.write(self._record(len(self.chunks), chunk))
            self._file.flush()
            os.fsync(self._file.fileno())
        self.chunks.append(chunk)

    def close(self) -> None:
        """Let another process have the journal."""
        self._file.close()
        self._lock.close()

    def _record(self, place: int, chunk: int) -> bytes:
        low = place & 0xFFFFFFFF
        return RECORD.pack(chunk, low, zlib.crc32(f"{self.id} {place} {chunk}".encode()))

    def _read_header(self, what: dict[str, str | int]) -> str:
        with self._path.open("rb") as file:
            line = file.read(HEADER_BYTES)
        try:
            header = json.loads(line)
            journal_id = str(header.pop("id"))
        except (ValueError, KeyError, AttributeError) as error:
            raise DamagedData(f"{self._path}: is not an everyscope journal; delete it together with its checkpoint") from error
        if header != what:
            raise DataError(
                f"{self._path}: is of {header}, the server has {what}; serve the same shards and chunks, or delete the journal "
                "and the checkpoint that goes with it"
            )
        return journal_id

    def _read_records(self, num_chunks: int) -> list[int]:
        raw = self._path.read_bytes()[HEADER_BYTES:]
        found: list[int] = []
        epoch: set[int] = set()
        for start in range(0, len(raw), RECORD.size):
            record = raw[start : start + RECORD.size]
            place = len(found)
            chunk = RECORD.unpack(record)[0] if len(record) == RECORD.size else -1
            if chunk < 0 or record != self._record(place, chunk):
                if start + RECORD.size < len(raw):
                    raise DamagedData(f"{self._path}: the record of place {place} is damaged; restore the file, or retrain")
                break  # torn by a kill: its chunk was not used
            if place % num_chunks == 0:
                epoch.clear()
            if chunk in epoch or chunk >= num_chunks:
                raise DamagedData(f"{self._path}: has chunk {chunk} twice in an epoch; restore the file, or retrain")
            epoch.add(chunk)
            found.append(chunk)
        return found


def _header(value: dict[str, str | int]) -> bytes:
    line = json.dumps(value).encode()
    assert len(line) < HEADER_BYTES, line
    return line + b" " * (HEADER_BYTES - 1 - len(line)) + b"\n"
