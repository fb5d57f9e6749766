"""Looking at running servers from a terminal: what they hold, how often a byte read is served, and who waits."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from everyscope.activations.serve.config import host_and_port
from everyscope.activations.serve.guard import read_token
from everyscope.activations.stream.link import LeaseLost, Link, NotYet, Unreachable
from everyscope.base.errors import ConfigError, EveryscopeError
from everyscope.base.files import human_bytes

CALL_SECONDS = 5.0
Reports = dict[str, dict[str, Any] | str]
"""By server: its counters, or why there are none."""


def watch(
    servers: Sequence[str],
    *,
    token_file: Path | None = None,
    roots: Path | None = None,
    interval: float = 1.0,
    is_once: bool = False,
    console: Console | None = None,
) -> None:
    """Show counters of servers (HOST:PORT) until Ctrl-C, or once. `roots`: PEM certificates to trust, which also means TLS.

    ConfigError for an address that is none, or a token that is refused.
    """
    for server in servers:
        if host_and_port(server)[1] < 0:
            raise ConfigError(f"{server!r}: expected HOST:PORT, as in 127.0.0.1:8815")
    token, certificates = read_token(token_file), None if roots is None else roots.read_bytes()
    scheme = "grpc+tcp" if certificates is None else "grpc+tls"
    links = {server: Link(f"{scheme}://{server}", token, certificates, CALL_SECONDS) for server in servers}
    shown = console or Console()
    try:
        before, at = look(links), time.monotonic()
        if is_once:
            shown.print(view(before, before, 1.0))
            return
        with Live(view(before, before, 1.0), console=shown, auto_refresh=False) as live:
            while True:
                time.sleep(interval)
                now, then = look(links), at
                at = time.monotonic()
                live.update(view(now, before, at - then), refresh=True)
                before = now
    except KeyboardInterrupt:
        return
    finally:
        for link in links.values():
            link.close()


def look(links: dict[str, Link]) -> Reports:
    """One round of questions; a server that does not answer is part of the answer."""
    found: Reports = {}
    for server, link in links.items():
        try:
            found[server] = json.loads(link.counters())
        except (Unreachable, NotYet, LeaseLost) as error:
            found[server] = f"no answer: {error}"
        except EveryscopeError as error:
            found[server] = str(error)
    return found


def view(now: Reports, before: Reports, seconds: float) -> Group:
    """The tables for one moment; rates are since `before`, `seconds` ago."""
    servers = Table("server", "slice", "buffer", "under way", "waiting", "trainers", "refused", title="servers")
    sites = Table("server", "site", "read", "served", "amortisation", "hits", "served/s")
    trainers = Table("server", "trainer", "site", "chunks", "served", "hits", "waited", "served/s")
    for server, report in now.items():
        if isinstance(report, str):
            servers.add_row(server, report, *[""] * 5, style="red")
            continue
        buffer, last = report["buffer"], before.get(server)
        held = f"{buffer['held']}/{buffer['slots']}, {human_bytes(buffer['bytes'])}"
        refused = str(sum(report["refusals"].values()))
        state = [str(buffer[name]) for name in ("pinned", "waiting", "leases")]
        servers.add_row(server, report["slice"], held, *state, refused)
        for site, counts in report["sites"].items():
            if not counts["chunks_served"]:
                continue
            earlier = 0 if not isinstance(last, dict) else last["sites"].get(site, counts)["bytes_served"]
            sites.add_row(
                server,
                site,
                human_bytes(counts["bytes_read"]),
                human_bytes(counts["bytes_served"]),
                f"{counts['amortisation']:.2f}",
                f"{counts['hit_rate']:.0%}",
                human_bytes(max(0, counts["bytes_served"] - earlier) / seconds),
            )
        known = {} if not isinstance(last, dict) else {(row["trainer"], row["site"]): row for row in last["trainers"]}
        for row in report["trainers"]:
            earlier = known.get((row["trainer"], row["site"]), row)["bytes"]
            trainers.add_row(
                server,
                row["trainer"],
                row["site"],
                str(row["chunks"]),
                human_bytes(row["bytes"]),
                f"{row['hits'] / max(row['chunks'], 1):.0%}",
                f"{row['waiting_seconds']:.1f} s",
                human_bytes(max(0, row["bytes"] - earlier) / seconds),
            )
    return Group(servers, sites, trainers)
