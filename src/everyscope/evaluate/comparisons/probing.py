"""k-sparse probing: how well a few latents of the canonical SAEs predict a token's class, on documents unseen in fitting.

Beside every probe stand as many coordinates of the activation itself, all of them, and the class that is more common. The
built-in labels are the classes of Python's own tokens; a .jsonl brings others. Tokens that are massive at a site are left out
there, in training and in the test, as in its evaluation.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from everyscope.base.errors import DataError
from everyscope.base.files import sha256
from everyscope.base.ids import content_id
from everyscope.base.progress import Meter, meter
from everyscope.evaluate.bootstrap import bootstrap_interval
from everyscope.evaluate.comparisons.canonical import canonical_saes
from everyscope.evaluate.comparisons.config import ProbingConfig
from everyscope.evaluate.comparisons.labels import LabelledCorpus, labelled_python, read_labelled
from everyscope.evaluate.comparisons.probe_rows import ProbeRows, SiteActivations, activations_at, read_rows
from everyscope.evaluate.comparisons.probes import (
    Encode,
    Task,
    balanced_accuracy,
    choose,
    columns,
    draw_rows,
    f1,
    probe,
    tasks_of,
)
from everyscope.evaluate.comparisons.scored import Scored, read_scored
from everyscope.evaluate.comparisons.slices import is_current, read_slice, write_slice
from everyscope.sae.folded import Sae
from everyscope.sae.normalisation import NormLimits
from everyscope.sites.model import load_language_model
from everyscope.sites.names import Site
from everyscope.text.tokenizer import load_tokenizer

SLICE, FOLDER = "probing.json", "probing"
VERSION = 2
MAJORITY_ACCURACY = 0.5
"""Balanced accuracy of always saying the same [1]."""


@dataclass(frozen=True, eq=False)
class Probed:
    """What stays the same for all probes."""

    config: ProbingConfig
    tasks: Sequence[Task]
    drawn: Bool[Tensor, "seeds train_rows"]
    """Each seed's training rows."""
    document: Int[np.ndarray, " test_rows"]
    """The number of each test row's document."""

    def of_usual(self, train: Bool[Tensor, " train_rows"], test: Bool[Tensor, " test_rows"]) -> "Probed":
        """The same without massive rows, and without the tasks that are too rare among the others."""
        drawn = self.drawn[:, train]
        tasks = [Task(task.name, task.train[train], task.test[test]) for task in self.tasks]
        common = [task for task in tasks if task.is_common(drawn, self.config.min_positives)]
        return replace(self, tasks=common, drawn=drawn, document=self.document[test.numpy()])


def run(config: ProbingConfig) -> Path:
    """Write slices/probing.json and return its path. What has been found for an SAE is kept, and not computed again.

    TextError where no document has labels, DataError where no label is common enough; raises as loading the model does.
    """
    scored = list(canonical_saes(read_scored(config.evaluate), config.canonical_l0).values())
    path, common = config.slices / SLICE, _common(config)
    inputs = content_id([common, [one.evidence for one in scored]])
    if is_current(path, inputs):
        return path
    pending = [one for one in scored if not is_current(_kept(config, one), _inputs(common, one))]
    if pending:
        _probe_all(config, pending, common)
    rows = [row for one in scored for row in read_slice(_kept(config, one))["rows"]]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    write_slice(path, inputs, {"tasks": tasks, "rows": rows, "seeds": config.num_seeds})
    return path


def _common(config: ProbingConfig) -> str:
    """Hash of everything that determines the results of any SAE."""
    settings = config.model_dump(mode="json", exclude={"evaluate", "canonical_l0", "sites_at_once", "labels", "text"})
    about = [config.evaluate.model.as_json(), config.packing.as_json()]
    return content_id([VERSION, settings, about, None if config.labels is None else sha256(config.labels)])


def _inputs(common: str, one: Scored) -> str:
    return content_id([common, one.evidence])


def _kept(config: ProbingConfig, one: Scored) -> Path:
    """Where the results of one SAE are kept."""
    return config.work / FOLDER / f"{one.name}.json"


def _probe_all(config: ProbingConfig, pending: Sequence[Scored], common: str) -> None:
    """Probe some SAEs, a few sites at a time, each site's activations from one pass over the rows."""
    evaluate = config.evaluate
    tokenizer = load_tokenizer(evaluate.model.name, evaluate.model.revision)
    corpus: LabelledCorpus = labelled_python(config.packing) if config.labels is None else read_labelled(config.labels)
    train = read_rows(corpus, config, tokenizer, "train", config.train_tokens)
    test = read_rows(corpus, config, tokenizer, "held_out", config.test_tokens)
    drawn = draw_rows(train.document, config.num_seeds)
    tasks = tasks_of(corpus.names, train.labels, test.labels, drawn, config.min_positives)
    if not tasks:
        raise DataError(
            f"none of {', '.join(corpus.names)} has {config.min_positives} tokens in every draw of training documents and in the "
            "held-out ones; give more text, raise train_tokens and test_tokens, or lower min_positives"
        )
    probed, model = Probed(config, tasks, drawn, test.document), load_language_model(evaluate.model).model
    sites = sorted({one.site for one in pending})
    with meter("probing", len(pending) + len(sites), "dictionaries") as progress:
        for start in range(0, len(sites), config.sites_at_once):
            group = {
                site: _limits(next(one for one in pending if one.site == site))
                for site in sites[start : start + config.sites_at_once]
            }
            inside, outside = (_gathered(model, tokenizer, group, rows, evaluate.batch_blocks) for rows in (train, test))
            for site in group:
                saes = [one for one in pending if one.site == site]
                _probe_site(probed, saes, inside.pop(site), outside.pop(site), common, progress)


