"""Which language model is read, and how it is run."""

from typing import Literal

from everyscope.base.schema import Schema


class ModelConfig(Schema):
    """A causal language model of Hugging Face's transformers."""

    name: str = "tiny"
    """A bundled model (tiny, tiny-it), a local folder, or a hub id."""
    revision: str | None = None
    """Commit or tag on the hub; None takes the newest."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of weights and forward passes."""
    device: str = "cpu"
    """Torch device that the model runs on, as in cpu or cuda:0."""
