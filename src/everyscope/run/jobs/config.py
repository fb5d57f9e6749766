"""Where the jobs of a run go, and how hard they are tried. Torch-free."""

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from everyscope.base.schema import Schema

HERE = "local"
"""The address of a Ray cluster that is started on this host and ends with the command."""


class EngineConfig(Schema):
    """Which machine, or machines, a run's jobs run on. Nothing here decides what they compute, but for `job_cpus`."""

    engine: Literal["local", "ray"] = "local"
    """This host, or the hosts of a Ray cluster."""
    address: str = HERE
    """Of the Ray cluster, HOST:PORT; local starts one on this host's loopback alone, which ends with the command."""
    workers: int | None = Field(default=None, ge=1)
    """Training groups trained side by side; None: as many as there are cores for, on a cluster as fit [jobs]."""
    job_cpus: int | None = Field(default=None, ge=1)
    """Cores, and threads, of each job that runs the language model, and of each training group; sums depend on it in their last
    bits. None takes what a run without engine would, so that both come to the same bits [cores]."""
    model_gpus: int = Field(default=1, ge=1)
    """GPUs of each job that runs the language model on them; more for a model with a device_map [devices]."""
    evaluate_jobs: int | None = Field(default=None, ge=1)
    """Jobs among which the SAEs of an evaluation are divided; each makes clean passes of its own, which cost.json counts. None
    takes one for each core of a CPU, as far as the model fits into memory so often, and else one [jobs]."""
    device_bytes: int | None = Field(default=None, ge=1)
    """Memory of one GPU, of which training groups get shares; None asks this host's, and gives each training group a whole one
    where it has none
    [bytes]."""
    gpus: int | None = Field(default=None, ge=1)
    """GPUs of the cluster, among which training groups are divided so that none waits for the longest; None divides only groups
    that do not fit one [devices]."""
    gpus_per_host: int | None = Field(default=None, ge=1)
    """GPUs of each host of the cluster, over which one SAE may be sharded; None takes this host's, or 8 [devices]."""
    serve: bool = False
    """Let training groups read from activation servers, which are jobs beside them, instead of reading shards each by itself.
    Beyond one host they need EVERYSCOPE_TOKEN in the environment of the cluster's hosts, and TLS."""
    tls_certificate: Path | None = None
    """The servers' certificate chain, PEM."""
    tls_key: Path | None = None
    """Its private key, PEM."""
    tls_roots: Path | None = None
    """Certificates to trust the servers by, PEM."""
    tries: int = Field(default=5, ge=1)
    """Attempts of one job in a row that bring it no further, before the run gives up [1]."""
    patience_seconds: float = Field(default=600.0, ge=0)
    """How long a cluster may be away, or starting, before the run gives up [s]."""

    @field_validator("address")
    @classmethod
    def _check_address(cls, address: str) -> str:
        if address != HERE and not re.fullmatch(r"[A-Za-z0-9_.-]+:\d{1,5}|\[[0-9A-Fa-f:]+\]:\d{1,5}", address):
            raise ValueError(f"address={address!r}: expected HOST:PORT of a Ray head, as in 10.0.0.5:6379, or {HERE}")
        return address

    @model_validator(mode="after")
    def _check_engine(self) -> "EngineConfig":
        if self.engine == "local" and self.address != HERE:
            raise ValueError(f"address={self.address!r} is of a Ray cluster; give engine='ray' too, or leave it out")
        if self.engine == "local" and (self.gpus or self.gpus_per_host):
            raise ValueError("gpus and gpus_per_host are for engine='ray'; of this host all are used, see CUDA_VISIBLE_DEVICES")
        if self.engine == "local" and self.serve:
            raise ValueError("serve is for engine='ray'; training groups on one host share what they read through its page cache")
        if not self.serve and (self.tls_certificate or self.tls_key):
            raise ValueError("tls_certificate and tls_key are for serve; give that too, or leave them out")
        return self