def _limits(one: Scored) -> NormLimits:
    """What the evaluation found massive at an SAE's site."""
    massive = one.metrics["massive"]
    written = _limit(massive["norm_limit"])
    return NormLimits(_limit(massive.get("input_norm_limit")) if one.site.inputs != one.site.outputs else written, written)


def _limit(found: float | None) -> float:
    return math.inf if found is None else found


def _gathered(
    model: Any, tokenizer: Any, sites: Mapping[Site, NormLimits], rows: ProbeRows, batch_blocks: int
) -> dict[Site, SiteActivations]:
    """All rows' activations at some sites."""
    parts = list(activations_at(model, tokenizer, sites, rows, batch_blocks))
    return {
        site: SiteActivations(torch.cat([part[site].x for part in parts]), torch.cat([part[site].is_usual for part in parts]))
        for site in sites
    }


def _probe_site(
    probed: Probed, saes: Sequence[Scored], train: SiteActivations, test: SiteActivations, common: str, progress: Meter
) -> None:
    """Probe the SAEs of one site on its usual rows, beside the activation's own coordinates."""
    config, device = probed.config, torch.device(probed.config.evaluate.model.device)
    probed, inside, outside = probed.of_usual(train.is_usual, test.is_usual), train.x[train.is_usual], test.x[test.is_usual]
    neurons, dense = sparse_scores(probed, lambda x: x, inside.shape[1], inside, outside), dense_scores(probed, inside, outside)
    progress.advance()
    for one in saes:
        sae = one.target.sae().to(device)
        rows = []
        for (task, k), score in sparse_scores(probed, _encoder(sae, device), sae.d_sae, inside, outside).items():
            beside = {"neurons": neurons[task, k]["accuracy"], "dense": dense[task], "majority": MAJORITY_ACCURACY}
            rows.append({"task": task, "site": one.site.folder, "sae": one.name, "k": k} | score | {"baseline": beside})
        write_slice(_kept(config, one), _inputs(common, one), {"rows": rows})
        progress.advance()


def _encoder(sae: Sae, device: torch.device) -> Encode:
    """The SAE on its device, between rows and latents on the CPU."""
    return lambda x: sae.encode(x.to(device)).cpu()


def sparse_scores(
    probed: Probed, encode: Encode, num_features: int, train: Float[Tensor, "n d_in"], test: Float[Tensor, "m d_in"]
) -> dict[tuple[str, int], dict[str, Any]]:
    """By task and k: balanced accuracy with its interval, F1, and the features that the first seed chose.

    Verdicts of all seeds count together; k larger than the number of features takes all of them.
    """
    config, ks = probed.config, sorted(probed.config.ks)
    if not probed.tasks:
        return {}
    chosen = choose(encode, num_features, train, probed.tasks, probed.drawn, ks[-1])
    used, place = chosen.unique(return_inverse=True)
    inside, outside = columns(encode, num_features, train, used), columns(encode, num_features, test, used)
    found = {}
    for number, task in enumerate(probed.tasks):
        for k in ks:
            tables = [
                probe(
                    inside[place[seed, number, :k]].T,
                    outside[place[seed, number, :k]].T,
                    task,
                    drawn,
                    probed.document,
                    config.ridge,
                )
                for seed, drawn in enumerate(probed.drawn)
            ]
            counts = torch.stack(tables).sum(0)
            interval = bootstrap_interval(counts, balanced_accuracy, resamples=config.resamples, level=config.level)
            found[task.name, k] = {
                "accuracy": float(balanced_accuracy(counts.sum(0))),
                "f1": float(f1(counts.sum(0))),
                "interval": interval,
                "latents": chosen[0, number, :k].tolist(),
            }
    return found


def dense_scores(probed: Probed, train: Float[Tensor, "n d_in"], test: Float[Tensor, "m d_in"]) -> dict[str, float]:
    """By task: the balanced accuracy of a probe on all coordinates."""
    found = {}
    for task in probed.tasks:
        tables = [probe(train, test, task, drawn, probed.document, probed.config.ridge) for drawn in probed.drawn]
        found[task.name] = float(balanced_accuracy(torch.stack(tables).sum((0, 1))))
    return found
