"""Who may listen where, and who may ask: addresses, token, certificates, and refusals that cannot fill a log."""

import hmac
import ipaddress
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pyarrow.flight as flight

from everyscope.activations.serve.config import ServeConfig
from everyscope.activations.stream.config import TOKEN_VARIABLE
from everyscope.base.errors import ConfigError

MIN_TOKEN_LENGTH = 16
"""A shorter token is a mistake or a guess away [characters]."""
LOGGED_PER_SECOND = 1.0
"""Refusals that are logged one by one; what comes faster is counted in the next line [1/s]."""


def resolves_to_loopback(host: str) -> bool:
    """Whether every address of `host` is of this host alone; ConfigError where the name has none."""
    try:
        addresses = {str(found[4][0]) for found in socket.getaddrinfo(host, None)}
    except OSError as error:
        raise ConfigError(f"--listen {host}: no such address ({error.strerror}); give one of this machine's") from error
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses)


def read_token(file: Path | None) -> str | None:
    """The token from `file`, or from the environment, or None; ConfigError where it is too short or cannot be sent."""
    token, where = os.environ.get(TOKEN_VARIABLE), TOKEN_VARIABLE
    if file is not None:
        token, where = _read(file).decode(errors="replace").strip(), str(file)
    if token is None:
        return None
    if len(token) < MIN_TOKEN_LENGTH or not (token.isascii() and token.isprintable()) or " " in token:
        raise ConfigError(
            f"{where}: expected a token of {MIN_TOKEN_LENGTH} or more ASCII characters without spaces; "
            "make one with: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )
    return token


def require_safe(config: ServeConfig, token: str | None) -> None:
    """ConfigError where others could connect who may not: an address beyond this host without both token and TLS."""
    host, _ = config.address
    if resolves_to_loopback(host):
        return
    missing = [name for name, given in (("a token", token), ("TLS", config.tls_certificate)) if given is None]
    if missing:
        raise ConfigError(
            f"--listen {config.listen}: other machines could connect, and {' and '.join(missing)} is missing; set "
            f"{TOKEN_VARIABLE} (or --token-file), --tls-certificate and --tls-key, or listen on 127.0.0.1"
        )


def read_certificates(config: ServeConfig) -> list[tuple[bytes, bytes]]:
    """The certificate chain with its key, as Flight wants it, or nothing; ConfigError where a file cannot be read."""
    if config.tls_certificate is None or config.tls_key is None:
        return []
    pair = (_read(config.tls_certificate), _read(config.tls_key))
    for path, pem in zip((config.tls_certificate, config.tls_key), pair, strict=True):
        if b"-----BEGIN " not in pem:
            raise ConfigError(f"{path}: is not PEM; expected a file that begins with -----BEGIN ...-----")
    return [pair]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a file that this user may read") from error


class RefusalLog:
    """Writes refusals down, but no more than one line a second: an attacker must not fill the disk."""

    def __init__(self, write: Callable[..., None]) -> None:
        """`write(what, **details)` writes a line."""
        self._write = write
        self._next, self._held_back = 0.0, 0

    def note(self, reason: str, peer: str, message: str) -> None:
        """A request was turned down."""
        now = time.monotonic()
        if now < self._next:
            self._held_back += 1
            return
        self._next = now + 1 / LOGGED_PER_SECOND
        more, self._held_back = self._held_back, 0
        self._write("refused", reason=reason, peer=peer, message=message[:200], not_logged_before=more)


class TokenGate(flight.ServerMiddlewareFactory):
    """Looks at the token of every call before anything else does. Only made where there is a token."""

    def __init__(self, token: str, on_refusal: Callable[[str, str], None]) -> None:
        """`on_refusal(reason, message)` receives calls without the right token."""
        super().__init__()
        self._expected = f"Bearer {token}".encode()
        self._on_refusal = on_refusal

    def start_call(self, info: flight.CallInfo, headers: Mapping[str, list[str | bytes]]) -> None:
        """Refuse a call whose one `authorization` header is not ours; compared in constant time."""
        given = [value for name, values in headers.items() if name.lower() == "authorization" for value in values]
        value = given[0] if len(given) == 1 else b""
        got = value.encode("utf-8", "replace") if isinstance(value, str) else value
        if not hmac.compare_digest(got, self._expected):
            self._on_refusal("token", "no token, or a wrong one" if given else "no token")
            raise flight.FlightUnauthenticatedError("a token is needed; set EVERYSCOPE_TOKEN to the server's")
