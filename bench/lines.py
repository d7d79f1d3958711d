"""What one side of the comparison says to the process that compares: a JSON line for each thing."""

import argparse
import json
import logging
from typing import Any

import numpy as np
from budget import Budget
from numpy.typing import NDArray
from rows import Row


def say(kind: str, value: Any) -> None:
    """One line for the process that compares."""
    print(json.dumps({kind: value}), flush=True)


class _Said(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say("log", record.getMessage())


def say_logs() -> None:
    """The engine's log goes to the process that compares: how far a rank that loads is, and what is compiled."""
    logger = logging.getLogger("sgld")
    logger.setLevel(logging.INFO)
    logger.addHandler(_Said())


def fits(row: Row, budget: Budget) -> bool:
    """Whether there is time for a row; says so where there is none."""
    if budget.has(0):
        return True
    say("skipped", row.name)
    return False


def keep(args: argparse.Namespace, row: Row, name: str, frames: NDArray[np.uint8]) -> None:
    """Pictures of request 0, to be compared."""
    np.save(args.pictures / f"{row.name}.{name}.npy", frames)
