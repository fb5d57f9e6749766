"""Which language model is read, and how it is run."""

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

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
    """Torch device that the model runs on, as in cpu or cuda:0; with device_map, the device of work on its activations."""
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = None
    """How accelerate spreads the blocks of a model that no device holds over all of this machine's GPUs, then its memory, then
    its disk; None keeps the model on `device`."""
    weights: Literal["trained", "random"] = "trained"
    """The model's own weights, or an untrained sibling's: transformers' initialisation of the same architecture."""
    weights_seed: int = Field(default=0, ge=0)
    """Seed of weights="random"."""

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        if self.weights == "trained" and self.weights_seed:
            raise ValueError(f'weights_seed={self.weights_seed} with weights="trained": only weights="random" are drawn')
        if self.weights == "random" and self.device_map is not None:
            raise ValueError(
                f'device_map={self.device_map} with weights="random": these are drawn as a whole; leave device_map out'
            )
        return self

    @model_serializer(mode="wrap")
    def _without_the_usual(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Trained weights on one device go without saying: what is of them keeps the identity from before others were known."""
        unsaid = {"weights", "weights_seed"} if self.weights == "trained" else set[str]()
        unsaid |= {"device_map"} if self.device_map is None else set()
        return {name: value for name, value in handler(self).items() if name not in unsaid}
