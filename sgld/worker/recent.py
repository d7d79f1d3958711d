"""What was learned of the calls that came last; a long-lived server meets more than it should keep."""

from collections import OrderedDict
from typing import TypeVar

# Merge keys tell apart sizes and prompt lengths.
MAX_KEYS = 4096
T = TypeVar("T")


class Recent(OrderedDict[str, T]):
    """A dict of the entries that were set or got last, `MAX_KEYS` at most."""

    def __setitem__(self, key: str, value: T) -> None:
        super().__setitem__(key, value)
        self.move_to_end(key)
        while len(self) > MAX_KEYS:
            self.popitem(last=False)

    def recall(self, key: str) -> T | None:
        """The value of a key, if there is one."""
        if key in self:
            self.move_to_end(key)
        return super().get(key)
