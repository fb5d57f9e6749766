"""One pass over dense latents f [batch, d_sae] on a CPU, compiled by numba: their sums, their firings, and what each does.

Dense operations take a pass, and often a copy, for each of these figures; of 16k latents 50 fire on a row.
"""

import numpy as np

from everyscope.sae.kernels.cpu import compiled, dot


@compiled
def sum_latents(f, firings, sums, maxima, by_row):
    """Add rows on which each latent fires, int64, and its sum, float64, and take its maximum, float64; count by row, int64."""
    for row in range(f.shape[0]):
        values, count = f[row], 0
        for latent in range(values.shape[0]):
            value = values[latent]
            firings[latent] += np.int64(value > 0)
            sums[latent] += np.float64(value)
            maxima[latent] = value if value > maxima[latent] else maxima[latent]
            count += np.int64(value > 0)
        by_row[row] = count


@compiled
def attribute(f, gradient, W_dec, y, firing):
    """Into `y` f * (W_dec gradient) of the latents that fire, row after row; into `firing` their number in each row, int64."""
    total = 0
    for row in range(f.shape[0]):
        values, slope, begun = f[row], gradient[row], total
        for latent in range(values.shape[0]):
            if values[latent] > 0:
                y[total] = values[latent] * dot(slope, W_dec[latent])
                total += 1
        firing[row] = total - begun


@compiled
def count_firings(pre, level, counts):
    """Add the rows in which each pre-activation is above its level to `counts`, int64 [d_sae]; whether all are finite."""
    nonfinite = np.float32(0)
    for row in range(pre.shape[0]):
        values = pre[row]
        for latent in range(values.shape[0]):
            counts[latent] += np.int64(values[latent] > level[latent])
            nonfinite += values[latent] * np.float32(0)
    return nonfinite == 0


@compiled
def list_firings(pre, level, filled, rows, values):
    """Write row and pre-activation of each firing, latent after latent; `filled` says where each begins, and moves on."""
    for row in range(pre.shape[0]):
        of_row = pre[row]
        for latent in range(of_row.shape[0]):
            if of_row[latent] > level[latent]:
                rows[filled[latent]] = row
                values[filled[latent]] = of_row[latent]
                filled[latent] += 1
