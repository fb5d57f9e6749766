"""The devices that a plan reckons with: what the makers promise of them, and what share of it a run may hope for. Torch-free.

Peaks are public figures of one device. Shares are ours, and assumed: nothing here has been measured on a cluster. A JSON file
whose fields are those of `Device` takes their place, all of them or, beside `"kind"`, those that somebody has measured.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from everyscope.base.errors import ConfigError
from everyscope.base.schema import Schema, one_line


class Device(Schema):
    """One device of a cluster and its links. Bandwidths count one direction, peaks a multiplication and an addition as two."""

    name: str
    """What it is called."""
    origin: str
    """Where its peaks are from, for people."""
    bfloat16_flops: float = Field(gt=0)
    """Peak of dense products in bfloat16 [operations/s]."""
    float32_flops: float = Field(gt=0)
    """Peak of dense products in float32 proper, as dense steps are computed: torch leaves TF32 off [operations/s]."""
    memory_bytes: int = Field(gt=0)
    """Memory of the device [bytes]."""
    memory_bandwidth: float = Field(gt=0)
    """Between the device and its memory [bytes/s]."""
    host_bandwidth: float = Field(gt=0)
    """From the host's memory to the device [bytes/s]."""
    interconnect_bandwidth: float = Field(gt=0)
    """To other devices of the same host [bytes/s]."""
    devices_per_host: int = Field(default=8, ge=1)
    """Devices that share a host [devices]."""
    product_share: float = Field(default=0.6, gt=0, le=1)
    """Share of the peak that large products reach; assumed [1]."""
    memory_share: float = Field(default=0.8, gt=0, le=1)
    """Share of the memory's bandwidth that streaming kernels reach; assumed [1]."""
    link_share: float = Field(default=0.8, gt=0, le=1)
    """Share of the links' bandwidths that large transfers reach; assumed [1]."""
    usable_memory: float = Field(default=0.9, gt=0, le=1)
    """Share of the memory that a language model may take; assumed [1]."""
    utilisation: float | None = Field(default=None, gt=0, le=1)
    """Model FLOP utilisation of a training step, if one was measured: 12 operations per row, input and latent, against the peak
    in bfloat16. None predicts steps from the other fields [1]."""

    @property
    def bfloat16_rate(self) -> float:
        """What products in bfloat16 are expected to reach [operations/s]."""
        return self.bfloat16_flops * self.product_share

    @property
    def float32_rate(self) -> float:
        """What products in float32 are expected to reach [operations/s]."""
        return self.float32_flops * self.product_share

    @property
    def memory_rate(self) -> float:
        """What streaming kernels are expected to move [bytes/s]."""
        return self.memory_bandwidth * self.memory_share

    @property
    def host_rate(self) -> float:
        """What copies from the host are expected to reach [bytes/s]."""
        return self.host_bandwidth * self.link_share


NVIDIA = (
    "the maker's data sheets: products without sparsity, half of the links' two-way figures, one 400 (A100: 200) Gbit/s port each"
)
H100 = Device(
    name="h100",
    origin=f"SXM, 80 GB; {NVIDIA}",
    bfloat16_flops=989e12,
    float32_flops=67e12,
    memory_bytes=80 * 10**9,
    memory_bandwidth=3.35e12,
    host_bandwidth=64e9,
    interconnect_bandwidth=450e9,
)
DEVICES = {
    "h100": H100,
    "h200": H100.model_copy(
        update={
            "name": "h200",
            "origin": f"SXM, 141 GB; {NVIDIA}",
            "memory_bytes": 141 * 10**9,
            "memory_bandwidth": 4.8e12,
        }
    ),
    "a100": Device(
        name="a100",
        origin=f"SXM, 80 GB; {NVIDIA}",
        bfloat16_flops=312e12,
        float32_flops=19.5e12,
        memory_bytes=80 * 10**9,
        memory_bandwidth=2.039e12,
        host_bandwidth=32e9,
        interconnect_bandwidth=300e9,
    ),
    "tpuv3": Device(
        name="tpuv3",
        origin=(
            "peak, memory and all-reduce rate (of a pod, by chip): Google's documentation of Cloud TPU v3; host link: assumed, "
            "one PCIe 3.0 x16 for a host's four chips; float32: assumed, six passes in bfloat16; "
            "utilisation: Gemma Scope, section 3.3"
        ),
        bfloat16_flops=123e12,
        float32_flops=123e12 / 6,
        memory_bytes=32 * 2**30,
        memory_bandwidth=900e9,
        host_bandwidth=15.75e9 / 4,
        interconnect_bandwidth=340e12 / 1024,
        devices_per_host=4,
        utilisation=0.508,
    ),
}
"""The kinds that we know, by name. Gemma Scope trained on tpuv3, on which our engine does not run: it serves to compare."""


def device_of(kind: str) -> Device:
    """The device called `kind`, or that of a JSON file; ConfigError where there is none or its fields do not fit."""
    if kind in DEVICES:
        return DEVICES[kind]
    path = Path(kind)
    if path.suffix != ".json":
        raise ConfigError(f"--gpu {kind}: expected {', '.join(DEVICES)}, or a .json file with rates that were measured")
    try:
        fields: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f'--gpu {kind}: cannot be read as JSON ({error}); give a file of fields as {{"kind": "h100"}}'
        ) from error
    if not isinstance(fields, dict):
        raise ConfigError(f"--gpu {kind}: expected an object of fields, got {type(fields).__name__}")
    base = fields.pop("kind", None)
    if base is not None and base not in DEVICES:
        raise ConfigError(f"--gpu {kind}: kind {base!r} is none of {', '.join(DEVICES)}; leave it out and give all fields")
    known = {} if base is None else DEVICES[base].as_json()
    named = {"name": path.stem, "origin": path.name if base is None else f"{base} as {path.name} has it"}
    try:
        return Device.model_validate(known | named | fields)
    except ValidationError as error:
        raise ConfigError(f"--gpu {kind}: {one_line(error)}") from error
