"""What the ranks of test_launch.py do, where spawned processes can find it."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import torch

from everyscope.base.errors import ConfigError
from everyscope.sae.mesh import Mesh
from everyscope.train.launch import RankInfo
from everyscope.train.process_group import ProcessGroup, file_store, socket_store

Progress = Callable[[int], None]


def die_while_told(folder: Path, rank_info: RankInfo, progress: Progress) -> None:
    """Count the starts; rank 1 kills itself as often as the file `kills` says, and gets a step further each time it `moves`."""
    path = folder / f"starts_{rank_info.rank}"
    starts = int(path.read_text()) + 1 if path.exists() else 1
    path.write_text(str(starts))
    group = ProcessGroup(Mesh(1, rank_info.ranks, rank_info.rank), file_store(rank_info.rendezvous, rank_info.ranks))
    progress(starts if (folder / "moves").exists() else 1)
    group.barrier()
    if rank_info.rank == 1 and starts <= int((folder / "kills").read_text()):
        os.kill(os.getpid(), signal.SIGKILL)
    group.barrier()


def refuse(folder: Path, rank_info: RankInfo, progress: Progress) -> None:
    """Rank 1 finds something wrong, while the other waits for it."""
    group = ProcessGroup(Mesh(2, 1, rank_info.rank), file_store(rank_info.rendezvous, rank_info.ranks))
    if rank_info.rank == 1:
        raise ConfigError("colour='green': expected blue; set colour=blue")
    group.barrier()


def stumble(folder: Path, rank_info: RankInfo, progress: Progress) -> None:
    """A mistake of ours."""
    raise ZeroDivisionError("by nothing")


def meet_by_socket(address: tuple[str, int], rank_info: RankInfo, progress: Progress) -> None:
    """Meet at a bound socket, and sum."""
    host, port = address
    group = ProcessGroup(Mesh(1, 2, rank_info.rank), socket_store(host, port, rank_info.rank, rank_info.ranks, wait_seconds=60))
    x = torch.arange(4, dtype=torch.float64) + rank_info.rank
    group.sum_(x, "replicas")
    group.sum_(x, "shards")
    assert x.tolist() == [1, 3, 5, 7]
    assert group.bytes_reduced == {"shards": 0, "replicas": 32, "all": 0}
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    store = [line[1].partition(":")[0] for line in lines if line[3] == "0A" and int(line[1].partition(":")[2], 16) == port]
    assert store == ["0100007F"]
    group.barrier()
    progress(1)
