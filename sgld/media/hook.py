"""What an operator does to each finished file before it is kept, such as signing where it comes from (C2PA)."""

import functools
import tempfile
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path

from sgld.errors import HookFailed
from sgld.fields import FieldError
from sgld.media.files import Content
from sgld.outcome import Raised, outcome_of

Hook = Callable[[Path, str], None]
"""Gets the path of a file that nobody sees yet, which it may change, and its media type; in any thread."""


@cache
def load_hook(name: str | None) -> Hook | None:
    """The function that is meant.

    :param name: as `package.module:function`.
    :raises FieldError: there is none.
    """
    if name is None:
        return None
    module, _, function = name.partition(":")
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise FieldError(
            "output_hook", name, f"it can't be loaded: {error}; it must be as package.module:function"
        ) from None
    if not callable(found):
        raise FieldError("output_hook", name, "it is no function")
    hook: Hook = found
    return hook


def hooked(content: Content, hook: Hook | None, media_type: str) -> Callable[[Path], None]:
    """What writes the content as the hook leaves it, and raises HookFailed where the hook raises."""

    def write(path: Path) -> None:
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            content(path)
        if hook is not None:
            _call(hook, path, media_type)

    return write


def hooked_bytes(content: bytes, hook: Hook | None, media_type: str) -> bytes:
    """The same for what is needed in memory; takes long, so call it in a thread."""
    if hook is None:
        return content
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "output"
        path.write_bytes(content)
        _call(hook, path, media_type)
        return path.read_bytes()


def _call(hook: Hook, path: Path, media_type: str) -> None:
    called = outcome_of(functools.partial(hook, path, media_type))
    if isinstance(called, Raised):
        said = f"{type(called.error).__name__}: {called.error}"
        raise HookFailed(f"the output hook failed, so the file isn't kept: {said}") from called.error
