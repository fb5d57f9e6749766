"""Harvest: text through a language model, the activations of all wanted sites to shuffled shards.

Bucket by bucket; one goes to the disk while the model fills the next. A bucket's shards are committed one by one and its tokens
last, so after a kill at any moment the same command finds the first bucket that lacks something, reads its text again, and
writes just what it lacks, to the same bits.
Several processes may each write a partition of the buckets; the folder is sealed by the process that finds nothing missing.
"""

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path

from everyscope.activations.harvest.buckets import Bucket, HarvestPosition, folder_bytes, read_buckets
from everyscope.activations.harvest.config import HarvestConfig
from everyscope.activations.harvest.fill import Commits, Writers, ahead, fill, finish, open_writers, sync
from everyscope.activations.harvest.folder import HarvestFolder
from everyscope.activations.harvest.locks import gate
from everyscope.activations.harvest.massive import tell_massive
from everyscope.activations.harvest.model_handle import Capture, ModelHandle, model_identity, open_handle
from everyscope.activations.harvest.timings import Timings
from everyscope.activations.shards.manifest import read_manifest, seal_folder, shard_path
from everyscope.activations.shards.reader import Shards, TokenBlocks
from everyscope.activations.shards.writer import write_token_shard
from everyscope.base.errors import StorageError, TextError
from everyscope.base.files import human_bytes, require_free_space
from everyscope.base.progress import Meter, human_count, meter, say
from everyscope.sites.names import Site


@dataclass(frozen=True)
class HarvestResult:
    """What a harvest has written."""

    folders: dict[Site, Path]
    """Where each site's shards lie."""
    tokens: Path
    """Where the blocks of token ids lie."""
    num_rows: int
    """Rows per site, once every partition is finished [rows]."""
    tokens_seen: int
    """Tokens that the model has read, those that became no row included [tokens]."""
    is_sealed: bool = True
    """Whether nothing is missing, so that the folder can be read; False while other partitions are to come."""
    seconds: dict[str, float] = field(default_factory=dict, compare=False)
    """Where this process's time went, by part of the work (`timings.PARTS`); empty where there was nothing to do [s]."""


def run(config: HarvestConfig, progress: Callable[[int], None] = lambda rows: None) -> HarvestResult:
    """Harvest what is missing. Where nothing is, no model is loaded. `progress` is called with rows of the partition.

    ConfigError where `out` holds another harvest, a site does not exist or the context is too long; ModelError; TextError;
    StorageError where the folder cannot be written, another process writes the same of it, or the disk or `max_bytes` is too
    small; DamagedData for a damaged manifest, unless `repair` is set; NonFinite, naming site, block and position.
    An error leaves whole shards or, where there are none yet, nothing.
    """
    return harvest(config, model_identity(config.model), open_handle, progress)


def harvest(
    config: HarvestConfig,
    identity: str,
    open_handle: Callable[[HarvestConfig], ModelHandle],
    progress: Callable[[int], None] = lambda rows: None,
) -> HarvestResult:
    """`run` with any model: its `identity`, and a function that gives what a harvest needs of it. Raises what `run` does."""
    folder = HarvestFolder(config, {"model": identity})
    folder.check_owner()
    if not config.repair:
        folder.learn()
        if folder.is_finished():
            folder.clear_locks()
            if folder.text_before() is not None:
                say(f"harvest: {config.text.origin} has changed since it was harvested; {folder.path} is kept as it is")
            return _result(folder)
    folder.check_text()
    handle, timings = open_handle(config), Timings(progress)
    with folder.locked():
        if folder.is_finished():  # nothing was damaged, or another process has been quicker
            return _result(folder)
        folder.sweep()
        _require_disk(folder, handle)
        end = _write_buckets(folder, handle, timings)
        if folder.adds_nothing(end):
            return _result(folder)
        folder.claim()  # where limits changed without a new bucket
        is_sealed = _seal(folder, end)
    if is_sealed:
        _tell_massive(folder, handle)
    if timings.seconds["forward"]:
        say(f"  {timings.line()}")
    return HarvestResult(folder.sites, folder.tokens, end.rows, end.blocks * config.text.context, is_sealed, timings.seconds)


def _tell_massive(folder: HarvestFolder, handle: ModelHandle) -> None:
    tokens = TokenBlocks(folder.tokens)

    def token_at(block: int, position: int) -> str:
        return handle.tokenizer.decode([int(tokens.input_ids(block, block + 1)[0, position])])

    for site, path in folder.sites.items():
        tell_massive(site.folder, Shards(path).statistics, token_at)


def _require_disk(folder: HarvestFolder, handle: ModelHandle) -> None:
    config, need = folder.config, folder.num_bytes(handle.widths)
    free = human_bytes(shutil.disk_usage(folder.path).free)
    wanted = f"{len(config.sites)} sites x {human_count(config.num_tokens)} tokens in {config.dtype}"
    say(f"  {wanted} need at most {human_bytes(need)} more on disk; {free} are free in {folder.path}")
    require_free_space(folder.path, need, "this harvest")


