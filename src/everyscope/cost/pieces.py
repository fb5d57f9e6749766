"""Banks cut into pieces that fit devices, and what a piece takes of them. Torch-free.

A bank that does not fit a device is divided: first by SAEs, which need nothing of one another and only read their batches
again, and an SAE that fits none by latents. Where devices would wait for the longest piece, that one is divided further, by SAEs
and then over twice as many devices. Of these, so few are replicas as the paper advises (`spread`).
"""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from everyscope.base.errors import ConfigError
from everyscope.base.files import human_bytes
from everyscope.cost.devices import Device
from everyscope.cost.step import (
    Load,
    StepTime,
    all_reduce_seconds,
    batch_bytes,
    compute_time,
    copy_seconds,
    dense_bytes,
    pairs_bytes,
    screen_bytes,
    state_bytes,
    summed_bytes,
)

WORTH = 0.9
"""A division must bring its piece's time down to this share of what it was, or is not made [1]."""


@dataclass(frozen=True)
class PlannedCode:
    """What a plan must know of an SAE."""

    width: int
    l0: float
    """Active latents of a row at the end of training, aimed at or guessed [latents]."""
    groups: int = 1
    """Matryoshka prefixes."""


@dataclass(frozen=True)
class Bank:
    """SAEs of one site that see the same batches."""

    site: str
    d_in: int
    saes: tuple[PlannedCode, ...]
    num_tokens: int
    """Rows that each SAE sees [rows]."""
    batch_rows: int
    row_bytes: int
    """One row on disk [bytes]."""

    @property
    def steps(self) -> int:
        """Updates [steps]."""
        return self.num_tokens // self.batch_rows


