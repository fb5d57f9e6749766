"""What lies in the folder of a harvest, and what of it can be kept: the whole memory of an interrupted run.

    harvest.json             the config that owns the folder, and where the harvests that it continues ended
    tokens/                  the blocks of token ids, written last in every bucket
    <site>/layer_<L>/        shards, statistics and manifest of one site

A folder belongs to a config from its first committed shard on; before that, anyone may have it. Its owner may ask for more
rows, or for other limits, later: what is sealed stays as it is, and new buckets follow.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from everyscope.activations.harvest.buckets import HarvestPosition, folder_bytes, is_full
from everyscope.activations.harvest.config import HarvestConfig
from everyscope.activations.harvest.locks import clear, gate, writing
from everyscope.activations.harvest.repair import take_away_damage
from everyscope.activations.shards.manifest import (
    MANIFEST,
    STATISTICS,
    TOKENS,
    is_committed,
    read_manifest,
    read_sidecar,
    shard_path,
    sidecar_path,
)
from everyscope.base.errors import ConfigError, StorageError
from everyscope.base.files import PARTIAL, read_json, write_json
from everyscope.base.ids import content_id
from everyscope.sites.names import Site
from everyscope.text.corpora import GIVEN
from everyscope.text.identity import text_identity

OWNER = "harvest.json"
"""The file that says whose folder it is."""


class HarvestFolder:
    """The files of one harvest below `config.out`."""

    def __init__(self, config: HarvestConfig, parents: dict[str, str]) -> None:
        """Does nothing to the disk yet; `parents` are the identities of what the harvest is made from, beside its text."""
        self.path, self.config = config.out, config
        self.tokens = config.out / TOKENS
        self.sites: dict[Site, Path] = {site: config.out / site.folder for site in config.sites}
        self._parents = parents
        self.stops: tuple[int, ...] = ()
        self._earlier: dict[str, str] = {}
        self._is_growing = False
        self.unsealed: dict[str, str] = {}
        """By folder name, the identities of those whose shards are being rewritten."""

    @property
    def folders(self) -> tuple[Path, ...]:
        """All folders that hold shards, that of the tokens last."""
        return (*self.sites.values(), self.tokens)

    @property
    def owner(self) -> dict[str, Any]:
        """What harvest.json is to say: whose the folder is, and its history where it has one."""
        history = {"max_bytes": self.config.max_bytes, "stops": list(self.stops), "earlier": self._earlier}
        kept = {name: value for name, value in history.items() if value}
        return {"config": self.config.record(), "parents": self._parents | self._text, **kept}

    @property
    def sealed_config(self) -> dict[str, Any]:
        """What manifests are to say of the config."""
        return _sealed_config(self.owner)

    def name(self, folder: Path) -> str:
        """What a manifest calls one of `folders`: its site, or tokens."""
        return folder.relative_to(self.path).as_posix()

    def parents(self, folder: Path) -> dict[str, str]:
        """What a manifest says of its parents; `earlier` is the identity that the folder had before the harvest was extended."""
        earlier = self._earlier.get(self.name(folder))
        text = {} if self.config.text.source in GIVEN else self._text  # the library's is that of the machine: harvest.json has it
        return self._parents | text | ({"earlier": earlier} if earlier else {})

    def check_owner(self) -> None:
        """ConfigError, naming each field that differs, where the folder holds shards of another harvest."""
        held = self._held()
        if held is not None:
            self._refuse_others(held)

    def text_before(self) -> str | None:
        """The identity of the text that the folder's shards are from, where that is not the text of today."""
        before, now = (self._held() or {}).get("parents", {}).get("text"), self._text.get("text")
        return before if before is not None and now is not None and before != now else None

    def check_text(self) -> None:
        """ConfigError where shards are to be written beside those of a text that has changed since."""
        before = self.text_before()
        if before is not None:
            raise ConfigError(
                f"{self.path}: the text ({self.config.text.origin}) has changed since this harvest began: parents.text is "
                f"{before!r} there and {self._text['text']!r} now; put the text back, choose another folder with --out, "
                "or delete this one"
            )

    def learn(self) -> None:
        """Read the folder's history; where it is sealed, and more is asked for now, its end becomes part of that."""
        held = self._held() or {}
        self.stops, self._earlier = tuple(held.get("stops", ())), held.get("earlier", {})
        self._is_growing = False
        if not held or _limits(held) == _limits(self.owner) or not self._is_sealed(_sealed_config(held)):
            return
        manifests = {self.name(folder): read_manifest(folder) for folder in self.folders}
        rows = next(iter(manifests.values())).num_rows
        if rows < self.config.num_tokens:
            self.stops = (*self.stops, rows)
            self._earlier = {name: manifest.identity for name, manifest in manifests.items()}
            self._is_growing = True

    def is_finished(self) -> bool:
        """Whether every folder has its manifest, and every file that it names, and no more is asked for. After `learn`."""
        held = self._held()
        return held is not None and not self._is_growing and self._is_sealed(_sealed_config(held))

    def adds_nothing(self, end: HarvestPosition) -> bool:
        """Whether a harvest that extends a sealed folder has found nothing to add."""
        return self._is_growing and end.rows == self.stops[-1]

    def is_sealed(self, folder: Path) -> bool:
        """Whether one of `folders` has the manifest of just this harvest, and every file that it names."""
        return _is_sealed(folder, self.sealed_config)

    def unseal(self, folder: Path, bucket: int) -> None:
        """Remove the manifest that names the shard of `bucket`, which is about to be rewritten."""
        if (folder / MANIFEST).is_file():
            manifest = read_manifest(folder)
            if bucket < len(manifest.shards):
                self.unsealed[self.name(folder)] = manifest.identity
                (folder / MANIFEST).unlink()

    def claim(self) -> None:
        """Write harvest.json, if it does not say so already."""
        with gate(self.path):
            if not (self.path / OWNER).is_file() or read_json(self.path / OWNER) != self.owner:
                write_json(self.path / OWNER, self.owner)

    def is_mine(self, bucket: int) -> bool:
        """Whether `bucket` is of this process's partition."""
        index, count = self.config.partition
        return bucket % count == index

    def missing(self, bucket: int, after: HarvestPosition) -> tuple[Site, ...]:
        """The sites whose shard of `bucket`, with its end at `after`, has not been committed."""
        return tuple(site for site, folder in self.sites.items() if not _ends_at(shard_path(folder, bucket), after))

    def has_tokens(self, bucket: int, after: HarvestPosition) -> bool:
        """Whether the tokens of `bucket`, with its end at `after`, have been committed."""
        return _ends_at(shard_path(self.tokens, bucket), after)

    def has_all(self, end: HarvestPosition) -> bool:
        """Whether every shard up to `end` has been committed, by whomever."""
        last = end.bucket - 1
        before = all(is_committed(shard_path(folder, bucket)) for folder in self.folders for bucket in range(last))
        return before and not self.missing(last, end) and self.has_tokens(last, end)

    def place(self) -> HarvestPosition:
        """The end of the last bucket before which there is nothing for this process to do or to look at again."""
        place = HarvestPosition()
        while is_committed(path := shard_path(self.tokens, place.bucket)):
            after = HarvestPosition.of_json(read_sidecar(path).after)
            if not is_full(place, after, self.config, self.stops):
                break
            if self.is_mine(place.bucket) and self.missing(place.bucket, after):
                break
            place = after
        return place

    def sweep(self) -> None:
        """Delete what a killed run of this partition left: partial files, and shards that were renamed but not committed."""
        for folder in self.folders:
            for path in folder.glob("shard_*"):
                is_half = path.name.endswith(PARTIAL) or (path.suffix == ".safetensors" and not sidecar_path(path).is_file())
                if is_half and self.is_mine(_index(path)):
                    path.unlink()

    def drop_behind(self, end: HarvestPosition) -> None:
        """Delete shards behind `end`, which a harvest with wider limits has left unsealed. At the gate."""
        for folder in self.folders:
            for path in folder.glob("shard_*"):
                if _index(path) >= end.bucket:
                    path.unlink()

    def num_bytes(self, widths: dict[Site, int]) -> int:
        """Disk that is still needed, at most [bytes]: the harvest's size less what is on disk already."""
        config = self.config
        buckets = -(-config.num_tokens // config.bucket_rows) + len(self.stops)
        blocks = 2 * config.num_tokens // (config.text.context - 1) + buckets  # twice, for BOS, EOS, prefixes and padding
        whole = folder_bytes(config, list(widths.values()), HarvestPosition(buckets, blocks, config.num_tokens))
        if config.max_bytes is not None:
            whole = min(whole, config.max_bytes)
        there = sum(path.stat().st_size for folder in self.folders for path in folder.glob("shard_*.safetensors"))
        return max(whole - there, 0)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other process from this partition; StorageError where one has it, or writes another harvest here.

        At the start and at the end, where nobody else writes here, leftovers are put in order.
        """
        is_new, purpose = not self.path.exists(), content_id([self.owner["config"], self.owner["parents"], self.config.max_bytes])
        try:
            with writing(self.path, self.config.partition, purpose, self._admit, self._leave):
                yield
        finally:
            if is_new:
                with suppress(OSError):  # there is something in it
                    self.path.rmdir()

    def clear_locks(self) -> None:
        """Delete the locks that killed processes have left."""
        clear(self.path)

    @cached_property
    def _text(self) -> dict[str, str]:
        """The identity of the text, if it is known."""
        identity = text_identity(self.config.text)
        return {} if identity is None else {"text": identity}

    def _admit(self, has_company: bool) -> None:
        self.check_owner()
        if not has_company:
            for folder in (self.path, *self.folders):
                for path in folder.glob("*.json" + PARTIAL):
                    path.unlink()
        elif self.config.repair:  # to whom a shard that is being written would look damaged
            raise StorageError(f"{self.path}: another harvest is writing here; wait for it before you repair the folder")
        if self.config.repair:
            take_away_damage(self.folders)
        self.learn()

    def _leave(self) -> None:
        """Where no shard was committed, take away the owner's file and empty folders."""
        if any(path for folder in self.folders for path in folder.glob("shard_*")):
            return
        (self.path / OWNER).unlink(missing_ok=True)
        for folder in [*self.folders, *{folder.parent for folder in self.sites.values()}]:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def _held(self) -> dict[str, Any] | None:
        """What harvest.json says, if the folder holds a shard. Where that file was lost, the manifests still know."""
        if not any(self.path.rglob("shard_*.json")):
            return None
        if (self.path / OWNER).is_file():
            return read_json(self.path / OWNER)
        sealed = next((folder for folder in self.folders if (folder / MANIFEST).is_file()), None)
        if sealed is None:
            return None
        manifest = read_manifest(sealed)
        if "stops" in manifest.config:
            raise ConfigError(
                f"{self.path / OWNER}: is missing, and with it the folder's history; restore it, or harvest into another folder"
            )
        return {"config": manifest.config, "parents": manifest.parents}

    def _refuse_others(self, held: dict[str, Any]) -> None:
        parents = {name: identity for name, identity in held["parents"].items() if name != "text"}  # see check_text
        recorded = _flat({"config": _resolved(held["config"]), "parents": parents})
        wanted = _flat({"config": self.config.record(), "parents": self._parents})
        differing = [name for name in dict.fromkeys([*recorded, *wanted]) if recorded.get(name) != wanted.get(name)]
        if "num_tokens" in differing and recorded["num_tokens"] < wanted["num_tokens"]:
            differing.remove("num_tokens")
        if differing:
            shown = "; ".join(f"{name} is {recorded.get(name)!r} there and {wanted.get(name)!r} here" for name in differing)
            raise ConfigError(
                f"{self.path}: holds another harvest: {shown}; choose another folder with --out, or delete this one"
            )

    def _is_sealed(self, config: dict[str, Any]) -> bool:
        return all(_is_sealed(folder, config) for folder in self.folders)


def _is_sealed(folder: Path, config: dict[str, Any]) -> bool:
    if not (folder / MANIFEST).is_file():
        return False
    manifest = read_manifest(folder)
    if _resolved(manifest.config) != _resolved(config) or not (manifest.site == TOKENS or (folder / STATISTICS).is_file()):
        return False
    return all(_is_there(folder / entry.file, entry.num_bytes) for entry in manifest.shards)


def _is_there(shard: Path, num_bytes: int) -> bool:
    return shard.is_file() and shard.stat().st_size == num_bytes and sidecar_path(shard).is_file()


def _sealed_config(owner: dict[str, Any]) -> dict[str, Any]:
    return owner["config"] | ({"stops": owner["stops"]} if owner.get("stops") else {})


def _resolved(config: dict[str, Any]) -> dict[str, Any]:
    """A config as it was recorded, with the defaults of fields that it does not know, for they came to everyscope later."""
    stops = {"stops": config["stops"]} if "stops" in config else {}
    try:
        fields = {name: value for name, value in config.items() if name != "stops"}
        return HarvestConfig.model_validate(fields | {"out": Path()}).record() | stops
    except ValidationError:  # of a later everyscope, or damaged: then the message is clear without it
        return config


def _limits(owner: dict[str, Any]) -> tuple[int, int | None]:
    return owner["config"]["num_tokens"], owner.get("max_bytes")


def _ends_at(shard: Path, after: HarvestPosition) -> bool:
    return is_committed(shard) and read_sidecar(shard).after == after.as_json()


def _index(path: Path) -> int:
    """The number in the name of a shard, or of a file beside it."""
    named = re.match(r"shard_(\d+)\.", path.name)
    assert named is not None, f"{path}: no shard's name"
    return int(named[1])


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects as one, with dotted names; `config.` is left out, so that names are those of the config's fields."""
    found: dict[str, Any] = {}
    for name, item in value.items():
        dotted = name if not prefix or prefix == "config" else f"{prefix}.{name}"
        found.update(_flat(item, dotted) if isinstance(item, dict) else {dotted: item})
    return found
