"""A language model with a suite's SAEs, for the pages that read a text, steer the model or draw its circuits."""

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from everyscope.base.errors import ConfigError, DataError, TextError
from everyscope.base.progress import say
from everyscope.browse.live import (
    MAX_TEXT,
    Ablation,
    AblationRequest,
    CircuitRequest,
    Continuations,
    Each,
    Push,
    Reading,
    SaeQuestion,
    SaeReading,
    Say,
    Stop,
    Stopped,
    TextToken,
)
from everyscope.browse.live_writing import Batch, Column, Pushed, drawn, pushed
from everyscope.circuits.attribution import attribute
from everyscope.circuits.choosing import coders_of
from everyscope.circuits.config import AttributionConfig, TargetTokens
from everyscope.circuits.graph import Graph
from everyscope.circuits.intervene import Edit as LatentEdit
from everyscope.circuits.intervene import Effects, intervene
from everyscope.circuits.writing import write_graph
from everyscope.sae.folded import Sae
from everyscope.sites.capture import capture
from everyscope.sites.config import ModelConfig
from everyscope.sites.model import load_language_model
from everyscope.sites.names import Site
from everyscope.sites.splice import Edit, splice
from everyscope.suite.reader import SuiteEntry, load_suite, model_of
from everyscope.text.markers import markers_of
from everyscope.text.pieces import special_tokens, token_pieces
from everyscope.text.tokenizer import load_tokenizer, readable_ids, unreadable_tokens

KEPT_BYTES = 2 << 30
"""SAEs kept in memory, the last used ones [bytes]."""
KEPT_READINGS = 8
"""Readings kept: pages come back to the same text for each token that somebody looks at [readings]."""
TOP_LATENTS = 12
"""Latents listed for each token, the first by rank [latents]."""
MAX_GRAPH_TOKENS = 512
"""Of a prompt whose graph a page asks for; the command takes longer ones [tokens]."""
GRAPH_SECONDS = 40.0
"""After which a page's graph gets no further latents [s]."""
TOP_TOKENS, TOP_CHANGED = 6, 24
"""Next tokens before and after an ablation, and downstream latents that it changes [tokens, latents]."""
GAIN = 1.3
"""How much faster all cores must be than one to be taken [1]: what else runs on the machine slows many threads more than one."""
UNTIMED_SECONDS = 3.0
"""A pass on all cores that takes longer is not timed on one [s]."""
TIMED_TOKENS = {"reading": 64, "writing": 1}
"""Tokens of the passes that are timed: products of matrices, and of matrices with vectors [tokens]."""


