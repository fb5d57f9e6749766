"""Training groups that read their activations from a server, which is a job itself: started beside them, and found by them.

For shards on storage that many readers share slowly: the server reads a chunk once, and every training group of the site takes it
from its memory. It listens at its host's own address in the cluster, which it writes into a file of the run; a training group
reads that file when it begins. A lost server is restarted, maybe elsewhere; a training group that misses it for too
long is lost too, and finds the new one at its next attempt. What is trained does not depend on any of this.
"""

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from everyscope.activations.serve.config import ServeConfig, host_and_port
from everyscope.activations.serve.origin import ShardOrigin
from everyscope.activations.serve.run import serving
from everyscope.base.errors import StorageError
from everyscope.base.files import write_text
from everyscope.base.ids import content_id
from everyscope.base.schema import Schema
from everyscope.base.signals import EXIT_CODE, termination
from everyscope.run.jobs.config import EngineConfig
from everyscope.run.jobs.job import Job, Progress, Resources
from everyscope.run.jobs.ray_task import ADDRESS_VARIABLE
from everyscope.train.config import TrainConfig
from everyscope.train.run import run_counting_rows as train_group

FIND_SECONDS, POLL_SECONDS, CONNECT_SECONDS = 120.0, 0.2, 5.0
"""How long a training group waits for its server to come up, how often it looks, and how long a connection may take [s]."""


class FoundServer(Schema):
    """A server of shards that says where it is."""

    serve: ServeConfig
    """The server; where it listens is decided by the host that it comes to."""
    address: Path
    """The file that it writes its address into."""


class ServedGroup(Schema):
    """A training group and where its server is to be found."""

    group: TrainConfig
    """The training group; its source is what the file says."""
    address: Path
    """The file with the server's address."""
    tls_roots: Path | None = None
    """Certificates to trust the server by, PEM."""


def served(jobs: Sequence[Job], engine: EngineConfig, folder: Path) -> list[Job]:
    """The jobs of training groups, reading from servers, and those servers: one for each folder of shards. Addresses go into
    `folder`.
    """
    if not jobs:
        return []
    roots = sorted({_root(job.config) for job in jobs})
    files = {root: folder.absolute() / f"server_{content_id(str(root))}.address" for root in roots}
    for path in files.values():
        path.unlink(missing_ok=True)  # of a run that was killed
    servers = []
    for number, root in enumerate(roots):
        config = ServeConfig(shards=root, tls_certificate=engine.tls_certificate, tls_key=engine.tls_key, offer_files=False)
        servers.append(
            Job(
                serve_shards,
                FoundServer(serve=config, address=files[root]),
                f"server {number + 1}/{len(roots)}",
                Resources(memory_bytes=config.buffer_bytes),
                is_service=True,
            )
        )
    return [
        *servers,
        *(
            replace(
                job,
                work=train_served,
                config=ServedGroup(group=job.config, address=files[_root(job.config)], tls_roots=engine.tls_roots),
            )
            for job in jobs
        ),
    ]


def serve_shards(config: FoundServer) -> None:
    """Serve until asked to stop, which ends with SystemExit. Raises what `serve.run.serving` does."""
    host = os.environ.get(ADDRESS_VARIABLE, "127.0.0.1")
    here = config.serve.model_copy(update={"listen": f"{host}:0"})
    with serving(here, ShardOrigin(here.shards, here.chunk_rows)) as server, termination() as is_asked_to_stop:
        write_text(config.address, server.location)
        while not is_asked_to_stop():
            time.sleep(POLL_SECONDS)
    config.address.unlink(missing_ok=True)
    raise SystemExit(EXIT_CODE)


def train_served(config: ServedGroup, progress: Progress) -> None:
    """Train from the server that the file names. StorageError where none came up, else what `train.run.run` raises."""
    end = time.monotonic() + FIND_SECONDS
    while (place := _listening(config.address)) is None:
        if time.monotonic() > end:
            raise StorageError(f"{config.address}: no activation server has come up; see the events of its job")
        time.sleep(POLL_SECONDS)
    group, sources = config.group, {"source": f"{place}/{config.group.site.folder}"}
    if group.writes is not None:
        sources["target_source"] = f"{place}/{group.writes.folder}"
    train_group(group.model_copy(update={**sources, "tls_roots": config.tls_roots}), progress)


def _listening(address: Path) -> str | None:
    """What the file says, if somebody listens there: a server that was killed leaves its address behind."""
    if not address.is_file():
        return None
    place = address.read_text(encoding="utf-8").strip()
    host, port = host_and_port(place.partition("://")[2])
    try:
        with socket.create_connection((host, port), timeout=CONNECT_SECONDS):
            return place
    except OSError:
        return None


def _root(group: TrainConfig) -> Path:
    """The folder of all sites' shards."""
    return group.shards.parents[len(Path(group.site.folder).parts) - 1]
