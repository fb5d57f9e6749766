"""The command line: quick help, overrides, and one line for whatever is wrong."""

import json
import subprocess
import sys

import pytest

from everyscope.cli.main import COMMANDS, main


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
        (("plan", "tiny", "--wdith", "3"), "Unrecognized options: --wdith, 3"),
        (("run", "tiny", "--workers", "0"), "expected 1 or more"),
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
            "--harvest.dtype",
            "float32",
        ]
    )
    value = json.loads(capsys.readouterr().out)
    assert {sae["width"] for sae in value["saes"]} == {64}
    assert {site["site"] for site in value["sites"]} == {"attn_out/layer_2", "mlp_out/layer_2", "resid_post/layer_2"}
    assert value["dtype"] == "float32"


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
