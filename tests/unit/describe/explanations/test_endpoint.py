"""The client against a server of ours on 127.0.0.1 that misbehaves by script."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from everyscope.base.errors import ConfigError, DamagedData, ModelError
from everyscope.describe.explanations.budget import Budget, questions_per_latent, quote, refuse_beyond
from everyscope.describe.explanations.config import EndpointConfig
from everyscope.describe.explanations.endpoint import Endpoint, Question
from everyscope.describe.explanations.replies import JOURNAL_FILE, REPLIES_FILE, Replies, num_paid

KEY = "sk-secret-of-this-test"


def question(number: int) -> Question:
    return Question("explain", number, -1, [{"role": "user", "content": f"question {number}"}], 0)


class Asking:
    """One client with its journal; remembers how long it was told to wait."""

    def __init__(self, folder: Path, url: str, **changes: Any) -> None:
        self.config = EndpointConfig(url=url, model="judge", **{"timeout_s": 20, "backoff_s": 0.5, **changes})
        self.waits: list[float] = []
        self.replies, self.budget = Replies(folder), Budget(self.config)
        self.endpoint = Endpoint(self.config, self.budget, self.waits.append)

    def ask(self, *numbers: int) -> list[str]:
        return [reply.text for reply in self.endpoint.ask([question(n) for n in numbers], self.replies, lambda _: None)]


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def echo(completed: Callable[..., str]) -> Callable[[dict[str, Any], int], tuple[int, str]]:
    return lambda payload, number: (200, completed(f"answer to {payload['messages'][-1]['content']}"))


def test_answers_come_in_order_and_nothing_is_paid_twice(fake: Any, completed: Any, tmp_path: Path):
    fake.script = echo(completed)
    asking = Asking(tmp_path, fake.url, concurrency=8)
    numbers = range(40)
    assert asking.ask(*numbers, *numbers) == [f"answer to question {n}" for n in (*numbers, *numbers)]
    assert asking.ask(*numbers) == [f"answer to question {n}" for n in numbers]
    assert len(fake.asked) == asking.budget.requests == 40
    asking.replies.seal()
    again = Asking(tmp_path, fake.url)
    assert again.ask(*numbers) == [f"answer to question {n}" for n in numbers]
    assert len(fake.asked) == 40
    assert num_paid(tmp_path) == 40
    assert fake.asked[0] | {"messages": 0} == {
        "path": "/v1/chat/completions",
        "model": "judge",
        "messages": 0,
        "seed": 0,
        "temperature": 0.0,
        "max_tokens": 400,
    }


@pytest.mark.parametrize("code", [429, 500, 503])
def test_passing_errors_are_tried_again_after_longer_and_longer_waits(fake: Any, completed: Any, tmp_path: Path, code: int):
    fake.script = lambda payload, number: (code, "busy") if number < 3 else (200, completed("yes"))
    asking = Asking(tmp_path, fake.url)
    assert asking.ask(1) == ["yes"]
    assert asking.waits == [0.5, 1.0, 2.0]
    assert asking.budget.requests == 4
    asking.replies.seal()
    assert num_paid(tmp_path) == 1


def test_retry_after_is_heeded(fake: Any, completed: Any, tmp_path: Path):
    fake.extra_headers = {"Retry-After": "7"}
    fake.script = lambda payload, number: (429, "") if number < 1 else (200, completed("yes"))
    asking = Asking(tmp_path, fake.url)
    asking.ask(1)
    assert asking.waits == [7.0]


@pytest.mark.parametrize("code", [400, 401, 404, 302])
def test_lasting_errors_end_at_once(fake: Any, tmp_path: Path, code: int):
    fake.extra_headers = {"Location": "http://127.0.0.1:9/stolen"}
    fake.script = lambda payload, number: (code, "no")
    asking = Asking(tmp_path, fake.url, concurrency=1)
    with pytest.raises(ModelError, match=f"HTTP {code}"):
        asking.ask(1, 2, 3)
    assert asking.waits == []
    assert len(fake.asked) <= 3


def test_giving_up_keeps_what_was_answered(fake: Any, completed: Any, tmp_path: Path):
    fake.script = lambda payload, number: (500, "") if "question 2" in str(payload) else (200, completed("yes"))
    asking = Asking(tmp_path, fake.url, concurrency=1, retries=2)
    with pytest.raises(ModelError, match="run the same command to resume"):
        asking.ask(1, 2)
    asking.replies.close()
    fake.script = echo(completed)
    again = Asking(tmp_path, fake.url)
    assert again.ask(1, 2) == ["yes", "answer to question 2"]
    assert len(fake.asked) == 1 + 3 + 1


@pytest.mark.parametrize("body", ["not JSON", "{}", "[]", '{"choices": []}', '{"choices": [{"message": {"content": null}}]}'])
def test_malformed_replies_are_kept_counted_as_cost_and_not_asked_again(fake: Any, tmp_path: Path, body: str):
    fake.script = lambda payload, number: (200, body)
    asking = Asking(tmp_path, fake.url, price_prompt=1.0, price_completion=1.0)
    assert asking.ask(1) == [""]
    assert asking.ask(1) == [""]
    assert len(fake.asked) == 1
    assert asking.budget.cost is not None
    assert asking.budget.cost >= 400 / 1e6
    asking.replies.seal()
    assert Replies(tmp_path).paid(asking.endpoint._identity(question(1))).raw == body


def test_a_slow_reply_is_given_up_and_tried_again(fake: Any, completed: Any, tmp_path: Path):
    def script(payload: dict[str, Any], number: int) -> tuple[int, str]:
        if number == 0:
            fake.closing.wait(30)
        return 200, completed("yes")

    fake.script = script
    asking = Asking(tmp_path, fake.url, timeout_s=0.3)
    assert asking.ask(1) == ["yes"]
    assert asking.waits == [0.5]


def test_no_server_is_one_line(tmp_path: Path):
    asking = Asking(tmp_path, "http://127.0.0.1:9/v1", retries=1)
    with pytest.raises(ModelError, match=r"ConnectError, .*refused") as caught:
        asking.ask(1)
    assert "\n" not in str(caught.value)


def test_the_key_is_sent_and_never_kept(fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    fake.script = lambda payload, number: (401, f"wrong key {KEY}")
    asking = Asking(tmp_path, fake.url)
    with pytest.raises(ModelError) as caught:
        asking.ask(1)
    assert fake.headers[0]["Authorization"] == f"Bearer {KEY}"
    asking.replies.seal()
    assert KEY not in str(caught.value)
    assert all(KEY.encode() not in path.read_bytes() for path in tmp_path.iterdir())
    assert KEY not in str(asking.config)


def test_a_key_is_not_sent_in_clear_text(monkeypatch: pytest.MonkeyPatch):
    config = EndpointConfig(url="http://models.example/v1", model="judge")
    Endpoint(config, Budget(config))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(ConfigError, match="clear text"):
        Endpoint(config, Budget(config))


@pytest.mark.parametrize("url", ["ftp://host", "host/v1", "https://user:pass@host/v1", "https://host/v1?key=1"])
def test_urls_that_hide_secrets_or_lead_nowhere_are_refused(url: str):
    with pytest.raises(ValidationError):
        EndpointConfig(url=url, model="judge")


def test_limits_hold_while_asking(fake: Any, completed: Any, tmp_path: Path):
    fake.script = lambda payload, number: (200, completed("yes", 1000, 100))
    asking = Asking(tmp_path / "a", fake.url, concurrency=1, max_requests=3)
    with pytest.raises(ConfigError, match="max_requests=3"):
        asking.ask(*range(9))
    assert len(fake.asked) == 3
    fake.asked.clear()
    prices = {"price_prompt": 100.0, "price_completion": 1000.0}  # a reply costs 0.2, the longest possible 0.4 and a bit
    asking = Asking(tmp_path / "b", fake.url, concurrency=1, max_cost=1.0, **prices)
    with pytest.raises(ConfigError, match="max_cost"):
        asking.ask(*range(9))
    assert asking.budget.cost == pytest.approx(0.2 * len(fake.asked))
    assert 0.5 < (asking.budget.cost or 0) <= 1.0


def test_costs_are_refused_before_anything_is_sent():
    config = EndpointConfig(url="http://127.0.0.1:9/v1", model="judge", price_prompt=10, price_completion=30, max_cost=0.01)
    expected = quote(config, num_saes=2, window_bytes=50, num_paid=0)
    assert expected.requests == 2 * 32 * questions_per_latent(config) == 2 * 32 * 17
    assert expected.completion_tokens == expected.requests * 400
    with pytest.raises(ConfigError, match="max_cost"):
        refuse_beyond(config, expected)
    with pytest.raises(ConfigError, match="max_requests"):
        refuse_beyond(config.model_copy(update={"max_requests": 10}), expected)
    assert quote(config, 2, 50, num_paid=expected.requests).requests == 0
    with pytest.raises(ValidationError, match="cannot be held without prices"):
        EndpointConfig(url="http://127.0.0.1:9/v1", model="judge", max_cost=1.0)


def test_a_torn_journal_loses_one_line_at_most(fake: Any, completed: Any, tmp_path: Path):
    fake.script = echo(completed)
    asking = Asking(tmp_path, fake.url)
    asking.ask(*range(5))
    asking.replies.close()
    journal = tmp_path / JOURNAL_FILE
    journal.write_bytes(journal.read_bytes()[:-10])
    again = Asking(tmp_path, fake.url)
    assert again.ask(*range(5)) == [f"answer to question {n}" for n in range(5)]
    assert len(fake.asked) == 6
    again.replies.seal()
    assert not journal.exists()
    assert num_paid(tmp_path) == 5


def test_damaged_replies_are_not_thrown_away(tmp_path: Path):
    (tmp_path / REPLIES_FILE).write_text("nonsense")
    with pytest.raises(DamagedData, match="paid"):
        Replies(tmp_path)
    (tmp_path / REPLIES_FILE).unlink()
    (tmp_path / JOURNAL_FILE).write_text("nonsense\n")
    with pytest.raises(DamagedData, match="paid"):
        Replies(tmp_path)


def test_a_reply_of_many_threads_is_whole(fake: Any, completed: Any, tmp_path: Path):
    barrier = threading.Barrier(4)

    def script(payload: dict[str, Any], number: int) -> tuple[int, str]:
        barrier.wait(10)
        return 200, completed("x" * 10_000)

    fake.script = script
    asking = Asking(tmp_path, fake.url, concurrency=4)
    asking.ask(*range(8))
    asking.replies.close()
    lines = (tmp_path / JOURNAL_FILE).read_text().splitlines()
    assert len([json.loads(line) for line in lines]) == 8
