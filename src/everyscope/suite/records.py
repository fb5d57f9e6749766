"""What suite.json says: every SAE, its folder, its headline metrics, and the checksum of every file. Torch-free.

A suite comes from anywhere: suite.json has its own identity, its numbers are finite and within bounds, and no name in it leads
out of the suite's folder.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError, model_validator

from everyscope.base.errors import DataError
from everyscope.base.files import read_sealed, write_sealed
from everyscope.base.schema import Schema
from everyscope.sites.names import SITE_KINDS, Site, SiteKind
from everyscope.suite.layout import INDEX_FILE, SAE_FILES

MAX_WIDTH, MAX_D_IN, MAX_LAYER = 1 << 24, 1 << 24, 1 << 16
"""Beyond what anybody has trained; who reads a suite makes room by these numbers."""
MAX_NAME = 1000
"""Of a path below the suite [characters]."""
FOLDER = re.compile(rf"({'|'.join(SITE_KINDS)})/layer_\d+/width_\w+/average_l0_\w+", re.ASCII)
"""The names that SAEs' folders may have."""
REMEDY = "download or publish the suite again"


def _sae_folder(value: str) -> str:
    if not FOLDER.fullmatch(value):
        raise ValueError(f"names the folder {value[:200]!r}; expected site/layer_L/width_W/average_l0_N")
    return value


def _inside(value: str) -> str:
    parts = value.split("/")
    if not value.isprintable() or "\\" in value or {"", ".", ".."} & set(parts) or len(value) > MAX_NAME:
        raise ValueError(f"names the file {value[:200]!r}, which is no path below the suite")
    return value


def _of_an_sae(value: str) -> str:
    if value not in SAE_FILES:
        raise ValueError(f"names the file {value[:200]!r}; an SAE has {', '.join(SAE_FILES)}")
    return value


Number = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Checksum = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Interval = tuple[Number, Number]
"""Both ends of an interval, low first."""
RIVALS = {"pca": "PCA", "neuron_basis": "single neurons", "linear": "a linear map"}
"""Baselines that a trained SAE beats, by name, and in words; a transcoder the last one, for the others see what it predicts."""


def beaten_by(fvu: float, baselines: Mapping[str, float]) -> list[str]:
    """Those of RIVALS that leave less variance unexplained than an SAE of FVU `fvu` does, in words."""
    rivals = {"linear": RIVALS["linear"]} if "linear" in baselines else RIVALS
    return [words for name, words in rivals.items() if baselines.get(name, math.inf) < fvu]


class Intervals(Schema):
    """Intervals of headline numbers, bootstrapped over documents; null where the evaluation could not make one."""

    l0: Interval | None
    """Of the mean number of active latents [latents]."""
    fvu: Interval | None
    """Of the fraction of variance unexplained [1]."""
    fvu_usual: Interval | None
    """Of the same over usual tokens [1]."""
    delta_loss: Interval | None
    """Of the rise of the language model's loss [nats/token]."""
    loss_recovered: Interval | None
    """Of the share of the mean ablation's loss that is recovered [1]."""


class Headline(Schema):
    """The numbers of an SAE that tables show; metrics.json beside it has them all. Over held-out documents, specials masked."""

    l0: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """Mean number of active latents [latents]."""
    fvu: Number
    """Fraction of variance unexplained, over all tokens [1]."""
    fvu_usual: Number
    """The same over usual tokens: those whose activation is not massive; by it SAEs are ranked [1]."""
    fvu_pca: Number
    """FVU of as many principal components as `l0`, rounded [1]."""
    fvu_pca_usual: Number
    """The same over usual tokens [1]."""
    num_massive_tokens: Count
    """Tokens with a massive activation, left out of every number but plain FVUs [tokens]."""
    delta_loss: Number
    """Rise of the language model's loss when the reconstruction is spliced in [nats/token]."""
    loss_recovered: Number | None
    """1 where splicing costs nothing, 0 where it costs as much as the training mean; null where what that costs is within its
    noise, or was not measured [1]."""
    kl: Number
    """KL divergence of the spliced model's predictions from the untouched model's [nats/token]."""
    cosine: Number
    """Mean cosine between activation and reconstruction [1]."""
    dead_fraction: Share
    """Share of latents that never fire [1]."""
    dense_fraction: Share
    """Share of latents that fire on more than a tenth of the tokens [1]."""
    intervals: Intervals
    """What the documents' choice leaves open."""
    baselines_fvu: dict[str, Number]
    """FVU of what an SAE must beat over usual tokens, by the baseline's name [1]."""
    is_canonical: bool
    """Whether it stands for its site and width where only one can be shown: its L0 is nearest the one aimed at."""

    @model_validator(mode="before")
    @classmethod
    def _of_older_suite(cls, value: Any) -> Any:
        """Suites that are older than the rule for massive rows left none out."""
        if isinstance(value, dict) and "fvu_usual" not in value and {"fvu", "fvu_pca"} <= value.keys():
            intervals = value["intervals"] if isinstance(value.get("intervals"), dict) else {}
            return value | {
                "fvu_usual": value["fvu"],
                "fvu_pca_usual": value["fvu_pca"],
                "num_massive_tokens": 0,
                "intervals": {"fvu_usual": intervals.get("fvu"), **intervals},
            }
        return value

    @property
    def beaten_by(self) -> list[str]:
        """What of the same L0 leaves less variance unexplained, in words: the SAE is undertrained."""
        return beaten_by(self.fvu_usual, self.baselines_fvu)


