"""What a server holds, where it listens, how much memory it takes and whom it lets in."""

import re
from pathlib import Path

from pydantic import Field, field_validator, model_validator

from everyscope.base.schema import Schema


class ServeConfig(Schema):
    """One activation server. No field holds a secret: the token comes from a file or from the environment."""

    shards: Path
    """The folder `shards` of a run, or that of one site: all finished sites below it are served."""
    listen: str = "127.0.0.1:8815"
    """HOST:PORT; port 0 takes a free one. Anything but this host itself needs a token and TLS."""
    slice: str = "0/1"
    """I/N: serve the I-th (from 0) of N contiguous slices of each site; N servers hold a site together."""
    chunk_rows: int = Field(default=8192, ge=1, le=2**24)
    """Rows that are read, kept and sent together; equal for all servers of a site [rows]."""
    buffer_bytes: int = Field(default=2 << 30, ge=1)
    """Memory for chunks, those under way to trainers included [bytes]."""
    in_flight: int = Field(default=4, ge=1, le=64)
    """Chunks in flight per trainer [chunks]."""
    lease_seconds: float = Field(default=60.0, gt=0)
    """A trainer that is silent for longer loses its lease [s]."""
    hold_seconds: float = Field(default=0.0, ge=0)
    """How long chunks that an idle trainer will need soon are kept from being replaced; 0 never keeps them [s]."""
    wait_seconds: float = Field(default=5.0, gt=0)
    """A request whose chunk is not ready by then gets the answer to ask again [s]."""
    read_threads: int = Field(default=1, ge=1, le=64)
    """Chunks read from disk at the same time."""
    offer_files: bool = True
    """Tell trainers on this host the files' paths, so that they read them without the server."""
    token_file: Path | None = None
    """A file with the token that clients must send; None takes EVERYSCOPE_TOKEN, where it is set."""
    tls_certificate: Path | None = None
    """The server's certificate chain, PEM."""
    tls_key: Path | None = None
    """Its private key, PEM."""
    log: Path | None = None
    """JSON lines of leases, refusals and errors; None writes none."""
    drain_seconds: float = Field(default=30.0, ge=0)
    """When asked to stop, how long to wait for chunks under way [s]."""

    @field_validator("listen")
    @classmethod
    def _check_listen(cls, listen: str) -> str:
        host, port = host_and_port(listen)
        if not host or not 0 <= port < 65536:
            raise ValueError(f"listen={listen!r}: expected HOST:PORT, as in 127.0.0.1:8815")
        return listen

    @field_validator("slice")
    @classmethod
    def _check_slice(cls, part: str) -> str:
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", part)
        if not found or not int(found[1]) < int(found[2]):
            raise ValueError(f"slice={part!r}: expected I/N with 0 <= I < N, as in 0/2 and 1/2")
        return part

    @model_validator(mode="after")
    def _check_tls(self) -> "ServeConfig":
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together; give both or none")
        return self

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        return host_and_port(self.listen)

    @property
    def slice_index(self) -> int:
        """Which slice is served, from 0."""
        return int(self.slice.partition("/")[0])

    @property
    def slice_count(self) -> int:
        """Of how many."""
        return int(self.slice.partition("/")[2])


def host_and_port(text: str) -> tuple[str, int]:
    """The two parts of HOST:PORT, where HOST may be [IPv6]; an empty host or port -1 where it is something else."""
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port) if port.isascii() and port.isdigit() else -1
