"""What a component was before an exclusive task changed it: processors, hooks and attributes of all its modules."""

from collections.abc import Collection, Iterable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

# What a module keeps in dicts of its own, which are changed in place.
_INNER = (
    "_modules",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
)


class Snapshot:
    """Remembers a component; nothing is copied but references."""

    def __init__(self, component: nn.Module) -> None:
        self.component = component
        self._modules = [(module, dict(vars(module)), _inner(module)) for module in component.modules()]

    def restore(self) -> None:
        """Make the component what it was, whatever happened to it since."""
        for module, attributes, inner in self._modules:
            vars(module).clear()
            vars(module).update(attributes)
            for name, content in inner.items():
                vars(module)[name].clear()
                vars(module)[name].update(content)


def next_hook_id() -> int:
    """The number of the next hook that is registered anywhere in this process."""
    return RemovableHandle.next_id


def remove_hooks(components: Iterable[nn.Module], ids: Collection[int]) -> None:
    """Remove hooks from all modules of components, where they are left."""
    for module in (module for component in components for module in component.modules()):
        for hooks in _inner(module).keys() - {"_modules"}:
            for hook_id in vars(module)[hooks].keys() & set(ids):
                del vars(module)[hooks][hook_id]


def _inner(module: nn.Module) -> dict[str, dict[Any, Any]]:
    return {name: dict(vars(module)[name]) for name in _INNER if name in vars(module)}
