"""Runs made from a model's name: sizes read, defaults that fit, hours kept, and the same run from the printed recipe."""

import json
import re
from pathlib import Path

import pytest

from everyscope.base.errors import ConfigError, ModelError
from everyscope.cli.arguments import parser_of
from everyscope.cli.commands import COMMANDS
from everyscope.cli.main import main
from everyscope.cli.recipe import resolve
from everyscope.run import model as model_module
from everyscope.run.automatic import (
    LEAST_TOKENS,
    MOST_TOKENS,
    Machine,
    UserChoices,
    automatic,
    context_of,
    passes_that_pay,
    recipe_text,
    slug,
    text_of,
)
from everyscope.run.config import RunConfig
from everyscope.run.find import find_recipe
from everyscope.run.model import measure_products, shape_of, with_shape
from everyscope.run.settings import ModelShape
from everyscope.run.stages import stages_of
from everyscope.sites.config import ModelConfig

SHAPE = ModelShape(num_layers=20, d_model=600, d_attention=640, num_parameters=10**8, vocabulary=50_000, context=128)
CPU = Machine("cpu", "bfloat16")


@pytest.fixture
def words(tmp_path) -> Path:
    file = tmp_path / "words.txt"
    file.write_text("some words\n")
    return file


def seconds_of(config: RunConfig) -> dict[str, float]:
    """A second for 100,000 tokens of each SAE and for each held-out block; rows cost a fifth of what training on them does."""
    saes, rows = len(config.saes_of(config.groups[0])) * len(config.all_sites), config.harvest.num_tokens
    training = config.groups[0].num_tokens * saes / 1e5
    return {"harvest": rows * saes / 5e5, "train": training, "evaluate": float(config.evaluate.num_sequences)}


def hours_of(config: RunConfig) -> float:
    return sum(seconds_of(config).values()) / 3600


def test_the_shape_of_a_bundled_model_is_that_of_its_recipe():
    given = find_recipe("tiny").sizes
    found = shape_of(ModelConfig(name="tiny"))
    for field in ("num_layers", "d_model", "d_attention", "num_parameters"):
        assert getattr(found, field) == getattr(given, field)
    assert found.in_blocks + found.words * found.d_model + found.d_model == found.num_parameters  # and the last norm
    config = find_recipe("tiny").model_copy(update={"shape": None})
    with pytest.raises(ConfigError, match="shape of 'tiny' is not known"):
        _ = config.all_sites
    assert with_shape(config).all_sites == find_recipe("tiny").all_sites


def test_defaults_fit_model_and_machine(words):
    config = automatic("somebody/Some-Model.v2", SHAPE, CPU, UserChoices(text=str(words)), text_of(str(words), 128), seconds_of)
    (group,) = config.groups
    assert (config.name, config.title) == ("some_model_v2", "Some-Model.v2 scope")
    assert (group.layers, group.widths, group.target_l0s) == ((10, 17), (4096,), (20, 50, 100))
    assert (config.model.device, config.model.dtype, config.train.device) == ("cpu", "bfloat16", "cpu")
    assert context_of(SHAPE, CPU) == 128
    assert context_of(SHAPE.model_copy(update={"context": None}), Machine("cuda", "bfloat16")) == 1024
    stages_of(config, Path("run"))


@pytest.mark.parametrize("hours", [0.03, 0.1, 1, 10])
def test_tokens_are_as_many_as_the_hours_allow(hours, words):
    config = automatic("m", SHAPE, CPU, UserChoices(hours=hours), text_of(str(words), 128), seconds_of)
    tokens = config.harvest.num_tokens or 0
    assert tokens >= LEAST_TOKENS
    passes = config.groups[0].num_tokens // tokens
    assert config.groups[0].num_tokens == passes * tokens
    assert hours_of(config) <= hours
    more = automatic("m", SHAPE, CPU, UserChoices(tokens=2 * tokens, passes=passes), text_of(str(words), 128), seconds_of)
    assert hours_of(more) > hours or tokens == MOST_TOKENS


@pytest.mark.parametrize(
    ("harvest", "train", "passes"), [(0.0, 1.0, 1), (1.0, 9.0, 2), (1.0, 1.0, 3), (9.0, 1.0, 6), (1e3, 1.0, 8)]
)
def test_rows_are_read_as_often_as_pays(harvest, train, passes):
    assert passes_that_pay({"harvest": harvest, "train": train}) == passes


def test_passes_are_wished_or_chosen(words):
    text = text_of(str(words), 64)
    chosen = automatic("m", SHAPE, CPU, UserChoices(tokens=10**6), text, seconds_of)
    assert (chosen.harvest.num_tokens, chosen.groups[0].num_tokens) == (10**6, 2 * 10**6)
    wished = automatic("m", SHAPE, CPU, UserChoices(tokens=10**6, passes=5), text, seconds_of)
    assert (wished.harvest.num_tokens, wished.groups[0].num_tokens) == (10**6, 5 * 10**6)
    with pytest.raises(ConfigError, match=r"--tokens 100: read 2 times they fill no .* of 256 rows; give --tokens 128 or more"):
        automatic("m", SHAPE, CPU, UserChoices(tokens=100, passes=2), text, seconds_of)
    assert automatic("m", SHAPE, CPU, UserChoices(tokens=128, passes=2), text, seconds_of).groups[0].num_tokens == 256
    with pytest.raises(ConfigError, match="--passes 0: expected at least 1"):
        automatic("m", SHAPE, CPU, UserChoices(passes=0), text, seconds_of)


