"""The pair path's fused update: for each latent with pairs, its gradients, Adam, unit norm, threshold and biases at once."""

from typing import NamedTuple

import numpy as np

from everyscope.sae.kernels.cpu import HALF, add_scaled, compiled, dot, inlined, round_row


class Adam(NamedTuple):
    """Adam without momentum, at one step."""

    steps: int
    """Steps done when this one is."""
    beta2: float
    """float64, for its powers"""
    fresh: np.float32
    """1 - beta2"""
    correction: np.float32
    """1 / (1 - beta2 ** steps)"""
    epsilon: np.float32
    rate: np.float32
    threshold_rate: np.float32


@inlined
def move(adam, decay, gradient, squared, rate):
    """Of one number: its new mean of squared gradients, and the change that Adam makes to it."""
    squared = decay * squared + adam.fresh * gradient * gradient
    return squared, -rate * gradient / (np.sqrt(squared * adam.correction) + adam.epsilon)


@inlined
def move_row(adam, decay, row, gradient, squared):
    """`move` for one row [d_in], in place."""
    for j in range(row.shape[0]):
        squared[j], change = move(adam, decay, gradient[j], squared[j], adam.rate)
        row[j] += change


@compiled
def update_b_dec(adam, b_dec, gradient, squared):
    """Move b_dec [d_in], which has a gradient at every step."""
    move_row(adam, np.float32(adam.beta2), b_dec, gradient, squared)


@compiled
def update_latents(start, stop, rows, pairs, latents, group_of, penalty, bandwidth, adam, d_b_dec):
    """Update latents [start, stop) in place; those without pairs stay as they are, for their gradients are zero.

    `penalty` [d_sae] is the sparsity terms' derivative by each latent's firing rate, `group_of` [d_sae] the latent's group of
    prefixes. d_b_dec [d_in] receives what these latents send to b_dec through the pre-encoder bias, with w_enc before the
    update: minus the sum of d_b_enc * w_enc.
    """
    d_in, batch = rows.centred.shape[1], np.float32(rows.centred.shape[0])
    d_w_enc, d_w_dec = np.empty(d_in, np.float32), np.empty(d_in, np.float32)
    for i in range(start, stop):
        d_w_enc[:] = 0
        d_w_dec[:] = 0
        d_b_enc, d_threshold, threshold = np.float32(0), np.float32(0), latents.threshold[i]
        num_pairs = 0
        for tile in range(pairs.start.shape[0]):
            for p in range(pairs.start[tile, i], pairs.start[tile, i + 1]):
                row, pre, d_f = pairs.row[tile, p], pairs.pre[tile, p], pairs.d_f[tile, p]
                num_pairs += 1
                if not (pre <= threshold):
                    add_scaled(d_w_enc, d_f, rows.centred[row])
                    add_scaled(d_w_dec, pre, rows.errors[row, group_of[i]])
                    d_b_enc += d_f
                if np.abs(pre - threshold) < HALF * bandwidth:
                    d_threshold -= (threshold * d_f + penalty[i] / batch) / bandwidth
        if num_pairs == 0:
            continue
        add_scaled(d_b_dec, -d_b_enc, latents.w_enc[i])
        add_scaled(d_w_dec, -dot(d_w_dec, latents.w_dec[i]), latents.w_dec[i])
        decay = np.float32(adam.beta2 ** np.float64(adam.steps - latents.touched[i]))
        latents.touched[i] = adam.steps
        move_row(adam, decay, latents.w_enc[i], d_w_enc, latents.squared_w_enc[i])
        move_row(adam, decay, latents.w_dec[i], d_w_dec, latents.squared_w_dec[i])
        inverse_norm = np.float32(1) / np.sqrt(dot(latents.w_dec[i], latents.w_dec[i]))
        for j in range(d_in):
            latents.w_dec[i, j] *= inverse_norm
        latents.squared_b_enc[i], change = move(adam, decay, d_b_enc, latents.squared_b_enc[i], adam.rate)
        latents.b_enc[i] += change
        latents.squared_threshold[i], change = move(adam, decay, d_threshold, latents.squared_threshold[i], adam.threshold_rate)
        # Below zero a threshold would let negative values pass, which the released form cannot express.
        latents.threshold[i] = np.float32(0) if threshold + change < 0 else threshold + change
        latents.w_norms[i], latents.w_residuals[i] = round_row(latents.w_enc[i], latents.w_rounded[i])
