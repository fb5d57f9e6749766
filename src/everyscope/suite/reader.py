"""Reading SAEs from wherever they lie: suites of ours, original Gemma Scope releases, SAELens folders, the Hugging Face hub.

One function per format; `load_sae` only decides which of them it has before it.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import huggingface_hub
import numpy as np
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from everyscope.base.errors import ConfigError, DataError, NonFinite, ShapeMismatch, first_line
from everyscope.base.files import read_object, require_file, unreadable
from everyscope.sae.files import has_sae, read_sae
from everyscope.sae.folded import PARAMETERS, SKIP, Sae, from_tensors
from everyscope.sae.metadata import SaeMetadata
from everyscope.sae.saelens import SAE, SKIP_TRANSCODER, TRANSCODER, metadata_of
from everyscope.sites.names import Site, SiteKind, as_site
from everyscope.suite.layout import CONFIG_FILE, INDEX_FILE, NPZ_FILE, WEIGHTS_FILE
from everyscope.suite.npz import array_names, read_arrays
from everyscope.suite.records import Headline, SaeRecord, SuiteIndex, read_index
from everyscope.suite.verify import checksums, verify_file

SUITE_DEPTH = 4
"""How far above an SAE's folder its suite lies: site, layer, width, L0."""
UNFOLDED = ("scal", "norm", "skip")
"""Parts of names of arrays beside the five that change what an SAE computes, unless they are 1 everywhere (0 for a skip)."""

GEMMA_SCOPE = re.compile(r"google/gemma-scope-(2b|9b|27b)-(pt|it)-(res|mlp|att)/layer_(\d+)/width_[0-9a-z]+/average_l0_(\d+)")
"""The hub ids of DeepMind's first release, whose files hold tensors alone."""
GEMMA_SCOPE_SITES: dict[str, SiteKind] = {"res": "resid_post", "mlp": "mlp_out", "att": "attn_out"}


def load_sae(path_or_hub_id: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | str = torch.float32) -> Sae:
    """One folded SAE: raw activations in, raw reconstruction out; `metadata` says what its files say of site, model and L0.

    Takes an SAE's folder in a suite or in a run, a folder or a params.npz of a Gemma Scope release, a SAELens JumpReLU folder
    (cfg.json + sae_weights.safetensors), or `org/repo/path/in/repo` on the Hugging Face hub. DataError where nothing
    readable is there, ConfigError for a kind of SAE that is not ours or a device or dtype that is none, ShapeMismatch and
    NonFinite for damaged tensors.
    """
    path = Path(path_or_hub_id)
    if path.exists():
        return _moved(_read_local(path), device, dtype)
    sae = _read_local(_download(str(path_or_hub_id)))
    if sae.metadata == SaeMetadata():  # a params.npz, which says nothing of itself
        sae.metadata = _of_gemma_scope(str(path_or_hub_id))
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


def _of_gemma_scope(hub_id: str) -> SaeMetadata:
    """What the path of an SAE in DeepMind's first release says of it; nothing for any other."""
    found = GEMMA_SCOPE.fullmatch(hub_id.strip("/").removesuffix(f"/{NPZ_FILE}"))
    if found is None:
        return SaeMetadata()
    size, tuned, kind, layer, l0 = found.groups()
    site = Site(GEMMA_SCOPE_SITES[kind], int(layer))
    return SaeMetadata(site, f"google/gemma-2-{size}{'-it' if tuned == 'it' else ''}", float(l0))


def _read_local(path: Path) -> Sae:
    if path.is_file() and path.suffix == ".npz":
        return read_npz(path)
    if (path / WEIGHTS_FILE).is_file() and (path / CONFIG_FILE).is_file():
        _verify_in_suite(path)
        return read_saelens(path)
    if (path / NPZ_FILE).is_file():
        return read_npz(path / NPZ_FILE)
    if has_sae(path):
        return read_sae(path)[0]
    if (path / INDEX_FILE).is_file():
        raise DataError(f"{path}: is a whole suite; use load_suite, or give the folder of one SAE below it")
    raise DataError(f"{path}: holds no SAE; expected {NPZ_FILE}, or {CONFIG_FILE} with {WEIGHTS_FILE}")


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


def read_npz(path: Path) -> Sae:
    """The SAE in a Gemma Scope params.npz, in float32, with the old names of its keys too.

    DataError for what is no npz of plain floating-point numbers or holds a tensor under two names, ConfigError for a scaling
    factor, or a skip connection, that is not folded into the weights.
    """
    found = array_names(path)
    by_name = {key: [name for name in found if name.lower() == key.lower()] for key in PARAMETERS}
    doubled = next((names for names in by_name.values() if len(names) > 1), None)
    if doubled is not None:
        raise DataError(f"{path}: holds both {' and '.join(doubled)}, which are one tensor; delete one of them")
    factors = [name for name in found if any(word in name.lower() for word in UNFOLDED)]
    chosen = {key: names[0] for key, names in by_name.items() if names}
    arrays = read_arrays(path, [*chosen.values(), *factors])
    for name in factors:
        _require_folded(path, name, arrays[name])
    return _checked(path, {key: torch.from_numpy(arrays[name]) for key, name in chosen.items()})


