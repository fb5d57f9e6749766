"""An SAE or transcoder in training: five parameter tensors or six, their squared-gradient means, and one exact update.

The state lives on normalised activations, of an SAE with the pre-encoder bias; `fold` turns it into what is published. A rank of
several may hold a shard of an SAE: a range of its latents, and b_dec, which every rank holds and updates alike.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Float64, Int32, Shaped
from torch import Tensor

from everyscope.sae.config import SaeConfig, SaePreset
from everyscope.sae.folded import Sae, from_tensors
from everyscope.sae.functional import (
    Gradients,
    decode,
    jumprelu,
    loss_gradients,
    pre_activations,
    unit_rows,
    without_parallel_part,
)
from everyscope.sae.metadata import SaeMetadata
from everyscope.sae.normalisation import Normalisation
from everyscope.sae.objective import penalty
from everyscope.sae.schedules import direction_rate, learning_rate_share, skip_rate, sparsity_weight, threshold_rate

TENSORS = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
"""Of every SAE; a transcoder with a skip has w_skip besides."""
LATENT_AXIS = {"W_enc": 1, "W_dec": 0, "b_enc": 0, "b_dec": None, "threshold": 0, "touched": 0, "last_fired": 0} | {
    "coordinate_weights": None,
    "w_skip": None,
}
"""Along which axis a tensor is cut where latents are; None for what every shard holds whole."""
SKIPPED = 2**22
"""Random numbers drawn at a time for the latents before a shard, which it must pass over."""


@dataclass(frozen=True)
class StepLosses:
    """What one update saw, left on the device: reading a value waits for it."""

    reconstruction: Float[Tensor, ""]
    """Mean ||y - y_hat||^2 over the batch, in normalised units; of an SAE y is x."""
    l0: Float[Tensor, ""]
    """Mean number of active latents per row."""
    pairs: Float[Tensor, ""]
    """Mean number of latents per row that are active or within half a bandwidth of their threshold."""
    fired: Shaped[Tensor, " d_sae"]
    """Rows on which each latent was active; of a shard, its own latents' [rows]."""


