"""Labels by a language model, judged by it on held-out windows, each beside the label of another latent on the same windows.

It sees examples of training documents when it explains and held-out documents when it judges. An answer that is not what was
asked for is kept and counted; its windows are left out of the score. A latent whose label cannot be read has its offline label
alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from everyscope.describe.explanations.config import EndpointConfig
from everyscope.describe.explanations.endpoint import Endpoint, Question
from everyscope.describe.explanations.firings import Firings, window_peaks
from everyscope.describe.explanations.offline import (
    MIN_FIRINGS,
    Ground,
    Labelled,
    detection_answers,
    explanation,
    fuzzing_answers,
    other_labels,
    samples_of,
)
from everyscope.describe.explanations.prompts import (
    DETECT,
    FUZZ,
    excerpt,
    explain_messages,
    judge_messages,
    parse_label,
    parse_numbers,
)
from everyscope.describe.explanations.replies import Replies
from everyscope.describe.explanations.samples import Sample, stratified
from everyscope.describe.explanations.scores import Answers
from everyscope.describe.explanations.table import Explanation
from everyscope.describe.explanations.wording import safe_label

KIND = "text"
"""Kind of a label in a language model's own words."""


@dataclass(frozen=True)
class Judged:
    """What a language model made of one SAE."""

    explanations: list[Explanation]
    num_unparsed: int
    """Answers that were not what was asked for."""
    num_asked: int
    """All answers."""


