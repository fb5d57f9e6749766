"""Sending the bodies of an export, each once.

The API would add examples and labels a second time if a body came twice. So a journal, upload/sent.jsonl, says of each body when
it was begun and when it was taken, for each host; where only the first stands there, the host is asked whether it knows the
body's first latent, which it takes together with the rest or not at all.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
Key = tuple[str, str]
"""What a body is known by: route and SHA-256."""


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

    @property
    def key(self) -> Key:
        """What the journal calls it."""
        return self.route, self.sha256


def upload(
    config: NeuronpediaConfig,
    heads: dict[str, list[str]],
    manifests: Sequence[dict[str, Any]],
    connect: Callable[[NeuronpediaConfig], Client] = Client,
) -> UploadResult:
    """Send what was not sent yet: models and sets that `heads` names by route, then the bodies of the sources.

    A dry run only says so. Raises ConfigError (no key, or it is refused, or another upload is at work), DataError (a body is
    refused, or is not the one that was written) and StorageError (the host is not reached).
    """
    assert config.host is not None
    items = list(_items(config, heads, manifests))
    with _journal(config.out, config.host, is_read_only=config.dry_run) as journal:
        _refuse_changed(config, journal, items)
        waiting = [item for item in items if journal.state(item.key) != TAKEN]
        features = [item for item in waiting if item.route == FEATURES]
        total = sum(item.route == FEATURES for item in items)
        result = UploadResult(
            host=config.host,
            num_bodies=len(features),
            num_features=sum(item.num_features for item in features),
            num_bytes=sum(item.num_bytes for item in features),
            num_sent_before=total - len(features),
            is_dry=config.dry_run,
        )
        if config.dry_run:
            _describe(config, waiting, result)
            return result
        client = connect(config)
        with meter("upload", total, "bodies") as progress:
            progress.advance(result.num_sent_before, is_resumed=True)
            for item in waiting:
                _send(config, client, journal, item)
                progress.advance(item.route == FEATURES)
    return result


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
        if item.where is not None and journal.sent_as(item.path) not in (None, item.sha256):
            model, source, _ = item.where
            raise DataError(
                f"{config.out / item.path}: was sent to {config.host} with other content, which would stay beside this; have "
                f"{model}/{source} deleted there and its lines in {JOURNAL} here, or export under another --set"
            )


def _send(config: NeuronpediaConfig, client: Client, journal: "_Journal", item: _Item) -> None:
    path = config.out / item.path
    body = read_bytes(path)
    if sha256(path) != item.sha256:
        raise DataError(f"{path}: is not as it was written; delete it, and the same command writes it again")
    if item.where is None:
        try:
            client.post(item.route, body)
        except DataError as error:
            if EXISTS not in str(error):
                raise
    else:
        where = item.where
        is_begun = journal.state(item.key) == BEGUN
        journal.write(item.key, item.path, BEGUN)
        if not (is_begun and client.has_feature(*where)):
            client.post(item.route, body, lambda: client.has_feature(*where))
    journal.write(item.key, item.path, TAKEN)


def _describe(config: NeuronpediaConfig, waiting: Sequence[_Item], result: UploadResult) -> None:
    for item in waiting:
        if item.route != FEATURES:
            say(f"  POST {result.host}/api/{item.route}  {item.path}")
    by_source: dict[str, list[_Item]] = {}
    for item in waiting:
        if item.where is not None:
            by_source.setdefault(item.where[1], []).append(item)
    for source, items in by_source.items():
        num_features, size = sum(item.num_features for item in items), human_bytes(sum(item.num_bytes for item in items))
        say(f"  POST {result.host}/api/{FEATURES}  {source}: {len(items)} bodies, {num_features} features, {size}")
    say(f"  Nothing was sent; {result.num_sent_before} bodies were sent before")


class _Journal:
    """What one host has taken."""

    def __init__(self, host: str, file: IO[bytes] | None, content: bytes) -> None:
        self._host, self._file = host, file
        self._states: dict[Key, str] = {}
        self._sent: dict[str, str] = {}
        for row in _rows(content):
            if row["host"] == host:
                self._states[row["route"], row["sha256"]] = row["state"]
                self._sent[row["path"]] = row["sha256"]

    def state(self, key: Key) -> str | None:
        """What is known of a body; None where it was never begun."""
        return self._states.get(key)

    def sent_as(self, path: str) -> str | None:
        """The SHA-256 under which the body in `path` was last begun; None where it never was."""
        return self._sent.get(path)

    def write(self, key: Key, path: str, state: str) -> None:
        """Note it, and have the disk hold the note before we go on."""
        assert self._file is not None, "a dry run writes no journal"
        row = {"host": self._host, "route": key[0], "sha256": key[1], "path": path, "state": state}
        self._file.write((json.dumps(row) + "\n").encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._states[key] = state
        self._sent[path] = key[1]


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
            raise ConfigError(
                f"{path}: another upload of this folder is at work; wait for it, then run the same command"
            ) from error
        file.seek(0)
        content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        file.truncate(len(whole))  # the end of a line that a kill cut short
        yield _Journal(host, file, whole)


def _rows(content: bytes) -> Iterator[dict[str, str]]:
    """The journal's notes; lines that are none are passed over."""
    for line in content.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and {"host", "route", "sha256", "path", "state"} <= set(row):
            yield row
