"""Hooks of mkdocs.yml: a page that would load anything from another host is a warning, and so, with --strict, an error."""

import logging
import re

LOG = logging.getLogger("mkdocs.plugins.docs_hooks")
LOADED = re.compile(
    r"""<(?:script|img|iframe|source|video|audio)\b[^>]*\bsrc=["'](?:https?:)?//[^"']+"""
    r"""|<link\b(?=[^>]*\brel=["'](?:stylesheet|preload|preconnect|icon))[^>]*\bhref=["'](?:https?:)?//[^"']+"""
)
"""What makes a browser fetch something from elsewhere; ordinary links do not."""


def on_post_page(output: str, page: object, config: object) -> str:
    """Warn of every address that the page would load; the page stays as it is."""
    for found in LOADED.finditer(output):
        LOG.warning("%s loads something from another host: %s", page, found.group(0)[:200])
    return output