class Judge:
    """One language model that labels one SAE."""

    def __init__(
        self, ground: Ground, config: EndpointConfig, endpoint: Endpoint, replies: Replies, done: Callable[[int], None]
    ) -> None:
        """`done` is called with answers."""
        self._ground, self._config, self._endpoint, self._replies, self._done = ground, config, endpoint, replies, done
        self._num_unparsed = self._num_asked = 0

    def explain(self, firings: Firings) -> Judged:
        """Label a sample of the SAE's latents and score the labels."""
        chosen = self._chosen(firings)
        labels = self._labels(firings, chosen)
        latents = list(labels)
        half = self._config.judged_windows // 2
        samples = samples_of(self._ground, firings, latents, half, self._config.judged_windows - half)
        others = other_labels(len(latents), 1, self._ground.config.seed)
        asked = {latent: [latent, *(latents[other] for other in others[number])] for number, latent in enumerate(latents)}
        detections = self._detections(labels, samples, asked)
        fuzzings = self._fuzzings(labels, samples, asked)
        method = safe_label(self._config.model)
        found = [
            explanation(labels[latent], method, detections[latent], fuzzings[latent], self._ground.score_weights)
            for latent in latents
        ]
        return Judged(found, self._num_unparsed, self._num_asked)

    def _chosen(self, firings: Firings) -> list[int]:
        """The latents to label, drawn by seed from those that fire often enough to be learnt."""
        learnt = np.concatenate([[0], np.cumsum(self._ground.is_learning[firings.tokens])])
        alive = np.flatnonzero(np.diff(learnt[firings.starts]) >= MIN_FIRINGS)
        random = np.random.default_rng([self._ground.config.seed, firings.d_sae])
        return np.sort(random.choice(alive, min(self._config.num_latents, len(alive)), replace=False)).tolist()

    def _labels(self, firings: Firings, latents: Sequence[int]) -> dict[int, Labelled]:
        """The labels that were given, by latent."""
        questions = [
            Question("explain", latent, -1, explain_messages(self._examples(firings, latent)), self._ground.config.seed)
            for latent in latents
        ]
        labels = {}
        for latent, answer in zip(latents, self._ask(questions), strict=True):
            label = parse_label(answer)
            self._num_unparsed += label is None
            if label is not None:
                labels[latent] = Labelled(latent, label, KIND, None)
        return labels

    def _examples(self, firings: Firings, latent: int) -> list[str]:
        """Marked windows of training documents, strongest first: half are the top ones, half from all deciles."""
        windows, random = self._ground.learn, np.random.default_rng([self._ground.config.seed, latent])
        window, peaks = window_peaks(firings, windows, latent)
        order = np.argsort(-peaks, kind="stable")
        top = order[: self._config.num_examples // 2]
        rest = order[len(top) :]
        spread = rest[stratified(peaks[rest], self._config.num_examples - len(top), random)]
        tokens, _ = firings.of(latent)
        chosen: list[int] = window[np.concatenate([top, spread])].tolist()
        return [excerpt(self._ground.passages, self._ground.traits.pieces, windows.tokens(number), tokens) for number in chosen]

    def _detections(
        self, labels: dict[int, Labelled], samples: dict[int, Sample], asked: dict[int, list[int]]
    ) -> dict[int, list[Answers]]:
        """For each latent the answers about its windows, for its own label and then the others'."""
        passages, pieces, windows = self._ground.passages, self._ground.traits.pieces, self._ground.score
        texts = {
            latent: [excerpt(passages, pieces, windows.tokens(number)) for number in sample.windows.tolist()]
            for latent, sample in samples.items()
        }
        verdicts = self._judge("detection", DETECT, labels, texts, asked)
        return {
            latent: [_answered(detection_answers(self._ground, samples[latent], one > 0), one) for one in verdicts[latent]]
            for latent in asked
        }

    def _fuzzings(
        self, labels: dict[int, Labelled], samples: dict[int, Sample], asked: dict[int, list[int]]
    ) -> dict[int, list[Answers]]:
        """Likewise about the marks in its active windows."""
        passages, pieces, windows = self._ground.passages, self._ground.traits.pieces, self._ground.score
        texts = {
            latent: [
                excerpt(passages, pieces, windows.tokens(int(windows.of_token[marks[0]])), marks)
                for marks in (*samples[latent].right, *samples[latent].wrong)
            ]
            for latent in asked
        }
        verdicts = self._judge("fuzzing", FUZZ, labels, texts, asked)
        return {
            latent: [_answered(fuzzing_answers(self._ground, samples[latent], one > 0), one) for one in verdicts[latent]]
            for latent in asked
        }

    def _judge(
        self,
        purpose: str,
        question: str,
        labels: dict[int, Labelled],
        texts: dict[int, list[str]],
        asked: dict[int, list[int]],
    ) -> dict[int, list[Int[np.ndarray, " n"]]]:
        """About each text, in mixed order, for each label that is asked of a latent's texts: 1 yes, 0 no, -1 not to be read."""
        seed, size = self._ground.config.seed, self._config.windows_per_request
        questions, places = [], []
        verdicts = {latent: [np.full(len(texts[latent]), -1) for _ in owners] for latent, owners in asked.items()}
        for latent, owners in asked.items():
            order = np.random.default_rng([seed, latent]).permutation(len(texts[latent]))
            for number, owner in enumerate(owners):
                for start in range(0, len(order), size):
                    shown = order[start : start + size]
                    messages = judge_messages(question, labels[owner].label, [texts[latent][place] for place in shown])
                    questions.append(Question(purpose, latent, owner, messages, seed))
                    places.append((verdicts[latent][number], shown))
        for answer, (verdict, shown) in zip(self._ask(questions), places, strict=True):
            numbers = parse_numbers(answer, len(shown))
            self._num_unparsed += numbers is None
            if numbers is not None:
                verdict[shown] = [place in numbers for place in range(1, len(shown) + 1)]
        return verdicts

    def _ask(self, questions: list[Question]) -> list[str]:
        self._num_asked += len(questions)
        return [reply.text for reply in self._endpoint.ask(questions, self._replies, self._done)]


def _answered(answers: Answers, verdict: Int[np.ndarray, " n"]) -> Answers:
    """Those of the answers that could be read."""
    kept = verdict >= 0
    return Answers(answers.truth[kept], answers.answer[kept], answers.document[kept])
