"""JSONL logs that survive a kill: one object a line, cut back to the last checkpoint when a run resumes."""

import json
from pathlib import Path
from typing import Any

from everyscope.base.errors import DamagedData
from everyscope.base.files import make_folder, storage_errors


class JsonLines:
    """An append-only log of JSON objects. Its length in bytes is part of a checkpoint, so that resuming can cut it back."""

    def __init__(self, path: Path, keep_bytes: int = 0) -> None:
        """Open `path` and drop whatever lies behind its first `keep_bytes` [bytes]; DamagedData where it holds fewer."""
        make_folder(path.parent)
        self._path = path
        with storage_errors(path):
            num_bytes = path.stat().st_size if path.exists() else 0
            if num_bytes < keep_bytes:  # truncate would fill the gap with zeros
                raise DamagedData(
                    f"{path}: holds {num_bytes} bytes, its checkpoint expects {keep_bytes} or more; "
                    f"put the file back, or delete the folder {path.parent} and run again"
                )
            self._file = path.open("ab")
            self._file.truncate(keep_bytes)
            self._file.seek(keep_bytes)

    def write(self, row: dict[str, Any]) -> None:
        """Append one object and hand it to the operating system; StorageError on a full disk."""
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        with storage_errors(self._path):
            self._file.write(line)
            self._file.flush()

    @property
    def num_bytes(self) -> int:
        """Bytes written so far, those kept from an earlier run included."""
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
