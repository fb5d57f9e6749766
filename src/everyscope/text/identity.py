"""What tells one text from another of the same name: a harvest that is extended must read what it began with."""

from pathlib import Path

from everyscope.base.errors import TextError
from everyscope.base.fingerprint import fingerprint
from everyscope.base.hub import hub_commit
from everyscope.base.ids import content_id
from everyscope.text.arithmetic import arithmetic_page
from everyscope.text.config import TextConfig
from everyscope.text.corpora import library_files
from everyscope.text.files import files_at


def text_identity(config: TextConfig) -> str | None:
    """A fingerprint of local files, the commit of a dataset on the hub, names and sizes of the library's sources.

    None where the text is not there: what was made from it can still be read.
    """
    try:
        if config.source == "files":
            return fingerprint(file for path in config.paths for file in files_at(path))
        if config.dataset is not None:
            folder = Path(config.dataset)
            if folder.is_dir():
                return fingerprint(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
            commit = hub_commit(config.dataset, config.dataset_revision, "dataset")
            return None if commit is None else f"{config.dataset}@{commit}"
        if config.source == "arithmetic":
            return content_id(arithmetic_page(0))
        return content_id(sorted((name, path.stat().st_size) for name, path in library_files().items()))
    except (OSError, TextError):
        return None
