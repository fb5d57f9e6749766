"""What tests of the GPU engines share: SAEs whose step shows all that it computes, where they run, what counts as near."""

import os
from dataclasses import replace
from importlib.util import find_spec

import torch

from everyscope.sae.config import SaeConfig, SaePreset
from everyscope.sae.functional import unit_rows
from everyscope.sae.trainable import TrainableSae, new_sae

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
RUNS = INTERPRETED or torch.cuda.is_available()
REASON = "torch sees no CUDA device, and triton, which could interpret, is not installed"
DEVICE = "cpu" if INTERPRETED else "cuda"

# Adam divides a gradient by its own size, so that rounding of a tiny one becomes a full step: a large epsilon lets parameters
# show their gradients instead.
RECIPE = SaePreset(
    learning_rate=0.05,
    threshold_learning_rate=0.02,
    learning_rate_warmup_steps=0,
    sparsity_warmup_steps=0,
    bandwidth=0.2,
    initial_threshold=0.6,
    beta2=0.9,
    epsilon=0.05,
    encoder_scale=1.3,
    frequency_limit=0.3,
)
NESTED = RECIPE.model_copy(update={"prefix_shares": (0.2, 0.5, 1.0)})
BY_ROW = RECIPE.model_copy(update={"direction_rate": 0.3, "encoder_follows": True, "warm_start": True, "largest_step": 1.5})


def problem(rows: int, d_in: int, width: int, preset: SaePreset = RECIPE, seed: int = 0) -> tuple[TrainableSae, torch.Tensor]:
    """An SAE with biases that matter and thresholds that differ, and a batch that some latents lie in."""
    generator = torch.Generator().manual_seed(seed)
    sae = new_sae(SaeConfig(width=width, sparsity_coefficient=0.05, preset=preset, seed=seed), d_in)
    p = sae.parameters
    p["b_dec"].copy_(torch.randn(d_in, generator=generator) * 0.05)
    p["b_enc"].copy_(torch.randn(width, generator=generator) * 0.05)
    sae.coordinate_weights.copy_(torch.rand(d_in, generator=generator) + 0.5)
    p["threshold"].add_(torch.rand(width, generator=generator) * 0.2)
    weights = torch.rand(rows, width, generator=generator) * (torch.rand(rows, width, generator=generator) < 3 / width)
    x = weights @ p["W_dec"] + p["b_dec"] + torch.randn(rows, d_in, generator=generator) * 0.2 / d_in**0.5
    return moved(sae, DEVICE, torch.float32), x.to(DEVICE)


def transcoder_problem(
    rows: int, d: int, width: int, preset: SaePreset = RECIPE, *, skip: bool
) -> tuple[TrainableSae, torch.Tensor, torch.Tensor]:
    """A transcoder that differs from an SAE in all that it may, and a batch of both sides."""
    _, x = problem(rows, d, width, preset)
    generator = torch.Generator().manual_seed(7)
    preset = preset.model_copy(update={"encoder_follows": False})
    sae = new_sae(SaeConfig(width=width, sparsity_coefficient=0.05, preset=preset, skip=skip), d, d_out=d)
    p = sae.parameters
    p["W_dec"].copy_(unit_rows(torch.randn(width, d, generator=generator)))
    for name in ("b_dec", "b_enc", *(["w_skip"] if skip else [])):
        p[name].copy_(torch.randn(p[name].shape, generator=generator) * 0.05)
    p["threshold"].add_(torch.rand(width, generator=generator) * 0.2)
    y = x.cpu() @ torch.randn(d, d, generator=generator) / d**0.5 + 0.1
    return moved(sae, DEVICE, torch.float32), x, y.to(DEVICE)


def moved(sae: TrainableSae, device: str, dtype: torch.dtype) -> TrainableSae:
    """A copy, in the layout that engines keep."""
    parameters, squared = (
        {name: t.T.to(device, dtype, copy=True).contiguous().T if name == "W_enc" else t.to(device, dtype, copy=True)
         for name, t in tensors.items()}
        for tensors in (sae.parameters, sae.squared)
    )  # fmt: skip
    weights, touched = sae.coordinate_weights.to(device, dtype, copy=True), sae.touched.to(device, copy=True)
    return replace(sae, parameters=parameters, squared=squared, coordinate_weights=weights, touched=touched)


def assert_near(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-5, what: str = "") -> None:
    difference = (got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)
    assert difference < tolerance, f"{what}: off by {difference:.2e} of its norm"


def batches(sae: TrainableSae, number: int) -> list[torch.Tensor]:
    """Batches in which only some latents have pairs, others in each."""
    _, x = problem(12 * number, sae.parameters["b_dec"].shape[0], sae.config.width)
    return list(x.split(12))
