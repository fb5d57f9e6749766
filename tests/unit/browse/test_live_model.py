"""Reading and steering a real model against slow twins: whole passes without a cache, one row at a time, every latent encoded."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transcoder_suite import write_transcoder_suite
from transformers import AutoModelForCausalLM

from everyscope.base.errors import ConfigError
from everyscope.browse.live import Continuation, Push, SaeQuestion, Stopped
from everyscope.browse.live_model import GAIN, UNTIMED_SECONDS, SuiteModel, quickest
from everyscope.browse.live_writing import drawn
from everyscope.sae.folded import Sae
from everyscope.sae.metadata import SaeMetadata
from everyscope.sites.capture import capture
from everyscope.sites.config import ModelConfig
from everyscope.sites.names import Site
from everyscope.sites.splice import splice
from everyscope.suite.reader import load_suite

PROMPT, WIDTH = "def mean(values):", 48


def coder(seed: int, d_in: int = 32) -> Sae:
    draw = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=draw)

    metadata = SaeMetadata(kind="transcoder")
    return Sae(
        normal(d_in, WIDTH), normal(WIDTH, d_in), 0.1 * normal(WIDTH), normal(d_in), torch.full((WIDTH,), 0.5), metadata=metadata
    )


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory, tiny_random_model_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("live")
    return write_transcoder_suite(folder, str(tiny_random_model_folder), {layer: coder(layer) for layer in range(2)})


@pytest.fixture(scope="module")
def live(suite: Path, tiny_random_model_folder: Path) -> Iterator[SuiteModel]:
    before = torch.get_num_threads()
    yield SuiteModel(suite, ModelConfig(name=str(tiny_random_model_folder)))
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(suite: Path) -> list[str]:
    return [entry.record.folder for entry in load_suite(suite)]


@pytest.fixture(scope="module")
def model(tiny_random_model_folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_random_model_folder, attn_implementation="eager").eval()


@torch.no_grad()
def slow(live: SuiteModel, model: torch.nn.Module, pushes: list[tuple[int, int, float]], num_tokens: int) -> Continuation:
    """The likeliest continuation, each token by a whole pass; layers, latents and strengths of `pushes`."""

    def edit(layer: int):
        sae = coder(layer)

        def moved(x: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
            f = sae.encode(x)
            changed = f.clone()
            for where, latent, strength in pushes:
                if where == layer:
                    changed[..., latent] += strength
            return written + (sae.decode(changed.clamp(min=0)) - sae.decode(f))

        return moved

    ids, kl, log_probability = live._encoded(PROMPT), 0.0, 0.0
    start = ids.shape[1]
    for _ in range(num_tokens):
        unsteered = model(input_ids=ids).logits[0, -1].double().log_softmax(-1)
        with splice(model, {Site("transcoder", layer): edit(layer) for layer in {where for where, _, _ in pushes}}):
            own = model(input_ids=ids).logits[0, -1].double().log_softmax(-1)
        token = int(own.argmax())
        kl += float((own.exp() * (own - unsteered)).sum())
        log_probability += float(unsteered[token])
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    tokens = tuple(live._pieces[token] for token in ids[0, start:].tolist())
    return Continuation(tokens, kl / num_tokens, log_probability / num_tokens)


def test_columns_in_one_batch_are_what_each_is_alone(live: SuiteModel, model: torch.nn.Module, folders: list[str]):
    columns = [[], [(0, 3, 4.0)], [(1, 7, 6.0), (0, 3, -50.0), (1, 7, 2.0)], [(0, 3, 0.0)]]
    steps: list[tuple[bytes | None, ...]] = []
    found = live.write(
        PROMPT,
        [[Push(folders[layer], latent, strength) for layer, latent, strength in pushes] for pushes in columns],
        num_tokens=12,
        temperature=0,
        seed=0,
        each=steps.append,
    )
    assert found.seconds > 0
    for place, (pushes, column) in enumerate(zip(columns, found.columns, strict=True)):
        want = slow(live, model, pushes, 12)
        assert column.tokens == want.tokens == tuple(step[place] for step in steps)
        assert column.kl == pytest.approx(want.kl, rel=1e-3, abs=1e-5)  # float32 through softmaxes of 4,000 tokens
        assert column.log_probability == pytest.approx(want.log_probability, rel=1e-4)
    assert found.columns[0] == found.columns[3]
    assert found.columns[0].kl == 0
    assert found.columns[1].kl > 0.01


def test_equal_distributions_draw_equal_tokens_and_others_their_own():
    logits = torch.log(torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]]))
    generator, count = torch.Generator().manual_seed(0), 4000
    tokens = torch.stack([drawn(logits, 1.0, generator) for _ in range(count)])
    assert torch.equal(tokens[:, 0], tokens[:, 1])
    for row in (0, 2):
        shares = tokens[:, row].bincount(minlength=4) / count
        assert torch.allclose(shares, logits[row].exp(), atol=4 * 0.5 / count**0.5)  # four standard deviations at most
    cold = torch.stack([drawn(logits, 0.5, generator) for _ in range(count)])
    squares = logits[0].exp() ** 2 / (logits[0].exp() ** 2).sum()
    assert torch.allclose(cold[:, 0].bincount(minlength=4) / count, squares, atol=4 * 0.5 / count**0.5)
    assert drawn(logits, 0, generator).tolist() == [3, 3, 0]


def test_a_seed_writes_the_same_beginning_whatever_the_length(live: SuiteModel, folders: list[str]):
    columns = [[], [Push(folders[0], 3, 4.0)]]
    long, short, other = (
        live.write(PROMPT, columns, num_tokens=count, temperature=1.0, seed=seed).columns
        for count, seed in ((9, 1), (4, 1), (9, 2))
    )
    assert [column.tokens[:4] for column in long] == [column.tokens for column in short]
    assert [column.tokens for column in long] != [column.tokens for column in other]


def test_columns_end_before_eos_each_by_itself(live: SuiteModel, folders: list[str], monkeypatch: pytest.MonkeyPatch):
    columns = [[], [Push(folders[0], 3, 40.0)]]
    whole = live.write(PROMPT, columns, num_tokens=6, temperature=1.0, seed=3).columns
    numbers = [live._pieces.index(token) for token in whole[1].tokens]
    eos = next(number for number in numbers[1:] if live._pieces[number] not in (*whole[0].tokens, whole[1].tokens[0]))
    monkeypatch.setattr(live, "_markers", live._markers.__class__(**{**vars(live._markers), "eos": eos}))
    steps: list[tuple[bytes | None, ...]] = []
    ended = live.write(PROMPT, columns, num_tokens=6, temperature=1.0, seed=3, each=steps.append).columns
    at = numbers.index(eos)
    assert ended[0].tokens == whole[0].tokens
    assert ended[1].tokens == whole[1].tokens[:at]
    assert [step[1] for step in steps] == [*whole[1].tokens[:at], *[None] * (6 - at)]


def test_work_stops_between_tokens(live: SuiteModel):
    steps: list[tuple[bytes | None, ...]] = []
    with pytest.raises(Stopped):
        live.write(PROMPT, [[]], num_tokens=50, temperature=0, seed=0, each=steps.append, stop=lambda: len(steps) == 3)
    assert len(steps) == 3
    with pytest.raises(ConfigError, match="it has 48"):
        live.write(PROMPT, [[Push(next(iter(live._entries)), WIDTH, 1.0)]], num_tokens=1, temperature=0, seed=0)


def test_a_reading_is_ranked_by_worth_and_follows_latents(live: SuiteModel, model: torch.nn.Module, folders: list[str]):
    worth = np.linspace(0, 1, WIDTH, dtype=np.float32)
    questions = [SaeQuestion(folders[0], worth, follow=(5,)), SaeQuestion(folders[1])]
    found = live.read(PROMPT, questions)
    ids = live._encoded(PROMPT)
    assert [token.token for token in found.tokens] == ids[0].tolist()
    assert b"".join(token.piece for token in found.tokens[1:]).decode() == PROMPT
    assert found.tokens[0].is_special
    for layer, (question, answer) in enumerate(zip(questions, found.by_sae, strict=True)):
        site = Site("transcoder", layer)
        f = coder(layer).encode(capture(model, [site], ids)[site][0]).numpy()
        f[0] = 0  # BOS has no latents
        scores = f * (1 if question.worth is None else question.worth)
        for place, top in enumerate(answer.top):
            want = [int(latent) for latent in np.argsort(-scores[place], kind="stable")[:12] if scores[place, latent] > 0]
            assert [latent for latent, _ in top] == want
            assert [value for _, value in top] == pytest.approx(f[place, want].tolist(), rel=1e-4)
        for latent in question.follow:
            assert answer.followed[latent] == pytest.approx(f[:, latent].tolist(), rel=1e-4, abs=1e-5)
    assert live.read(PROMPT, questions) is found
    assert (
        live.read(PROMPT, [SaeQuestion(folders[0], worth[::-1].copy(), follow=(5,)), questions[1]]).by_sae[0] != found.by_sae[0]
    )


@pytest.mark.parametrize(
    ("on_one", "on_all", "want"),
    [
        (0.1, 0.1 / (GAIN + 0.01), 4),
        (0.1, 0.1 / (GAIN - 0.01), 1),
        (0.001, 0.2, 1),
        (9.9, UNTIMED_SECONDS + 0.1, 4),
    ],
)
def test_all_threads_are_taken_where_they_are_quicker(on_one: float, on_all: float, want: int):
    asked: list[int] = []

    def seconds(threads: int) -> float:
        asked.append(threads)
        return {1: on_one, 4: on_all}[threads]

    assert quickest(seconds, 4) == want
    assert asked == ([4] if on_all > UNTIMED_SECONDS else [4, 1])
    assert quickest(seconds, 1) == 1
