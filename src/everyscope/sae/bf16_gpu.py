"""Training on a GPU in bfloat16: products and gathers are of rounded numbers, sums, weights and Adam's means are float32.

A step goes by pairs or densely, whichever is faster on this device at the last known number of pairs (`crossover`). How many
there are only the device knows: the number of the step LAG before decides, which has long arrived when it is read, so the choice
is the same on every run. Lists of pairs have a fixed room: a step whose pairs do not fit changes nothing, and is counted.

A step has three parts. `prepare` is the host's: it chooses, and sends the numbers that depend on the step. `launch` is the
device's alone and may be recorded and replayed while `prepare` gives the same answer. `settle` sends the counts on their way to
the host.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from everyscope.sae.across_ranks import counted, shared_penalty
from everyscope.sae.crossover import measured_crossover
from everyscope.sae.gpu_limits import ROUNDED_SEGMENT, rounded_list_room, steps_apart
from everyscope.sae.gpu_work import Rounded, Seen, Work
from everyscope.sae.kernels.gpu_bf16 import float32_sums
from everyscope.sae.kernels.gpu_bf16_update import NUMBERS, Fixed, update_always, update_latents
from everyscope.sae.kernels.gpu_triton import blocks, row_of_threads
from everyscope.sae.mesh import ALONE, Collective
from everyscope.sae.objective import penalty
from everyscope.sae.schedules import direction_rate, learning_rate_share, skip_rate, sparsity_weight, threshold_rate
from everyscope.sae.trainable import StepLosses, TrainableSae

LAG = 8
"""Steps after which a count of pairs is looked at [steps]."""
KEPT = 0.8
"""Share of the crossover below which a dense SAE returns to pairs [1]."""
TABLE_STEPS = 1024
"""Steps whose numbers are sent to the device at once [steps]."""
Ways = tuple[bool, ...]
"""Of each SAE, whether it goes by pairs."""


class GpuBfloat16:
    """The SAEs of a training group, stepped by pairs where that is faster and densely where it is not."""

    def __init__(
        self,
        saes: Sequence[TrainableSae],
        collective: Collective = ALONE,
        max_pairs: int | None = None,
        crossover: float | None = None,
    ) -> None:
        """Take over `saes`, whose tensors change in place.

        Lists have room for `max_pairs`, or for what `rounded_list_room` says. Steps are dense above `crossover`, a share of all
        (row, latent), which is measured at the first step where it is None.
        """
        self.saes, self.max_pairs, self.collective = saes, max_pairs, collective
        self._device = saes[0].touched.device
        self._on_cuda = self._device.type == "cuda"
        # Whose thresholds begin at the target L0 has a sparse code from the first step; others' grow sparse.
        sparse = [sae.config.preset.warm_start and sae.config.target_l0 is not None for sae in saes]
        self._uses_pairs = torch.tensor(sparse)
        self._crossover = torch.full((len(saes),), math.nan if crossover is None else crossover, dtype=torch.float64)
        self._counts = torch.full((LAG, len(saes)), -1, pin_memory=self._on_cuda)
        self._arrivals: list[torch.cuda.Event | None] = [None] * LAG
        self._seen = torch.zeros(len(saes), dtype=torch.int64, device=self._device)
        self._skipped = torch.zeros(len(saes), dtype=torch.int64, device=self._device)
        self._reconstruction = torch.zeros(len(saes), device=self._device)
        self._numbers = torch.zeros(len(saes), len(NUMBERS), dtype=torch.float64, device=self._device)
        self._table, self._table_of = self._numbers[None], (0, -1)
        self._latents = [torch.empty(3, sae.width, dtype=torch.int32, device=self._device) for sae in saes]
        self._rounded = [Rounded.of(sae) for sae in saes]
        self._fixed = [fixed_of(sae) for sae in saes]
        self._work: dict[tuple[int, int, tuple[int, ...], int, int], Work] = {}
        self._step = 0
        self._streams = [torch.cuda.Stream(self._device) for _ in saes] if self._on_cuda and len(saes) > 1 else []

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold beyond the SAEs; waits for counts under way. `skipped` counts steps that did not fit."""
        for arrival in filter(None, self._arrivals):
            arrival.synchronize()
        return {
            "uses_pairs": self._uses_pairs,
            "crossover": self._crossover,
            "counts": self._counts,
            "skipped": self._skipped,
            "reconstruction": self._reconstruction,
        }

    def refresh(self) -> None:
        """Round the weights again; to be called where they were changed from outside."""
        for rounded in self._rounded:
            rounded.refresh()

    def step(
        self, x: Float[Tensor, "batch d_in"], step: int, steps: int, target: Float[Tensor, "batch d_in"] | None = None
    ) -> list[StepLosses]:
        """One training step of every SAE on normalised activations, in place; losses stay on the device. An SAE's target is x.

        A step that was skipped for want of room reports the reconstruction of the last one that was not.
        """
        with torch.no_grad(), torch.cuda.device_of(x):  # Triton launches on the current device
            ways = self.prepare(len(x), step, steps)
            losses = self.launch(x.contiguous(), ways, None if target is None else target.contiguous())
            self.settle(step)
        return losses

    def prepare(self, rows: int, step: int, steps: int) -> Ways:
        """Choose each SAE's way by the count LAG steps before, and send the numbers of this step, ahead of its kernels."""
        slot = step % LAG
        if arrival := self._arrivals[slot]:
            arrival.synchronize()  # recorded LAG steps ago: holds back only a host that runs so far ahead
        for number, sae in enumerate(self.saes):
            if self._crossover[number].isnan():
                self._crossover[number] = self._measured(sae, rows)
            self._choose(number, int(self._counts[slot, number]), rows)
        first, known_steps = self._table_of
        if steps != known_steps or not first <= step < first + TABLE_STEPS:
            self._table_of = (step, steps)
            table = [[numbers_at(sae, at, steps) for sae in self.saes] for at in range(step, min(step + TABLE_STEPS, steps))]
            self._table = torch.tensor(table, dtype=torch.float64).to(self._device)
        self._numbers.copy_(self._table[step - self._table_of[0]])
        self._step = step
        return tuple(self._uses_pairs.tolist())

    def launch(
        self, x: Float[Tensor, "batch d_in"], ways: Ways, target: Float[Tensor, "batch d_in"] | None = None
    ) -> list[StepLosses]:
        """The device's part of a step that is prepared, of nothing but tensors; small SAEs side by side."""
        target = x if target is None else target
        with float32_sums():
            if not (self._streams and self._are_apart(len(x))):
                return [self._one(number, x, target, by_pairs) for number, by_pairs in enumerate(ways)]
            here, losses = torch.cuda.current_stream(), []
            for number, (by_pairs, stream) in enumerate(zip(ways, self._streams, strict=True)):
                stream.wait_stream(here)
                with torch.cuda.stream(stream):
                    losses.append(self._one(number, x, target, by_pairs))
            for stream in self._streams:
                here.wait_stream(stream)
            return losses

    def settle(self, step: int) -> None:
        """Send the counts of this step to the host, which reads them LAG steps later."""
        slot = step % LAG
        self._counts[slot].copy_(self._seen, non_blocking=True)
        if self._on_cuda:
            arrival = self._arrivals[slot] = self._arrivals[slot] or torch.cuda.Event()
            arrival.record()

    def steps_done(self) -> Tensor:
        """The steps that are done when this one is, [], int32, on the device."""
        return self._numbers[0, 0].int()

    def _choose(self, number: int, count: int, rows: int) -> None:
        share, crossover = count / (rows * self._widest(self.saes[number])), float(self._crossover[number])
        if self._uses_pairs[number] and share > crossover:
            self._uses_pairs[number] = False
        elif not self._uses_pairs[number] and 0 <= share < KEPT * crossover:
            self._uses_pairs[number] = True

    def _measured(self, sae: TrainableSae, rows: int) -> float:
        """The crossover for SAEs of this kind, the same on all ranks; half of what lists have room for where nothing is timed."""
        most = (self.max_pairs or rounded_list_room(rows, self._widest(sae))) / (rows * self._widest(sae)) / 2
        share = min(most, measured_crossover(sae, rows, GpuBfloat16)) if self._on_cuda else most
        if self.collective.mesh.ranks > 1:
            shares = torch.zeros((), dtype=torch.float64, device=self._device)
            shares.fill_(share if self.collective.mesh.rank == 0 else 0.0)
            self.collective.sum_(shares, "all")
            share = float(shares)
        return share

    def _one(self, number: int, x: Tensor, target: Tensor, by_pairs: bool) -> StepLosses:
        sae, rounded, counts = self.saes[number], self._rounded[number], self._latents[number]
        numbers, mesh = self._numbers[number], self.collective.mesh
        batch, work = len(x) * mesh.replicas, self._work_for(len(x), x.shape[1], sae, number)
        seen = work.forward(rounded, x, target, counts, by_pairs, self.collective)
        if mesh.ranks == 1:
            squares, num_pairs, num_active = seen.squares, counts[0].sum(), counts[1].sum()
            cost = penalty(sae.config, numbers[-1].float(), counts[1] / batch).contiguous()
        else:
            whole = counted(self.collective, counts, seen.squares, seen.squares.new_zeros(1))
            counts.copy_(whole.by_latent)
            (num_pairs, num_active), squares = whole.totals[:2], whole.squares.float()
            cost = shared_penalty(sae, self._step, whole.by_latent[1], num_active, batch)
        lists, segments = work.gradients(rounded, by_pairs, self.collective)
        update_latents(
            sae.parameters, sae.squared, sae.touched, rounded.weights, lists, segments, work.batch, counts, cost,
            sae.coordinate_weights, numbers, work.partial, batch, self._fixed[number], ROUNDED_SEGMENT,
        )  # fmt: skip
        self._update_b_dec(number, work, seen)
        if sae.config.skip:
            self._update_skip(number, work, seen)
        return self._losses(number, seen, squares, num_pairs, num_active, batch)

    def _update_b_dec(self, number: int, work: Work, seen: Seen) -> None:
        """The decoder's bias, whose gradient all latents of an SAE reach, through its pre-encoder bias."""
        gradient, sae = work.errors[0].sum(0), self.saes[number]
        self.collective.sum_(gradient, "replicas")
        if not sae.is_transcoder:
            from_latents = work.partial.sum(0)
            self.collective.sum_(from_latents, "shards")
            gradient = gradient - from_latents
        self._move_always(number, "b_dec", gradient, seen, "rate")

    def _update_skip(self, number: int, work: Work, seen: Seen) -> None:
        """A transcoder's skip; all shards alike, who have the same errors."""
        gradient = work.skip_gradient()
        self.collective.sum_(gradient, "replicas")
        self._move_always(number, "w_skip", gradient, seen, "skip_rate")
        self._rounded[number].refresh_skip()

    def _move_always(self, number: int, name: str, gradient: Tensor, seen: Seen, rate: str) -> None:
        p, v = self.saes[number].parameters[name], self.saes[number].squared[name]
        update_always(p, v, gradient, seen.fits, self._numbers[number], self._fixed[number], rate)

    def _losses(self, number: int, seen: Seen, squares: Tensor, num_pairs: Tensor, num_active: Tensor, batch: int) -> StepLosses:
        fits = seen.fits
        self._seen[number] = seen.count
        self._skipped[number] += ~fits
        # Not a number in, not a number out, also of a step that was skipped for the many pairs which that makes.
        reconstruction = torch.where(fits, squares, self._reconstruction[number] + 0 * squares)
        self._reconstruction[number] = reconstruction
        pairs = torch.where(fits, num_pairs.float(), seen.count.float())
        return StepLosses(reconstruction, (num_active / batch).float(), pairs / batch, self._latents[number][1])

    def _are_apart(self, rows: int) -> bool:
        """Whether SAEs step side by side: small ones do, but not those of several ranks, which must communicate in one order."""
        return self.collective.mesh.ranks == 1 and all(steps_apart(rows, sae.width) for sae in self.saes)

    def _widest(self, sae: TrainableSae) -> int:
        """Latents of the largest shard."""
        return blocks(sae.config.width, self.collective.mesh.shards)

    def _work_for(self, rows: int, d_in: int, sae: TrainableSae, number: int = 0) -> Work:
        """Memory for one step; of SAEs that step side by side each has its own."""
        room = self.max_pairs or rounded_list_room(rows, self._widest(sae))
        key = (rows, d_in, sae.prefixes, room, number if self._are_apart(rows) else 0)
        if key not in self._work:
            self._work[key] = Work(rows, d_in, sae.prefixes, room, programs_on(self._device, d_in), self._device)
        return self._work[key]


