"""Which transcoders of a suite go to circuit-tracer, and how they take the MLP's input there."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from everyscope.base.schema import Schema


class CircuitTracerConfig(Schema):
    """One transcoder for every layer of a published suite, written as a set that circuit-tracer loads, with its feature files."""

    suite: Path
    """The suite's folder, or that of the run that holds it."""
    out: Path
    """Folder of the set: config.yaml and layer_<n>.safetensors; features/ holds what its viewer shows."""
    width: int | None = Field(default=None, gt=0)
    """Number of latents of the transcoders, where the suite has several [latents]."""
    l0: float | None = Field(default=None, gt=0)
    """Of a layer's transcoders the one whose L0 is nearest to this; None takes the canonical one [latents]."""
    saes: str = "*"
    """Pattern of the transcoders' names in the run that trained them, as in *_skip."""
    model: str | None = None
    """The id or folder by which circuit-tracer loads the language model; None takes the suite's own name for it."""
    input: Literal["as_trained", "normalised", "mlp_input"] = "as_trained"
    """In which form transcoders take the MLP's input: normalised is without the norm's gain, mlp_input with it. From the
    form that they were trained on they are converted exactly, by the gain of the suite's language model."""
    output_hook: Literal["hook_mlp_out", "mlp.hook_out"] | None = None
    """What circuit-tracer calls the MLP's output; None takes hook_mlp_out, and for Qwen 3 mlp.hook_out, all it has there."""
    scan: str | None = None
    """Where its viewer finds feature files: the hub id that the folder will be uploaded under, or a path; None takes `out`."""
    features: bool = True
    """Whether feature files are written; the suite must be described."""
    graphs: tuple[Path, ...] = ()
    """Graph files of circuit-tracer, as graph_files/<slug>.json: the labels are written on their nodes, which it leaves empty."""
