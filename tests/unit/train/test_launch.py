"""Ranks start together, end together, and start again together."""

import multiprocessing
import socket

import pytest
from unit.train import launch_driver

from everyscope.base.errors import ConfigError, EveryscopeError
from everyscope.train.launch import launch
from everyscope.train.process_group import socket_store

pytestmark = pytest.mark.usefixtures("forked_interpreters")


def test_ranks_that_never_get_further_are_given_up(tmp_path):
    (tmp_path / "kills").write_text("100")
    with pytest.raises(EveryscopeError, match="killed by signal 9, 2 times in a row; the same command resumes"):
        launch(launch_driver.die_while_told, tmp_path, 2, max_restarts=1, first_pause=0.01)
    assert (tmp_path / "starts_1").read_text() == "2"


def test_ranks_that_get_further_each_time_are_not_and_each_step_is_heard_once(tmp_path, capsys):
    (tmp_path / "kills").write_text("2")
    (tmp_path / "moves").touch()
    heard: list[int] = []
    launch(launch_driver.die_while_told, tmp_path, 2, heard.append, max_restarts=1, first_pause=0.01)
    assert [(tmp_path / f"starts_{rank}").read_text() for rank in (0, 1)] == ["3", "3"]
    assert heard == [1, 1, 1]
    assert capsys.readouterr().err.count("rank 1 was killed by signal 9; all 2 ranks resume") == 2
    assert not multiprocessing.active_children()


def test_an_error_is_raised_once_and_as_it_was(tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"^colour='green': expected blue; set colour=blue$"):
        launch(launch_driver.refuse, tmp_path, 2)
    with pytest.raises(EveryscopeError, match="ZeroDivisionError: by nothing") as raised:
        launch(launch_driver.stumble, tmp_path, 1)
    assert "Traceback" in raised.value.__notes__[0]
    assert capsys.readouterr().err == ""
    assert not multiprocessing.active_children()


def test_hosts_meet_at_a_bound_socket():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    heard: list[int] = []
    launch(launch_driver.meet_by_socket, ("127.0.0.1", port), 2, heard.append)
    assert heard == [1]


def test_a_port_that_is_taken_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="cannot listen on 127"):
        socket_store("127.0.0.1", taken.getsockname()[1], 0, 2)
