"""What of a suite goes to Neuronpedia, under which names, and where it is sent."""

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from everyscope.base.addresses import checked_address
from everyscope.base.schema import Schema

NAME = re.compile(r"[a-z](-?[a-z0-9])*")
"""What the API takes as the name of a source set."""
MODEL_NAME = re.compile(r"[a-z]([._-]?[a-z0-9])*")
"""What it takes as a model's id: lower case, no two marks side by side, none at the end."""
KEY_VARIABLE = "NEURONPEDIA_API_KEY"
"""The environment variable with the key, as Neuronpedia's own client calls it."""


class NeuronpediaConfig(Schema):
    """One published suite, written as files for Neuronpedia, and sent to its API where that is asked for."""

    suite: Path
    """The suite's folder, or that of the run that holds it."""
    out: Path
    """Folder of the files: v1/ is the bulk layout, upload/ holds the bodies for the API."""
    model_id: str | None = None
    """The language model's id on Neuronpedia, as in gemma-2-2b; None makes it of the suite's own name for the model."""
    set: str | None = None
    """What the names of source sets begin with, as gemmascope in gemmascope-res-16k; None makes it of the suite's title."""
    saes: str = "*"
    """Pattern of the SAEs' folders below the suite, as in resid_post/layer_2/*."""
    creator_name: str = Field(default="everyscope", min_length=1)
    """Who is shown as the maker."""
    creator_id: str = Field(default="clkht01d40000jv08hvalcvly", min_length=1)
    """The user's id in the importing database to whom all rows belong; the default is that database's own default creator."""
    visibility: Literal["PUBLIC", "UNLISTED", "PRIVATE"] = "UNLISTED"
    """Who finds the release there; UNLISTED is open to all who know its address."""
    urls: tuple[str, ...] = ()
    """Addresses of paper, weights or code."""
    hf_repo: str | None = None
    """Where on the Hugging Face hub the suite lies, as org/repo; None says nothing."""
    explanation_type: str | None = None
    """Name under which Neuronpedia knows the method of the labels; imports fail with one that it does not know. None: none."""
    explanation_model: str | None = None
    """Name under which it knows the model that wrote the labels. None: none."""
    latents_per_file: int = Field(default=1024, gt=0)
    """Latents in a file of the bulk layout; more where an SAE would otherwise need too many files [latents]."""
    max_file_bytes: int = Field(default=200_000_000, ge=2**20)
    """Size of such a file when unpacked; its importer inserts it in pieces of so much at most [bytes]."""
    max_body_bytes: int = Field(default=4_000_000, ge=2**20)
    """Size of a body for the API [bytes]."""
    upload: bool = False
    """Whether the bodies are sent, with the key from the environment (NEURONPEDIA_API_KEY)."""
    host: str | None = None
    """Where they are sent, as https://HOST; has no default."""
    dry_run: bool = False
    """Say what would be sent, and send nothing."""
    create_model: bool = False
    """Whether the language model is made known there first; it must be known before anything else is sent."""
    retries: int = Field(default=6, ge=0)
    """Attempts after a failed one, for each body [attempts]."""
    backoff_s: float = Field(default=2.0, ge=0)
    """Wait before the second attempt; doubles with each further one [s]."""
    timeout_s: float = Field(default=120.0, gt=0)
    """How long an answer may take [s]."""

    @field_validator("model_id")
    @classmethod
    def _check_model_id(cls, value: str | None) -> str | None:
        if value is not None and not (MODEL_NAME.fullmatch(value) and len(value) <= 128):
            raise ValueError(f"model_id={value!r}: expected lower-case letters, digits, dots and dashes, as in gemma-2-2b")
        return value

    @field_validator("set")
    @classmethod
    def _check_set(cls, value: str | None) -> str | None:
        if value is not None and not NAME.fullmatch(value):
            raise ValueError(f"set={value!r}: expected lower-case letters, digits and single dashes, as in gemmascope")
        return value

    @field_validator("host")
    @classmethod
    def _check_host(cls, value: str | None) -> str | None:
        return None if value is None else checked_address("host", value, has_path=False)

    @model_validator(mode="after")
    def _check_upload(self) -> "NeuronpediaConfig":
        if self.upload and self.host is None:
            raise ValueError("upload needs a host; give --host https://HOST")
        if not self.upload and (self.host is not None or self.dry_run or self.create_model):
            raise ValueError("host, dry_run and create_model are for uploads; give --upload too, or leave them out")
        return self
