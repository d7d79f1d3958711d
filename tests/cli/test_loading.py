"""What `sgld generate` shows of the engine's log."""

import logging
from io import StringIO

import pytest

from sgld_cli.loading import PATIENCE_S, LoadingLines, loading_shown
from sgld_cli.progress import Lines

REPLICAS = "sgld.engine.replicas"


def record(level: int, text: str) -> logging.LogRecord:
    return logging.LogRecord(REPLICAS, level, "", 0, text, (), None)


def test_what_is_loaded_is_shown_once_it_takes_long() -> None:
    stream, now = StringIO(), [0.0]
    lines = LoadingLines(Lines(stream), lambda: now[0])
    lines.handle(record(logging.INFO, "replica 0: reading vae (1 s)"))
    now[0] = PATIENCE_S
    lines.handle(record(logging.INFO, "replica 0: still reading vae (10 s)"))
    assert stream.getvalue() == "replica 0: still reading vae (10 s)\n"


def test_what_is_wrong_is_shown_at_once_what_is_loaded_later_and_nothing_afterwards() -> None:
    stream, now, loading = StringIO(), [0.0], logging.getLogger(REPLICAS)
    other, level = logging.getLogger("sgld.engine.supervisor"), loading.level
    with loading_shown(Lines(stream), lambda: now[0]):
        other.warning("replica %d was lost; it is started again", 1)
        loading.info("replica 1: reading vae (1 s)")
        now[0] = PATIENCE_S
        loading.info("replica 1: still reading vae (11 s)")
        other.info("nobody asks for it")
    other.warning("later")
    assert stream.getvalue().splitlines() == [
        "replica 1 was lost; it is started again",
        "replica 1: still reading vae (11 s)",
    ]
    assert loading.level == level


def test_who_logs_goes_on_when_nobody_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Left(StringIO):
        def write(self, _text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(logging, "raiseExceptions", False)
    with loading_shown(Lines(Left())):
        logging.getLogger("sgld.engine.supervisor").warning("a rank was lost")
