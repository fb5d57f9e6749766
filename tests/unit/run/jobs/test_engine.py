"""Which engine a command line asks for, what is refused, and what people see of its jobs."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from everyscope.base.errors import ConfigError, MissingExtra
from everyscope.base.progress import console
from everyscope.cli.main import main
from everyscope.run.jobs import ray_cluster
from everyscope.run.jobs.config import EngineConfig
from everyscope.run.jobs.job import Job, Resources
from everyscope.run.jobs.ray_cluster import require_closed, require_token, stays_here
from everyscope.run.jobs.ray_executor import _fits
from everyscope.run.jobs.runner import opened_runner
from everyscope.run.jobs.watch import Board, written
from everyscope.run.stage_jobs import model_resources


@pytest.mark.parametrize("address", ["local", "10.0.0.5:6379", "head.cluster:6379", "[fe80::1]:6379"])
def test_addresses_are_named(address):
    assert EngineConfig(engine="ray", address=address).address == address


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"engine": "ray", "address": "auto"}, "expected HOST:PORT"),
        ({"engine": "ray", "address": "ray://10.0.0.5:10001"}, "expected HOST:PORT"),
        ({"address": "10.0.0.5:6379"}, "give engine='ray' too"),
        ({"serve": True}, "page cache"),
        ({"engine": "ray", "tls_key": Path("key")}, "for serve"),
        ({"engine": "ray", "tries": 0}, "tries"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(fields, words):
    with pytest.raises(ValidationError, match=words):
        EngineConfig(**fields)


def test_they_are_one_line_on_the_command_line(capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["run", "tiny", "--out", str(tmp_path / "run"), "--address", "10.0.0.5:6379"])
    assert "give engine='ray' too" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["harvest", "tiny", "--out", str(tmp_path / "run"), "--engine", "ray", "--partition", "0/2"])
    assert "the engine divides the harvest" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, "export RAY_AUTH_MODE=token; ray get-auth-token --generate"),
        ({"RAY_AUTH_MODE": "disabled"}, "RAY_AUTH_MODE=disabled"),
        ({"RAY_AUTH_MODE": "token"}, "ray get-auth-token --generate"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": " "}, "ray get-auth-token --generate"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/nowhere/token"}, "/nowhere/token"),
    ],
)
def test_without_a_token_ray_is_refused(monkeypatch, tmp_path, environment, words):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=words), opened_runner(EngineConfig(engine="ray"), tmp_path / "jobs"):
        pass
    assert not (tmp_path / "jobs").exists()
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("a" * 64)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    require_token()


def test_without_ray_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'everyscope\[ray\]'"):
        require_token()


@pytest.mark.parametrize(
    ("answer", "is_closed"),
    [((1, "ray.exceptions.AuthenticationError: ..."), True), ((0, ""), False), ((None, ""), False), ((1, "no such host"), False)],
)
def test_a_cluster_is_closed_only_if_it_says_so(monkeypatch, answer, is_closed):
    monkeypatch.setattr(ray_cluster, "_ask", lambda address, environment: answer)
    if is_closed:
        require_closed("10.0.0.5:6379")
        return
    with pytest.raises(ConfigError, match=r"10\.0\.0\.5:6379"):
        require_closed("10.0.0.5:6379")


def test_only_this_host_is_loopback():
    assert [stays_here(host + ":6379") for host in ("127.0.0.1", "localhost", "[::1]", "10.0.0.5", "127.0.0.1.example.org")] == [
        True,
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("resources", "count"),
    [
        (Resources(cpus=3), 5),
        (Resources(cpus=1, gpus=0.3), 6),
        (Resources(cpus=1, gpus=2.0), 1),
        (Resources(cpus=1, gpus=3.0), 0),
        (Resources(cpus=1, memory_bytes=6), 1),
        (Resources(cpus=17), 0),
    ],
)
def test_how_many_jobs_a_host_holds(resources, count):
    assert _fits({"CPU": 16.0, "GPU": 2.0, "memory": 10.0}, resources) == count


def test_a_device_that_a_cluster_cannot_give_is_refused():
    assert model_resources("cuda", EngineConfig(engine="ray", model_gpus=2)).gpus == 2.0
    with pytest.raises(ConfigError, match="set device='cuda'"):
        model_resources("cuda:1", EngineConfig(engine="ray"))


def test_the_table_shows_what_is_at_work_first_and_the_log_says_what_went_wrong(tmp_path, capsys):
    jobs = [Job(print, None, f"job {number}", units=100) for number in range(40)]
    write = written(tmp_path / "jobs/events.jsonl")
    with Board("groups", jobs, "steps") as board:
        for event in (
            {"event": "started", "job": "job 39", "host": "far", "attempt": 1},
            {"event": "units", "job": "job 39", "done": 50, "attempt": 1},
            {"event": "retry", "job": "job 38", "why": "its worker was lost", "seconds": 4.0, "attempt": 2},
            {"event": "done", "job": "job 0", "attempt": 1},
        ):
            board.tell(event)
            write(event)
        with console.capture() as shown:
            console.print(board.table())
    lines = shown.get().splitlines()
    assert "1 of 40 jobs done, 1 running; 150/4k steps" in shown.get()
    rows = [line for line in lines if line.strip().startswith(("job ", "and "))]
    assert "job 39" in rows[1]
    assert "50 %" in rows[1]
    assert "retry (2)" in rows[2]
    assert "and 16 more" in rows[-1]
    assert "job 38: its worker was lost; again in 4 s" in capsys.readouterr().err
    kept = [json.loads(line)["event"] for line in (tmp_path / "jobs/events.jsonl").read_text().splitlines()]
    assert kept == ["started", "retry", "done"]


def test_neither_ray_nor_a_launcher_is_loaded_before_it_is_asked_for():
    code = (
        "import sys, everyscope.run.pipeline, everyscope.run.jobs.runner, everyscope.run.jobs.ray_executor\n"
        "print(sorted({'ray', 'torch.distributed.run', 'torch.distributed.launcher'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
