"""Which text is read, how it is cut into blocks, and which documents are kept out of training."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from everyscope.base.schema import Schema

TextSource = Literal[
    "standard_library", "standard_library_docstrings", "standard_library_instructions", "arithmetic", "files", "dataset"
]
Split = Literal["train", "held_out"]


class TextConfig(Schema):
    """A corpus, its packing and its split."""

    source: TextSource = "standard_library"
    """Where documents come from: the Python library on this machine (its files, their docstrings, or requests about its
    functions with their answers, in Gemma's turns), generated arithmetic, local files, or a Hugging Face dataset."""
    paths: tuple[Path, ...] = ()
    """Files or folders for source="files": .txt (a document a file), .jsonl and .parquet (a document a row)."""
    dataset: str | None = None
    """Hugging Face dataset for source="dataset": a hub id, or a local folder that `datasets` can load."""
    dataset_config: str | None = None
    """The dataset's configuration (subset), where it has several."""
    dataset_split: str = "train"
    """The dataset's own split that is read; our held-out documents are taken from it by content."""
    column: str = "text"
    """The column of .jsonl, .parquet and datasets that holds the text."""
    context: int = Field(default=1024, ge=4)
    """Block length, BOS included [tokens]."""
    prefix: str = ""
    """Text put after BOS in every block, as Gemma's user-turn prefix for instruction-tuned models; never measured."""
    suffix: str = ""
    """Text put at the end of every block, as Gemma's model-turn prefix; measured like any other text."""
    held_out_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Share of documents, chosen by a hash of their content, on which everything is measured and nothing trained [1]."""

    @property
    def origin(self) -> str:
        """The corpus in words, for messages: its paths, its dataset, or its name."""
        if self.source == "files":
            return ", ".join(map(str, self.paths))
        return f"dataset {self.dataset}" if self.source == "dataset" else self.source

    @model_validator(mode="after")
    def _check_source(self) -> "TextConfig":
        if self.source != "dataset" and (self.dataset_config is not None or self.dataset_split != "train"):
            setting = f"dataset_config={self.dataset_config!r}, dataset_split={self.dataset_split!r}"
            raise ValueError(f'{setting} with source={self.source!r}: only source="dataset" has them')
        if self.source not in ("files", "dataset") and self.column != "text":
            raise ValueError(
                f'column={self.column!r} with source={self.source!r}: only source="files" and "dataset" have columns'
            )
        if (self.source == "files") != bool(self.paths):
            raise ValueError(f'paths={self.paths!r} with source={self.source!r}: source="files" needs paths, others take none')
        if (self.source == "dataset") != (self.dataset is not None):
            raise ValueError(f'dataset={self.dataset!r} with source={self.source!r}: source="dataset" needs it, others do not')
        return self
