"""Describe every latent of every trained SAE of a model, for people to look at.

One pass of the model over training and held-out blocks feeds all SAEs: their codes go to disk, and everything is computed from
there, exactly. SAEs that are described are skipped, without loading the model; a killed description resumes after the last
whole portion of codes, or behind the last whole SAE, and ends with the same bytes.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Any

import pyarrow
import torch

from everyscope.base.bundled import public_name
from everyscope.base.errors import ShapeMismatch
from everyscope.base.files import make_folder, require_free_space, write_sealed
from everyscope.base.progress import meter
from everyscope.describe.codes import FIRING_BYTES, CodesFolder, collect, unfinished_group
from everyscope.describe.config import DescribeConfig
from everyscope.describe.directions import logit_columns, neighbour_column
from everyscope.describe.lens import Lens
from everyscope.describe.measures import QUANTILES, Measures, TextFacts, group_words, histogram_edges, text_facts
from everyscope.describe.sequences import Sequences, read_sequences, write_sequences, write_vocabulary
from everyscope.describe.table import held_out_columns, measured_before, write_latents
from everyscope.describe.targets import DescribeTarget, described_text_identity, find_targets, read_facts
from everyscope.sae.files import read_sae
from everyscope.sae.folded import Sae
from everyscope.sae.threads import single_threaded_pool
from everyscope.sites.logits import LogitPath, final_norm, gain_of, logit_path
from everyscope.sites.model import LanguageModel, load_language_model
from everyscope.suite.descriptions import write_order
from everyscope.text.tokenizer import load_tokenizer

TEXT_FOLDER, CODES_FOLDER = "text", "codes"
SEQUENCES_FILE, VOCABULARY_FILE, MODEL_FILE = "sequences.parquet", "vocabulary.parquet", "model.json"
FORMAT = 1
"""Of latents.parquet."""
MOST_AT_ONCE = 4
"""SAEs measured side by side; each holds its codes in memory."""
SPARE_ROOM = 1.25
"""Codes on the run's own text may be denser than on the evaluation's by so much [1]."""


@dataclass(frozen=True)
class DescribeResult:
    """What a description left on disk."""

    descriptions: Path
    """The folder: saes.json, text/, and <site>/layer_<L>/<SAE>/latents.parquet."""
    num_described: int
    """SAEs described in this run."""
    num_renewed: int
    """SAEs of which only the surroundings were rewritten."""
    num_skipped: int
    """SAEs that were described already."""


def run(config: DescribeConfig) -> DescribeResult:
    """Describe every SAE below `config.trained` that is not described under this config yet.

    Raises DataError (nothing trained, or not evaluated), ShapeMismatch and NonFinite (SAE and model do not fit, or break
    down), ModelError and TextError (model or text cannot be read), StorageError.
    """
    targets = find_targets(config)
    make_folder(config.out)
    write_order(config.out, [(target.site, target.name) for target in targets])
    pending = tuple(target for target in targets if not target.is_measured)
    if pending or not _has_text(config):
        _describe(config, targets, pending)
    stale = [target for target in targets if not target.is_whole]
    for target in stale:
        _renew(config, target, targets)
    shutil.rmtree(config.out / CODES_FOLDER, ignore_errors=True)
    return DescribeResult(config.out, len(pending), len(stale), len(targets) - len(pending) - len(stale))


def _has_text(config: DescribeConfig) -> bool:
    folder = config.out / TEXT_FOLDER
    is_ours = read_facts(folder / SEQUENCES_FILE).get("identity") == described_text_identity(config)
    return is_ours and (folder / VOCABULARY_FILE).exists() and (folder / MODEL_FILE).exists()


@dataclass(frozen=True, eq=False)
class _Described:
    """What stays the same over all SAEs."""

    model: LanguageModel
    sequences: Sequences
    facts: TextFacts
    num_known: int
    """Tokens that the tokenizer knows; the model may have more rows."""

    @cached_property
    def lens(self) -> Lens:
        """The model's unembedding, prepared for all SAEs."""
        head: Any = self.model.model
        return Lens(head.get_output_embeddings().weight, self.num_known)


