"""What suite.json says: every SAE, its folder, its headline metrics, and the checksum of every file. Torch-free."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError, model_validator

from everyscope.base.errors import DamagedData, DataError
from everyscope.base.files import read_json, sha256
from everyscope.base.schema import Schema
from everyscope.sites.names import Site, SiteKind
from everyscope.suite.layout import INDEX_FILE

Interval = tuple[float, float]
"""Both ends of an interval, low first."""
RIVALS = {"pca": "PCA", "neuron_basis": "single neurons"}
"""Baselines that a trained SAE beats, by name, and in words."""


def beaten_by(fvu: float, baselines: Mapping[str, float]) -> list[str]:
    """Those of RIVALS that leave less variance unexplained than an SAE of FVU `fvu` does, in words."""
    return [words for name, words in RIVALS.items() if baselines.get(name, math.inf) < fvu]


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

    l0: float
    """Mean number of active latents [latents]."""
    fvu: float
    """Fraction of variance unexplained, over all tokens [1]."""
    fvu_usual: float
    """The same over usual tokens: those whose activation is not massive; by it SAEs are ranked [1]."""
    fvu_pca: float
    """FVU of as many principal components as `l0`, rounded [1]."""
    fvu_pca_usual: float
    """The same over usual tokens [1]."""
    num_massive_tokens: int
    """Tokens with a massive activation, left out of every number but plain FVUs [tokens]."""
    delta_loss: float
    """Rise of the language model's loss when the reconstruction is spliced in [nats/token]."""
    loss_recovered: float | None
    """1 where splicing costs nothing, 0 where it costs as much as the training mean; null where what that costs is within its
    noise, or was not measured [1]."""
    kl: float
    """KL divergence of the spliced model's predictions from the untouched model's [nats/token]."""
    cosine: float
    """Mean cosine between activation and reconstruction [1]."""
    dead_fraction: float
    """Share of latents that never fire [1]."""
    dense_fraction: float
    """Share of latents that fire on more than a tenth of the tokens [1]."""
    intervals: Intervals
    """What the documents' choice leaves open."""
    baselines_fvu: dict[str, float]
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

    folder: str
    """Its folder below the suite, as in resid_post/layer_3/width_16k/average_l0_71."""
    name: str
    """Its name in the run that trained it."""
    site: SiteKind
    """The kind of its site."""
    layer: int
    """The layer of its site, from 0."""
    d_in: int
    """Size of its activations."""
    width: int
    """Number of its latents [latents]."""
    num_tokens: int | None
    """Tokens it was trained on [tokens]; null where its record does not say."""
    metrics: Headline
    """Its headline numbers."""
    files: dict[str, str]
    """SHA-256 of each of its files, by name in its folder."""

    @property
    def where(self) -> Site:
        """The site as an object."""
        return Site(self.site, self.layer)


class Measured(Schema):
    """What the suite was measured on."""

    data: str
    """The text, in words."""
    mask: str
    """What was left out of every number, in words."""
    num_tokens: int
    """Positions measured [tokens]."""
    num_sequences: int
    """Blocks read [blocks]."""
    context: int
    """Length of a block [tokens]."""
    num_documents: int
    """Documents behind the intervals [documents]."""
    interval_level: float
    """Share of intervals that hold the true value [1]."""
    loss_clean: float
    """Loss of the untouched language model [nats/token]."""


class SuiteIndex(Schema):
    """suite.json: written last, so that a suite with an index is whole."""

    version: str
    """The everyscope that published it."""
    title: str
    """Its name, for people."""
    model: str
    """The language model it is of: a bundled model's name, or a hub id."""
    measured: Measured
    """Text and sizes behind all numbers."""
    inputs: str
    """Hash of everything it was published from."""
    saes: tuple[SaeRecord, ...]
    """All SAEs, by site, layer, width and L0."""
    files: dict[str, str]
    """SHA-256 of the files that belong to no one SAE, by path below the suite."""


def read_index(suite: Path) -> SuiteIndex:
    """The index of the suite in folder `suite`; DataError where there is none or it is of another form."""
    path = suite / INDEX_FILE
    try:
        return SuiteIndex.model_validate(read_json(path))
    except ValidationError as error:
        field = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise DataError(f"{path}: field {field} is not as this version expects; publish the suite again") from error


def verify_suite(suite: Path) -> None:
    """Compare every file with its checksum in suite.json; DamagedData names the first that differs or is missing."""
    index = read_index(suite)
    checksums = dict(index.files)
    for record in index.saes:
        checksums |= {f"{record.folder}/{name}": checksum for name, checksum in record.files.items()}
    for name, checksum in checksums.items():
        path = suite / name
        if not path.is_file():
            raise DamagedData(f"{path}: listed in {INDEX_FILE} but missing; publish or download the suite again")
        if (got := sha256(path)) != checksum:
            raise DamagedData(f"{path}: SHA-256 is {got[:12]}…, expected {checksum[:12]}…; publish or download the suite again")
