"""k-sparse probes: k features chosen by their mean difference between classes, and a logistic regression on these alone.

Features are an SAE's latents or the activations' own coordinates; both are chosen by the same rule, on training rows: largest
|mean where the label is - mean where it is not|, in raw units. The chosen ones for small k are the first for larger k.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int, Int64
from torch import Tensor

from everyscope.base.errors import DataError

MAX_STEPS = 100
"""Newton steps; a handful suffice."""
TOLERANCE = 1e-10
"""The fit ends where no entry of the gradient is larger [nats]."""


@dataclass(frozen=True)
class Probe:
    """A linear classifier of raw features: it says yes where x @ weight + bias > 0."""

    weight: Float64[Tensor, " k"]
    bias: Float64[Tensor, ""]

    def says_yes(self, x: Float64[Tensor, "n k"]) -> Bool[Tensor, " n"]:
        """Its verdict on each row."""
        return x.double() @ self.weight + self.bias > 0


def fit_probe(x: Float64[Tensor, "n k"], is_positive: Bool[Tensor, " n"], ridge: float) -> Probe:
    """The probe of least mean loss, both classes weighing one half, plus `ridge` / 2 times its squared coefficients.

    Features are standardised for the fit, so that the ridge means the same for all; the bias goes free. A feature that never
    varies gets no weight. DataError where one class has no row.
    """
    x, y = x.double(), is_positive.double()
    positives = int(is_positive.sum())
    if not 0 < positives < len(y):
        raise DataError(f"{positives} of {len(y)} rows are positive; a probe needs both classes, give more text")
    mean, spread = x.mean(0), x.std(0, correction=0)
    spread = torch.where(spread > 0, spread, torch.inf)
    design = torch.cat([(x - mean) / spread, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    weights = torch.where(is_positive, 0.5 / positives, 0.5 / (len(y) - positives))
    penalty = torch.full((design.shape[1],), ridge, dtype=torch.float64)
    penalty[-1] = 0
    coefficients = _newton(design, y, weights.double(), penalty)
    weight = coefficients[:-1] / spread
    return Probe(weight, coefficients[-1] - weight @ mean)


def _newton(
    design: Float64[Tensor, "n p"], y: Float64[Tensor, " n"], weights: Float64[Tensor, " n"], penalty: Float64[Tensor, " p"]
) -> Float64[Tensor, " p"]:
    """The minimum of the penalised loss. Steps are halved until the loss falls, so that separable data cannot run away."""

    def loss(at: Tensor) -> Tensor:
        scores = design @ at
        return weights @ (torch.nn.functional.softplus(scores) - y * scores) + penalty @ at.square() / 2

    at = torch.zeros(design.shape[1], dtype=torch.float64)
    reached = loss(at)
    for _ in range(MAX_STEPS):
        probability = torch.sigmoid(design @ at)
        gradient = design.T @ (weights * (probability - y)) + penalty * at
        if gradient.abs().max() <= TOLERANCE:
            break
        curvature = weights * probability * (1 - probability)
        hessian = (design * curvature[:, None]).T @ design + torch.diag(penalty)
        step = torch.linalg.lstsq(hessian, gradient[:, None]).solution[:, 0]
        size = 1.0
        while (next_loss := loss(at - size * step)) > reached and size > 1e-6:
            size /= 2
        if size <= 1e-6:  # rounding alone is left
            break
        at, reached = at - size * step, next_loss
    return at


CHUNK_FEATURES = 1 << 26
"""Features held at once [numbers]; bounds memory at large widths."""
COUNTS = 4
"""Columns of a table of verdicts: true positives, false negatives, false positives, true negatives."""

Encode = Callable[[Float[Tensor, "n d_in"]], Float[Tensor, "n features"]]


@dataclass(frozen=True)
class Task:
    """One label against everything else."""

    name: str
    train: Bool[Tensor, " train_rows"]
    """Which training rows have the label."""
    test: Bool[Tensor, " test_rows"]

    def is_common(self, drawn: Bool[Tensor, "seeds train_rows"], least: int) -> bool:
        """Whether `least` rows have the label, and as many have not, in the test and in every seed's draw."""
        counts = [self.test.sum(), (~self.test).sum()]
        counts += [count for rows in drawn for count in ((self.train & rows).sum(), (~self.train & rows).sum())]
        return int(torch.stack(counts).min()) >= least


