"""Which text is read, how it is cut into blocks, and which documents are kept out of training."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from everyscope.base.schema import Schema

TextSource = Literal[
    "standard_library", "standard_library_docstrings", "standard_library_instructions", "arithmetic", "files", "dataset"
]
Split = Literal["train", "held_out"]
BosPlaces = Literal["by_family", "block", "document"]

PACKING = ("context", "prefix", "suffix", "bos", "skip_positions", "held_out_fraction")
"""Fields that say how documents become blocks, whatever corpus they are from."""


class TextConfig(Schema):
    """A corpus, its packing and its split."""

    source: TextSource = "standard_library"
    """Where documents come from: the Python library on this machine (its files, their docstrings, or requests about its
    functions with their answers, in Gemma's turns), generated arithmetic, local files, or a Hugging Face dataset."""
    paths: tuple[Path, ...] = ()
    """Files or folders for source="files": .txt (a document a file), .jsonl and .parquet (a document a row)."""
    dataset: str | None = None
    """Hugging Face dataset for source="dataset": a hub id, or a local folder that `datasets` can load."""
    dataset_revision: str | None = None
    """Commit, branch or tag of a dataset on the hub; None reads the newest."""
    dataset_config: str | None = None
    """The dataset's configuration (subset), where it has several."""
    dataset_split: str = "train"
    """The dataset's own split that is read; our held-out documents are taken from it by content."""
    column: str = "text"
    """The column of .jsonl, .parquet and datasets that holds the text, or a conversation: a list of messages with role and
    content (OpenAI's form) or from and value (ShareGPT's), which the tokenizer's chat template turns into text."""
    roles: tuple[str, ...] | None = None
    """Of conversations, the roles whose words count, as assistant; the words of others and the markers of turns are read but
    never measured. None measures everything, markers included."""
    shuffle_seed: int | None = Field(default=None, ge=0)
    """Seed of the order in which the documents of files and datasets are read; None reads them in the order they are stored."""
    context: int = Field(default=1024, ge=4)
    """Block length, BOS included [tokens]."""
    prefix: str = ""
    """Text put after BOS in every block, as Gemma's user-turn prefix for instruction-tuned models; never measured."""
    suffix: str = ""
    """Text put at the end of every block, as Gemma's model-turn prefix; measured like any other text."""
    bos: BosPlaces = "by_family"
    """Where BOS stands: at the start of every block, or also at the start of every document within a block. "by_family" follows
    the model's own training: every document for Gemma's tokenizers, every block for others."""
    skip_positions: int = Field(default=0, ge=0)
    """Positions behind the BOS of every block that are read but never measured, like BOS itself [tokens]."""
    held_out_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Share of documents, chosen by a hash of their content, on which everything is measured and nothing trained [1]."""

    @property
    def origin(self) -> str:
        """The corpus in words, for messages: its paths, its dataset, or its name."""
        if self.source == "files":
            return ", ".join(map(str, self.paths))
        return f"dataset {self.dataset}" if self.source == "dataset" else self.source

    @property
    def packing(self) -> dict[str, Any]:
        """The fields that say how documents become blocks, for another corpus that is to be cut alike."""
        return {name: getattr(self, name) for name in PACKING}

    @model_serializer(mode="wrap")
    def _without_later_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Fields that were added later are left out at their defaults, so that a config keeps the identity it had before."""
        added = ("dataset_revision", "roles", "shuffle_seed", "bos", "skip_positions")
        unchanged = {name for name in added if getattr(self, name) == type(self).model_fields[name].default}
        return {name: value for name, value in handler(self).items() if name not in unchanged}

    @model_validator(mode="after")
    def _check_source(self) -> "TextConfig":
        of_datasets = {"dataset_config": None, "dataset_split": "train", "dataset_revision": None}
        of_rows = {"column": "text", "roles": None, "shuffle_seed": None}
        for fields, sources in ((of_datasets, ("dataset",)), (of_rows, ("files", "dataset"))):
            given = [f"{name}={getattr(self, name)!r}" for name, default in fields.items() if getattr(self, name) != default]
            if given and self.source not in sources:
                only = " and ".join(f'source="{source}"' for source in sources)
                raise ValueError(f"{', '.join(given)} with source={self.source!r}: only {only} can have it; leave it out")
        if self.roles is not None and not self.roles:
            raise ValueError("roles=(): no token would count; name at least one role, as assistant, or leave roles out")
        if self.skip_positions > self.context - 2:
            raise ValueError(
                f"skip_positions={self.skip_positions} leaves nothing to measure of context={self.context}; "
                f"set it to at most {self.context - 2}"
            )
        if (self.source == "files") != bool(self.paths):
            raise ValueError(f'paths={self.paths!r} with source={self.source!r}: source="files" needs paths, others take none')
        if (self.source == "dataset") != (self.dataset is not None):
            raise ValueError(f'dataset={self.dataset!r} with source={self.source!r}: source="dataset" needs it, others do not')
        return self
