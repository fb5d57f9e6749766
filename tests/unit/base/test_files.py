"""Laws of base.files: a file is whole or absent, and the system's complaints become one clear line."""

import errno
import hashlib
import os

import pytest

from everyscope.base.bundled import public_name
from everyscope.base.errors import DamagedData, DataError, StorageError
from everyscope.base.files import (
    human_bytes,
    make_folder,
    read_bytes,
    read_json,
    read_object,
    read_sealed,
    require_free_space,
    sha256,
    storage_errors,
    whole_file,
    write_json,
    write_sealed,
    write_text,
)


def test_whole_file_appears_only_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "folder" / "a.txt"
    with whole_file(path) as partial:
        partial.write_text("half")
        assert not path.exists()
    assert path.read_text() == "half"
    assert [file.name for file in path.parent.iterdir()] == ["a.txt"]


def write_half(path, error):
    with whole_file(path) as partial:
        partial.write_text("half")
        raise error


@pytest.mark.parametrize("error", [ValueError("ours"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_whole_file_leaves_nothing_behind_on_error(tmp_path, error):
    with pytest.raises((ValueError, KeyboardInterrupt, StorageError)):
        write_half(tmp_path / "a.txt", error)
    assert list(tmp_path.iterdir()) == []


def test_whole_file_keeps_the_old_file_on_error(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(ValueError, match="ours"):
        write_half(path, ValueError("ours"))
    assert path.read_text() == "old"


def test_whole_file_does_not_appear_when_nothing_was_written(tmp_path):
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "a.txt"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_of_a_folder_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="--out"):
        make_folder(tmp_path / "file" / "below")
    with pytest.raises(StorageError, match="--out"):
        write_text(tmp_path / "file" / "a.txt", "")
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(StorageError, match="--out"):
        write_text(tmp_path / "a.txt", "")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.txt", "file"]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EDQUOT, "disk is full"),
        (errno.EACCES, "no permission"),
        (errno.EROFS, "no permission"),
        (errno.ENOTDIR, "a file is where"),
    ],
)
def test_storage_errors_name_the_path_and_the_remedy(tmp_path, code, words):
    with pytest.raises(StorageError, match=words) as caught, storage_errors(tmp_path):
        raise OSError(code, "what the system says")
    message = str(caught.value)
    assert message.startswith(str(tmp_path))
    assert "--out" in message
    assert "\n" not in message


def test_errors_that_are_not_about_storage_pass(tmp_path):
    with pytest.raises(FileNotFoundError), storage_errors(tmp_path):
        (tmp_path / "missing").read_text()


def test_json_round_trip(tmp_path):
    value = {"name": "é", "list": [1, 2.5, None], "nested": {"true": True}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


def test_json_refuses_nan_and_leaves_nothing_behind(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_read_json_says_what_is_wrong(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_json(tmp_path / "missing.json")
    (tmp_path / "half.json").write_text('{"a": ')
    with pytest.raises(DataError, match="not readable as JSON"):
        read_json(tmp_path / "half.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not readable as JSON"):
        read_json(tmp_path / "binary.json")
    with pytest.raises(DataError, match="no such file"):
        read_json(tmp_path / "half.json" / "below.json")
    with pytest.raises(DataError, match="is a folder, expected a file"):
        read_json(tmp_path)


def test_sha256_is_that_of_the_bytes(tmp_path):
    content = bytes(range(256)) * 1000
    (tmp_path / "a").write_bytes(content)
    assert sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_free_space_is_checked_before_the_folder_exists(tmp_path):
    require_free_space(tmp_path / "not" / "yet", 1, "a test")
    with pytest.raises(StorageError, match=r"a test needs 1024\.0 PiB"):
        require_free_space(tmp_path / "not" / "yet", 2**60, "a test")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB"), (17 << 50, "17.0 PiB")]
)
def test_human_bytes(num_bytes, text):
    assert human_bytes(num_bytes) == text


def test_pipes_devices_and_folders_are_refused_at_once(tmp_path):
    """Each would hang, or never end, if it were opened and read."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name, kind in (("pipe", "a named pipe"), ("zero", "a device"), (".", "a folder")):
        for read in (read_bytes, read_json, read_object, read_sealed, sha256):
            with pytest.raises(DataError, match=kind):
                read(tmp_path / name)


def test_json_is_read_up_to_a_bound(tmp_path):
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataError, match="larger than"):
        read_json(tmp_path / "sparse")
    (tmp_path / "exact").write_bytes(b"1234")
    assert read_bytes(tmp_path / "exact", at_most=4) == b"1234"


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a": NaN}', "9" * 5000, '{"a": -Infinity}', "", "\ud800"])
def test_json_of_no_value_is_one_line_that_names_the_file(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(DataError, match=r"a\.json: not readable as JSON") as caught:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "Git LFS pointer.*git lfs pull"),
        ("\n<!DOCTYPE html>\n<html><head><title>Sign in</title>", "HTML page"),
        ("<HTML><body>404</body>", "HTML page"),
    ],
)
def test_what_a_download_left_instead_of_a_file_is_called_what_it_is(tmp_path, content, words):
    (tmp_path / "cfg.json").write_text(content)
    with pytest.raises(DataError, match=rf"cfg\.json: is .*{words}"):
        read_json(tmp_path / "cfg.json")


def test_an_object_is_an_object(tmp_path):
    write_json(tmp_path / "a.json", [1])
    with pytest.raises(DataError, match=r"a\.json: holds list, expected a JSON object"):
        read_object(tmp_path / "a.json")


def test_every_change_of_a_sealed_object_is_seen(tmp_path):
    path, value = tmp_path / "a.json", {"fvu": 0.376, "names": ["a", "b"], "none": None}
    write_sealed(path, value)
    assert read_sealed(path) == value
    text = path.read_text()
    for old, new in (
        ("0.376", "0.01"),
        ("0.376", "1e999"),
        ('"a"', '"c"'),
        ("null", "0"),
        ("identity", "identitz"),
        ("fvu", "fvv"),
    ):
        path.write_text(text.replace(old, new))
        with pytest.raises(DamagedData, match=r"a\.json: its identity.*again"):
            read_sealed(path)
    write_json(path, value)
    with pytest.raises(DamagedData, match="its identity is 'None'"):
        read_sealed(path)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("tiny", "tiny"),
        ("google/gemma-2-2b", "google/gemma-2-2b"),
        ("/home/me/models/gemma", "gemma"),
        ("~/models/gemma/", "gemma"),
        ("./gemma", "gemma"),
        ("../a/gemma", "gemma"),
        ("shared/models/gemma", "gemma"),
        ("C:\\models\\gemma", "gemma"),
    ],
)
def test_published_files_do_not_say_where_a_model_lies(name, published):
    assert public_name(name) == published
