"""Sending the bodies of an export, each once.

The API would add examples and labels a second time if a body came twice. So a journal, upload/sent.jsonl, says of each body when
it was begun and when it was taken, for each host; where only the first stands there, the host is asked whether it knows the
body's first latent, which it takes together with the rest or not at all.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, Any

from everyscope.base.errors import ConfigError, DataError
from everyscope.base.files import human_bytes, make_folder, read_bytes, sha256, storage_errors
from everyscope.base.progress import meter, say
from everyscope.publish.neuronpedia.client import EXISTS, Client
from everyscope.publish.neuronpedia.config import NeuronpediaConfig

JOURNAL = "upload/sent.jsonl"
BEGUN, TAKEN = "begun", "taken"
FEATURES = "feature/upload-batch"
"""The API's route for bodies of features."""


@dataclass(frozen=True)
class UploadResult:
    """What an upload has done; of a dry run, what it would do."""

    host: str
    num_bodies: int
    """Bodies of features sent [bodies]."""
    num_features: int
    """Features in them [features]."""
    num_bytes: int
    """Their size [bytes]."""
    num_sent_before: int
    """Bodies that an earlier run had sent [bodies]."""
    is_dry: bool
    """Whether nothing was sent."""


@dataclass(frozen=True)
class _Item:
    """One request."""

    route: str
    path: str
    """Of its body, below the export."""
    sha256: str
    num_bytes: int = 0
    num_features: int = 0
    where: tuple[str, str, int] | None = None
    """Model, source and number of the first latent; None for a body that has none."""


def upload(config: NeuronpediaConfig, heads: dict[str, list[str]], manifests: Sequence[dict[str, Any]]) -> UploadResult:
    """Send what was not sent yet: models and sets that `heads` names by route, then the bodies of the sources.

    A dry run only lists them. Raises ConfigError (no key, or it is refused, or another upload runs), DataError (a body is
    refused, or is not the one that was written) and StorageError (the host is not reached).
    """
    assert config.host is not None
    with _journal(config.out, config.host, is_read_only=config.dry_run) as journal:
        items = list(_items(config, heads, manifests))
        _refuse_changed(config, journal, items)
        waiting = [item for item in items if journal.state(item) != TAKEN]
        features = [item for item in waiting if item.where is not None]
        total = sum(item.where is not None for item in items)
        num_features, num_bytes = sum(item.num_features for item in features), sum(item.num_bytes for item in features)
        before = total - len(features)
        if config.dry_run:
            _list(config.host, waiting, before)
        else:
            client = Client(config)
            with meter("upload", total, "bodies") as progress:
                progress.advance(before, is_resumed=True)
                for item in waiting:
                    _send(config, client, journal, item)
                    progress.advance(item.where is not None)
    return UploadResult(config.host, len(features), num_features, num_bytes, before, config.dry_run)


def _items(config: NeuronpediaConfig, heads: dict[str, list[str]], manifests: Sequence[dict[str, Any]]) -> Iterator[_Item]:
    for route, paths in heads.items():
        if route != "model/new" or config.create_model:
            yield from (_Item(route, path, sha256(config.out / path)) for path in paths)
    for manifest in manifests:
        for body in manifest["bodies"]:
            where = (manifest["model"], manifest["source"], body["first"])
            yield _Item(FEATURES, body["path"], body["sha256"], body["num_bytes"], body["num_features"], where)


def _refuse_changed(config: NeuronpediaConfig, journal: "_Journal", items: Sequence[_Item]) -> None:
    """DataError where a body was sent before with other content: the host would then have both."""
    for item in items:
        if item.where is not None and journal.sent.get(item.path, item.sha256) != item.sha256:
            model, source, _ = item.where
            raise DataError(
                f"{config.out / item.path}: was sent to {config.host} with other content, which would stay beside this; have "
                f"{model}/{source} deleted there and its lines in {JOURNAL} here, or export under another --set"
            )


def _send(config: NeuronpediaConfig, client: Client, journal: "_Journal", item: _Item) -> None:
    path = config.out / item.path
    body = read_bytes(path)
    if sha256(path) != item.sha256:
        raise DataError(f"{path}: changed since it was written; delete it and run the same command to write it again")
    if item.where is None:
        try:
            client.post(item.route, body)
        except DataError as error:
            if EXISTS not in str(error):
                raise
    else:
        where = item.where
        is_begun = journal.state(item) == BEGUN
        journal.write(item, BEGUN)
        if not (is_begun and client.has_feature(*where)):
            client.post(item.route, body, lambda: client.has_feature(*where))
    journal.write(item, TAKEN)


def _list(host: str, waiting: Sequence[_Item], num_sent_before: int) -> None:
    for (route, source), group in groupby(waiting, lambda item: (item.route, item.where[1] if item.where else item.path)):
        items = list(group)
        size = human_bytes(sum(item.num_bytes for item in items))
        counts = f": {len(items)} bodies, {sum(item.num_features for item in items)} features, {size}"
        say(f"  POST {host}/api/{route}  {source}{counts if items[0].where else ''}")
    say(f"  Nothing was sent; {num_sent_before} bodies were sent before")


class _Journal:
    """What one host has taken."""

    def __init__(self, host: str, file: IO[bytes] | None, content: bytes) -> None:
        self._host, self._file = host, file
        self._states: dict[tuple[str, str], str] = {}
        self.sent: dict[str, str] = {}
        """By path: the SHA-256 under which its body was last begun."""
        for row in _rows(content):
            if row["host"] == host:
                self._note(row)

    def state(self, item: _Item) -> str | None:
        """BEGUN or TAKEN; None where it was never begun."""
        return self._states.get((item.route, item.sha256))

    def write(self, item: _Item, state: str) -> None:
        """Note it, and have the disk hold the note before we continue."""
        assert self._file is not None, "a dry run writes no journal"
        row = {"host": self._host, "route": item.route, "sha256": item.sha256, "path": item.path, "state": state}
        self._file.write((json.dumps(row) + "\n").encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._note(row)

    def _note(self, row: dict[str, str]) -> None:
        self._states[row["route"], row["sha256"]] = row["state"]
        self.sent[row["path"]] = row["sha256"]


@contextmanager
def _journal(out: Path, host: str, is_read_only: bool) -> Iterator[_Journal]:
    """The journal of an export, for this process alone."""
    path = out / JOURNAL
    if is_read_only:
        yield _Journal(host, None, path.read_bytes() if path.is_file() else b"")
        return
    make_folder(path.parent)
    with storage_errors(path), path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"{path}: another upload of this folder is running; wait for it, then run this again") from error
        file.seek(0)
        content = file.read()
        complete = content[: content.rfind(b"\n") + 1]
        file.truncate(len(complete))  # the end of a line that a kill cut short
        yield _Journal(host, file, complete)


def _rows(content: bytes) -> Iterator[dict[str, str]]:
    """The journal's notes; other lines are ignored."""
    for line in content.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and {"host", "route", "sha256", "path", "state"} <= set(row):
            yield row
