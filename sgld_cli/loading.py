"""The engine's log on stderr: whatever is wrong, and what replicas load where that takes long."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sgld_cli.progress import Display

PATIENCE_S = 10.0
"""For so long nobody is told that a model is loaded: most are by then."""
_OF_ALL, _OF_LOADING = "sgld", "sgld.engine.replicas"


class LoadingLines(logging.Handler):
    """Shows log records as lines of a display.

    :param clock: seconds.
    """

    def __init__(self, display: Display, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(logging.INFO)
        self._display, self._clock = display, clock
        self._until = clock() + PATIENCE_S

    def emit(self, record: logging.LogRecord) -> None:
        """Show a record, unless it is too early."""
        if record.levelno > logging.INFO or self._clock() >= self._until:
            try:
                self._display.note(self.format(record))
            except (OSError, ValueError):
                # As of stderr that nobody reads any more: whoever logs has something else to do.
                self.handleError(record)


@contextmanager
def loading_shown(display: Display, clock: Callable[[], float] = time.monotonic) -> Iterator[None]:
    """While the block runs the engine's log goes to a display."""
    lines, loading = LoadingLines(display, clock), logging.getLogger(_OF_LOADING)
    before = loading.level
    loading.setLevel(logging.INFO)
    logging.getLogger(_OF_ALL).addHandler(lines)
    try:
        yield
    finally:
        logging.getLogger(_OF_ALL).removeHandler(lines)
        loading.setLevel(before)