def test_wishes_are_kept_and_too_few_hours_are_refused(words):
    text = text_of(str(words), 64)
    choices = UserChoices(sites=("mlp_out",), layers=(3,), widths=(256, 512), l0s=(7.0,), tokens=10**6, passes=1)
    (group,) = automatic("m", SHAPE, CPU, choices, text, seconds_of).groups
    assert (group.sites, group.layers, group.widths, group.target_l0s, group.num_tokens) == (
        ("mlp_out",), (3,), (256, 512), (7,), 10**6,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"--hours 0.001: the smallest run takes about"):
        automatic("m", SHAPE, CPU, UserChoices(hours=0.001), text, seconds_of)
    with pytest.raises(ConfigError, match="expected a time above 0"):
        automatic("m", SHAPE, CPU, UserChoices(hours=0), text, seconds_of)


def test_texts_are_files_or_datasets_and_never_a_guess(words, monkeypatch):
    assert text_of(str(words), 64).paths == (words,)
    assert text_of("owner/name", 64).dataset == "owner/name"
    with pytest.raises(ConfigError, match="no such file or folder"):
        text_of(str(words) + "x", 64)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="which text"):
        text_of(None, 64)


def test_the_printed_recipe_is_the_same_run(tiny_random_model_folder, words):
    name = str(tiny_random_model_folder)
    shape = shape_of(ModelConfig(name=name))
    choices = UserChoices(tokens=2**16)
    config = automatic(name, shape, CPU, choices, text_of(str(words), 32), seconds_of)
    scope: dict = {}
    exec(recipe_text(config, choices), scope)
    of_a_recipe: dict = {"public_model": None, "sized_for_hours": None}
    assert with_shape(scope["recipe"]()) == config.model_copy(update=of_a_recipe)


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("owner/Model-1b", "Model-1b"),
        ("/data/models/mine", "mine"),
        ("./mine", "mine"),
        ("models/of/mine", "mine"),
        ("tiny", "tiny"),
    ],
)
def test_a_path_is_no_public_name(name, public):
    config = find_recipe("tiny").model_copy(update={"model": ModelConfig(name=name)})
    assert config.publish_config(Path()).model == (name if "owner" in name else public)
    assert config.model_copy(update={"public_model": "known/as"}).publish_config(Path()).model == "known/as"
    assert slug(name) == public.lower().replace("-", "_")


def test_a_hub_that_does_not_answer_is_said_within_seconds(monkeypatch):
    def refused(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(model_module.socket, "create_connection", refused)
    monkeypatch.setattr(model_module, "getproxies", dict)
    monkeypatch.setattr(model_module.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ModelError, match=r"not in the cache, and .* does not answer"):
        shape_of(ModelConfig(name="nobody/nothing"))


def test_products_have_rates_in_both_formats():
    assert all(rate > 0 for rate in measure_products(seconds=0.01).values())


def dry_run(capsys, *words: str) -> dict:
    main(["run", *words, "--dry-run", "--json"])
    return json.loads(capsys.readouterr().out)


def test_one_command_for_a_folder_and_the_same_again(tiny_random_model_folder, words, tmp_path, capsys):
    folder, out = str(tiny_random_model_folder), tmp_path / "run"
    flags = ["--out", str(out), "--text", str(words), "--text.context", "32", "--layers", "1", "--widths", "64", "--l0", "4"]
    first = dry_run(capsys, folder, *flags, "--tokens", "65536", "--passes", "1")
    assert [group["num_tokens"] for group in first["train"]] == [65536]
    assert first["publish"]["model"] == tiny_random_model_folder.name
    assert not out.exists()
    out.mkdir()
    config = with_shape(find_recipe("tiny")).model_copy(update={"model": ModelConfig(name=folder)})
    config = config.model_copy(update={"shape": shape_of(config.model), "groups": config.groups[:1], "text": config.text})
    config = config.model_copy(
        update={"text": config.text.model_copy(update={"context": 32}), "instruction_tuned": None, "random_weights": None}
    )
    (out / "recipe.json").write_text(json.dumps(config.as_json()))
    again = dry_run(capsys, folder, "--out", str(out))
    assert {group["num_tokens"] for group in again["train"]} == {config.groups[0].num_tokens}


def resolve_of(command: list[str]) -> RunConfig:
    parser = parser_of("run", COMMANDS["run"])
    options, fields = parser.parse_known_args(command[1:])
    options.command, options.flags = "run", parser.flags()
    return resolve(options, fields)[0]


def test_a_run_that_began_goes_on_by_the_same_command_alone(tiny_random_model_folder, words, tmp_path, capsys):
    out = tmp_path / "run"
    asked = ["--text", str(words), "--layers", "1", "--widths", "64", "--l0", "4", "--hours", "2", "--sites", "mlp_out"]
    same = ["run", str(tiny_random_model_folder), "--out", str(out), "--text.context", "32", *asked, "--dry-run", "--json"]
    main([*same, "--tokens", "65536"])
    first = json.loads(capsys.readouterr().out)
    config = resolve_of([*same, "--tokens", "65536"])
    out.mkdir()
    (out / "recipe.json").write_text(json.dumps(config.as_json()))
    main([*same, "--tokens", "65536"])
    assert json.loads(capsys.readouterr().out) == first
    (tmp_path / "other.txt").write_text("other words")
    for name, value in {
        "text": str(tmp_path / "other.txt"),
        "layers": "0",
        "widths": "32",
        "l0": "5",
        "hours": "3",
        "sites": "resid_post",
        "tokens": "131072",
        "passes": "7",
    }.items():
        with pytest.raises(SystemExit):
            main([*same, f"--{name}", value])
        assert re.search(f"--{name} .*{value}.*: the run in .* began with .*; choose another --out", capsys.readouterr().err)


def test_flags_of_a_model_are_not_for_recipes(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "tiny", "--layers", "2"])
    assert "--layers is for a MODEL" in capsys.readouterr().err
