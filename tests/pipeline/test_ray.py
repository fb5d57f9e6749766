"""A Ray cluster of two workers on this host's loopback: the same suite as without it, whatever is killed on the way.

Needs `pip install 'everyscope[ray]'`; two to three minutes on two cores, so it is left to `make test-cluster`.
"""

import importlib.util
import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from everyscope.cli.main import main
from everyscope.run.jobs.ray_cluster import LocalCluster

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'everyscope[ray]'"),
]

RECIPE = """
from everyscope.run.config import *
from everyscope.run.recipes.tiny import recipe as tiny

def recipe():
    return tiny().model_copy(update=dict(
        name="small",
        model=ModelConfig(name={model!r}),
        shape=ModelShape(num_layers=2, d_model=32, d_attention=48, num_parameters=150_000),
        text=TextConfig(source="files", paths=({text!r},), context=32, held_out_fraction=0.3),
        groups=(
            SaeGroup(
                sites=("mlp_out", "attn_out"), layers=(1,), widths=(48,), target_l0s=(8,),
                num_tokens=196608,
            ),
        ),
        harvest=HarvestSettings(bucket_rows=512, num_tokens=3072, dtype="bfloat16", batch_blocks=4),
        train=TrainSettings(batch_rows=64, checkpoint_steps=64, log_steps=64),
        evaluate=EvaluateSettings(
            num_sequences=24, batch_blocks=4, checkpoint_batches=1, pca_rows=512, uniformity_sequences=4, baseline_sequences=4
        ),
        compare=CompareSettings(slices=("precision",), num_sequences=4),
        instruction_tuned=None,
        random_weights=None,
        describe=DescribeSettings(num_sequences=24, batch_blocks=4),
        explain=ExplainSettings(num_sequences=12, num_held_out_sequences=12, batch_blocks=4),
    ))
"""
STAGES = ("harvest", "attn_out", "evaluate", "compare", "describe", "explain")
"""How the names of jobs begin, stage by stage."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_random_model_folder) -> Path:
    """A recipe file over some of the library's own files."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "text").mkdir()
    for module in (json, signal, subprocess, secrets):
        source = Path(module.__file__).read_text()
        for number in range(0, min(len(source), 12_000), 1500):
            (folder / f"text/{module.__name__}_{number}.txt").write_text(source[number : number + 1500])
    (folder / "small.py").write_text(RECIPE.format(model=str(tiny_random_model_folder), text=str(folder / "text")))
    return folder / "small.py"


@pytest.fixture(scope="module")
def fast_start() -> None:
    """Not here: Ray starts interpreters of its own kind."""


@pytest.fixture(autouse=True)
def token(monkeypatch, tmp_path) -> None:
    """A token for Ray, and a cluster that gives a lost head up soon."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "5")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory) -> Path:
    """The run without Ray, in this test's own process."""
    out = tmp_path_factory.mktemp("finished") / "run"
    main(["run", str(recipe), "--out", str(out), "--workers", "1", "--json"])
    return out


def start(command: str, recipe: Path, out: Path, *flags: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "everyscope", command, str(recipe), "--out", str(out), "--engine", "ray", *flags]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def tree(folder: Path) -> dict[str, bytes]:
    """The bytes of all files below, but for those that tell how long something took, and what became of jobs."""
    files = (
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "cost.json" and not path.name.endswith(".speed.json")
    )
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    return {name: content for name, content in found.items() if not name.startswith("jobs/")}


def listening() -> dict[str, set[str]]:
    """Local addresses of listening TCP sockets of this host, by the socket's inode."""
    found: dict[str, set[str]] = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                found.setdefault(fields[9], set()).add(fields[1].partition(":")[0])
    return found


