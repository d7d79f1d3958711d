"""How a command ends badly: its exit code and its one line."""

from sgld.errors import ModelLost, SgldError

OK = 0
FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130
"""128 and the number of SIGINT, as shells count."""

_BAD_INPUT_CODES = frozenset({"invalid_request", "deadline_impossible", "model_error", "storage_error"})


def exit_code(code: str) -> int:
    """The exit code for the code of an error in sgld.errors."""
    return BAD_INPUT if code in _BAD_INPUT_CODES else FAILED


def exit_code_of(error: SgldError) -> int:
    """The exit code for an error."""
    return FAILED if isinstance(error, ModelLost) else exit_code(error.code)


def error_line(message: str) -> str:
    """An error as one line, whatever the message holds."""
    return f"sgld: error: {' '.join(message.split())}"