@dataclass(frozen=True)
class Piece:
    """Some SAEs of a bank on `shards` x `replicas` devices, on one kind of device."""

    bank: Bank
    saes: tuple[PlannedCode, ...]
    device: Device
    shards: int = 1
    """Parts of each SAE's latents."""
    replicas: int = 1
    """Parts of each batch."""

    @property
    def devices(self) -> int:
        """Devices that it takes, all at once."""
        return self.shards * self.replicas

    @cached_property
    def loads(self) -> tuple[Load, ...]:
        """Each SAE's part on one device."""
        return tuple(
            Load.of(self.bank.d_in, sae.width, sae.l0, self.bank.batch_rows, self.shards, self.replicas, sae.groups)
            for sae in self.saes
        )

    @cached_property
    def memory(self) -> int:
        """On each device: what stays, work space of every shape by pairs, of the largest dense step, batches [bytes]."""
        stays = sum(state_bytes(load.d_in, load.width) + screen_bytes(load.d_in, load.width) for load in self.loads)
        shapes = {(load.width, load.groups): load for load in self.loads}.values()
        dense = max(dense_bytes(load, is_shared=self.devices > 1) for load in shapes)  # has room for a step by pairs' gradients
        work = sum(pairs_bytes(load) for load in shapes) + dense
        return stays + work + batch_bytes(self.loads[0].rows, self.bank.d_in)

    @property
    def fits(self) -> bool:
        """Whether each device has the memory."""
        return self.memory <= self.device.memory_bytes * self.device.usable_memory

    @cached_property
    def sums(self) -> tuple[int, int]:
        """What each device sums in a step over latent shards, and over replicas: payloads [bytes]."""
        found = [
            summed_bytes(load, self.shards, self.replicas, "pairs_gpu" if load.goes_by_pairs else "dense") for load in self.loads
        ]
        return sum(latents for latents, _ in found), sum(gradients for _, gradients in found)

    @cached_property
    def step(self) -> StepTime:
        """One step of all its SAEs."""
        is_on_one_host = self.devices <= self.device.devices_per_host
        across = self.device.link_rate(self.replicas if is_on_one_host else self.device.devices_per_host + 1)
        total = StepTime(
            latents=all_reduce_seconds(self.sums[0], self.shards, self.device.link_rate(self.shards)),
            gradients=all_reduce_seconds(self.sums[1], self.replicas, across),
        )
        for load in self.loads:
            total += compute_time(load, self.device)
        return total

    @cached_property
    def copy(self) -> float:
        """A batch's rows to one device, while the step before is computed [s]."""
        return copy_seconds(self.loads[0].rows, self.bank.d_in, self.device)

    @cached_property
    def seconds(self) -> float:
        """From its first step to its last [s]."""
        return self.bank.steps * max(self.step.total, self.copy)

    @property
    def host_bytes(self) -> int:
        """Over the links from hosts to devices, in all: every latent shard takes its replica's rows [bytes]."""
        return self.bank.steps * self.bank.batch_rows * 4 * self.bank.d_in * self.shards

    @property
    def disk_bytes(self) -> int:
        """Off the disk: once for each host that latent shards lie on, for these share what is in its memory [bytes]."""
        return self.bank.num_tokens * self.bank.row_bytes * -(-self.shards // self.device.devices_per_host)

    @property
    def summed_bytes(self) -> tuple[int, int]:
        """All-reduced by each group in all steps, over latent shards and over replicas, as payload [bytes]."""
        latents, gradients = self.sums
        return self.bank.steps * latents * self.replicas, self.bank.steps * gradients * self.shards


def spread(piece: Piece, devices: int) -> Piece | None:
    """The piece on so many devices, with the fewest replicas for which copying hides; None where it fits none so.

    Gemma Scope, section 3.3: the smallest data-parallel degree r at which the copy from the host is shorter than the step. Latent
    shards all need their replica's rows, so with n devices

        copy(r) = 4 batch d_in / (r host_rate)     <=     step(r) = compute(batch / r, latents r / n) + all-reduces

    Where compute is dense and 12 batch d_in width / (n F) for F operations a second, batch and d_in cancel: r >= n F / (3 width
    host_rate), once over the widths of all SAEs that share the batch. Where no r hides the copy, the quickest is taken.
    """
    ways = [replace(piece, shards=devices // replicas, replicas=replicas) for replicas in _powers(devices)]
    narrowest = min(sae.width for sae in piece.saes)
    ways = [way for way in ways if way.fits and way.shards <= narrowest and way.replicas <= way.bank.batch_rows]
    hidden = next((way for way in ways if way.copy <= way.step.total), None)
    return hidden or min(ways, key=lambda way: way.seconds, default=None)


def pieces_of(bank: Bank, device: Device, devices: int) -> list[Piece]:
    """The bank in as few pieces as fit; ConfigError where one SAE does not fit `devices` devices together."""
    pieces: list[Piece] = []
    for sae in sorted(bank.saes, key=lambda sae: -sae.width):
        alone = Piece(bank, (sae,), device)
        if not alone.fits:
            ways = (spread(alone, count) for count in _powers(devices))
            wide = next((way for way in ways if way is not None), None)
            if wide is None:
                count = _powers(devices)[-1]
                least = replace(alone, shards=min(count, sae.width)).memory
                room = human_bytes(device.memory_bytes * device.usable_memory)
                raise ConfigError(
                    f"{bank.site}: an SAE of {sae.width} latents needs {human_bytes(least)} on each of {count} {device.name}, "
                    f"which may use {room}; plan for more devices or smaller batches"
                )
            pieces.append(wide)
            continue
        last = pieces[-1] if pieces and pieces[-1].devices == 1 else None
        both = None if last is None else replace(last, saes=(*last.saes, sae))
        if both is not None and both.fits:
            pieces[-1] = both
        else:
            pieces.append(alone)
    return pieces


def divided(pieces: Iterable[Piece], devices: int, share: float) -> list[Piece]:
    """The pieces, the longest divided until it takes at most `share` of all pieces' time side by side, or cannot be."""
    heap = [(-piece.seconds, number, piece) for number, piece in enumerate(pieces)]
    heapq.heapify(heap)
    area, counter, done = sum(-time * piece.devices for time, _, piece in heap), len(heap), []
    while heap and -heap[0][0] > share * area / devices:
        _, _, longest = heapq.heappop(heap)
        parts = _halves(longest, devices)
        if parts is None:
            done.append(longest)
            continue
        area += sum(part.seconds * part.devices for part in parts) - longest.seconds * longest.devices
        for part in parts:
            counter += 1
            heapq.heappush(heap, (-part.seconds, counter, part))
    return done + [piece for _, _, piece in heap]


def _halves(piece: Piece, devices: int) -> list[Piece] | None:
    """The piece in two by SAEs, or, of one SAE, on twice as many devices; None where that is not worth it."""
    if len(piece.saes) > 1:
        bins: tuple[list[PlannedCode], list[PlannedCode]] = ([], [])
        for sae in sorted(piece.saes, key=lambda sae: -sae.width):
            min(bins, key=lambda part: sum(one.width for one in part)).append(sae)
        parts = [replace(piece, saes=tuple(part)) for part in bins]
    else:
        wider = spread(piece, 2 * piece.devices) if 2 * piece.devices <= devices else None
        parts = [] if wider is None else [wider]
    return parts if parts and max(part.seconds for part in parts) <= WORTH * piece.seconds else None


def _powers(limit: int) -> list[int]:
    """1, 2, 4, ... up to `limit`."""
    return [1 << power for power in range(limit.bit_length()) if 1 << power <= limit]
