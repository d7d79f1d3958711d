"""What is fetched of the Hugging Face hub as files: folders of a repo, their names, and whether it has a file."""

from pathlib import Path

from sgld.errors import ModelError
from sgld.models.resolve import hub_file
from sgld.outcome import one_line


def fetch(
    repo_id: str,
    revision: str | None,
    *,
    allow: list[str] | None = None,
    ignore: list[str] | None = None,
    force: bool = False,
) -> Path:
    """The folder with files of a repo, in the hub's cache; where the hub can't be reached, with what the cache has.

    :param allow: patterns of what is fetched, by default everything.
    :param force: fetch what the cache has, too.
    :raises ModelError: they can't be had.
    """
    from huggingface_hub import snapshot_download  # takes a second

    try:
        folder = snapshot_download(
            repo_id, revision=revision, allow_patterns=allow, ignore_patterns=ignore, force_download=force
        )
    except (OSError, ValueError, http_error()) as error:
        raise ModelError(f"{repo_id} can't be fetched: {one_line(error)}") from None
    return Path(folder)


def names_in(repo_id: str, revision: str | None) -> list[str]:
    """The files of a repo; where the hub can't be reached, those that the cache has.

    :raises ModelError: neither says.
    """
    from huggingface_hub import HfApi, constants, snapshot_download  # takes a second

    try:
        siblings = HfApi().model_info(repo_id, revision=revision or constants.DEFAULT_REVISION).siblings or ()
        return [file.rfilename for file in siblings]
    except (OSError, ValueError, http_error()) as error:
        try:
            # None of its files has to be there.
            folder = Path(snapshot_download(repo_id, revision=revision, local_files_only=True, allow_patterns=[]))
        except (OSError, ValueError):
            raise ModelError(f"{repo_id} can't be fetched: {one_line(error)}") from None
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


def has_file(repo_id: str, name: str, revision: str | None) -> bool:
    """Whether a repo has this file, which is fetched if it does.

    :raises ModelError: the hub doesn't say.
    """
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        hub_file(repo_id, name, revision)
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError):
            raise ModelError(f"{repo_id} can't be fetched: {one_line(error)}") from None
        return False
    except (OSError, ValueError, http_error()) as error:
        raise ModelError(f"{repo_id} can't be fetched: {one_line(error)}") from None
    return True


def http_error() -> type[BaseException]:
    """All that the hub's HTTP library raises, whichever that is: its versions use two."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__mro__[1]
