"""The model that an engine serves, as far as its ranks have said, or why it can't be served."""

import anyio

from sgld.errors import EngineClosed, ModelError
from sgld.messages import ModelInfo, with_note


class Served:
    """The model of an engine."""

    def __init__(self) -> None:
        self.model: ModelInfo | None = None
        """As the rank that was ready first had it, with what was noted since."""
        self.error: ModelError | None = None
        """Why it can't be served."""
        self._is_decided = anyio.Event()

    @property
    def is_decided(self) -> bool:
        """Whether it is served, or can't be."""
        return self._is_decided.is_set()

    def decide(self) -> None:
        """From now on it is served, or nobody waits for it any more."""
        self._is_decided.set()

    async def wait(self) -> ModelInfo:
        """Wait until it is served.

        :raises ModelError: it can't be.
        :raises EngineClosed: the engine was closed before.
        """
        await self._is_decided.wait()
        if self.model is None:
            raise self.error or EngineClosed("the engine was closed")
        return self.model

    def check(self) -> None:
        """See that it isn't known to be impossible.

        :raises ModelError: it can't be served.
        """
        if self.error is not None:
            raise self.error

    def noted(self, component: str, note: str) -> None:
        """A rank found something out of a component."""
        self.model = self.model and with_note(self.model, component, note)

    def fail(self, error: ModelError) -> None:
        """It can't be served."""
        self.model, self.error = None, error
        self.decide()
