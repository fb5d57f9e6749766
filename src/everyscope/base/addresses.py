"""Addresses of hosts, as they are written: nothing is looked up."""

import ipaddress
from urllib.parse import urlsplit


def is_loopback(host: str) -> bool:
    """Whether a host's name or address means this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def checked_address(field: str, value: str, *, has_path: bool) -> str:
    """An http(s) address without a closing slash; ValueError, which names the `field`, for others and for one with a secret."""
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname or (parts.path.strip("/") and not has_path):
        raise ValueError(f"{field}={value!r}: expected http(s)://host[:port]{'/v1' if has_path else ''}")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(f"{field} holds a user, a password or a query; give the key as an environment variable")
    return value.rstrip("/")