def _require_folded(path: Path, name: str, values: np.ndarray) -> None:
    neutral = 0 if "skip" in name.lower() else 1
    if not np.all(values == neutral):
        raise ConfigError(f"{path}: {name} is not {neutral} everywhere; only folded SAEs are read, rescale W_enc and W_dec first")


def _checked(path: Path, tensors: Mapping[str, Tensor], metadata: SaeMetadata | None = None) -> Sae:
    """The SAE of five tensors out of the file `path`, float32; what is wrong with them names the file."""
    for name in (*PARAMETERS, SKIP):
        tensor = tensors.get(name)
        if tensor is not None and not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise DataError(f"{path}: {name} holds {kind}, expected floating-point numbers; convert it to float32")
    try:
        sae = from_tensors({name: tensor.float() for name, tensor in tensors.items() if name in (*PARAMETERS, SKIP)}, metadata)
    except (ShapeMismatch, NonFinite) as error:
        raise type(error)(f"{path}: {error}") from error
    if bool((sae.threshold < 0).any()):
        lowest = float(sae.threshold.min())
        raise DataError(f"{path}: threshold has {lowest:.3g}, expected 0 or more everywhere; JumpReLU would keep negative values")
    return sae


def read_saelens(folder: Path) -> Sae:
    """The JumpReLU SAE in a SAELens folder, folded: b_dec that is subtracted from the input goes into b_enc.

    Pre-activations (x - b_dec) @ W_enc + b_enc equal x @ W_enc + (b_enc - b_dec @ W_enc). ConfigError for another
    architecture, or activations that must be normalised first; ShapeMismatch where weights are not of the sizes in cfg.json.
    """
    config, path = read_object(folder / CONFIG_FILE), folder / WEIGHTS_FILE
    architecture, normalised = config.get("architecture"), config.get("normalize_activations") or "none"
    if architecture not in (SAE, TRANSCODER, SKIP_TRANSCODER) or normalised != "none":
        raise ConfigError(
            f"{folder / CONFIG_FILE}: architecture={architecture!r}, normalize_activations={normalised!r}; "
            "only jumprelu SAEs and transcoders with none can be read, fold the normalisation in first"
        )
    # SAELens itself takes a missing flag for true.
    subtracts = config.get("apply_b_dec_to_input", architecture == SAE)
    if architecture != SAE and subtracts:
        raise ConfigError(
            f"{folder / CONFIG_FILE}: apply_b_dec_to_input=true with {architecture}: its b_dec is of what it writes"
        )
    require_file(path)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise unreadable(path, "safetensors", error) from error
    for name, tensor in tensors.items():
        if any(word in name.lower() for word in UNFOLDED) and not (name == SKIP and architecture == SKIP_TRANSCODER):
            _require_folded(path, name, tensor.numpy())
    if (SKIP in tensors) != (architecture == SKIP_TRANSCODER):
        tensors = _with_skip_as_said(path, tensors, architecture)
    if SKIP in tensors:
        tensors[SKIP] = tensors[SKIP].T.contiguous()
    sae = _checked(path, tensors, metadata_of(config))
    for field, got in (("d_in", sae.d_in), ("d_sae", sae.d_sae), ("d_out", sae.d_out)):
        if (want := config.get(field, got)) != got:
            raise ShapeMismatch(f"{path}: has {field}={got}, {CONFIG_FILE} says {want!r}; are they of two SAEs? download both")
    return _subtraction_folded(sae) if subtracts else sae


def _with_skip_as_said(path: Path, tensors: dict[str, Tensor], architecture: str) -> dict[str, Tensor]:
    """The tensors without a skip of zeros that the architecture does not have; ShapeMismatch where it should have one."""
    if architecture == SKIP_TRANSCODER:
        raise ShapeMismatch(f"{path}: has no {SKIP}, {CONFIG_FILE} says {architecture}; download both again")
    return {name: tensor for name, tensor in tensors.items() if name != SKIP}


def _subtraction_folded(sae: Sae) -> Sae:
    bias = sae.b_enc.double() - sae.b_dec.double() @ sae.W_enc.double()
    return sae.with_tensors(b_enc=bias.float())


def _download(hub_id: str) -> Path:
    """Fetch `org/repo/path/in/repo` from the hub: that file, or the files of that folder; the local path."""
    parts = hub_id.strip("/").split("/")
    if len(parts) < 3 or hub_id.startswith((".", "/", "~")):
        raise DataError(f"{hub_id}: no such path, and no hub id either; a hub id is written org/repo/path/in/repo")
    repo, inside = "/".join(parts[:2]), "/".join(parts[2:])
    try:
        if inside.endswith(".npz"):
            return Path(huggingface_hub.hf_hub_download(repo, inside))
        patterns = [f"{inside}/{name}" for name in (NPZ_FILE, CONFIG_FILE, WEIGHTS_FILE)]
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=patterns)) / inside
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
    """The suite in a folder; tensors are read only when an entry's `sae()` is called. DataError where there is none."""
    return Suite(Path(path), read_index(Path(path)))
