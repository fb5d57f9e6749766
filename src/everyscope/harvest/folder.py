"""What lies in the folder of a harvest, and what of it can be kept: the whole memory of an interrupted run.

    harvest.json             the config that owns the folder
    tokens/                  the blocks of token ids, written last in every bucket
    <site>/layer_<L>/        shards, statistics and manifest of one site

A folder belongs to a config from its first committed shard on; before that, anyone may have it.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from everyscope.base.errors import ConfigError, StorageError
from everyscope.base.files import PARTIAL, make_folder, read_json, storage_errors
from everyscope.harvest.buckets import Place
from everyscope.harvest.config import HarvestConfig
from everyscope.shards.format import activation_layout, token_layout
from everyscope.shards.manifest import (
    MANIFEST,
    STATISTICS,
    TOKENS,
    is_committed,
    read_manifest,
    read_sidecar,
    shard_path,
    sidecar_path,
)
from everyscope.sites.names import Site

OWNER = "harvest.json"
"""The file that says whose folder it is."""


class HarvestFolder:
    """The files of one harvest below `config.out`."""

    def __init__(self, config: HarvestConfig, parents: dict[str, str]) -> None:
        """Does nothing to the disk yet; `parents` are the identities of what the harvest is made from."""
        self.path, self.config = config.out, config
        self.tokens = config.out / TOKENS
        self.sites: dict[Site, Path] = {site: config.out / site.folder for site in config.sites}
        self.parents = parents
        self.owner = {"config": config.record(), "parents": parents}

    @property
    def folders(self) -> tuple[Path, ...]:
        """All folders that hold shards, that of the tokens last."""
        return (*self.sites.values(), self.tokens)

    def check_owner(self) -> None:
        """ConfigError, naming each field that differs, where the folder holds shards of another harvest."""
        if not (self.path / OWNER).is_file() or not any(self.path.rglob("shard_*.json")):
            return
        held, wanted = _flat(read_json(self.path / OWNER)), _flat(self.owner)
        differing = [name for name in dict.fromkeys([*held, *wanted]) if held.get(name) != wanted.get(name)]
        if differing:
            shown = "; ".join(f"{name} is {held.get(name)!r} there and {wanted.get(name)!r} here" for name in differing)
            raise ConfigError(
                f"{self.path}: holds another harvest: {shown}; choose another folder with --out, or delete this one"
            )

    def missing(self, bucket: int) -> tuple[Site, ...]:
        """The sites whose shard of `bucket` has not been committed."""
        return tuple(site for site, folder in self.sites.items() if not is_committed(shard_path(folder, bucket)))

    def has_tokens(self, bucket: int) -> bool:
        """Whether the tokens of `bucket` have been committed."""
        return is_committed(shard_path(self.tokens, bucket))

    def place(self) -> Place:
        """The end of the last bucket before which all is committed: from here on something is to be done."""
        place = Place()
        while self.has_tokens(place.bucket) and not self.missing(place.bucket):
            place = Place.of_json(read_sidecar(shard_path(self.tokens, place.bucket)).after)
        return place

    def is_finished(self) -> bool:
        """Whether every folder has its manifest, and every file that it names."""
        for folder in self.folders:
            if not (folder / MANIFEST).is_file() or not (folder == self.tokens or (folder / STATISTICS).is_file()):
                return False
            if not all(is_committed(folder / entry.file) for entry in read_manifest(folder).shards):
                return False
        return True

    def sweep(self) -> None:
        """Delete what a killed run left half-written: partial files, and shards that were renamed but not committed."""
        for path in [self.path / (OWNER + PARTIAL), *(path for folder in self.folders for path in folder.glob("*" + PARTIAL))]:
            path.unlink(missing_ok=True)
        for folder in self.folders:
            for path in folder.glob("shard_*.safetensors"):
                if not sidecar_path(path).is_file():
                    path.unlink()

    def num_bytes(self, widths: dict[Site, int]) -> int:
        """Disk that is still needed, at most [bytes]: what the whole harvest takes less what is there already."""
        config = self.config
        rows = min(config.num_tokens, config.bucket_rows + config.text.context)
        buckets = -(-config.num_tokens // config.bucket_rows)
        header = len(activation_layout(rows, 1, config.dtype).header)
        whole = sum(
            activation_layout(config.num_tokens, width, config.dtype).num_bytes + buckets * header for width in widths.values()
        )
        blocks = 2 * config.num_tokens // (config.text.context - 1) + buckets  # twice, for BOS, EOS, prefixes and padding
        whole += token_layout(blocks, config.text.context).num_bytes + buckets * header
        there = sum(path.stat().st_size for folder in self.folders for path in folder.glob("shard_*.safetensors"))
        return max(whole - there, 0)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other process from harvesting into the folder; StorageError where one does. Ends with this process."""
        make_folder(self.path)
        with storage_errors(self.path):
            descriptor = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise StorageError(
                    f"{self.path}: another harvest is writing here; wait for it, or choose another folder with --out"
                ) from error
            yield
        finally:
            os.close(descriptor)

    def discard_if_empty(self, with_root: bool) -> None:
        """Where no shard was committed, take away the owner's file and empty folders (`path` too `with_root`)."""
        if any(path for folder in self.folders for path in folder.glob("shard_*")):
            return
        (self.path / OWNER).unlink(missing_ok=True)
        roots = [self.path] if with_root else []
        for folder in [*self.folders, *{folder.parent for folder in self.sites.values()}, *roots]:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects as one, with dotted names; `config.` is left out, so that names are those of the config's fields."""
    found: dict[str, Any] = {}
    for name, item in value.items():
        dotted = name if not prefix or prefix == "config" else f"{prefix}.{name}"
        found.update(_flat(item, dotted) if isinstance(item, dict) else {dotted: item})
    return found
