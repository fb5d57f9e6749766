"""Where the pieces of banks train on a cluster, and when: list scheduling, longest first. Numbers in, numbers out; torch-free."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from everyscope.cost.devices import Device
from everyscope.cost.pieces import Bank, Piece, divided, pieces_of

FINENESS = (4.0, 2.0, 1.0, 0.5, 0.25)
"""Pieces are divided until the longest takes at most this share of what all would take side by side; the best is kept. Coarse
ones leave devices idle and read less."""


@dataclass(frozen=True)
class Placed:
    """A piece, when it starts and where."""

    piece: Piece
    start: float
    """[s]."""
    devices: tuple[int, ...]
    """Numbers of its devices; those of a host are consecutive."""

    @property
    def end(self) -> float:
        """[s]."""
        return self.start + self.piece.seconds


@dataclass(frozen=True)
class Placement:
    """All pieces on a cluster."""

    placed: tuple[Placed, ...]
    devices: int

    @cached_property
    def seconds(self) -> float:
        """Until the last piece ends [s]."""
        return max(placed.end for placed in self.placed)

    @cached_property
    def busy(self) -> float:
        """Devices' time that pieces take [device s]."""
        return sum(placed.piece.seconds * placed.piece.devices for placed in self.placed)

    @cached_property
    def read_bytes(self) -> int:
        """Off the disk for all pieces, each by itself [bytes]."""
        return sum(placed.piece.disk_bytes for placed in self.placed)

    def seconds_from(self, disk_rate: float | None) -> float:
        """Until the last piece ends where they share a disk of so many bytes/s; None is no limit [s]."""
        return max(self.seconds, 0.0 if disk_rate is None else self.read_bytes / disk_rate)

    @cached_property
    def least_seconds(self) -> float:
        """No placement of these pieces ends before all devices were busy all the time, nor before the longest piece [s]."""
        return max(self.busy / self.devices, max(placed.piece.seconds for placed in self.placed))


def place(banks: Sequence[Bank], device: Device, devices: int, disk_rate: float | None = None) -> Placement:
    """The placement found that is quickest on a disk of `disk_rate` [bytes/s]; ConfigError where an SAE does not fit.

    Where all pieces take one device, longest first ends within 4/3 - 1/(3 n) of the best order (Graham 1969). Pieces of several
    devices have to find room on one host, or on whole hosts, at once, and no such bound; `least_seconds` bounds what was lost in
    either case, and tests hold it to a factor of two.
    """
    whole = [piece for bank in banks for piece in pieces_of(bank, device, devices)]
    found = []
    for share in FINENESS:
        pieces = divided(whole, devices, share)
        for order in (lambda piece: (-piece.seconds,), lambda piece: (-piece.devices, -piece.seconds)):
            found.append(_schedule(sorted(pieces, key=order), devices, device.devices_per_host))
    return min(found, key=lambda placement: placement.seconds_from(disk_rate))


def _schedule(pieces: list[Piece], devices: int, per_host: int) -> Placement:
    """List scheduling: whenever devices come free, the first piece of the list that finds room starts."""
    hosts = [list(range(first, min(first + per_host, devices))) for first in range(0, devices, per_host)]
    free = [list(host) for host in hosts]
    running: list[tuple[float, int, Placed]] = []
    placed: list[Placed] = []
    now, waiting = 0.0, list(pieces)
    while waiting:
        left = []
        for number, piece in enumerate(waiting):
            taken = _take(free, piece.devices, per_host)
            if taken is None:
                left.append(piece)
                if not any(free):
                    left += waiting[number + 1 :]
                    break
            else:
                placed.append(Placed(piece, now, taken))
                heapq.heappush(running, (placed[-1].end, len(placed), placed[-1]))
        waiting = left
        if waiting:
            now = running[0][0]
            while running and running[0][0] <= now:
                for number in heapq.heappop(running)[2].devices:
                    free[number // per_host].append(number)
    return Placement(tuple(placed), devices)


def _take(free: list[list[int]], count: int, per_host: int) -> tuple[int, ...] | None:
    """Devices for a piece, taken from those that are free: of the host with the least room for it, or whole hosts; else None."""
    if count <= per_host:
        host = min((host for host in free if len(host) >= count), key=len, default=None)
        if host is None:
            return None
        taken = sorted(host)[:count]
        host[:] = [number for number in host if number not in taken]
        return tuple(taken)
    whole = [host for host in free if len(host) == per_host][: -(-count // per_host)]
    if len(whole) * per_host < count:
        return None
    taken = sorted(number for host in whole for number in host)
    for host in whole:
        host.clear()
    for number in taken[count:]:
        free[number // per_host].append(number)
    return tuple(taken[:count])
