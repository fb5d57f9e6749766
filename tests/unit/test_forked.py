"""A forked interpreter behaves as a fresh one: codes, output, signals, threads, sessions, environments."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest

pytestmark = [
    pytest.mark.usefixtures("forked_interpreters"),
    pytest.mark.skipif(sys.platform != "linux", reason="forks only on Linux"),
]
LATE = "import threading, time; threading.Thread(target=lambda: (time.sleep(0.05), print('late'))).start(); print('early')"


def outcome(start: type[subprocess.Popen], arguments: list[str]) -> tuple[int, str, list[str]]:
    command = [sys.executable, *arguments]
    child = start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    output, errors = child.communicate("line\n")
    return child.returncode, output, errors.splitlines()[-1:]


@pytest.mark.parametrize(
    "arguments",
    [
        ["-c", "print(input())"],
        ["-B", "-X", "utf8", "-c", "import sys; print(sys.argv, __name__); sys.exit(3)", "one", "-two"],
        ["-c", "raise ValueError('wrong')"],
        ["-c", "import sys; sys.exit('words')"],
        ["-c", "raise KeyboardInterrupt"],
        ["-c", "import os, signal; print('lost'); os.kill(os.getpid(), signal.SIGKILL)"],
        ["-c", "import os; os._exit(9)"],
        ["-c", "import atexit; atexit.register(print, 'bye'); print('hello')"],
        ["-c", LATE],
        ["-m", "this"],
    ],
)
def test_it_ends_as_a_fresh_one(arguments):
    assert outcome(subprocess.Popen, arguments) == outcome(forked.RealPopen, arguments)


def test_signals_reach_it_and_it_leads_a_session_of_its_own(tmp_path):
    code = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); print(1, flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True, cwd=tmp_path)
    assert isinstance(child, forked.ForkedPopen)
    assert child.stdout is not None
    assert child.stdout.readline() == b"1\n"
    assert os.getsid(child.pid) == child.pid
    assert Path(f"/proc/{child.pid}/cwd").readlink() == tmp_path
    assert child.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.01)
    child.send_signal(signal.SIGTERM)
    assert child.wait() == 7
    child.stdout.close()


def test_it_has_the_environment_that_it_is_given():
    code = "import os, torch; print(sorted(os.environ), torch.get_num_threads())"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={"OMP_NUM_THREADS": "3", forked.ADDRESS: os.environ[forked.ADDRESS]},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout == f"{sorted((forked.ADDRESS, 'OMP_NUM_THREADS'))} 3\n"


def test_spawned_processes_of_multiprocessing_too():
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    process = context.Process(target=answers.put, args=(5,))
    process.start()
    process.join()
    assert (answers.get(), process.exitcode) == (5, 0)
    sleeper = context.Process(target=time.sleep, args=(60,), daemon=True)
    sleeper.start()
    sleeper.kill()
    sleeper.join()
    assert sleeper.exitcode == -signal.SIGKILL
