"""Every error that a user can cause or meet, in one small tree.

    EveryscopeError
    ├── ConfigError        a recipe, name, flag or number that cannot be used
    ├── TextError          text that is empty, unreadable or of another form than said
    ├── ModelError         a language model that cannot be loaded or whose sites cannot be proved
    ├── DataError          activations, shards or suites that are not what they claim
    │   ├── DamagedData    bytes differ from their checksum
    │   ├── ShapeMismatch  sizes that do not fit one another
    │   └── NonFinite      NaN or infinity where a number is needed
    ├── StorageError       a folder that cannot be written, or a disk without room
    └── MissingExtra       an optional package that is not installed

Each message is one line: what we got, what we expected, how to fix it. The command line prints it and exits with 1.
"""


def first_line(error: BaseException) -> str:
    """What `error` says in its first line, or the name of its class where it says nothing: other libraries' errors run on."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class EveryscopeError(Exception):
    """The root of all errors that everyscope raises on purpose."""


class ConfigError(EveryscopeError):
    """A recipe, name, flag or number that cannot be used."""


class TextError(EveryscopeError):
    """Text that is empty, unreadable or of another form than said."""


class ModelError(EveryscopeError):
    """A language model that cannot be loaded, or whose sites cannot be proved."""


class DataError(EveryscopeError):
    """Activations, shards or suites that are not what they claim."""


class DamagedData(DataError):
    """Bytes that differ from their recorded checksum."""


class ShapeMismatch(DataError):
    """Sizes that do not fit one another."""


class NonFinite(DataError):
    """NaN or infinity where a number is needed."""


class StorageError(EveryscopeError):
    """A folder that cannot be written, or a disk without room."""


class MissingExtra(EveryscopeError):
    """An optional package that is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        """`package` is the module that failed to import, `extra` the group that brings it, `purpose` what needs it."""
        super().__init__(f"{purpose} needs the package {package!r}, which is not installed; pip install 'everyscope[{extra}]'")
        self._made_of = (package, extra, purpose)

    def __reduce__(self) -> tuple[type["MissingExtra"], tuple[str, str, str]]:
        """Survive the way back from a worker process, which rebuilds errors from their arguments."""
        return MissingExtra, self._made_of