def draw_rows(document: Int[np.ndarray, " rows"], num_seeds: int) -> Bool[Tensor, "seeds rows"]:
    """For each seed the rows of a random half of the documents, rounded up."""
    num_documents = int(document.max()) + 1
    drawn = [
        np.isin(document, np.random.default_rng(seed).permutation(num_documents)[: -(-num_documents // 2)])
        for seed in range(num_seeds)
    ]
    return torch.from_numpy(np.stack(drawn))


def tasks_of(
    names: Sequence[str],
    train: Int[np.ndarray, " train_rows"],
    test: Int[np.ndarray, " test_rows"],
    drawn: Bool[Tensor, "seeds train_rows"],
    min_positives: int,
) -> list[Task]:
    """The labels that enough rows have, and enough have not, in the test and in every seed's draw; by number of the label."""
    tasks = [Task(name, torch.from_numpy(train == number), torch.from_numpy(test == number)) for number, name in enumerate(names)]
    return [task for task in tasks if task.is_common(drawn, min_positives)]


def _encoded(
    encode: Encode, x: Float[Tensor, "n d_in"], num_features: int
) -> Iterator[tuple[slice, Float[Tensor, "m features"]]]:
    size = max(1, CHUNK_FEATURES // num_features)
    for start in range(0, len(x), size):
        rows = slice(start, start + size)
        yield rows, encode(x[rows])


def choose(
    encode: Encode,
    num_features: int,
    x: Float[Tensor, "n d_in"],
    tasks: Sequence[Task],
    drawn: Bool[Tensor, "seeds n"],
    num: int,
) -> Int64[Tensor, "seeds tasks num"]:
    """The `num` features of largest mean difference for each seed and task, largest first; fewer where there are fewer."""
    has_label = torch.stack([task.train for task in tasks])
    members = torch.stack([drawn[:, None] & has_label, drawn[:, None] & ~has_label]).double()  # [2 seeds tasks n]
    sums = torch.zeros(*members.shape[:-1], num_features, dtype=torch.float64)
    for rows, features in _encoded(encode, x, num_features):
        sums += members[..., rows] @ features.double()
    means = sums / members.sum(-1, keepdim=True)
    return (means[0] - means[1]).abs().sort(dim=-1, descending=True, stable=True).indices[..., :num]


def columns(encode: Encode, num_features: int, x: Float[Tensor, "n d_in"], chosen: Int64[Tensor, " k"]) -> Float[Tensor, "k n"]:
    """The chosen features of all rows, float64; one feature's values lie together, so that taking some is cheap."""
    return torch.cat([features[:, chosen].T.double() for _, features in _encoded(encode, x, num_features)], dim=1)


def verdicts(
    says_yes: Bool[Tensor, " n"], is_true: Bool[Tensor, " n"], document: Int[np.ndarray, " n"]
) -> Float[Tensor, "documents counts"]:
    """How often a probe was right and wrong in each document: TP, FN, FP, TN."""
    kind = torch.where(is_true, torch.where(says_yes, 0, 1), torch.where(says_yes, 2, 3))
    place = torch.from_numpy(document).long() * COUNTS + kind
    return torch.bincount(place, minlength=(int(document.max()) + 1) * COUNTS).double().view(-1, COUNTS)


def balanced_accuracy(counts: Float[Tensor, "*sets counts"]) -> Float[Tensor, "*sets"]:
    """Balanced accuracy: the mean of the shares of both classes classified correctly [1]; NaN where one has no row."""
    hit, miss, alarm, rest = counts.double().unbind(-1)
    return (hit / (hit + miss) + rest / (alarm + rest)) / 2


def f1(counts: Float[Tensor, "*sets counts"]) -> Float[Tensor, "*sets"]:
    """2 TP / (2 TP + FP + FN) [1]."""
    hit, miss, alarm, _ = counts.double().unbind(-1)
    return 2 * hit / (2 * hit + miss + alarm)


def probe(
    train: Float[Tensor, "n k"],
    test: Float[Tensor, "m k"],
    task: Task,
    drawn: Bool[Tensor, " n"],
    document: Int[np.ndarray, " m"],
    ridge: float,
) -> Float[Tensor, "documents counts"]:
    """The verdicts on the test rows of a probe fitted to one seed's training rows."""
    fitted = fit_probe(train[drawn], task.train[drawn], ridge)
    return verdicts(fitted.says_yes(test), task.test, document)
