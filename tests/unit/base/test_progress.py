"""Laws of base.progress: people read it on standard error, unchanged; machines read standard output, untouched."""

import pytest

from everyscope.base.progress import heading, human_count, meter, say


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