class SuiteModel:
    """The model that a suite is of, and its SAEs as they are asked for."""

    def __init__(self, suite: Path, model: ModelConfig | None = None) -> None:
        """Load the model that `suite` names, or another one; ModelError where it is unavailable.

        Times it on one core and on all, and says which it takes; this and all else in the thread that will ask it.
        """
        self._suite = loaded = load_suite(suite)
        config = (model or model_of(suite, loaded.index.model)).model_copy(update={"device": "cpu", "device_map": None})
        self._entries = {entry.record.folder: entry for entry in loaded}
        self._model: Any = load_language_model(config).model
        self._tokenizer = load_tokenizer(config.name, config.revision)
        self._markers = markers_of(self._tokenizer)
        self._longest = int(getattr(self._model.config.get_text_config(), "max_position_embeddings", 1 << 30))
        self._pieces, self._special = token_pieces(self._tokenizer), special_tokens(self._tokenizer)
        self._saes: OrderedDict[str, Sae] = OrderedDict()
        self._readings: OrderedDict[bytes, Reading] = OrderedDict()
        most = torch.get_num_threads()
        self.threads = {name: quickest(partial(self._pass_seconds, tokens), most) for name, tokens in TIMED_TOKENS.items()}
        chosen = ", ".join(f"{name} on {count} of {most} threads" for name, count in self.threads.items())
        say(f"{loaded.index.model}: {chosen}, by timing")

    def read(self, text: str, questions: Sequence[SaeQuestion]) -> Reading:
        """Every token of `text`, BOS in front, with the latents that are active there; specials have none. See Live."""
        key = hashlib.sha256(repr([text, *((one.sae_id, one.follow) for one in questions)]).encode())
        for question in questions:
            key.update(b"" if question.worth is None else question.worth.tobytes())
        if key.digest() not in self._readings:
            self._readings[key.digest()] = self._read(text, questions)
            if len(self._readings) > KEPT_READINGS:
                self._readings.popitem(last=False)
        self._readings.move_to_end(key.digest())
        return self._readings[key.digest()]

    def _read(self, text: str, questions: Sequence[SaeQuestion]) -> Reading:
        torch.set_num_threads(self.threads["reading"])
        input_ids = self._encoded(text)
        entries = [self._entry(question.sae_id) for question in questions]
        found = capture(self._model, list(dict.fromkeys(entry.site for entry in entries)), input_ids)
        ids = input_ids[0].tolist()
        tokens = tuple(TextToken(token, self._pieces[token], token in self._special) for token in ids)
        is_text = torch.tensor([not token.is_special for token in tokens])
        answers = [
            _answered(self._sae(question.sae_id).encode(found[entry.site][0]) * is_text[:, None], question)
            for question, entry in zip(questions, entries, strict=True)
        ]
        return Reading(tokens, tuple(answers))

    @torch.no_grad()
    def write(
        self,
        prompt: str,
        columns: Sequence[Sequence[Push]],
        *,
        num_tokens: int,
        temperature: float,
        seed: int,
        each: Each = lambda step: None,
        stop: Stop = lambda: False,
    ) -> Continuations:
        """Continue `prompt` once for each column's pushes, all from the same random numbers. See Live.

        Columns end before EOS. Columns that push nothing are one and the same row.
        """
        torch.set_num_threads(self.threads["writing"])
        input_ids = self._encoded(prompt)
        batch = Batch.of(columns)
        num_tokens = min(num_tokens, self._longest - input_ids.shape[1])
        written = [Column() for _ in columns]
        generator = torch.Generator().manual_seed(seed)
        cache, fed = None, input_ids.expand(batch.num_rows, -1)
        with splice(self._model, self._edits(batch)):
            start = time.perf_counter()
            for _ in range(num_tokens):
                if stop():
                    raise Stopped(f"{num_tokens} tokens took too long, or the page was closed; ask for fewer")
                output = self._model(input_ids=fed, past_key_values=cache, use_cache=True)
                cache, logits = output.past_key_values, output.logits[:, -1].float()
                chosen = drawn(logits[: batch.num_written], temperature, generator)
                told = logits.log_softmax(-1)
                numbers = chosen.tolist()
                for column, row in zip(written, batch.row_of, strict=True):
                    column.add(numbers[row], told[row], told[batch.beside(row)], self._markers.eos)
                each(tuple(self._pieces[column.tokens[-1]] if column.is_open else None for column in written))
                if not any(column.is_open for column in written):
                    break
                fed = torch.cat([chosen, chosen[1:]])[:, None]
            seconds = time.perf_counter() - start
        return Continuations(tuple(column.told(self._pieces) for column in written), seconds)

    def draw(self, request: CircuitRequest, path: Path, *, say: Say, stop: Stop = lambda: False) -> None:
        """Write the graph of a prompt, or of the token at a position in it, to `path`.

        ConfigError for a position outside the prompt, TextError for more tokens than MAX_GRAPH_TOKENS, Stopped where `stop` says
        so.
        """
        input_ids, target = self._encoded(request.prompt), request.target
        if request.position is not None:
            if not 1 <= request.position < input_ids.shape[1]:
                last = input_ids.shape[1] - 1
                raise ConfigError(
                    f"position {request.position}: the prompt has tokens 1 to {last} behind BOS; choose one of these"
                )
            target = target or TargetTokens((int(input_ids[0, request.position]),))
            input_ids = input_ids[:, : request.position]
        if input_ids.shape[1] > MAX_GRAPH_TOKENS:
            counts = f"{input_ids.shape[1]} tokens, pages take {MAX_GRAPH_TOKENS}"
            raise TextError(f"the prompt has {counts}; shorten it, or use `everyscope circuit`")

        def report(done: int, of: int) -> None:
            if stop():
                raise Stopped("the graph took too long, or the page was closed; shorten the prompt")
            say(done, of)

        config = AttributionConfig(max_seconds=GRAPH_SECONDS)
        coders = coders_of(self._suite)
        more: dict[str, Any] = {"target": target, "config": config, "tokenizer": self._tokenizer, "say": report}
        graph = attribute(self._in_float32(), coders, input_ids, **more)
        write_graph(path, graph)

    def ablate(self, graph: Graph, request: AblationRequest) -> Sequence[Ablation]:
        """What scaling latents changes in the model, each variant beside what the graph predicts; ConfigError where the graph is
        not of this suite's transcoders.
        """
        entries = [self._entry(coder.name) for coder in graph.facts.coders]
        edits = [[LatentEdit(latent, request.factor) for latent in some] for some in request.variants]
        held = {"freezes_attention": request.freezes_attention, "freezes_norms": request.freezes_norms}
        effects = intervene(self._in_float32(), entries, graph, [[], *edits], **held)
        return [self._ablation(effects, variant) for variant in range(1, len(edits) + 1)]

    def _in_float32(self) -> Any:
        """The model, from now on in float32, on the threads that reading takes: in bfloat16 a graph's sums would not hold."""
        torch.set_num_threads(self.threads["reading"])
        if self._model.dtype != torch.float32:
            self._model.float()
            self._readings.clear()
        return self._model

    def _ablation(self, effects: Effects, variant: int) -> Ablation:
        before, after = (torch.from_numpy(effects.logits[place]).double().softmax(-1) for place in (0, variant))
        tokens = dict.fromkeys([*before.topk(TOP_TOKENS).indices.tolist(), *after.topk(TOP_TOKENS).indices.tolist()])
        measured, predicted = effects.latents_measured[variant], effects.latents_predicted[variant]
        size = np.maximum(np.abs(measured), np.abs(predicted))
        nodes = [node for node in np.argsort(-size, kind="stable")[:TOP_CHANGED].tolist() if size[node] > 0]
        return Ablation(
            tuple(zip(effects.measured[variant].tolist(), effects.predicted[variant].tolist(), strict=True)),
            tuple((self._pieces[token], before[token].item(), after[token].item()) for token in tokens),
            tuple((node, float(measured[node]), float(predicted[node])) for node in nodes),
        )

    @torch.no_grad()
    def _pass_seconds(self, num_tokens: int, threads: int) -> float:
        """How long a pass over so many tokens takes on so many threads, the quicker of two behind a first one [s]."""
        torch.set_num_threads(threads)
        cache = self._model(input_ids=torch.full((1, 8), self._markers.bos), use_cache=True).past_key_values
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            cache = self._model(
                input_ids=torch.full((1, num_tokens), self._markers.bos), past_key_values=cache, use_cache=True
            ).past_key_values
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    def _encoded(self, text: str) -> Int[Tensor, "1 ctx"]:
        """BOS and the tokens of `text`; TextError where it is empty or longer than the model reads."""
        if not text.strip() or len(text) > MAX_TEXT:
            raise TextError(f"the text has {len(text)} characters, expected 1 to {MAX_TEXT}, not all of them space")
        tokens = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(tokens) + 1 > self._longest:
            raise TextError(f"the text has {len(tokens)} tokens, the model reads {self._longest - 1}; shorten it")
        ids, _ = readable_ids(self._tokenizer, tokens, "the text", unreadable_tokens())
        return torch.tensor([[self._markers.bos, *ids.tolist()]])

    def _entry(self, sae_id: str) -> SuiteEntry:
        if sae_id not in self._entries:
            raise DataError(f"{sae_id!r}: not an SAE of this suite; give a folder that suite.json lists")
        return self._entries[sae_id]

    def _sae(self, sae_id: str) -> Sae:
        if sae_id not in self._saes:
            self._saes[sae_id] = self._entry(sae_id).sae()
            while len(self._saes) > 1 and sum(map(_num_bytes, self._saes.values())) > KEPT_BYTES:
                self._saes.popitem(last=False)
        self._saes.move_to_end(sae_id)
        return self._saes[sae_id]

    def _edits(self, batch: "Batch") -> dict[Site, Edit]:
        """One edit per site, which adds up all pushes there; ConfigError for a latent that the SAE does not have."""
        by_site: dict[Site, list[Pushed]] = {}
        for sae_id, by_latent in batch.strengths.items():
            entry = self._entry(sae_id)
            if wrong := [latent for latent in by_latent if not 0 <= latent < entry.width]:
                raise ConfigError(f"{sae_id}: latent {wrong[0]}, but it has {entry.width}; give one from 0 on")
            by_site.setdefault(entry.site, []).append(Pushed.of(self._sae(sae_id), by_latent))
        return {site: partial(pushed, pushes=pushes) for site, pushes in by_site.items()}


def quickest(seconds: Callable[[int], float], most: int) -> int:
    """1 thread or `most`: all where a pass on one takes GAIN times as long, or where a pass takes long anyway.

    `seconds` gives the time of a pass on so many threads [s].
    """
    if most == 1:
        return 1
    on_all = seconds(most)
    return most if on_all > UNTIMED_SECONDS or seconds(1) > GAIN * on_all else 1


def _num_bytes(sae: Sae) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in sae.own_tensors().values())


def _answered(f: Float[Tensor, "ctx d_sae"], question: SaeQuestion) -> SaeReading:
    """The first TOP_LATENTS of each token by activation times worth, and the latents that are followed."""
    ranked = f if question.worth is None else f * torch.from_numpy(question.worth)
    scores, latents = ranked.topk(min(TOP_LATENTS, f.shape[1]))
    values = f.gather(1, latents)
    top = tuple(
        tuple((latent, value) for latent, value, score in zip(*row, strict=True) if score > 0)
        for row in zip(latents.tolist(), values.tolist(), scores.tolist(), strict=True)
    )
    return SaeReading(top, {latent: tuple(f[:, latent].tolist()) for latent in question.follow})
