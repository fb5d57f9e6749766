"""Laws of base.progress: people read it on standard error, unchanged; machines read standard output, untouched."""

import pytest

from everyscope.base.progress import heading, human_count, meter, printable, say


@pytest.mark.parametrize("speak", [say, heading])
def test_messages_are_printed_as_they_are(capsys, speak):
    message = "pip install 'everyscope[data]' and look into [/tmp/x]"
    speak(message)
    out, err = capsys.readouterr()
    assert err == message + "\n"
    assert out == ""


def test_a_meter_in_a_log_ends_with_the_whole_count(capsys):
    with meter("harvest", 3000, "rows") as count:
        count.advance(1000, is_resumed=True)
        count.advance(2000)
    out, err = capsys.readouterr()
    assert "harvest: 3k/3k rows" in err
    assert "rows/s" in err
    assert out == ""


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999.4, "999"), (999.7, "1k"), (1234, "1.23k"), (1_250_000, "1.25M"), (8e9, "8B"), (1.6e13, "16T")],
)
def test_human_count(count, text):
    assert human_count(count) == text


def test_nothing_that_a_terminal_obeys_is_shown():
    hostile = "\x1b]0;title\x07 \x1b[2J\x9b31m plain\ttext\r\u202e é\n"
    assert printable(hostile) == "\ufffd]0;title\ufffd \ufffd[2J\ufffd31m plain\ttext\ufffd\ufffd é\n"


def test_what_is_said_is_printable(capsys):
    say("a \x1b[31mred\x1b[0m suite")
    assert "\x1b" not in capsys.readouterr().err
