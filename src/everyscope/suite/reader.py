"""Reading SAEs and transcoders from wherever they lie: our suites, other projects' files (`formats`), the Hugging Face hub."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from pydantic import ValidationError

from everyscope.base.bundled import public_name
from everyscope.base.errors import ConfigError, DataError, first_line
from everyscope.base.files import read_object
from everyscope.sae.files import has_sae, read_sae
from everyscope.sae.folded import Sae
from everyscope.sae.metadata import SaeMetadata
from everyscope.sites.config import ModelConfig
from everyscope.sites.names import Site, as_site
from everyscope.suite.formats import gemma_scope, sparsify
from everyscope.suite.formats.known import FORMATS, coders_in, read_coder
from everyscope.suite.layout import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, suite_folder
from everyscope.suite.records import Headline, SaeRecord, SuiteIndex, read_index
from everyscope.suite.verify import checksums, verify_file

SUITE_DEPTH = 4
"""How far above an SAE's folder its suite lies: site, layer, width, L0."""
RUN_RECIPE = "recipe.json"
"""A run's config, in the folder that its suite lies in."""
WEIGHT_SUFFIXES = (".npz", ".safetensors", ".pt")
"""What names of files of weights end with."""


def load_sae(path_or_hub_id: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | str = torch.float32) -> Sae:
    """One folded SAE: raw activations in, raw reconstruction out; `metadata` says what its files say of site, model and L0.

    Takes an SAE's folder in a suite or in a run; the folder, or the file of weights, of an SAE or transcoder of Gemma Scope 1 or
    2, SAELens, sparsify, dictionary_learning, Llama Scope, Qwen-Scope or circuit-tracer (docs/reference/formats.md); or
    `org/repo/path/in/repo` on the Hugging Face hub. DataError where nothing readable is found, ConfigError for a kind of coder
    without a folded form or a device or dtype that is none, ShapeMismatch and NonFinite for damaged tensors.
    """
    path = Path(path_or_hub_id)
    if path.exists():
        return _moved(_read_local(path), device, dtype)
    sae = _read_local(_download(str(path_or_hub_id)))
    is_released = str(path_or_hub_id).startswith(gemma_scope.HUB)
    if is_released and sae.metadata == SaeMetadata():  # a params.npz, which says nothing of itself
        sae.metadata = gemma_scope.known(str(path_or_hub_id))
    return _moved(sae, device, dtype)


def _moved(sae: Sae, device: torch.device | str, dtype: torch.dtype | str) -> Sae:
    """The SAE on another device, in another number format; ConfigError where these are none."""
    kind = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ConfigError(f"dtype={dtype!r} is no number format of SAEs; choose float32, bfloat16, float16 or float64")
    try:
        return sae.to(device, kind)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"device={device!r} cannot be used ({first_line(error)[:120]}); choose cpu, or a GPU of this host"
        ) from error


def _read_local(path: Path) -> Sae:
    found = coders_in(path) if path.is_dir() else [(None, path)]
    if found and found[0][1].name == WEIGHTS_FILE:
        _verify_in_suite(found[0][1].parent)
    if not found:
        if has_sae(path):
            return read_sae(path)[0]
        if (path / INDEX_FILE).is_file():
            raise DataError(f"{path}: is a whole suite; use load_suite, or give the folder of one SAE below it")
    return read_coder(path)


def _verify_in_suite(folder: Path) -> None:
    """Where `folder` lies in a suite that lists it: DamagedData unless its weights are those that were published.

    safetensors has no checksum of its own; npz has.
    """
    parents = folder.resolve().parents
    if len(parents) < SUITE_DEPTH or not (parents[SUITE_DEPTH - 1] / INDEX_FILE).is_file():
        return
    suite = parents[SUITE_DEPTH - 1]
    known = _known_files(suite, (suite / INDEX_FILE).stat().st_mtime_ns)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        checksum = known.get(f"{folder.resolve().relative_to(suite).as_posix()}/{name}")
        if checksum is not None:
            verify_file(folder / name, checksum)


@lru_cache(maxsize=4)
def _known_files(suite: Path, time: int) -> dict[str, str]:
    """SHA-256 of a suite's files by path, as of the `time` at which suite.json was written."""
    return checksums(read_index(suite))


