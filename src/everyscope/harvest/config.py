"""What a harvest reads, which sites it keeps, and where it puts them."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from everyscope.base.schema import Schema
from everyscope.sites.config import ModelConfig
from everyscope.sites.names import Site
from everyscope.text.config import TextConfig


class HarvestConfig(Schema):
    """One pass of a language model over the train split of a corpus."""

    model: ModelConfig
    """The language model."""
    text: TextConfig
    """The corpus; only its train split is harvested."""
    sites: tuple[Site, ...] = Field(min_length=1)
    """The sites to keep; all are captured in the same forward pass."""
    num_tokens: int = Field(gt=0)
    """Rows wanted per site; fewer where the text ends first [tokens]."""
    bucket_rows: int = Field(default=2**20, gt=0)
    """Rows shuffled together, which make one shard; rounded up to whole blocks of text [rows]."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format on disk."""
    batch_blocks: int = Field(default=16, gt=0)
    """Blocks per forward pass [blocks]."""
    seed: int = Field(default=0, ge=0)
    """Seed of the shuffle."""
    out: Path
    """The folder that gets one folder per site, and `tokens`."""

    @field_validator("sites")
    @classmethod
    def _check_sites(cls, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        doubled = sorted({str(site) for site in sites if sites.count(site) > 1})
        if doubled:
            raise ValueError(f"sites names {', '.join(doubled)} more than once; name each site once")
        return sites

    def record(self) -> dict[str, Any]:
        """All fields that decide what is written, as JSON values: all but `out`, so that a folder may be moved."""
        return {name: value for name, value in self.as_json().items() if name != "out"}