def _write_buckets(folder: HarvestFolder, handle: ModelHandle, timings: Timings) -> HarvestPosition:
    """Write every bucket of the partition that lacks something; the place behind the last bucket of all."""
    config, place, room = folder.config, folder.place(), _Room(folder.config, handle)
    open_model = cache(handle.open)
    with meter("harvest", config.num_tokens, "tokens") as progress, Commits(timings) as commits:
        if place.rows:
            progress.advance(place.rows, is_resumed=True)
            timings.tell(place.rows // config.partition[1])
        is_claimed = False
        for bucket in ahead(read_buckets(config, handle.tokenizer, place, folder.stops, room.is_enough), timings):
            if not is_claimed:
                folder.claim()
                is_claimed = True
            _write_bucket(folder, handle, bucket, open_model, progress, timings, commits)
            place = bucket.after
    if place.rows == 0 and room.is_used_up:
        blocks = f"one block of {config.text.context} tokens at {len(config.sites)} sites"
        raise StorageError(f"{config.out}: max_bytes={config.max_bytes} holds not even {blocks}; allow more, or keep fewer sites")
    if place.rows == 0:
        raise TextError(f"{config.text.source}: the train split has no countable token; give non-empty documents")
    if place.rows < config.num_tokens:
        end = f"max_bytes={config.max_bytes} is used up" if room.is_used_up else "the text ends"
        say(f"harvest: {end} after {place.rows} of {config.num_tokens} tokens; continuing with these")
    return place


class _Room:
    """How far `max_bytes` reaches."""

    def __init__(self, config: HarvestConfig, handle: ModelHandle) -> None:
        self._config, self._widths = config, list(handle.widths.values())
        self.is_used_up = False

    def is_enough(self, after: HarvestPosition) -> bool:
        limit = self._config.max_bytes
        self.is_used_up = limit is not None and folder_bytes(self._config, self._widths, after) > limit
        return not self.is_used_up


def _write_bucket(
    folder: HarvestFolder,
    handle: ModelHandle,
    bucket: Bucket,
    open_model: Callable[[], Capture],
    progress: Meter,
    timings: Timings,
    commits: Commits,
) -> None:
    """Fill the shards of `bucket` that are missing, if it is of this partition, and let them be committed."""
    index = bucket.before.bucket
    missing = folder.missing(index, bucket.after) if folder.is_mine(index) else ()
    with ExitStack() as stack:
        writers: Writers = {}
        if missing:
            for site in missing:
                folder.unseal(folder.sites[site], index)
            with timings.spending("load"):
                capture = open_model()
            paths = {site: shard_path(folder.sites[site], index) for site in missing}
            writers = open_writers(paths, handle.widths, bucket, folder.config, commits.memory, stack)
            is_on_cpu = fill(writers, bucket, folder.config, capture, progress, timings)
            if is_on_cpu and all(writer.is_in_memory for writer in writers.values()):
                with timings.spending("commit"):
                    finish(list(writers.values()))
        else:
            progress.advance(bucket.num_rows, is_resumed=True)
            timings.tell(bucket.num_rows if folder.is_mine(index) else 0)
        if folder.is_mine(index):
            commits.wait()
            commits.begin(partial(_commit, folder, bucket, writers, stack.pop_all()))


def _commit(folder: HarvestFolder, bucket: Bucket, writers: Writers, shards: ExitStack) -> None:
    """See shards to the disk, which closing `shards` commits, and then the bucket's tokens, if they are missing."""
    with shards:
        sync(list(writers.values()))
    if not folder.has_tokens(bucket.before.bucket, bucket.after):
        folder.unseal(folder.tokens, bucket.before.bucket)
        write_token_shard(shard_path(folder.tokens, bucket.before.bucket), bucket.input_ids, bucket.after.as_json())


def _seal(folder: HarvestFolder, end: HarvestPosition) -> bool:
    """Write the manifests that are missing, those of the sites last: a reader that finds one finds everything else in its place.

    Nothing is done while other partitions lack something; whether nothing does.
    """
    with gate(folder.path):
        if not folder.has_all(end):
            index, count = folder.config.partition
            say(f"harvest: partition {index} of {count} is done; the folder is sealed when all partitions are done")
            return False
        folder.drop_behind(end)
        for path in reversed(folder.folders):
            if folder.is_sealed(path):
                continue
            name = folder.name(path)
            manifest = seal_folder(
                path,
                end.bucket,
                site=name,
                config=folder.sealed_config,
                parents=folder.parents(path),
                version=version("everyscope"),
            )
            if manifest.identity != folder.unsealed.get(name, manifest.identity):
                say(f"harvest: {name} differs from before (computed on another machine); retrain on it")
    return True


def _result(folder: HarvestFolder) -> HarvestResult:
    tokens = read_manifest(folder.tokens)
    any_site = next(iter(folder.sites.values()))
    return HarvestResult(folder.sites, folder.tokens, read_manifest(any_site).num_rows, tokens.num_rows * tokens.d_in)