def _download(hub_id: str) -> Path:
    """Fetch `org/repo/path/in/repo` from the hub, a file of weights or a coder's folder, with its configs; the local path."""
    parts = hub_id.strip("/").split("/")
    if len(parts) < 3 or hub_id.startswith((".", "/", "~")):
        raise DataError(f"{hub_id}: no such path, and no hub id either; a hub id is written org/repo/path/in/repo")
    repo, inside = "/".join(parts[:2]), "/".join(parts[2:])
    is_file = inside.endswith(WEIGHT_SUFFIXES)
    folder, _, _ = inside.rpartition("/") if is_file else (inside, "", "")
    names = [] if is_file else [one.file for one in FORMATS if not one.is_set]
    names += [one.config for one in FORMATS if one.config is not None]
    above = f"{folder.rpartition('/')[0]}/{sparsify.RUN_FILE}".lstrip("/")
    beside = [f"{folder}/{name}".lstrip("/") for name in dict.fromkeys(names)]
    try:
        fetched = huggingface_hub.snapshot_download(repo, allow_patterns=[*([inside] if is_file else []), *beside, above])
        return Path(fetched) / inside
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{hub_id}: not found locally or on the hub ({reason}); check name and network") from error


@dataclass(frozen=True)
class SuiteEntry:
    """One SAE of a suite on disk: its numbers at once, its tensors when asked."""

    root: Path
    """The suite's folder."""
    record: SaeRecord

    @property
    def folder(self) -> Path:
        """The SAE's own folder."""
        return self.root / self.record.folder

    @property
    def site(self) -> Site:
        """Where in the model it sits."""
        return self.record.where

    @property
    def width(self) -> int:
        """Number of latents [latents]."""
        return self.record.width

    @property
    def metrics(self) -> Headline:
        """Its headline numbers."""
        return self.record.metrics

    def sae(self, *, device: torch.device | str = "cpu", dtype: torch.dtype | str = torch.float32) -> Sae:
        """Load its tensors, on each call; raises as `load_sae` does."""
        return load_sae(self.folder, device=device, dtype=dtype)

    def __repr__(self) -> str:
        return f"SuiteEntry({self.record.folder}: L0={self.metrics.l0:.4g}, FVU={self.metrics.fvu:.3f})"


@dataclass(frozen=True)
class Suite:
    """A published suite: iterate over its SAEs, or look some up."""

    root: Path
    index: SuiteIndex

    def __iter__(self) -> Iterator[SuiteEntry]:
        """All SAEs, by site, layer, width and L0."""
        return (SuiteEntry(self.root, record) for record in self.index.saes)

    def __len__(self) -> int:
        """Number of SAEs."""
        return len(self.index.saes)

    def __repr__(self) -> str:
        widths = ", ".join(map(str, sorted({entry.width for entry in self})))
        sites = len({entry.site for entry in self})
        return f"Suite({str(self.root)!r}: {len(self)} SAEs of {self.index.model} at {sites} sites, widths {widths or 'none'})"

    def find(self, site: Site | str | None = None, width: int | None = None) -> list[SuiteEntry]:
        """The SAEs at `site`, or the site of that name, and of `width` [latents], in order; None takes any."""
        wanted = None if site is None else as_site(site)
        return [entry for entry in self if wanted in (None, entry.site) and width in (None, entry.width)]

    def nearest(self, site: Site | str, width: int, l0: float) -> SuiteEntry:
        """The SAE at `site` of `width` whose L0 is nearest to `l0` [latents]; DataError where the suite has none there."""
        site = as_site(site)
        found = self.find(site, width)
        if not found:
            have = ", ".join(map(str, sorted({entry.width for entry in self.find(site)}))) or "none"
            raise DataError(f"{self.root}: no SAE of width {width} at {site}; widths there: {have}")
        return min(found, key=lambda entry: abs(entry.metrics.l0 - l0))


def load_suite(path: str | Path) -> Suite:
    """The suite in a folder, or in a run's; tensors are read only when an entry's `sae()` is called.

    ConfigError where there is no such folder, DataError where it holds no suite.
    """
    root = suite_folder(Path(path))
    return Suite(root, read_index(root))


def model_of(suite: Path, name: str) -> ModelConfig:
    """The model that a suite calls `name`: that of the run in whose folder the suite lies, if it is published under this name.

    On the CPU where the run's device is not here: a suite made on a GPU is looked at on a laptop.
    """
    recipe = suite.resolve().parent / RUN_RECIPE
    if recipe.is_file():
        try:
            run = read_object(recipe)
            found = ModelConfig.model_validate(run.get("model"))
        except (DataError, ValidationError):
            return ModelConfig(name=name)  # a recipe of another version: the name is all there is
        if (run.get("public_model") or public_name(found.name)) == name:
            is_here = not found.device.startswith("cuda") or torch.cuda.is_available()
            return found if is_here else found.model_copy(update={"device": "cpu", "device_map": None})
    return ModelConfig(name=name)
