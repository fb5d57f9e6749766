"""What a harvest reads, which sites it keeps, and where it puts them; and what an import does."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from everyscope.base.schema import Schema
from everyscope.sites.config import ModelConfig
from everyscope.sites.names import Site
from everyscope.text.config import TextConfig

SHUFFLE_BYTES = 4 << 30
"""Memory that shuffling may take, by default [bytes]."""
DISPOSABLE = {"out", "partition", "max_bytes", "shuffle_bytes", "repair"}
"""Fields of a harvest that do not decide what it writes, or not more than where it ends."""


class HarvestConfig(Schema):
    """One pass of a language model over the train split of a corpus."""

    model: ModelConfig
    """The language model."""
    text: TextConfig
    """The corpus; only its train split is harvested."""
    sites: tuple[Site, ...] = Field(min_length=1)
    """The sites to keep; all are captured in the same forward pass."""
    num_tokens: int = Field(gt=0)
    """Rows wanted per site; fewer where the text ends first. A folder with fewer is extended [tokens]."""
    bucket_rows: int = Field(default=2**20, gt=0)
    """Rows shuffled together, which make one shard; rounded up to whole blocks of text [rows]."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format on disk."""
    batch_blocks: int = Field(default=16, gt=0)
    """Blocks per forward pass [blocks]."""
    seed: int = Field(default=0, ge=0)
    """Seed of the shuffle."""
    partition: tuple[int, int] = (0, 1)
    """(index, count): this process writes the buckets index, index + count, ... Processes with other indices write the rest
    of the same folder, at the same time or not; whichever is last seals it [1]."""
    max_bytes: int | None = Field(default=None, gt=0)
    """Limit of the folder's size; the harvest ends early, and valid, before exceeding it. None: no limit [bytes]."""
    shuffle_bytes: int = Field(default=SHUFFLE_BYTES, gt=0)
    """Memory for shuffling. Shards of a bucket that take more together are shuffled on disk by pieces, to the same bytes
    [bytes]."""
    repair: bool = False
    """Verify all existing shards first and rewrite those that differ from their checksum."""
    out: Path
    """The folder that gets one folder per site, and `tokens`."""

    @field_validator("sites")
    @classmethod
    def _check_sites(cls, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        doubled = sorted({str(site) for site in sites if sites.count(site) > 1})
        if doubled:
            raise ValueError(f"sites names {', '.join(doubled)} more than once; name each site once")
        return sites

    @field_validator("partition")
    @classmethod
    def _check_partition(cls, partition: tuple[int, int]) -> tuple[int, int]:
        index, count = partition
        if not 0 <= index < count:
            raise ValueError(f"partition={index},{count}: expected (index, count) with 0 <= index < count, as (0, 2) and (1, 2)")
        return partition

    def record(self) -> dict[str, Any]:
        """The fields that decide what is written, as JSON values: not the folder, which may be moved, nor how it is filled."""
        return {name: value for name, value in self.as_json().items() if name not in DISPOSABLE}


class ImportConfig(Schema):
    """Activations from elsewhere, of anything: one array to one shuffled folder of shards."""

    source: Path
    """A .npy or .safetensors file of [rows, d_in] or [sequences, positions, d_in], or a folder of SAELens' cached activations."""
    site: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*){0,3}$", max_length=200)
    """What the activations are called: a place in a language model, as resid_post/layer_3, or any name, as vision/block_7."""
    tensor: str | None = None
    """The tensor in a .safetensors file, or the column of a SAELens cache, that is meant; None where there is only one."""
    skip_positions: int = Field(default=0, ge=0)
    """Positions left out at the start of every sequence, as 1 where BOS was stored too [tokens]."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format on disk; float16 fits into float32 only."""
    bucket_rows: int = Field(default=2**20, gt=0)
    """Rows of a shard; rows are shuffled over all shards [rows]."""
    shuffle_bytes: int = Field(default=SHUFFLE_BYTES, gt=0)
    """Memory for shuffling [bytes]."""
    seed: int = Field(default=0, ge=0)
    """Seed of the shuffle."""
    out: Path
    """The folder that gets the shards."""

    @field_validator("site")
    @classmethod
    def _check_site(cls, site: str) -> str:
        if site == "tokens":
            raise ValueError("site='tokens' is what a harvest calls its token ids; choose another name")
        return site

    def record(self) -> dict[str, Any]:
        """The fields that decide what is written, as JSON values: neither the folders, which may be moved, nor the memory."""
        return {name: value for name, value in self.as_json().items() if name not in ("source", "out", "shuffle_bytes")}
