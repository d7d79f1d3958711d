"""Every error that sgld raises.

    SgldError
    ├── InvalidRequest      the request can't be done as asked; nothing ran
    │   └── DeadlineImpossible  not in the time that it allows
    ├── ModelError          the model can't be found, read or served
    ├── StorageError        the bucket can't be used
    ├── HookFailed          what the operator does to files raised
    ├── QueueFull           too many requests wait already
    ├── EngineClosed        the engine is shut down, or was never started
    ├── ChannelClosed       the process at the other end is gone
    └── GenerationFailed    the request ran and failed
        ├── PipelineFailed  its pipeline raised
        ├── OutOfMemory     the device has too little memory for it
        └── RankLost        the rank process died or hung, twice

`Cancelled` stands apart: it derives from BaseException, because pipelines catch Exception.
"""

from typing import ClassVar


class SgldError(Exception):
    """Base of all errors of sgld; `code` is what a client may switch on."""

    code: ClassVar[str] = "error"


class InvalidRequest(SgldError):
    """The request can't be done as asked. `param` names the field at fault, if one is."""

    code = "invalid_request"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class DeadlineImpossible(InvalidRequest):
    """The request takes longer than its `deadline_s`, whatever else there is to do."""

    code = "deadline_impossible"

    def __init__(self, message: str) -> None:
        super().__init__(message, "deadline_s")


class ModelError(SgldError):
    """The model can't be found, read or served."""

    code = "model_error"


class ModelLost(ModelError):
    """The process that loaded the model died or hung: that may be nothing of the model's."""


class StorageError(SgldError):
    """The bucket of the cloud storage can't be used: it isn't there, refuses us, or can't be reached."""

    code = "storage_error"


class HookFailed(SgldError):
    """The function that the operator has called with each file raised."""

    code = "hook_failed"


class QueueFull(SgldError):
    """Too many requests wait already. `retry_after_s` predicts when there is room; None while nothing is known."""

    code = "queue_full"

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineClosed(SgldError):
    """The engine is shut down, or was never started."""

    code = "engine_closed"


class ChannelClosed(SgldError):
    """The process at the other end of a channel is gone."""

    code = "channel_closed"


class GenerationFailed(SgldError):
    """The request ran and failed."""

    code = "generation_failed"


class PipelineFailed(GenerationFailed):
    """The pipeline of the request raised."""

    code = "pipeline_failed"


class OutOfMemory(GenerationFailed):
    """The device has too little memory for the request."""

    code = "out_of_memory"


class RankLost(GenerationFailed):
    """The rank process died or hung while it worked on the request, and again on the second attempt."""

    code = "rank_lost"


class Cancelled(BaseException):
    """Raised inside a task's thread at the call where it waits, to unwind its pipeline."""
