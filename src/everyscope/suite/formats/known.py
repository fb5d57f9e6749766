"""The formats that can be read, and how each is known by its files. A new one is a file beside this one and a row here."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from everyscope.base.errors import ConfigError, DataError
from everyscope.sae import saelens as saelens_files
from everyscope.sae.folded import Sae
from everyscope.sae.metadata import SaeMetadata
from everyscope.suite.formats import (
    circuit_tracer,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    llama_scope,
    qwen_scope,
    saelens,
    sparsify,
)


@dataclass(frozen=True)
class Format:
    """One project's files."""

    name: str
    file: str
    """The path of the weights below the coder's folder; with a star where a folder holds a set, one layer a file."""
    config: str | None
    """The file that must lie in that folder too; None where the format has none."""
    read: Callable[[Path], Sae]
    """The coder in a file of weights."""
    known: Callable[[Path], SaeMetadata]
    """What the files say of it, weights unread."""

    @property
    def is_set(self) -> bool:
        """Whether a folder holds several coders."""
        return "*" in self.file

    def folder(self, weights: Path) -> Path:
        """The folder of the coder in `weights`."""
        return weights.parents[self.file.count("/")]

    def has(self, weights: Path) -> bool:
        """Whether an existing file is one of this format's."""
        ends = "/".join(weights.absolute().parts[-1 - self.file.count("/") :])
        return fnmatchcase(ends, self.file) and (self.config is None or (self.folder(weights) / self.config).is_file())

    def __str__(self) -> str:
        return f"{self.file.replace('*', '<n>')}{'' if self.config is None else f' with {self.config}'} ({self.name})"


FORMATS = (
    Format("SAELens", saelens_files.WEIGHTS_FILE, saelens_files.CONFIG_FILE, saelens.read, saelens.known),
    Format("Gemma Scope", gemma_scope.NPZ_FILE, None, gemma_scope.read, gemma_scope.known),
    Format("Gemma Scope 2", gemma_scope_2.WEIGHTS_FILE, gemma_scope_2.CONFIG_FILE, gemma_scope_2.read, gemma_scope_2.known),
    Format("sparsify", sparsify.WEIGHTS_FILE, sparsify.CONFIG_FILE, sparsify.read, sparsify.known),
    Format(
        "dictionary_learning",
        dictionary_learning.WEIGHTS_FILE,
        dictionary_learning.CONFIG_FILE,
        dictionary_learning.read,
        dictionary_learning.known,
    ),
    Format("Llama Scope", llama_scope.WEIGHTS_FILE, llama_scope.CONFIG_FILE, llama_scope.read, llama_scope.known),
    Format("Qwen-Scope", qwen_scope.FILES, qwen_scope.CONFIG_FILE, qwen_scope.read, qwen_scope.known),
    Format("circuit-tracer", circuit_tracer.FILES, circuit_tracer.CONFIG_FILE, circuit_tracer.read, circuit_tracer.known),
)
"""In the order in which a folder that fits several is read."""
OF_SEVERAL_LAYERS = (("params_layer_*.safetensors", "config.json"), ("W_enc_*.safetensors", "config.yaml"))
"""Files of crosscoders and cross-layer transcoders, of Gemma Scope 2 and of circuit-tracer, with what lies beside them."""
EXPECTED = "expected " + ", ".join(map(str, FORMATS))
"""The known formats, in words."""


def format_of(weights: Path) -> Format | None:
    """The format of a file of weights; None where it is of none."""
    return next((one for one in FORMATS if one.has(weights)), None)


def coders_in(folder: Path) -> list[tuple[Format, Path]]:
    """The format and file of each coder right in a folder: of one format, one or a set. Empty where there is none."""
    for one in FORMATS:
        found = [path for path in folder.glob(one.file) if path.is_file() and one.has(path)]
        if found:
            return [(one, path) for path in sorted(found, key=_in_order)]
    return []


def coders_below(root: Path) -> Iterator[tuple[Format, Path]]:
    """Every coder at or below `root`, by folder; a folder that fits several formats counts as the first of them."""
    files = [path for path in root.rglob("*") if path.is_file()]
    for folder in sorted({one.folder(path) for path in files if (one := format_of(path)) is not None}):
        yield from coders_in(folder)


def refuse_several_layers(folder: Path) -> None:
    """ConfigError for the folder of a coder that reads or writes several layers at once."""
    for files, config in OF_SEVERAL_LAYERS:
        if (folder / config).is_file() and any(folder.glob(files)):
            raise ConfigError(
                f"{folder}: is a crosscoder or cross-layer transcoder ({files.replace('*', '<n>')} with {config}); SAEs and "
                "transcoders of one layer can be read"
            )


def read_coder(path: Path) -> Sae:
    """The coder in a file of weights, or in the folder of one; DataError where there is none, or a set of several.

    ConfigError for one of several layers at once.
    """
    refuse_several_layers(path if path.is_dir() else path.parent)
    if path.is_file():
        if path.suffix == ".npz":  # under whatever name
            return gemma_scope.read(path)
        one = format_of(path)
        if one is None:
            raise DataError(f"{path}: is no file of weights that is known here; {EXPECTED}")
        return one.read(path)
    found = coders_in(path)
    if not found:
        raise DataError(f"{path}: holds no SAE or transcoder; {EXPECTED}")
    one, weights = found[0]
    if one.is_set:
        raise DataError(f"{path}: holds a set of {len(found)} layers ({one.name}); give the file of one, as {weights}")
    return one.read(weights)


def _in_order(path: Path) -> tuple[int, str]:
    number = re.search(r"\d+", path.name)
    return int(number[0]) if number else -1, path.name
