"""What is fetched of the Hugging Face hub beside what diffusers fetches itself."""

from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from sgld.errors import ModelError
from sgld.models.resolve import one_line

# All that its HTTP library raises, whichever that is: httpx before huggingface_hub 2.2, httpx2 since.
_HTTP_ERROR: type[BaseException] = HfHubHTTPError.__mro__[1]


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
    try:
        folder = snapshot_download(
            repo_id, revision=revision, allow_patterns=allow, ignore_patterns=ignore, force_download=force
        )
    except (OSError, ValueError, _HTTP_ERROR) as error:
        raise ModelError(f"{repo_id} can't be fetched: {one_line(error)}") from None
    return Path(folder)


def has_file(repo_id: str, name: str, revision: str | None) -> bool:
    """Whether a repo has this file, which is fetched if it does.

    :raises ModelError: the hub doesn't say.
    """
    try:
        hf_hub_download(repo_id, name, revision=revision)
    except LocalEntryNotFoundError as error:
        raise ModelError(f"{repo_id} can't be fetched: {one_line(error)}") from None
    except EntryNotFoundError:
        return False
    except (OSError, ValueError, _HTTP_ERROR) as error:
        raise ModelError(f"{repo_id} can't be fetched: {one_line(error)}") from None
    return True
