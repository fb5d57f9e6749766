"""What is explained, from which text, and, where a language model is to write labels, which one and for how much."""

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from everyscope.base.addresses import checked_address
from everyscope.base.schema import Schema
from everyscope.sites.config import ModelConfig
from everyscope.text.config import TextConfig

Syntax = Literal["python", "plain"]


class EndpointConfig(Schema):
    """A language model behind any OpenAI-compatible endpoint (`<url>/chat/completions`), hosted or on this machine.

    The key is no field: it is read from the environment when a request is sent, and never stored or logged.
    """

    url: str
    """Base URL, as in http://127.0.0.1:8000/v1; https unless the host is this machine."""
    model: str = Field(min_length=1)
    """The model's name, as the endpoint knows it."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; where it is not set, no key is sent, as local servers like it."""
    saes: str = "*"
    """Pattern of `<site>/layer_<L>/<SAE>` for the SAEs whose latents it labels, as in resid_post/layer_2/*."""
    num_latents: int = Field(default=32, gt=0)
    """Latents that are labelled and scored in each of those SAEs, drawn by seed [latents]."""
    num_examples: int = Field(default=20, gt=0)
    """Windows shown to the explainer: half of them the strongest, half from all deciles [windows]."""
    judged_windows: int = Field(default=20, gt=1)
    """Windows that are judged for each score, half of them active [windows]."""
    windows_per_request: int = Field(default=5, gt=0)
    """Windows judged by one request [windows]."""
    max_completion_tokens: int = Field(default=400, gt=0)
    """Limit of each answer [tokens]."""
    limit_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the endpoint calls that limit: local servers know the former, some hosted models only the latter."""
    temperature: float | None = Field(default=0.0, ge=0)
    """Sampling temperature; None sends none, for models that refuse one [1]."""
    concurrency: int = Field(default=4, gt=0)
    """Requests under way at once [requests]."""
    timeout_s: float = Field(default=60.0, gt=0)
    """A request is given up after so long [s]."""
    retries: int = Field(default=4, ge=0)
    """Further attempts after a 429, a 5xx or a broken connection, each after twice the wait [attempts]."""
    backoff_s: float = Field(default=1.0, ge=0)
    """Wait before the first of them [s]."""
    price_prompt: float | None = Field(default=None, ge=0)
    """Price of a million prompt tokens, in any currency; None leaves money out."""
    price_completion: float | None = Field(default=None, ge=0)
    """Price of a million completion tokens, in the same currency."""
    max_requests: int = Field(default=2000, gt=0)
    """Refuse to start, and stop, beyond so many requests, attempts that failed included [requests]."""
    max_cost: float | None = Field(default=None, ge=0)
    """Refuse to start, and stop, beyond so much money; needs both prices."""
    is_quote_only: bool = False
    """Say what it would cost, and spend nothing."""

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        return checked_address("url", url, has_path=True)

    @model_validator(mode="after")
    def _check_prices(self) -> "EndpointConfig":
        if (self.price_prompt is None) != (self.price_completion is None):
            raise ValueError("price_prompt and price_completion go together; give both, or neither")
        if self.max_cost is not None and self.price_prompt is None:
            raise ValueError(f"max_cost={self.max_cost} cannot be held without prices; give price_prompt and price_completion")
        return self


class ExplainConfig(Schema):
    """Labels for every alive latent of all trained SAEs of one model, learnt on training documents, scored on held-out ones."""

    model: ModelConfig
    """The language model whose activations the SAEs read."""
    text: TextConfig
    """The corpus; explainers see its train split, scorers its held-out split."""
    trained: Path
    """Folder written by `everyscope train`: every SAE in it is explained."""
    saes: str = "*"
    """Pattern of `<site>/layer_<L>/<SAE>` for the SAEs whose latents are labelled, as in resid_post/layer_2/*."""
    out: Path
    """The folder of descriptions; gets <site>/layer_<L>/<SAE>/explanations.parquet."""
    num_sequences: int = Field(default=512, gt=0)
    """Blocks of training documents that labels are learnt on [blocks]."""
    block_stride: int = Field(default=8, gt=0)
    """Distance between blocks of the train split that are read, so that many documents are seen; smaller where the text is too
    short for that [blocks]."""
    num_held_out_sequences: int = Field(default=512, gt=0)
    """Held-out blocks that labels are scored on, from the first on; fewer where the text ends early [blocks]."""
    batch_blocks: int = Field(default=16, gt=0)
    """Blocks per forward pass [blocks]."""
    saes_per_pass: int = Field(default=16, gt=0)
    """SAEs whose activations are held in memory together; each such group takes one pass over the text [SAEs]."""
    window_tokens: int = Field(default=16, gt=1)
    """Length of the windows that are judged [tokens]."""
    active_windows: int = Field(default=40, gt=1)
    """Windows on which a latent fires, drawn evenly from its deciles, for each offline score [windows]."""
    silent_windows: int = Field(default=40, gt=1)
    """Windows on which it is silent; half of them are ones on which its most co-firing neighbours fire [windows]."""
    null_labels: int = Field(default=4, gt=0)
    """Labels of other latents whose mean score is the null of an offline label [labels]."""
    bootstrap_draws: int = Field(default=200, gt=0)
    """Resamplings of the held-out documents behind each interval [1]."""
    syntax: Syntax | None = None
    """The language whose syntax labels may refer to; None: python for the standard library, plain for any other text."""
    endpoint: EndpointConfig | None = None
    """The language model that labels a sample of the latents; None: offline labels alone."""
    share: tuple[int, int] = (0, 1)
    """Which share of the SAEs, of how many, this process takes; each reads the text for itself."""
    seed: int = Field(default=0, ge=0)
    """Seed of halves, samples, nulls and resamplings."""

    @model_validator(mode="after")
    def _check_share(self) -> "ExplainConfig":
        number, count = self.share
        if not 0 <= number < count:
            raise ValueError(f"share={self.share}: expected (number, count) with number from 0 to count - 1")
        return self

    @property
    def language(self) -> Syntax:
        """The language of the text, chosen or following from its source."""
        return self.syntax or ("python" if self.text.source == "standard_library" else "plain")
