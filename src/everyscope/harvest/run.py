"""Harvest: text through a language model, the activations of all wanted sites to shuffled shards.

Bucket by bucket. A bucket's shards are committed one by one and its tokens last, so after a kill at any moment the same
command finds the first bucket that lacks something, reads its text again, and writes just what it lacks, to the same bits.
"""

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from everyscope.base.errors import TextError
from everyscope.base.files import human_bytes, require_free_space, write_json
from everyscope.base.progress import Meter, human_count, meter, say
from everyscope.harvest.buckets import Bucket, Place, read_buckets
from everyscope.harvest.config import HarvestConfig
from everyscope.harvest.folder import OWNER, HarvestFolder
from everyscope.harvest.subject import Capture, Subject, model_identity, subject_of
from everyscope.shards.manifest import TOKENS, read_manifest, seal_folder, shard_path
from everyscope.shards.writer import ActivationWriter, new_activation_shard, write_token_shard
from everyscope.sites.names import Site


@dataclass(frozen=True)
class HarvestResult:
    """What a harvest has written."""

    folders: dict[Site, Path]
    """Where each site's shards lie."""
    tokens: Path
    """Where the blocks of token ids lie."""
    num_rows: int
    """Rows per site [rows]."""
    tokens_seen: int
    """Tokens that the model has read, those that became no row included [tokens]."""


def run(config: HarvestConfig) -> HarvestResult:
    """Harvest what is not there yet. Where all is there, nothing is loaded.

    ConfigError where `out` holds another harvest, a site does not exist or the context is too long; ModelError; TextError;
    StorageError where the folder cannot be written or the disk is too small; NonFinite, naming site, block and position.
    An error leaves whole shards or, where there are none yet, nothing.
    """
    return harvest(config, model_identity(config.model), subject_of)


def harvest(config: HarvestConfig, identity: str, subject_of: Callable[[HarvestConfig], Subject]) -> HarvestResult:
    """`run` with any model: its `identity`, and a function that gives what a harvest needs of it. Raises what `run` does."""
    folder = HarvestFolder(config, {"model": identity})
    folder.check_owner()
    if folder.is_finished():
        return _result(folder)
    subject = subject_of(config)
    is_new = not folder.path.exists()
    with folder.locked():
        try:
            folder.sweep()
            _require_disk(folder, subject)
            _seal(folder, _write_buckets(folder, subject))
        except BaseException:
            folder.discard_if_empty(with_root=is_new)
            raise
    return _result(folder)


def _require_disk(folder: HarvestFolder, subject: Subject) -> None:
    config, need = folder.config, folder.num_bytes(subject.widths)
    free = human_bytes(shutil.disk_usage(folder.path).free)
    wanted = f"{len(config.sites)} sites x {human_count(config.num_tokens)} tokens in {config.dtype}"
    say(f"  {wanted} need at most {human_bytes(need)} more on disk; {free} are free in {folder.path}")
    require_free_space(folder.path, need, "this harvest")


def _write_buckets(folder: HarvestFolder, subject: Subject) -> Place:
    """Write every bucket that lacks something; the place behind the last one."""
    config, place = folder.config, folder.place()
    buckets = read_buckets(config, subject.tokenizer, place)
    first = next(buckets, None)
    if first is not None:
        write_json(folder.path / OWNER, folder.owner)
        capture = subject.open()
        with meter("harvest", config.num_tokens, "tokens") as progress:
            if place.rows:
                progress.advance(place.rows, is_resumed=True)
            for bucket in chain([first], buckets):
                _write_bucket(folder, subject, bucket, capture, progress)
                place = bucket.after
    if place.rows == 0:
        raise TextError(f"{config.text.source}: the train split has no token that counts; give documents that are not empty")
    if place.rows < config.num_tokens:
        say(f"harvest: the text ends after {place.rows} of {config.num_tokens} tokens; going on with what there is")
    return place


def _write_bucket(folder: HarvestFolder, subject: Subject, bucket: Bucket, capture: Capture, progress: Meter) -> None:
    """Commit the shards of `bucket` that are missing, then its tokens."""
    config, index, after = folder.config, bucket.before.bucket, bucket.after.as_json()
    missing = folder.missing(index)
    with ExitStack() as stack:
        writers = {
            site: stack.enter_context(
                new_activation_shard(
                    shard_path(folder.sites[site], index),
                    name=str(site),
                    rows=bucket.num_rows,
                    d_in=subject.widths[site],
                    dtype=config.dtype,
                    context=config.text.context,
                    after=after,
                )
            )
            for site in missing
        }
        if writers:
            _fill(writers, bucket, config, capture, progress)
        else:
            progress.advance(bucket.num_rows, is_resumed=True)
    if not folder.has_tokens(index):
        write_token_shard(shard_path(folder.tokens, index), bucket.input_ids, after)


def _fill(
    writers: dict[Site, ActivationWriter], bucket: Bucket, config: HarvestConfig, capture: Capture, progress: Meter
) -> None:
    """Run the model over the bucket, and put each row where the shuffle wants it."""
    places, done = bucket.places(config.seed), 0
    for start in range(0, len(bucket.input_ids), config.batch_blocks):
        batch = slice(start, start + config.batch_blocks)
        block, position = np.nonzero(bucket.mask[batch])
        where = places[done : done + len(block)]
        activations = capture(tuple(writers), torch.from_numpy(bucket.input_ids[batch].astype(np.int64)))
        for site, writer in writers.items():
            device = activations[site].device
            rows = activations[site][torch.from_numpy(block).to(device), torch.from_numpy(position).to(device)]
            writer.put(rows, where, bucket.before.blocks + start + block, position)
        done += len(block)
        progress.advance(len(block))


def _seal(folder: HarvestFolder, end: Place) -> None:
    """Write the manifests, those of the sites last: a reader that finds one finds everything else in its place."""
    config = folder.config.record()
    for path in reversed(folder.folders):
        site = TOKENS if path == folder.tokens else path.relative_to(folder.path).as_posix()
        seal_folder(path, end.bucket, site=site, config=config, parents=folder.parents, version=version("everyscope"))


def _result(folder: HarvestFolder) -> HarvestResult:
    tokens = read_manifest(folder.tokens)
    any_site = next(iter(folder.sites.values()))
    return HarvestResult(folder.sites, folder.tokens, read_manifest(any_site).num_rows, tokens.num_rows * tokens.d_in)