def _describe(config: DescribeConfig, targets: Sequence[DescribeTarget], pending: Sequence[DescribeTarget]) -> None:
    """Write the text, then describe the pending SAEs, group by group."""
    tokenizer = load_tokenizer(config.model.name, config.model.revision)
    model = load_language_model(config.model)
    sequences = read_sequences(config, tokenizer)
    if not _has_text(config):
        _write_text(config, model, tokenizer, sequences)
    if not pending:
        return
    vocab_size = max(model.adapter.config.vocab_size, len(tokenizer))
    described = _Described(model, sequences, text_facts(sequences, vocab_size, config.seed), len(tokenizer))
    folder = config.out / CODES_FOLDER
    groups = list(_groups(config, targets, pending, sequences.num_tokens, unfinished_group(folder)))
    total = sequences.num_tokens * sum(len(group) for group in groups)
    for group in groups:
        codes = CodesFolder(
            folder, tuple(target.identity for target in group), ceil(len(sequences.input_ids) / config.portion_blocks)
        )
        _collect(config, described, group, codes, total)
        waiting = [target for target in group if not target.is_measured]
        _describe_saes(config, described, waiting, targets, codes)
        codes.delete()


def _describe_saes(
    config: DescribeConfig,
    described: _Described,
    waiting: Sequence[DescribeTarget],
    targets: Sequence[DescribeTarget],
    codes: CodesFolder,
) -> None:
    """SAE by SAE, a few at a time in threads: most of the work is compiled and lets other threads run."""
    assert described.lens, "made here, once, and not by every thread"
    with (
        meter("latents", sum(target.width for target in waiting), "latents") as progress,
        single_threaded_pool(min(MOST_AT_ONCE, os.cpu_count() or 1)) as pool,
    ):
        running = {pool.submit(_describe_sae, config, described, target, targets, codes): target for target in waiting}
        try:
            for future in as_completed(running):
                future.result()
                progress.advance(running[future].width)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _groups(
    config: DescribeConfig,
    targets: Sequence[DescribeTarget],
    pending: Sequence[DescribeTarget],
    num_tokens: int,
    unfinished: tuple[str, ...],
) -> Iterator[tuple[DescribeTarget, ...]]:
    """The SAEs that one pass of the model serves: first those of a killed run that have codes on disk, then as many as fit."""
    known = {target.identity: target for target in targets}
    waiting = list(pending)
    if set(unfinished) <= set(known) and any(target.identity in unfinished for target in waiting):
        yield tuple(known[identity] for identity in unfinished)
        waiting = [target for target in waiting if target.identity not in unfinished]
    group, size = [], 0.0
    for target in waiting:
        needs = target.l0 * num_tokens * FIRING_BYTES
        if group and (size + needs > config.codes_bytes or len(group) == config.saes_at_once):
            yield tuple(group)
            group, size = [], 0.0
        group.append(target)
        size += needs
    if group:
        yield tuple(group)


def _collect(
    config: DescribeConfig, described: _Described, group: Sequence[DescribeTarget], codes: CodesFolder, total: int
) -> None:
    """One pass of the model for a group, unless its codes are all there."""
    device = torch.device(config.model.device)
    needs = sum(target.l0 for target in group) * described.sequences.num_tokens * FIRING_BYTES * SPARE_ROOM
    codes.open()
    missing = [number for number in range(codes.num_portions) if not codes.portion(number).exists()]
    require_free_space(config.out, int(needs * len(missing) / codes.num_portions), "keeping the firings until they are described")
    saes = [(target, _checked(described.model, target).to(device)) for target in group] if missing else []
    with (
        meter("describe", described.sequences.num_tokens * len(group), "tokens x SAEs") as progress,
        single_threaded_pool(min(MOST_AT_ONCE, os.cpu_count() or 1) if device.type == "cpu" else 1) as pool,
    ):

        def passed(num_tokens: int, is_resumed: bool) -> None:
            progress.advance(num_tokens * len(group), is_resumed=is_resumed)

        collect(config, described.model.model, described.sequences, saes, codes, passed, pool)