def descendants(pid: int) -> set[int]:
    """Processes that `pid` started, and theirs."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def open_addresses(pid: int) -> set[str]:
    """Where `pid` and what it started listen, as /proc writes addresses."""
    sockets, found = listening(), set()
    for process in descendants(pid):
        for link in Path(f"/proc/{process}/fd").glob("*"):
            try:
                target = str(link.readlink())
            except OSError:
                continue
            found |= sockets.get(target.removeprefix("socket:[").removesuffix("]"), set())
    return found


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
"""127.0.0.1, the same as IPv6 writes it, and ::1."""


def events(child: subprocess.Popen[str]) -> Iterator[dict]:
    assert child.stdout is not None
    for line in child.stdout:
        yield json.loads(line)


def kill(pid: int) -> None:
    """SIGKILL to a worker, which its own event named."""
    assert b"everyscope.run.jobs.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    os.kill(pid, signal.SIGKILL)


def test_a_worker_killed_in_every_stage_changes_nothing_but_the_time(recipe, finished, tmp_path):
    """Two jobs at a time, one of them killed in each stage; nobody listens but on the loopback."""
    out = tmp_path / "run"
    child = start("run", recipe, out, "--json", "--workers", "2")
    killed, addresses, told = set(), set(), []
    pids: dict[str, int] = {}
    for event in events(child):
        told.append(event)
        name, what = event.get("job", ""), event["event"]
        if what == "started":
            pids[name] = event["pid"]
        stage = next((stage for stage in STAGES if name.startswith(stage)), None)
        is_time = what == "units" and 100 < event["done"] < 2500 if stage == "attn_out" else what == "started"
        if stage is not None and stage not in killed and is_time:
            addresses |= open_addresses(child.pid)
            kill(pids[name])
            killed.add(stage)
    _, errors = child.communicate()
    assert child.returncode == 0, errors
    assert killed == set(STAGES)
    assert [event["event"] for event in told].count("retry") == len(STAGES)
    assert told[-1]["event"] == "suite"
    assert {event["job"] for event in told if event.get("job", "").startswith("harvest")} == {"harvest 1/2", "harvest 2/2"}
    assert addresses
    assert addresses <= LOOPBACK
    want, got = tree(finished), tree(out)
    assert sorted(got) == sorted(want)
    assert [name for name in want if want[name] != got[name]] == []


def test_the_head_is_lost_and_started_again_and_the_same_command_goes_on(recipe, finished, tmp_path):
    """Every process of the cluster is killed while training groups train from a server of it; a new one comes up in its place."""
    out = tmp_path / "run"
    main(["harvest", str(recipe), "--out", str(out)])
    cluster = LocalCluster(3, 0)
    pids = descendants(os.getpid()) - {os.getpid()}
    child = start("train", recipe, out, "--json", "--serve", "--address", cluster.address, "--tries", "1")
    told, is_killed = [], False
    for event in events(child):
        told.append(event)
        if event["event"] == "units" and event["done"] > 100 and not is_killed:
            for pid in sorted(pids):
                os.kill(pid, signal.SIGKILL)
            cluster.close()
            cluster = LocalCluster(3, 0, int(cluster.address.rpartition(":")[2]))
            is_killed = True
    _, errors = child.communicate()
    cluster.close()
    assert child.returncode == 0, errors
    assert is_killed
    assert "went away; connecting again" in errors
    assert {event["job"] for event in told if event["event"] == "retry"} >= {"server 1/1"}
    want, got = tree(finished / "train"), tree(out / "train")
    assert sorted(got) == sorted(want)
    assert [name for name in want if want[name] != got[name]] == []


def test_interrupted_jobs_save_their_state_and_nothing_is_left_running(recipe, tmp_path):
    out = tmp_path / "run"
    main(["harvest", str(recipe), "--out", str(out)])
    child = start("train", recipe, out, "--json")
    for event in events(child):
        if event["event"] == "units" and event["done"] > 20:
            started = descendants(child.pid)
            child.send_signal(signal.SIGTERM)
            break
    _, errors = child.communicate()
    assert child.returncode == 128 + signal.SIGTERM
    assert "run the same command to resume" in errors
    assert list(out.glob("train/*/*/group_*.safetensors"))
    assert not [pid for pid in started if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"RAY_AUTH_MODE": None}, "export RAY_AUTH_MODE=token; ray get-auth-token --generate"),
        ({"RAY_AUTH_MODE": "disabled"}, "RAY_AUTH_MODE=disabled"),
        ({"RAY_AUTH_TOKEN": None, "RAY_AUTH_TOKEN_PATH": "/nowhere/token"}, "ray get-auth-token --generate"),
    ],
)
def test_without_a_token_nothing_is_started(recipe, tmp_path, monkeypatch, capsys, changes, complaint):
    for name, value in changes.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    before = descendants(os.getpid())
    with pytest.raises(SystemExit):
        main(["run", str(recipe), "--out", str(tmp_path / "run"), "--engine", "ray"])
    assert complaint in capsys.readouterr().err
    assert descendants(os.getpid()) == before
    assert not (tmp_path / "run").exists()


def test_a_cluster_that_is_open_to_all_is_refused(recipe, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as open_to_all:
        open_to_all.setenv("RAY_AUTH_MODE", "disabled")
        cluster = LocalCluster(1, 0)
    with pytest.raises(SystemExit):
        main(["run", str(recipe), "--out", str(tmp_path / "run"), "--engine", "ray", "--address", cluster.address])
    cluster.close()
    assert "answers without a token" in capsys.readouterr().err


def test_a_cluster_with_another_token_is_not_taken_for_ours(recipe, tmp_path, monkeypatch, capsys):
    cluster = LocalCluster(1, 0)
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    with pytest.raises(SystemExit):
        main(
            ["run", str(recipe), "--out", str(tmp_path / "r"), "--engine", "ray", "--address", cluster.address, "--patience", "0"]
        )
    cluster.close()
    assert "no Ray cluster that takes our token" in capsys.readouterr().err
