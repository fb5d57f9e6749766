"""Asking one host over HTTP with a key that no other host may see."""

import ipaddress
import urllib.request
from typing import Any


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host: it is an error instead."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def is_loopback(host: str) -> bool:
    """Whether a host's name or address, as it stands, means this machine; nothing is looked up."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def opener_for(host: str) -> urllib.request.OpenerDirector:
    """Opens addresses of `host`: follows no redirect, and asks this machine itself without the proxies of the environment."""
    return urllib.request.build_opener(_NoRedirect, *([urllib.request.ProxyHandler({})] if is_loopback(host) else []))
