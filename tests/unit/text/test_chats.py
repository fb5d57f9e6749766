"""Chats and pages of arithmetic: right answers, right turns, and the tasks that the bundled model was tuned on."""

import importlib.util
from itertools import islice
from pathlib import Path

from everyscope.text.arithmetic import PAGE_LINES, PROBLEMS, arithmetic_page
from everyscope.text.chats import END_OF_TURN, MODEL_TURN, USER_TURN, chats_of
from everyscope.text.config import TextConfig
from everyscope.text.corpora import read_documents, standard_library
from everyscope.text.tokenizer import load_tokenizer

SCRIPT = Path(__file__).parents[3] / "scripts/train_tiny_model.py"
SOURCE = '''
@cached
def double(x):
    """Two of it.

    More words."""
    return 2 * x

def silent(x):
    return x
'''
SIGNS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


def test_three_tasks_for_each_documented_function():
    chats = list(chats_of(SOURCE))
    code = "def double(x):\n    return 2 * x"
    assert chats == [
        (f"Write a docstring for this function.\n\n{code}", "Two of it."),
        ("Which function does this?\n\nTwo of it.", "def double(x):"),
        ('Write the body of this function.\n\ndef double(x):\n    """Two of it."""', "    return 2 * x"),
    ]
    assert list(chats_of("def f(:")) == []


def test_the_tasks_are_those_of_the_training_script():
    spec = importlib.util.spec_from_file_location("train_tiny_model", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    documents = [document for document in standard_library() if document.split(0.05) == "held_out"]
    want = script.chats("held_out")
    assert len(want) > 300
    assert [pair for document in documents for pair in chats_of(document.text)] == want


def test_chats_have_both_turns_and_the_split_of_their_file():
    documents = list(islice(read_documents(TextConfig(source="standard_library_instructions")), 300))
    splits = {document.name: document.split(0.3) for document in standard_library()}
    tokenizer = load_tokenizer("tiny-it")
    turn = tokenizer.convert_tokens_to_ids("<start_of_turn>")
    for document in documents:
        assert document.text.startswith(USER_TURN)
        assert document.text.count(MODEL_TURN) >= 1
        assert document.text.endswith(END_OF_TURN)
        assert document.split(0.3) == splits[document.name.rpartition(":")[0]]
    assert len({document.name for document in documents}) == 300
    ids = tokenizer(documents[0].text, add_special_tokens=False)["input_ids"]
    assert ids.count(turn) == 2
    request, answer = next(chats_of(next(document.text for document in standard_library() if list(chats_of(document.text)))))
    messages = [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == f"<bos>{documents[0].text}"


def test_every_answer_is_right():
    kinds = set()
    for number in range(40):
        lines = arithmetic_page(number).splitlines()
        assert len(lines) == PAGE_LINES
        for line in lines:
            a, sign, b, *rest = line.split()
            a, b = int(a), int(b)
            assert 0 <= min(a, b) <= max(a, b) < 1000
            if sign in SIGNS:
                assert rest == ["=", str(SIGNS[sign](a, b))]
            elif sign == "/":
                assert (rest[0], rest[2]) == ("=", "remainder")
                assert int(rest[1]) * b + int(rest[3]) == a
                assert 0 <= int(rest[3]) < b
            else:
                assert rest == []
                assert sign == ("<" if a < b else ">" if a > b else "=")
            kinds.add("compare" if not rest else sign)
    assert len(kinds) == len(PROBLEMS)


def test_arithmetic_is_the_same_everywhere_and_never_twice():
    assert arithmetic_page(0).splitlines()[:2] == ["420 > 5", "303 * 58 = 17574"]
    documents = list(islice(read_documents(TextConfig(source="arithmetic")), 500))
    assert len({document.text for document in documents}) == 500
    assert {document.split(0.05) for document in documents} == {"train", "held_out"}
