"""A program that does not outlive its parent: `python -m everyscope.run.jobs.supervisor FOLDER PROGRAM [ARGUMENT ...]`.

When standard input ends, or SIGTERM comes, the program is sent SIGTERM, and FOLDER, where it keeps its scratch files, is deleted
once it has left. It is known by its process id alone: nothing is ever ended by its name.
"""

import os
import shutil
import subprocess
import sys
import threading

from everyscope.base.signals import termination

POLL_SECONDS = 0.2
STOP_SECONDS = 20.0


def main() -> None:
    """Run the program until it ends or standard input does; its exit code is ours."""
    folder, *command = sys.argv[1:]
    is_over = threading.Event()
    threading.Thread(target=_wait_for_end, args=(is_over,), daemon=True).start()
    with termination() as is_asked_to_stop:
        program = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        while program.poll() is None and not is_over.wait(POLL_SECONDS) and not is_asked_to_stop():
            pass
        if program.poll() is None:
            program.terminate()
            try:
                program.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                program.kill()
        shutil.rmtree(folder, ignore_errors=True)
        sys.exit(program.wait() and 1)


def _wait_for_end(is_over: threading.Event) -> None:
    while os.read(0, 1):
        pass
    is_over.set()


if __name__ == "__main__":
    main()
