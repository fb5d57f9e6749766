"""Optional packages: imported when first needed, refused with the command that installs them."""

import importlib
from types import ModuleType

from everyscope.base.errors import MissingExtra


def import_extra(module: str, extra: str, purpose: str) -> ModuleType:
    """Import `module` or raise MissingExtra, which names the extra to install and what needed it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(module, extra, purpose) from error
