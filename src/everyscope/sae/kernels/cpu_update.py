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
    least_share: np.float32
    """Of the current gradient, what its root of mean squares counts as at least, but for thresholds: 1 / largest_step, or 0"""
    rate: np.float32
    threshold_rate: np.float32
    direction_rate: np.float32
    """For rows of W_dec as a whole; 0 moves their numbers each by `rate`"""
    follow: np.float32
    """What a row of W_enc moves by, besides, of its direction's move"""


@inlined
def move(adam, decay, gradient, squared, rate, least_share):
    """Of one number: its new mean of squared gradients, and the change that Adam makes to it."""
    squared = decay * squared + adam.fresh * gradient * gradient
    root = max(np.sqrt(squared * adam.correction), least_share * np.abs(gradient))
    return squared, -rate * gradient / (root + adam.epsilon)


@inlined
def move_row(adam, decay, row, gradient, squared):
    """`move` for one row, in place."""
    for j in range(row.shape[0]):
        squared[j], change = move(adam, decay, gradient[j], squared[j], adam.rate, adam.least_share)
        row[j] += change


@compiled
def update_always(adam, parameter, gradient, squared):
    """Move what has a gradient at every step, as b_dec [d_out]; rows of a skip, one behind the other."""
    move_row(adam, np.float32(adam.beta2), parameter, gradient, squared)


@inlined
def turn(adam, decay, gradient, squared):
    """Make a direction's gradient [d_out] the change that Adam makes to the direction before it has norm one again, in place."""
    if adam.direction_rate > 0:
        total = dot(gradient, gradient)
        squared[0] = decay * squared[0] + adam.fresh * total
        root = max(np.sqrt(squared[0] * adam.correction), adam.least_share * np.sqrt(total))
        factor = -adam.direction_rate / (root + adam.epsilon)
        for j in range(gradient.shape[0]):
            gradient[j] *= factor
    else:
        for j in range(gradient.shape[0]):
            squared[j], gradient[j] = move(adam, decay, gradient[j], squared[j], adam.rate, adam.least_share)


@inlined
def move_direction(adam, W_dec, change, W_enc, weights):
    """Add `change` to a row of W_dec [d_out], give it norm one, and let its row of W_enc follow unless there are no weights."""
    for j in range(W_dec.shape[0]):
        change[j] += W_dec[j]
    inverse_norm = np.float32(1) / np.sqrt(dot(change, change))
    if weights is None:  # decided when this is compiled
        for j in range(W_dec.shape[0]):
            W_dec[j] = change[j] * inverse_norm
    else:
        for j in range(W_dec.shape[0]):
            moved = change[j] * inverse_norm
            W_enc[j] += adam.follow * weights[j] * (moved - W_dec[j])
            W_dec[j] = moved


@inlined
def sum_pairs(i, rows, pairs, latents, group, cost, bandwidth, batch, d_W_enc, d_W_dec):
    """Put the gradients of latent i into d_W_enc [d_in] and d_W_dec [d_out]; return its number of pairs, d_b_enc and d_threshold.

    `cost` is the sparsity terms' derivative by its firing rate, `batch` the number of rows that rates are taken over.
    """
    d_W_enc[:] = 0
    d_W_dec[:] = 0
    d_b_enc, d_threshold, threshold = np.float32(0), np.float32(0), latents.threshold[i]
    num_pairs = 0
    for tile in range(pairs.start.shape[0]):
        for p in range(pairs.start[tile, i], pairs.start[tile, i + 1]):
            row, pre, d_f = pairs.row[tile, p], pairs.pre[tile, p], pairs.d_f[tile, p]
            num_pairs += 1
            if not (pre <= threshold):
                add_scaled(d_W_enc, d_f, rows.centred[row])
                add_scaled(d_W_dec, pre, rows.errors[row, group])
                d_b_enc += d_f
            if np.abs(pre - threshold) < HALF * bandwidth:
                d_threshold -= (threshold * d_f + cost / batch) / bandwidth
    return num_pairs, d_b_enc, d_threshold