class SaeRecord(Schema):
    """One SAE of a suite."""

    folder: Annotated[str, AfterValidator(_sae_folder)]
    """Its folder below the suite, as in resid_post/layer_3/width_16k/average_l0_71."""
    name: str
    """Its name in the run that trained it."""
    site: SiteKind
    """The kind of its site."""
    layer: int = Field(ge=0, le=MAX_LAYER)
    """The layer of its site, from 0."""
    d_in: int = Field(gt=0, le=MAX_D_IN)
    """Size of its activations."""
    width: int = Field(gt=0, le=MAX_WIDTH)
    """Number of its latents [latents]."""
    num_tokens: Count | None
    """Tokens it was trained on [tokens]; null where its record does not say."""
    metrics: Headline
    """Its headline numbers."""
    files: dict[Annotated[str, AfterValidator(_of_an_sae)], Checksum]
    """SHA-256 of each of its files, by name in its folder."""

    @property
    def where(self) -> Site:
        """The site as an object."""
        return Site(self.site, self.layer)


class MeasuredOn(Schema):
    """What the suite was measured on."""

    data: str
    """The text, in words."""
    mask: str
    """What was left out of every number, in words."""
    num_tokens: Count
    """Positions measured [tokens]."""
    num_sequences: Count
    """Blocks read [blocks]."""
    context: Count
    """Length of a block [tokens]."""
    num_documents: Count
    """Documents behind the intervals [documents]."""
    interval_level: Share
    """Share of intervals that hold the true value [1]."""
    loss_clean: Number
    """Loss of the untouched language model [nats/token]."""


class SuiteIndex(Schema):
    """suite.json: written last, so that a suite with an index is whole."""

    version: str
    """The everyscope that published it."""
    title: str
    """Its name, for people."""
    model: str
    """The language model it is of: a bundled model's name, or a hub id."""
    measured: MeasuredOn
    """Text and sizes behind all numbers."""
    inputs: str
    """Hash of everything it was published from."""
    saes: tuple[SaeRecord, ...]
    """All SAEs, by site, layer, width and L0."""
    files: dict[Annotated[str, AfterValidator(_inside)], Checksum]
    """SHA-256 of the files that belong to no one SAE, by path below the suite."""
    cost: str | None = None
    """Hash of what cost.json counts, its seconds left out, for they differ from run to run; null where it is not known."""

    @model_validator(mode="after")
    def _lists_each_sae_once(self) -> "SuiteIndex":
        folders = [sae.folder for sae in self.saes]
        if len(set(folders)) < len(folders):
            raise ValueError("lists an SAE twice")
        return self


def read_index(suite: Path) -> SuiteIndex:
    """The index of the suite in folder `suite`; DamagedData where it was changed, DataError where there is none that fits."""
    return parse_index(read_sealed(suite / INDEX_FILE, REMEDY), suite / INDEX_FILE)


def parse_index(value: dict[str, Any], name: Path) -> SuiteIndex:
    """The index that an object spells; DataError, which calls it `name`, for a field that is not as this version expects."""
    try:
        return SuiteIndex.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part)[:80] for part in first["loc"]) or "saes"
        raise DataError(f"{name}: field {field} is not as this version expects: {first['msg'][:300]}; {REMEDY}") from error


def write_index(suite: Path, index: SuiteIndex) -> None:
    """Write suite.json, with its own identity."""
    write_sealed(suite / INDEX_FILE, index.as_json())