def _checked(model: LanguageModel, target: DescribeTarget) -> Sae:
    """The SAE; ShapeMismatch where it is of another model."""
    sae, _ = read_sae(target.folder)
    if sae.d_in != (width := model.adapter.width(target.site)):
        raise ShapeMismatch(f"{target.folder}: the SAE has d_in={sae.d_in}, {target.site} of the model {width}; train it again")
    return sae


def _describe_sae(
    config: DescribeConfig, described: _Described, target: DescribeTarget, targets: Sequence[DescribeTarget], codes: CodesFolder
) -> None:
    """Everything about one SAE, from its codes and its decoder."""
    massive = codes.massive(target.identity)
    facts = described.facts
    if len(massive):
        facts = text_facts(described.sequences.without(massive), facts.occurrences.shape[1], config.seed)
    measures = Measures(config, codes.read(target.identity), facts)
    path = logit_path(described.model.model, target.site)
    W_dec = read_sae(target.folder)[0].W_dec
    surroundings = _surroundings(config, target, targets)

    def columns(first: int, last: int) -> dict[str, pyarrow.Array]:
        logits = logit_columns(path, described.lens, W_dec[first:last], has_raw=config.raw_logits)
        return {**measures.columns(first, last), **logits, **surroundings(first, last)}

    about = {**_facts(config, facts.sequences, path, target), "num_massive_tokens": len(massive)}
    write_latents(target.out, target.width, about, columns)


def _facts(config: DescribeConfig, sequences: Sequences, path: LogitPath, target: DescribeTarget) -> dict[str, Any]:
    """What latents.parquet says of itself."""
    return {
        "format": FORMAT,
        "num_tokens": sequences.num_tokens,
        "num_sequences": len(sequences.input_ids),
        "context": sequences.context,
        "num_documents": len(sequences.documents),
        "histogram_edges_of_max": histogram_edges().tolist(),
        "quantiles": list(QUANTILES),
        "groups": group_words(config),
        "window": config.window,
        "logit_path": path.words,
        "logit_softcap": path.softcap,
        "identity": target.identity,
        "surroundings": target.surroundings,
    }


def _surroundings(config: DescribeConfig, target: DescribeTarget, targets: Sequence[DescribeTarget]) -> Any:
    """The columns that the evaluation and other SAEs decide, by range."""
    held_out = held_out_columns(target)
    device = torch.device(config.model.device)
    others = {number: read_sae(targets[number].folder)[0].to(device) for _, number in target.relatives}
    W_dec = others[target.number].W_dec

    def columns(first: int, last: int) -> dict[str, pyarrow.Array]:
        near = neighbour_column(W_dec[first:last], first, target.relatives, others, config.neighbours)
        return {**held_out(first, last), "neighbours": near}

    return columns


def _renew(config: DescribeConfig, target: DescribeTarget, targets: Sequence[DescribeTarget]) -> None:
    """Rewrite the surroundings of an SAE and keep what was measured of it."""
    measured, surroundings = measured_before(target.out), _surroundings(config, target, targets)
    facts = {**read_facts(target.out), "surroundings": target.surroundings}
    write_latents(target.out, target.width, facts, lambda first, last: {**measured(first, last), **surroundings(first, last)})


def _write_text(config: DescribeConfig, model: LanguageModel, tokenizer: Any, sequences: Sequences) -> None:
    """Model, vocabulary and, last, the blocks: text/ with our sequences is whole."""
    folder = config.out / TEXT_FOLDER
    head: Any = model.model
    norm = final_norm(model.model, model.adapter)
    kind = "LayerNorm" if gain_of(norm, model.adapter.d_model).is_centring else "RMSNorm"
    write_sealed(
        folder / MODEL_FILE,
        {
            "model": public_name(config.model.name),
            "revision": config.model.revision,
            "tokenizer": type(tokenizer).__name__,
            "num_layers": model.adapter.num_layers,
            "d_model": model.adapter.d_model,
            "vocab_size": head.get_output_embeddings().weight.shape[0],
            "norm": kind,
            "logit_softcap": getattr(model.adapter.config, "final_logit_softcapping", None),
        },
    )
    write_vocabulary(folder / VOCABULARY_FILE, tokenizer)
    write_sequences(folder / SEQUENCES_FILE, sequences, described_text_identity(config))