@dataclass(frozen=True)
class TrainableSae:
    """The tensors of one SAE in training, changed in place by its engine. W_enc is stored by latent: W_enc.T is contiguous.

    Of a shard, d_sae is the number of its own latents; `config` is always that of the whole SAE.
    """

    config: SaeConfig
    parameters: dict[str, Tensor]
    """W_enc [d_in, d_sae], W_dec [d_sae, d_out], b_enc [d_sae], b_dec [d_out], threshold [d_sae], maybe w_skip [d_in, d_out];
    float32."""
    squared: dict[str, Tensor]
    """Adam's running mean of each parameter's squared gradient, of the same shapes; with a direction_rate, of W_dec's rows'
    squared norms, [d_sae]."""
    coordinate_weights: Float[Tensor, " d_in"]
    """How much an encoder that follows its direction does so in each coordinate; mean 1."""
    touched: Int32[Tensor, " d_sae"]
    """Steps that each latent's means include. A latent without gradient does not move, and its means only decay, so that may
    wait until it has one again (`catch_up`)."""
    last_fired: Int32[Tensor, " d_sae"]
    """Steps done when each latent was last active; 0 for never."""
    first: int = 0
    """Number, in the whole SAE, of the first latent that is held here."""
    is_transcoder: bool = False
    """Whether it predicts a target, and b_dec is no pre-encoder bias."""

    @property
    def width(self) -> int:
        """Latents held here."""
        return len(self.touched)

    @property
    def prefixes(self) -> tuple[int, ...]:
        """Where the config's prefixes end among the latents held here; none ends behind the last."""
        return tuple(min(max(stop - self.first, 0), self.width) for stop in self.config.prefixes)

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        """Latent activations of normalised activations."""
        p = self.parameters
        return jumprelu(pre_activations(self.seen(x), p["W_enc"], p["b_enc"]), p["threshold"])

    def seen(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        """What the encoder sees of normalised activations."""
        return x if self.is_transcoder else x - self.parameters["b_dec"]

    def __call__(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_out"]:
        """The reconstruction of normalised activations, or the prediction from them."""
        y_hat = decode(self.encode(x), self.parameters["W_dec"], self.parameters["b_dec"])
        return y_hat + x @ self.parameters["w_skip"] if "w_skip" in self.parameters else y_hat

    def tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint needs, by name; the tensors themselves, not copies."""
        squared = {f"squared.{name}": self.squared[name] for name in self.parameters}
        others = {name: getattr(self, name) for name in ("coordinate_weights", "touched", "last_fired")}
        return {**self.parameters, **squared, **others}


def new_sae(
    config: SaeConfig, d_in: int, device: str = "cpu", latents: range | None = None, d_out: int | None = None
) -> TrainableSae:
    """The SAE at step 0: He-uniform unit decoder rows, W_enc their transpose, zero biases, equal thresholds (section 3.2).

    Drawn on the CPU from `config.seed` and the width, so that every device starts alike, and a wide SAE does not start from a
    narrow one's directions: it would seem to have split latents that it was given. He-uniform over a row is uniform in (-a, a),
    and a does not matter once rows have norm one. With `latents`, a contiguous range, it is that shard of the same SAE, and no
    more than that is ever in memory.

    With `d_out` it is a transcoder. Its W_enc begins as the transpose of W_dec too, as in Gemma Scope 2; where sizes differ, with
    rows of its own. A skip begins at zero.
    """
    latents = range(config.width) if latents is None else latents
    width, sizes = len(latents), (d_in, d_in if d_out is None else d_out)
    W_dec = _directions([config.seed, config.width], sizes[1], latents)
    rows = W_dec if sizes[0] == sizes[1] else _directions([config.seed, config.width, 1], d_in, latents)
    parameters = {
        "W_enc": (rows * config.preset.encoder_scale).T,
        "W_dec": W_dec,
        "b_enc": torch.zeros(width),
        "b_dec": torch.zeros(sizes[1]),
        "threshold": torch.full((width,), config.preset.initial_threshold),
    }
    if config.skip:
        assert d_out is not None, "a skip is a transcoder's"
        parameters["w_skip"] = torch.zeros(sizes)
    on_device = {name: tensor.to(device) for name, tensor in parameters.items()}
    squared = {name: torch.zeros_like(tensor) for name, tensor in on_device.items()}
    if config.preset.direction_rate is not None:
        squared["W_dec"] = torch.zeros(width, device=device)
    touched, last_fired = (torch.zeros(width, dtype=torch.int32, device=device) for _ in range(2))
    weights = torch.ones(d_in, device=device)
    return TrainableSae(config, on_device, squared, weights, touched, last_fired, latents.start, d_out is not None)


def _directions(seeds: list[int], size: int, latents: range) -> Float[Tensor, "d_sae size"]:
    """Unit rows of these latents, drawn from the seeds; those of the latents before are passed over."""
    seed = np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(seed >> np.uint64(1)))
    for start in range(0, latents.start * size, SKIPPED):
        torch.empty(min(SKIPPED, latents.start * size - start)).uniform_(-1, 1, generator=generator)
    return unit_rows(torch.empty(len(latents), size).uniform_(-1, 1, generator=generator))


@torch.no_grad()
def dense_update(
    sae: TrainableSae, x: Float[Tensor, "batch d_in"], step: int, steps: int, target: Float[Tensor, "batch d_out"] | None = None
) -> StepLosses:
    """One training step on normalised activations, in place: gradients, projection, Adam, unit decoder rows (section 3.2).

    `target` is what a transcoder is to predict; an SAE's is x. The means of squared gradients must be up to date, as dense steps
    leave them and `catch_up` makes them.
    """
    gradients = loss_gradients(
        x,
        **sae.parameters,
        target=target,
        is_transcoder=sae.is_transcoder,
        penalty=partial(penalty, sae.config, sparsity_weight(sae.config, step)),
        bandwidth=sae.config.preset.bandwidth,
        prefixes=sae.config.prefixes,
    )
    return move_along(sae, gradients, step, steps)


def move_along(sae: TrainableSae, gradients: Gradients, step: int, steps: int) -> StepLosses:
    """The half of `dense_update` that follows the gradients, for the latents held here."""
    preset = sae.config.preset
    rate = preset.learning_rate * learning_rate_share(preset, step, steps)
    rates = dict.fromkeys(TENSORS, rate) | {"threshold": threshold_rate(sae.config, step, steps)}
    rates["w_skip"] = skip_rate(preset, step, steps)
    if preset.direction_rate is not None:
        rates["W_dec"] = direction_rate(preset, step, steps)
    directions = sae.parameters["W_dec"].clone() if preset.encoder_follows else None
    for name in sae.parameters:
        parameter, gradient, squared = sae.parameters[name], getattr(gradients, name), sae.squared[name]
        if name == "W_dec":
            gradient = without_parallel_part(gradient, parameter)
        adam = adam_without_momentum if parameter.shape == squared.shape else adam_by_row
        largest = None if name == "threshold" else preset.largest_step
        adam(parameter, gradient, squared, rates[name], preset, step, largest)
    sae.parameters["W_dec"].copy_(unit_rows(sae.parameters["W_dec"]))
    if directions is not None:
        moved = (sae.parameters["W_dec"] - directions).mul_(sae.coordinate_weights)
        sae.parameters["W_enc"].add_(moved.T, alpha=preset.encoder_scale)
    # Below zero a threshold would let negative values pass, which the released form cannot express.
    sae.parameters["threshold"].clamp_(min=0)
    sae.touched.fill_(step + 1)
    return StepLosses(gradients.reconstruction_loss, gradients.l0, gradients.pairs, gradients.fired)


@torch.no_grad()
def catch_up(sae: TrainableSae, steps: int) -> None:
    """Let the means of squared gradients of all latents include `steps` steps: those left out had gradients of zero."""
    decay = (sae.config.preset.beta2 ** (steps - sae.touched).double()).to(sae.squared["b_enc"].dtype)
    for name in ("W_enc", "b_enc", "threshold"):
        sae.squared[name].mul_(decay)
    sae.squared["W_dec"].mul_(decay if sae.squared["W_dec"].dim() == 1 else decay[:, None])
    sae.touched.fill_(steps)


def adam_without_momentum(
    parameter: Tensor,
    gradient: Tensor,
    squared: Tensor,
    rate: float,
    preset: SaePreset,
    step: int,
    largest_step: float | None = None,
) -> None:
    """Adam with beta1 = 0 (arXiv 1412.6980, algorithm 1), in place; `step` counts from 0. No step is above `largest_step`."""
    squared.mul_(preset.beta2).addcmul_(gradient, gradient, value=1 - preset.beta2)
    root = (squared / (1 - preset.beta2 ** (step + 1))).sqrt_()
    if largest_step is not None:
        root = torch.maximum(root, gradient.abs().div_(largest_step))
    parameter.addcdiv_(gradient, root.add_(preset.epsilon), value=-rate)


def adam_by_row(
    rows: Float[Tensor, "rows d"],
    gradient: Float[Tensor, "rows d"],
    squared: Float[Tensor, " rows"],
    rate: float,
    preset: SaePreset,
    step: int,
    largest_step: float | None = None,
) -> None:
    """`adam_without_momentum` of whole rows: one mean each, of the gradient's squared norm, so that a step goes along it."""
    total = gradient.square().sum(1)
    squared.mul_(preset.beta2).add_(total, alpha=1 - preset.beta2)
    root = (squared / (1 - preset.beta2 ** (step + 1))).sqrt_()
    if largest_step is not None:
        root = torch.maximum(root, total.sqrt_().div_(largest_step))
    rows.addcmul_(gradient, root.add_(preset.epsilon).reciprocal_()[:, None], value=-rate)


def fold(sae: TrainableSae, normalisation: Normalisation, target: Normalisation | None = None) -> Sae:
    """The coder on raw activations x_raw = mean + scale * x: an SAE without its pre-encoder bias, a transcoder of raw `target`s.

    Gemma Scope, appendix A, eq. 5 to 11, and the mean: b_dec' = mean + scale b_dec, and as much less reaches the encoder,
    b_enc' = scale (b_enc - b_dec @ W_enc) - mean @ W_enc. A transcoder has a scale and a mean for each side. Its latents are in
    the target's units, so that rows of W_dec keep norm one: with r = target scale / scale, W_enc' = r W_enc, b_enc' =
    target scale b_enc - mean @ W_enc', W_skip' = r w_skip, b_dec' = target mean + target scale b_dec - mean @ W_skip'.
    """
    p = {name: tensor.detach().to("cpu", torch.float64) for name, tensor in sae.parameters.items()}
    mean = _mean_of(normalisation, len(p["W_enc"]))
    if target is None:
        assert not sae.is_transcoder, "a transcoder's target has a normalisation of its own"
        scale = normalisation.scale
        folded = {
            "W_enc": p["W_enc"],
            "W_dec": p["W_dec"],
            "b_enc": scale * (p["b_enc"] - p["b_dec"] @ p["W_enc"]) - mean @ p["W_enc"],
            "b_dec": mean + scale * p["b_dec"],
            "threshold": scale * p["threshold"],
        }
        return from_tensors({name: tensor.float().contiguous() for name, tensor in folded.items()})
    scale, ratio = target.scale, target.scale / normalisation.scale
    W_enc, b_dec = ratio * p["W_enc"], _mean_of(target, len(p["b_dec"])) + scale * p["b_dec"]
    folded = {"W_enc": W_enc, "W_dec": p["W_dec"], "b_enc": scale * p["b_enc"] - mean @ W_enc}
    if "w_skip" in p:
        folded["W_skip"] = ratio * p["w_skip"]
        b_dec = b_dec - mean @ folded["W_skip"]
    folded |= {"b_dec": b_dec, "threshold": scale * p["threshold"]}
    return from_tensors({name: tensor.float().contiguous() for name, tensor in folded.items()}, SaeMetadata(kind="transcoder"))


def _mean_of(normalisation: Normalisation, size: int) -> Float64[Tensor, " size"]:
    """What the normalisation subtracts."""
    return torch.zeros(size, dtype=torch.float64) if normalisation.mean is None else torch.from_numpy(normalisation.mean)