def programs_on(device: torch.device, d_in: int) -> int:
    """Programs that share the latents: as many as a device holds at once where each thread has 64 registers."""
    warps = row_of_threads(d_in)[1]
    return torch.cuda.get_device_properties(device).multi_processor_count * 32 // warps if device.type == "cuda" else 3


def numbers_at(sae: TrainableSae, step: int, steps: int) -> list[float]:
    """NUMBERS at `step` of `steps`."""
    preset = sae.config.preset
    rate = preset.learning_rate * learning_rate_share(preset, step, steps)
    rates = (rate, threshold_rate(sae.config, step, steps), direction_rate(preset, step, steps), skip_rate(preset, step, steps))
    return [step + 1, 1 / (1 - preset.beta2 ** (step + 1)), *rates, sparsity_weight(sae.config, step)]


def fixed_of(sae: TrainableSae) -> Fixed:
    """The numbers that no step changes."""
    preset = sae.config.preset
    least_share = 1 / preset.largest_step if preset.largest_step else 0.0
    follow = preset.encoder_scale if preset.encoder_follows else 0.0
    log_decay, by_row = math.log2(preset.beta2), preset.direction_rate is not None
    return Fixed(1 - preset.beta2, log_decay, preset.epsilon, least_share, follow, preset.bandwidth, by_row)
