"""What `sgld generate` shows of the engine's log."""

import logging
from io import StringIO

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


def test_what_is_wrong_is_shown_at_once_and_nothing_afterwards() -> None:
    stream = StringIO()
    with loading_shown(Lines(stream)):
        logging.getLogger("sgld.engine.supervisor").warning("replica %d was lost; it is started again", 1)
        logging.getLogger("sgld.engine.supervisor").info("nobody asks for it")
        logging.getLogger(REPLICAS).info("replica 0: reading vae (1 s)")
    logging.getLogger("sgld.engine.supervisor").warning("later")
    assert stream.getvalue() == "replica 1 was lost; it is started again\n"
