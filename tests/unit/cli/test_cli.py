"""The command line: quick help, overrides, and one line for whatever is wrong."""

import json
import os
import subprocess
import sys

import pytest

from everyscope.cli.arguments import parser_of, set_apart
from everyscope.cli.commands import COMMANDS
from everyscope.cli.flags import flags_of
from everyscope.cli.main import MAIN_FIELDS, main
from everyscope.run.find import find_recipe


def said(capsys, *arguments: str) -> str:
    """The one line on standard error of a command that must fail."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code not in (0, None)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("run", "tinny"), "did you mean 'tiny'"),
        (("run",), "needs a RECIPE"),
        (("plan", "tiny", "--groups.0.layers", "9"), "layers 0 to 3"),
        (("plan", "tiny", "--evaluate.num-sequences", "0"), "num_sequences Input should be greater than or equal to 1"),
        (("plan", "tiny", "--groups.0.sites", "attention"), "invalid choice 'attention'"),
        (("plan", "tiny", "--wdith", "3"), "unknown flag --wdith; did you mean --groups.0.widths?"),
        (("run", "tiny", "--workers", "0"), "expected 1 or more"),
        (("rnu", "tiny"), "unknown command 'rnu'; did you mean 'run'?"),
        ((), "no command given"),
        (("train", "tiny", "--model", "gpt2"), "unknown flag --model; did you mean --model.name?"),
        (("run", "tiny", "--worker", "2"), "unknown flag --worker; did you mean --workers?"),
        (("run", "tiny", "--tri", "2"), "unknown flag --tri"),
        (("run", "tiny", "--workers", "two"), "invalid int value: 'two'"),
        (("serve", "shards", "--token", "SECRET"), "--token: a secret on a command line shows"),
        (("verify", "runs", "--deep"), "unknown argument --deep"),
        (("plan", "tiny", "--curve"), "--curve describes a cluster"),
        (("plan", "tiny", "--gpu", "h100"), "--gpus N"),
        (("plan", "tiny", "--gpus", "8"), "with --gpu: h100, h200"),
        (("plan", "tiny", "--gpus", "8", "--gpu", "h100", "--teraflops", "1"), "--teraflops describes this machine"),
        (("verify", "/nowhere/at/all"), "no such folder"),
        (("run", "tiny", "--out", "/proc/everyscope"), "/proc/everyscope"),
    ],
)
def test_bad_input_is_one_line_and_a_non_zero_exit(capsys, arguments, complaint):
    assert complaint in said(capsys, *arguments)


def test_saes_of_any_but_a_bundled_model_need_a_text(capsys, tmp_path):
    complaint = said(capsys, "evaluate", str(tmp_path), "--model", "org/model")
    assert "no text for model 'org/model'; give text like that it was trained on with --text" in complaint
    for arguments in (("--model", "org/model", "--text", "standard_library"), ("--model", "tiny")):
        assert "holds no finished SAE" in said(capsys, "evaluate", str(tmp_path), *arguments)


def test_flags_override_any_field(capsys):
    main(
        [
            "plan",
            "tiny",
            "--json",
            "--teraflops",
            "1",
            "--groups.0.widths",
            "64",
            "--groups.0.layers",
            "2",
            "--groups.1.widths",
            "64",
            "--groups.1.layers",
            "2",
            "--harvest.dtype",
            "float32",
        ]
    )
    value = json.loads(capsys.readouterr().out)
    assert {sae["width"] for sae in value["saes"]} == {64}
    assert {site["site"] for site in value["sites"]} == {
        "attn_out/layer_2",
        "mlp_in/layer_2",
        "mlp_out/layer_2",
        "resid_post/layer_2",
    }
    assert value["dtype"] == "float32"


def test_help_is_short_and_help_all_has_every_field(capsys):
    main(["run", "tiny", "--help"])
    short = capsys.readouterr().out.splitlines()
    assert len(short) < 110
    assert any("--groups.0.widths" in line for line in short)
    with pytest.raises(SystemExit) as caught:
        main(["run", "tiny", "--help-all"])
    assert caught.value.code == 0
    whole = capsys.readouterr().out
    shown = ("--groups.", "--train.", "--harvest.", "--evaluate.", "--text.", "--model.", "--preset.", "--seed")
    assert [flag for flag in flags_of(find_recipe("tiny")) if flag.startswith(shown) and flag not in whole] == []


def test_help_says_that_a_recipe_of_python_runs(capsys):
    takers = [name for name, command in COMMANDS.items() if command.takes_recipe]
    assert {"run", "plan"} <= set(takers)
    for arguments in (["--help"], *([name, "--help"] for name in takers)):
        main(arguments)
        assert "is executed, by plan" in " ".join(capsys.readouterr().out.split()), arguments


def test_every_main_field_is_one_of_a_recipe():
    assert set(MAIN_FIELDS) <= flags_of(find_recipe("tiny")).keys()


def test_help_and_plans_come_without_torch():
    code = (
        "import sys, contextlib\nfrom everyscope.cli.main import main\n"
        "for arguments in (['--help'], ['run', '--help'], ['run', 'tiny', '--help'], ['plan', 'tiny', '--teraflops', '1']):\n"
        "    with contextlib.suppress(SystemExit):\n        main(arguments)\n"
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules), 'imported too much'\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert all(name in result.stdout for name in COMMANDS)
    assert "--groups.0.widths" in result.stdout


def test_a_reader_who_leaves_is_no_error_to_tell_of():
    command = [sys.executable, "-m", "everyscope", "plan", "gemma_2_2b", "--json", "--teraflops", "1", "--disk-gbps", "1"]
    planning = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert planning.stdout is not None
    assert planning.stderr is not None
    planning.stdout.close()
    assert b"Traceback" not in planning.stderr.read()
    assert planning.wait() == 1
    planning.stderr.close()


@pytest.mark.parametrize("words", [("--token", "hunter2hunter2"), ("--token=hunter2hunter2",)])
@pytest.mark.parametrize("path", [(), ("shards",)])
def test_a_secret_on_the_command_line_is_refused_and_not_echoed(capsys, words, path):
    line = said(capsys, "serve", *path, *words)
    assert "hunter2" not in line
    assert "--token-file FILE" in line


def test_flags_are_not_guessed_from_their_beginnings(capsys):
    assert "--model-gpu" in said(capsys, "run", "tiny", "--model-gpu", "2", "--out", "/proc/everyscope")


def test_what_nobody_foresaw_is_one_line_that_takes_the_blame(capsys, monkeypatch):
    def fail(*given) -> None:
        raise KeyError("\x1b[31mred")

    monkeypatch.setattr("everyscope.cli.main.dispatch", fail)
    line = said(capsys, "plan", "tiny")
    assert "internal error" in line
    assert "KeyError" in line
    assert "\x1b" not in line
    with pytest.raises(KeyError):
        main(["plan", "tiny", "--debug"])


def test_a_terminal_that_lacks_letters_loses_no_work():
    code = (
        "import sys; from everyscope.cli.main import main; sys.argv = ['everyscope', 'plan', 'tiny', '--teraflops', '1']; main()"
    )
    child = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-c", code], env=os.environ | {"PYTHONIOENCODING": "cp1252"}, capture_output=True
    )
    assert child.returncode == 0, child.stderr
    assert b"Traceback" not in child.stderr


def test_a_flag_before_the_path_keeps_its_value():
    for given, want in (
        (["--port", "9000", "runs/a"], (["runs/a"], ["--port", "9000"])),
        (
            ["runs/a", "--port", "9000", "--no-open", "--cache", "c"],
            (["runs/a", "--no-open"], ["--port", "9000", "--cache", "c"]),
        ),
        (["--port"], (["--port"], [])),
        ([], ([], [])),
    ):
        assert set_apart(COMMANDS["browse"], (), given) == want
    assert set_apart(COMMANDS["run"], (), ["--out", "x", "tiny"]) == (["--out", "x", "tiny"], [])
    watching = ["HOST:1", "--watch", "--token-file", "secret"]  # a flag of the command and a field of its config
    assert set_apart(COMMANDS["serve"], parser_of("serve", COMMANDS["serve"]).flags(), watching) == (watching, [])
