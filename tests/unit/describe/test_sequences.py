import numpy as np
import pyarrow.parquet
import pytest
from small_description import CONTEXT, WORDS

from everyscope.base.errors import TextError
from everyscope.describe.config import DescribeConfig
from everyscope.describe.sequences import Sequences, read_sequences, write_sequences
from everyscope.sites.config import ModelConfig
from everyscope.text.config import TextConfig
from everyscope.text.markers import Markers
from everyscope.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    words = np.random.default_rng(0)
    for number in range(60):
        (folder / f"{number:03d}.txt").write_text(" ".join(words.choice(WORDS, int(words.integers(20, 60)))))
    return folder


def config_of(folder, **changes) -> DescribeConfig:
    text = TextConfig(source="files", paths=(folder,), context=CONTEXT, held_out_fraction=changes.pop("held_out_fraction", 0.5))
    folders = {name: folder / name for name in ("trained", "scores", "out")}
    return DescribeConfig(model=ModelConfig(), text=text, **folders, **changes)


def test_no_document_is_in_both_splits(folder, tokenizer):
    found = read_sequences(config_of(folder, num_sequences=31, train_stride=2), tokenizer)
    assert found.splits == ("train",) * 16 + ("held_out",) * 15
    train, held_out = found.document[:16], found.document[16:]
    assert not set(train[train >= 0]) & set(held_out[held_out >= 0])
    assert len(set(found.documents)) == len(found.documents) == len(set(found.document[found.document >= 0]))
    assert found.num_tokens == found.mask.sum() > 0
    assert not found.mask[:, 0].any()


def test_a_stride_shows_more_documents(folder, tokenizer):
    near = read_sequences(config_of(folder, num_sequences=16, train_stride=1), tokenizer)
    far = read_sequences(config_of(folder, num_sequences=16, train_stride=4), tokenizer)
    assert np.array_equal(near.input_ids[4], far.input_ids[1])
    assert len(set(far.document[:8].ravel())) > len(set(near.document[:8].ravel()))


def test_a_short_text_is_read_with_a_smaller_stride(folder, tokenizer, capsys):
    all_of_it = read_sequences(config_of(folder, num_sequences=10_000, train_stride=1), tokenizer)
    again = read_sequences(config_of(folder, num_sequences=10_000, train_stride=1000), tokenizer)
    assert np.array_equal(all_of_it.input_ids, again.input_ids)
    assert "text ends after" in capsys.readouterr().err


def test_a_split_without_documents_is_refused(folder, tokenizer):
    with pytest.raises(TextError, match="no held_out document"):
        read_sequences(config_of(folder, num_sequences=10, held_out_fraction=1e-9), tokenizer)


def test_the_file_tells_where_documents_begin(folder, tokenizer, tmp_path):
    found = read_sequences(config_of(folder, num_sequences=20), tokenizer)
    write_sequences(tmp_path / "sequences.parquet", found, "identity")
    rows = pyarrow.parquet.read_table(tmp_path / "sequences.parquet").to_pylist()
    assert [row["sequence"] for row in rows] == list(range(20))
    for row, ids, document in zip(rows, found.input_ids, found.document, strict=True):
        assert row["input_ids"] == ids.tolist()
        assert row["first_document"] == row["documents"][0] == found.documents[document[1]]
        assert row["document_starts"][0] == 1
        for start, name in zip(row["document_starts"], row["documents"], strict=True):
            assert found.documents[document[start]] == name
            assert document[start - 1] != document[start]


def test_halves_hold_whole_documents_and_about_equally_many_tokens(sequences):
    half, document, mask = sequences.halves(0), sequences.document.ravel(), sequences.mask.ravel()
    assert set(half[~mask]) == {-1}
    for number in range(8):
        assert len(set(half[(document == number) & mask])) <= 1
    counts = np.bincount(half[mask])
    largest = np.bincount(document[mask]).max()
    assert abs(int(counts[0]) - int(counts[1])) <= largest
    assert not np.array_equal(half, sequences.halves(1))


def test_windows_never_cross_bos():
    """Where BOS also closes documents, as GPT-2's does, a window ends at each."""
    bos = 2
    ids = np.array([[2, 5, 6, 2, 7, 8, 9, 2], [2, 5, 5, 5, 5, 5, 5, 5]], np.int32)
    sequences = Sequences(ids, ids != bos, np.zeros_like(ids), ("train", "train"), ("a",), Markers(bos, bos, bos))
    first, last = (bound.reshape(ids.shape) for bound in sequences.bounds())
    assert first[0, [1, 2, 4, 5, 6]].tolist() == [1, 1, 4, 4, 4]
    assert last[0, [1, 2, 4, 5, 6]].tolist() == [3, 3, 7, 7, 7]
    assert first[1, 1:].tolist() == [9] * 7
    assert last[1, 1:].tolist() == [16] * 7
