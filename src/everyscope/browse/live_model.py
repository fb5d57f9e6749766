"""A language model with a suite's SAEs, for the pages that read a text or steer one.

Steering adds to the activations what pushing the latents adds to the reconstruction, decode(pushed) - decode(original): what the
SAE does not reconstruct stays as it was, and a push of 0 changes no bit.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from everyscope.base.errors import ConfigError, DataError, TextError
from everyscope.browse.live import (
    MAX_TEXT,
    Ablation,
    AblationRequest,
    CircuitRequest,
    Continuations,
    Push,
    Say,
    Stop,
    Stopped,
    TokenReading,
)
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

KEPT_SAES = 8
"""SAEs kept in memory [SAEs]."""
TOP_LATENTS = 12
"""Latents shown per token, the strongest [latents]."""
MAX_GRAPH_TOKENS = 512
"""Of a prompt whose graph a page asks for; the command takes longer ones [tokens]."""
GRAPH_SECONDS = 40.0
"""After which a page's graph gets no further latents [s]."""
TOP_TOKENS, TOP_CHANGED = 6, 24
"""Next tokens before and after an ablation, and downstream latents that it changes [tokens, latents]."""


class SuiteModel:
    """The model that a suite is of, and its SAEs as they are asked for."""

    def __init__(self, suite: Path, model: ModelConfig | None = None) -> None:
        """Load the model that `suite` names, or another one; ModelError where it cannot be loaded."""
        self._suite = loaded = load_suite(suite)
        config = (model or model_of(suite, loaded.index.model)).model_copy(update={"device": "cpu", "device_map": None})
        self._entries = {entry.record.folder: entry for entry in loaded}
        self._model: Any = load_language_model(config).model
        self._tokenizer = load_tokenizer(config.name, config.revision)
        self._markers = markers_of(self._tokenizer)
        self._longest = int(getattr(self._model.config.get_text_config(), "max_position_embeddings", 1 << 30))
        self._pieces, self._special = token_pieces(self._tokenizer), special_tokens(self._tokenizer)
        self._saes: OrderedDict[str, Sae] = OrderedDict()

    def active(self, text: str, sae_id: str) -> Sequence[TokenReading]:
        """Every token of `text`, BOS in front, with the latents of an SAE that are active there; specials have none."""
        input_ids = self._encoded(text)
        entry = self._entry(sae_id)
        x = capture(self._model, [entry.site], input_ids)[entry.site][0]
        strengths, latents = self._sae(sae_id).encode(x).topk(min(TOP_LATENTS, entry.width))
        readings = []
        for token, values, numbers in zip(input_ids[0].tolist(), strengths.tolist(), latents.tolist(), strict=True):
            is_special = token in self._special
            top = () if is_special else tuple((n, v) for n, v in zip(numbers, values, strict=True) if v > 0)
            readings.append(TokenReading(token, self._pieces[token], is_special, top))
        return readings

    def steer(
        self, prompt: str, pushes: Sequence[Push], *, num_tokens: int, temperature: float, seed: int, stop: Stop = lambda: False
    ) -> Continuations:
        """Continue `prompt` by `num_tokens` with and without `pushes`, from the same seed; temperature 0 takes the likeliest.

        Stopped as soon as `stop` says so.
        """
        input_ids = self._encoded(prompt)
        num_tokens = min(num_tokens, self._longest - input_ids.shape[1])
        edits = self._edits(pushes)
        plain = self._continue(input_ids, num_tokens, temperature, seed, stop)
        with splice(self._model, edits):
            steered = self._continue(input_ids, num_tokens, temperature, seed, stop)
        return Continuations(self._bytes(plain), self._bytes(steered))

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
                raise Stopped("the graph took too long, or no page waits for it any more; shorten the prompt")
            say(done, of)

        config = AttributionConfig(max_seconds=GRAPH_SECONDS)
        coders = coders_of(self._suite)
        graph = attribute(self._model, coders, input_ids, target=target, config=config, tokenizer=self._tokenizer, say=report)
        write_graph(path, graph)

    def ablate(self, graph: Graph, request: AblationRequest) -> Sequence[Ablation]:
        """What scaling latents changes in the model, each variant beside what the graph predicts; ConfigError where the graph is
        not of this suite's transcoders.
        """
        entries = [self._entry(coder.name) for coder in graph.facts.coders]
        edits = [[LatentEdit(latent, request.factor) for latent in some] for some in request.variants]
        held = {"freezes_attention": request.freezes_attention, "freezes_norms": request.freezes_norms}
        effects = intervene(self._model, entries, graph, [[], *edits], **held)
        return [self._ablation(effects, variant) for variant in range(1, len(edits) + 1)]

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
            raise DataError(f"{sae_id!r}: no SAE of this suite; take a folder that suite.json lists")
        return self._entries[sae_id]

    def _sae(self, sae_id: str) -> Sae:
        if sae_id not in self._saes:
            self._saes[sae_id] = self._entry(sae_id).sae()
            if len(self._saes) > KEPT_SAES:
                self._saes.popitem(last=False)
        self._saes.move_to_end(sae_id)
        return self._saes[sae_id]

    def _edits(self, pushes: Sequence[Push]) -> dict[Site, Edit]:
        """One edit per site, which adds up all pushes there; ConfigError for a latent that the SAE does not have."""
        by_site: dict[Site, dict[str, dict[int, float]]] = {}
        for push in pushes:
            entry = self._entry(push.sae_id)
            if not 0 <= push.latent < entry.width:
                raise ConfigError(f"{push.sae_id}: latent {push.latent}, but it has {entry.width}; give one from 0 on")
            strengths = by_site.setdefault(entry.site, {}).setdefault(push.sae_id, {})
            strengths[push.latent] = strengths.get(push.latent, 0.0) + push.strength
        return {
            site: partial(pushed, pushes=[(self._sae(sae_id), strengths) for sae_id, strengths in of_sae.items()])
            for site, of_sae in by_site.items()
        }

    @torch.no_grad()
    def _continue(self, input_ids: Int[Tensor, "1 ctx"], num_tokens: int, temperature: float, seed: int, stop: Stop) -> list[int]:
        """Up to `num_tokens` more tokens, drawn from a generator of our own; ends before EOS."""
        generator = torch.Generator().manual_seed(seed)
        continued: list[int] = []
        cache, fed = None, input_ids
        for _ in range(num_tokens):
            if stop():
                raise Stopped(f"{num_tokens} tokens took too long, or no page waits for them any more; ask for fewer")
            output = self._model(input_ids=fed, past_key_values=cache, use_cache=True)
            cache, logits = output.past_key_values, output.logits[0, -1].float()
            if temperature:
                token = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
            else:
                token = int(logits.argmax())
            if token == self._markers.eos:
                break
            continued.append(token)
            fed = torch.tensor([[token]])
        return continued

    def _bytes(self, tokens: Iterable[int]) -> tuple[bytes, ...]:
        return tuple(self._pieces[token] for token in tokens)


def pushed(
    x: Float[Tensor, "... d_in"],
    written: Float[Tensor, "... d_out"] | None = None,
    *,
    pushes: Sequence[tuple[Sae, dict[int, float]]],
) -> Float[Tensor, "... d_out"]:
    """Activations x to x + decode(f') - decode(f), where f' is their code f with strengths added to it, and never below 0.

    Of transcoders, that is added to what is `written` behind what they read.
    """
    total = x if written is None else written
    for sae, strengths in pushes:
        latents = list(strengths)
        f = sae.encode(x)[..., latents]
        moved = (f + torch.tensor([strengths[latent] for latent in latents])).clamp(min=0) - f
        total = total + (moved @ sae.W_dec[latents]).to(x)
    return total
