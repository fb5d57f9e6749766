"""A Ray cluster that is fit to be used: one that asks for a token, and, where we start it, listens on this host's loopback alone.

Ray's own default for `ray start` lets anyone who reaches a port run code. So nothing here runs without RAY_AUTH_MODE=token, and
a cluster that answers without a token is refused. Ray is asked through its own command; this process does not import it.
"""

import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from everyscope.base.addresses import is_loopback
from everyscope.base.errors import ConfigError, EveryscopeError, MissingExtra

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
LOOPBACK = "127.0.0.1"
STAY_HERE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Without it Ray takes 127.0.0.1, given as a node's address, for a wish to be reached from everywhere."""
COMMAND = [sys.executable, "-m", "ray.scripts.scripts"]
REFUSED = "AuthenticationError"
"""What Ray answers without a token, or with another one."""
START_SECONDS, ASK_SECONDS = 90.0, 30.0
POLL_SECONDS = 0.1
STORE_BYTES = 100 << 20
"""Of Ray's object store: jobs hand on lines of text [bytes]."""


def require_token() -> None:
    """MissingExtra where Ray is not installed; ConfigError, with the command that fixes it, unless Ray is to ask for a token."""
    if importlib.util.find_spec("ray") is None:
        raise MissingExtra("ray", "ray", "Running jobs on a Ray cluster")
    mode = os.environ.get(MODE)
    if mode != "token":
        raise ConfigError(
            f"{MODE}={mode or '(not set)'}: Ray would let anyone who reaches its ports run code; expected token: "
            f"export {MODE}=token; ray get-auth-token --generate"
        )
    named = os.environ.get(TOKEN_PATH)
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    is_there = os.environ.get(TOKEN, "").strip() or (path.is_file() and path.read_text().strip())
    if not is_there:
        raise ConfigError(
            f"{MODE}=token, but there is no token in {TOKEN} or {path}: ray get-auth-token --generate, "
            "or copy the one of the cluster's head"
        )


def require_closed(address: str) -> None:
    """ConfigError unless the cluster at `address` refuses clients without a token."""
    code, output = _ask(address, {MODE: "disabled"})
    if code == 0:
        raise ConfigError(
            f"{address}: this Ray cluster answers without a token, so anyone can run code there; stop it, and start it again "
            f"with {MODE}=token and the same token on every host"
        )
    if REFUSED not in output:
        raise ConfigError(
            f"{address}: this Ray cluster does not say whether it asks for a token; start it with {MODE}=token and a Ray of the "
            "version that everyscope[ray] names"
        )


def answers(address: str) -> bool:
    """Whether a cluster's head answers us."""
    return _ask(address, {})[0] == 0


def stays_here(address: str) -> bool:
    """Whether an address, HOST:PORT, is of this host alone."""
    return is_loopback(address.rpartition(":")[0].strip("[]"))


def environment_for(address: str) -> dict[str, str]:
    """This process's environment, and with it what keeps Ray on the loopback where `address` is there."""
    return os.environ | (STAY_HERE if stays_here(address) else {})


def _ask(address: str, environment: dict[str, str]) -> tuple[int | None, str]:
    """The exit code of Ray's own question to a head, and what it said; None where no answer came."""
    try:
        asked = subprocess.run(
            [*COMMAND, "health-check", "--address", address],
            env=environment_for(address) | environment,
            capture_output=True,
            text=True,
            timeout=ASK_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return None, ""
    return asked.returncode, asked.stderr


class LocalCluster:
    """A cluster of this host alone, which ends with this process, however that ends."""

    def __init__(self, cpus: int, gpus: int, port: int | None = None) -> None:
        """Start it with so many cores and GPUs, and wait until it listens, at a free port unless one is given.

        EveryscopeError where it does not.
        """
        folder = tempfile.mkdtemp(prefix="everyscope_ray_")
        self.address = f"{LOOPBACK}:{port or _free_port()}"
        start = [
            *COMMAND,
            "start",
            "--head",
            "--block",
            f"--node-ip-address={LOOPBACK}",  # what makes all of Ray's processes listen there and nowhere else
            f"--port={self.address.rpartition(':')[2]}",
            "--include-dashboard=false",
            f"--num-cpus={cpus}",
            f"--num-gpus={gpus}",
            f"--object-store-memory={STORE_BYTES}",
            "--disable-usage-stats",
            f"--temp-dir={folder}",
        ]
        self._supervisor = subprocess.Popen(
            [sys.executable, "-m", "everyscope.run.jobs.supervisor", folder, *start],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env=environment_for(self.address),
        )
        end = time.monotonic() + START_SECONDS
        while not _listens(self.address):
            if self._supervisor.poll() is not None or time.monotonic() > end:
                self.close()
                raise EveryscopeError(
                    "Ray did not start on this host; see what `ray start --head --block --node-ip-address=127.0.0.1` says"
                )
            time.sleep(POLL_SECONDS)
        if _listens(f"{_own_address()}:{self.address.rpartition(':')[2]}"):
            self.close()
            raise EveryscopeError(
                f"Ray listens at {_own_address()} although it was configured for {LOOPBACK}; install the version that "
                "everyscope[ray] names, or start a cluster yourself and give its --address"
            )

    @property
    def is_up(self) -> bool:
        """Whether its head still listens."""
        return self._supervisor.poll() is None and _listens(self.address)

    def close(self) -> None:
        """End it, and wait until its processes are gone."""
        if self._supervisor.stdin is not None:
            self._supervisor.stdin.close()
        self._supervisor.wait()


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=1):
            return True
    except OSError:
        return False


def _own_address() -> str:
    """Where other hosts would find this one; an address in the loopback's net where there is no other. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # of a net that is kept for examples
        except OSError:
            return "127.0.0.3"
        found = probe.getsockname()[0]
        return found if found != LOOPBACK else "127.0.0.3"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return probe.getsockname()[1]
