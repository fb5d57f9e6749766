"""The whole stage on a complete little run: files, skipping, a language model that is a script, and what it must not learn."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from small_scope import build_scope, tree_bytes

from everyscope.base.errors import ConfigError, DataError
from everyscope.describe.explanations import run as explain
from everyscope.describe.explanations.config import EndpointConfig, ExplainConfig
from everyscope.describe.explanations.passages import read_passages
from everyscope.describe.explanations.table import SCHEMA, explanation_facts
from everyscope.sites.names import Site
from everyscope.suite.latents import UNLABELLED
from everyscope.text.blocks import read_blocks
from everyscope.text.tokenizer import load_tokenizer

SITES = (Site("mlp_out", 1), Site("resid_post", 0))


@pytest.fixture(scope="module")
def explained(tmp_path_factory: pytest.TempPathFactory) -> ExplainConfig:
    root = tmp_path_factory.mktemp("scope")
    scope = build_scope(root, SITES, num_documents=120)
    config = ExplainConfig(
        model=scope.model,
        text=scope.text,
        trained=scope.trained,
        out=root / "descriptions",
        block_stride=1,
        window_tokens=4,
        active_windows=12,
        silent_windows=12,
    )
    result = explain.run(config)
    assert (result.num_explained, result.num_skipped) == (4, 0)
    return config


def asking(config: ExplainConfig, root: Path, url: str, **changes: Any) -> ExplainConfig:
    endpoint = EndpointConfig(
        url=url,
        model="judge",
        saes="mlp_out/layer_1/w32_0",
        num_latents=3,
        judged_windows=12,
        windows_per_request=5,
        num_examples=6,
        backoff_s=0,
        **changes,
    )
    return config.model_copy(update={"endpoint": endpoint, "out": root})


def rows_of(config: ExplainConfig, sae: str = "mlp_out/layer_1/w32_0") -> list[dict[str, Any]]:
    return pyarrow.parquet.read_table(config.out / sae / "explanations.parquet").to_pylist()


def test_files_have_the_promised_columns(explained: ExplainConfig):
    for site in SITES:
        for name in ("w32_0", "w32_1"):
            path = explained.out / site.folder / name / "explanations.parquet"
            assert pyarrow.parquet.read_schema(path).remove_metadata() == SCHEMA
            rows = pyarrow.parquet.read_table(path).to_pylist()
            assert [row["latent"] for row in rows] == sorted({row["latent"] for row in rows})
            assert any(row["detection"] is not None for row in rows)
            for row in rows:
                assert row["method"] == "offline statistics"
                assert 0 < len(row["label"]) <= 120
                if row["detection"] is not None:
                    assert 0 <= row["detection_low"] <= row["detection"] + 1e-6
                    assert row["detection"] - 1e-6 <= row["detection_high"] <= 1
                    assert row["num_scored"] >= 10


def test_without_a_window_labels_are_tokens_and_one_line_says_so(explained: ExplainConfig, tmp_path: Path, capsys: Any):
    """Blocks shorter than half a window: nothing can be checked or scored, and the stage ends well."""
    text = explained.text.model_copy(update={"context": 8})
    config = explained.model_copy(update={"out": tmp_path, "text": text, "window_tokens": 16})
    assert explain.run(config).num_explained == 4
    said = [line for line in capsys.readouterr().err.splitlines() if "windows of 16 tokens" in line]
    assert len(said) == 1
    assert "0 to score labels on" in said[0]
    assert "set window_tokens to 4 or less" in said[0]
    rows = rows_of(config)
    assert rows
    for row in rows:
        assert row["kind"] in UNLABELLED
        assert row["label"]
        assert row["detection"] is row["fuzzing"] is row["detection_null"] is None
        assert row["num_scored"] == 0


def test_nothing_is_explained_twice(explained: ExplainConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(explain, "load_language_model", lambda *_: pytest.fail("there was nothing to do"))
    result = explain.run(explained)
    assert (result.num_explained, result.num_skipped) == (0, 4)


def test_explanations_do_not_depend_on_how_the_work_is_cut(explained: ExplainConfig, tmp_path: Path):
    explain.run(explained.model_copy(update={"out": tmp_path, "batch_blocks": 3, "saes_per_pass": 1}))
    assert tree_bytes(tmp_path) == tree_bytes(explained.out)


def test_a_damaged_file_is_written_anew(explained: ExplainConfig, tmp_path: Path):
    shutil.copytree(explained.out, tmp_path / "out")
    config = explained.model_copy(update={"out": tmp_path / "out"})
    damaged = config.out / SITES[0].folder / "w32_1" / "explanations.parquet"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:100])
    result = explain.run(config)
    assert (result.num_explained, result.num_skipped) == (1, 3)
    assert damaged.read_bytes() == whole


def test_explainer_and_scorer_share_no_document(explained: ExplainConfig):
    """By content: the text of no training document of the corpus is among the held-out ones."""
    tokenizer = load_tokenizer(explained.model.name)
    passages = read_passages(explained, tokenizer)
    ids = passages.input_ids.ravel()
    train = {bytes(block.input_ids) for block in read_blocks(explained.text, tokenizer, "train")}
    scored = passages.tokens_of(2) // passages.input_ids.shape[1]
    assert not train & {bytes(passages.input_ids[block]) for block in set(scored.tolist())}
    assert len(ids[passages.tokens_of(2)])


def answer_all(label: str, numbers: list[int]) -> Any:
    def script(payload: dict[str, Any], number: int) -> tuple[int, str]:
        asked = payload["messages"][0]["content"]
        text = json.dumps({"label": label} if '{"label"' in asked else {"numbers": numbers})
        return 200, json.dumps(
            {"choices": [{"message": {"content": text}}], "usage": {"prompt_tokens": 9, "completion_tokens": 3}}
        )

    return script


def test_a_judge_that_says_none_scores_one_half(explained: ExplainConfig, tmp_path: Path, fake: Any):
    fake.script = answer_all("words about \x1b[31m `nothing", [])
    config = asking(explained, tmp_path, fake.url)
    result = explain.run(config)
    judged = [row for row in rows_of(config) if row["method"] == "judge"]
    assert len(judged) == 3
    for row in judged:
        assert row["label"] == "words about \\u001b[31m `nothing`"
        assert row["kind"] == "text"
        assert row["detection"] == row["detection_null"] == row["detection_low"] == row["detection_high"] == 0.5
    assert result.budget is not None
    assert result.quote is not None
    assert result.budget.requests == len(fake.asked) <= result.quote.requests
    assert result.budget.prompt_tokens == 9 * len(fake.asked) <= result.quote.prompt_tokens
    assert [row for row in rows_of(config) if row["method"] != "judge"] == rows_of(explained)
    order = [row["latent"] for row in rows_of(config)]
    assert order == sorted(order)
    replies = pyarrow.parquet.read_table(tmp_path / "mlp_out/layer_1/w32_0/replies.parquet").to_pylist()
    assert len(replies) == len(fake.asked)
    assert {reply["purpose"] for reply in replies} == {"explain", "detection", "fuzzing"}
    assert not (tmp_path / "resid_post/layer_0/w32_0/replies.parquet").exists()


def test_a_judge_that_cheats_is_seen_to_be_perfect(
    explained: ExplainConfig, tmp_path: Path, fake: Any, monkeypatch: pytest.MonkeyPatch
):
    """A judge told the truth through its label scores 1, and its null does not: prompts, order and truth fit together."""
    truths: dict[str, set[str]] = {}
    plain = explain.Judge._judge

    def told(self: Any, purpose: str, question: str, labels: Any, texts: Any, asked: Any) -> Any:
        for latent, windows in texts.items():
            half = len(windows) // 2
            truths[f"{purpose} label {latent}"] = set(windows[:half])
        named = {latent: type(one)(latent, f"{purpose} label {latent}", one.kind, one.rule) for latent, one in labels.items()}
        return plain(self, purpose, question, named, texts, asked)

    def script(payload: dict[str, Any], number: int) -> tuple[int, str]:
        system, user = (message["content"] for message in payload["messages"])
        if '{"label"' in system:
            return answer_all("anything", [])(payload, number)
        truth = next(windows for label, windows in truths.items() if f"active on: {label}\n" in system)
        lines = [line.split(". ", 1)[1] for line in user.split("\n")]
        return answer_all("", [place for place, line in enumerate(lines, start=1) if line in truth])(payload, number)

    monkeypatch.setattr(explain.Judge, "_judge", told)
    fake.script = script
    config = asking(explained, tmp_path, fake.url)
    explain.run(config)
    judged = [row for row in rows_of(config) if row["method"] == "judge" and row["detection"] is not None]
    assert judged
    for row in judged:
        assert row["detection"] > 0.9  # words repeat: a silent window may read as an active one does
        assert row["detection_null"] < row["detection"]


def test_answers_that_cannot_be_read_are_counted_and_kept(explained: ExplainConfig, tmp_path: Path, fake: Any):
    def script(payload: dict[str, Any], number: int) -> tuple[int, str]:
        is_label = '{"label"' in payload["messages"][0]["content"]
        return answer_all(f"label {number}", [1])(payload, number) if is_label else answer_all("", [99])(payload, number)

    fake.script = script
    config = asking(explained, tmp_path, fake.url)
    explain.run(config)
    facts = explanation_facts(tmp_path / "mlp_out/layer_1/w32_0/explanations.parquet")
    assert facts["num_asked"] == len(fake.asked)
    assert facts["num_unparsed"] == len(fake.asked) - 3
    judged = [row for row in rows_of(config) if row["method"] == "judge"]
    assert len(judged) == 3
    assert all(row["detection"] is None and row["fuzzing"] is None and row["num_scored"] == 0 for row in judged)


def test_a_label_that_cannot_be_read_is_left_to_the_offline_labeller(explained: ExplainConfig, tmp_path: Path, fake: Any):
    fake.script = answer_all("", [])
    config = asking(explained, tmp_path, fake.url)
    explain.run(config)
    assert rows_of(config) == rows_of(explained)
    assert len(fake.asked) == 3


def test_a_run_that_was_stopped_pays_for_nothing_twice(explained: ExplainConfig, tmp_path: Path, fake: Any):
    fake.script = answer_all("a label", [1])
    whole = asking(explained, tmp_path / "whole", fake.url)
    explain.run(whole)
    total = len(fake.asked)
    fake.asked.clear()
    limited = asking(explained, tmp_path / "cut", fake.url, max_requests=60, concurrency=1)
    fake.script = lambda payload, number: answer_all("a label", [1])(payload, number) if number < 8 else (404, "gone")
    with pytest.raises(Exception, match="gave no answer"):
        explain.run(limited)
    fake.script = answer_all("a label", [1])
    explain.run(limited)
    assert len(fake.asked) == total + 1  # the one that found nobody
    sae = "mlp_out/layer_1/w32_0/explanations.parquet"
    assert (tmp_path / "cut" / sae).read_bytes() == (tmp_path / "whole" / sae).read_bytes()


def test_costs_are_said_and_refused_before_the_model_is_loaded(
    explained: ExplainConfig, tmp_path: Path, fake: Any, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(explain, "load_language_model", lambda *_: pytest.fail("nothing was to be spent"))
    prices = {"price_prompt": 10.0, "price_completion": 30.0}
    result = explain.run(asking(explained, tmp_path, fake.url, is_quote_only=True, **prices))
    assert result.quote is not None
    assert "39 requests" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="max_cost"):
        explain.run(asking(explained, tmp_path, fake.url, max_cost=0.001, **prices))
    with pytest.raises(ConfigError, match="max_requests"):
        explain.run(asking(explained, tmp_path, fake.url, max_requests=5))
    assert not fake.asked


def test_what_matches_nothing_is_an_error(explained: ExplainConfig, tmp_path: Path):
    endpoint = EndpointConfig(url="http://127.0.0.1:9/v1", model="judge", saes="no/such/*")
    with pytest.raises(DataError, match="matches no SAE"):
        explain.run(explained.model_copy(update={"endpoint": endpoint}))
    with pytest.raises(DataError, match="no finished SAE"):
        explain.run(explained.model_copy(update={"trained": tmp_path}))


def test_shares_of_an_explanation_write_what_a_whole_one_does(explained: ExplainConfig, tmp_path: Path):
    shared, told = explained.model_copy(update={"out": tmp_path}), []
    for number in range(3):
        explain.run_share(shared.model_copy(update={"share": (number, 3)}), told.append)
    assert sum(told) == 4 * 32
    assert tree_bytes(tmp_path) == {
        name: content for name, content in tree_bytes(explained.out).items() if name.endswith("explanations.parquet")
    }
    assert explain.run(shared).num_skipped == 4
    with pytest.raises(ValueError, match=r"share=\(3, 3\): expected \(number, count\)"):
        ExplainConfig.model_validate(shared.model_dump() | {"share": (3, 3)})