@inlined
def update_latent(i, latents, adam, d_W_enc, d_W_dec, d_b_enc, d_threshold, d_b_dec):
    """Update latent i in place by its gradients, of which d_W_dec loses its part along the latent's direction.

    d_b_dec [d_in] receives what the latent sends to b_dec through an SAE's pre-encoder bias, with W_enc before the update: minus
    d_b_enc * W_enc. A transcoder has no such bias, and no weights of coordinates.
    """
    threshold = latents.threshold[i]
    if latents.coordinate_weights is not None:  # decided when this is compiled
        add_scaled(d_b_dec, -d_b_enc, latents.W_enc[i])
    add_scaled(d_W_dec, -dot(d_W_dec, latents.W_dec[i]), latents.W_dec[i])
    decay = np.float32(adam.beta2 ** np.float64(adam.steps - latents.touched[i]))
    latents.touched[i] = adam.steps
    move_row(adam, decay, latents.W_enc[i], d_W_enc, latents.squared_W_enc[i])
    turn(adam, decay, d_W_dec, latents.squared_W_dec[i])
    move_direction(adam, latents.W_dec[i], d_W_dec, latents.W_enc[i], latents.coordinate_weights)
    latents.squared_b_enc[i], change = move(adam, decay, d_b_enc, latents.squared_b_enc[i], adam.rate, adam.least_share)
    latents.b_enc[i] += change
    squared, free = latents.squared_threshold, np.float32(0)
    squared[i], change = move(adam, decay, d_threshold, squared[i], adam.threshold_rate, free)
    # Below zero a threshold would let negative values pass, which the released form cannot express.
    latents.threshold[i] = np.float32(0) if threshold + change < 0 else threshold + change
    latents.w_norms[i], latents.w_residuals[i] = round_row(latents.W_enc[i], latents.w_rounded[i])


@compiled
def update_latents(start, stop, rows, pairs, latents, group_of, penalty, bandwidth, adam, d_b_dec):
    """Update latents [start, stop) in place; those without pairs stay as they are, for their gradients are zero.

    `penalty` [d_sae] is the sparsity terms' derivative by each latent's firing rate, `group_of` [d_sae] the latent's group of
    prefixes. d_b_dec [d_in] receives what these latents send to b_dec.
    """
    d_in, batch = rows.centred.shape[1], np.float32(rows.centred.shape[0])
    d_W_enc, d_W_dec = np.empty(d_in, np.float32), np.empty(latents.W_dec.shape[1], np.float32)
    for i in range(start, stop):
        num_pairs, d_b_enc, d_threshold = sum_pairs(
            i, rows, pairs, latents, group_of[i], penalty[i], bandwidth, batch, d_W_enc, d_W_dec
        )
        if num_pairs > 0:
            update_latent(i, latents, adam, d_W_enc, d_W_dec, d_b_enc, d_threshold, d_b_dec)


@compiled
def sum_latents(moving, rows, pairs, latents, group_of, penalty, bandwidth, batch, gradients):
    """The first half of `update_latents` alone, for replicas to sum in between: the gradients of latents `moving`.

    gradients [number, d_in + d_out + 2] holds those by W_enc, W_dec, b_enc and threshold, a row for each of `moving`. `batch`
    counts the rows of all replicas.
    """
    d_in, both = rows.centred.shape[1], rows.centred.shape[1] + latents.W_dec.shape[1]
    for place in range(moving.shape[0]):
        i, gradient = moving[place], gradients[place]
        d_W_enc, d_W_dec = gradient[:d_in], gradient[d_in:both]
        _, gradient[both], gradient[both + 1] = sum_pairs(
            i, rows, pairs, latents, group_of[i], penalty[i], bandwidth, np.float32(batch), d_W_enc, d_W_dec
        )


@compiled
def move_latents(moving, gradients, latents, adam, d_b_dec):
    """The second half: update latents `moving` in place by their gradients, which change."""
    d_in, both = latents.W_enc.shape[1], latents.W_enc.shape[1] + latents.W_dec.shape[1]
    for place in range(moving.shape[0]):
        gradient = gradients[place]
        d_W_enc, d_W_dec = gradient[:d_in], gradient[d_in:both]
        update_latent(moving[place], latents, adam, d_W_enc, d_W_dec, gradient[both], gradient[both + 1], d_b_dec)
