"""Calls that come again and again are replayed as CUDA graphs: the host launches one instead of a thousand kernels.

What is equal for all uses of a graph is its key; what may differ are the values of tensors among the arguments. What
can't be a graph runs as it always did.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sgld.messages import Variant
from sgld.worker.comparison import relative_error
from sgld.worker.graph_keys import Key, key_of, unfit
from sgld.worker.graph_policy import Decision, GraphPolicy, is_worth_capturing, pays
from sgld.worker.invocation import Invocation, Tree
from sgld.worker.randomness import default_states
from sgld.worker.recorder import Broken, CudaRecorder, Leaking, Recorder, Recording, Unfit, check_result
from sgld.worker.trees import clone, closed, opened, rebuilt

logger = logging.getLogger(__name__)
MAX_BROKEN = 3
"""So many calls of a method may turn out to be what the device doesn't capture before no others are tried."""


class Graphs:
    """The graphs of all components of a rank.

    :param device: where they run.
    :param recorder: makes them.
    :param names: of components, for people.
    :param note: told which calls can't be graphs, and why.
    """

    def __init__(
        self,
        device: torch.device,
        policy: GraphPolicy[Key],
        recorder: Recorder,
        names: Mapping[nn.Module, str],
        note: Callable[[str, str], None] = lambda component, note: None,
    ) -> None:
        self.num_trials = 0
        """Calls that took longer than the next ones will, as a graph was made or compared with an eager forward."""
        self.num_replays = 0
        self.has_replayed = False
        """Whether the last call was a replay."""
        self._device_type = device.type
        self._policy = policy
        self._recorder = recorder
        self._names = names
        self._note = note
        self._recordings: dict[Key, Recording] = {}
        self._num_broken: Counter[tuple[nn.Module, str]] = Counter()
        self._noted: set[tuple[nn.Module, str, str]] = set()

    def run(self, invocation: Invocation, variant: Variant = "eager") -> Any:
        """Run a component, as a graph where that is known to pay.

        :param variant: what its graph is captured of.
        """
        self.has_replayed = False
        try:
            key, tensors = self.key(invocation, variant)
        except Unfit as problem:
            self._tell(invocation.module, invocation.method, str(problem))
            return invocation.plain()
        return self.perform(self.decide(key), key, invocation, tensors)

    def key(self, invocation: Invocation, variant: Variant = "eager") -> tuple[Key, list[torch.Tensor]]:
        """What an invocation must share with others that use its graph, and the tensors that may differ.

        :raises Unfit: it can't be a graph.
        """
        return key_of(invocation, variant, self._device_type)

    def decide(self, key: Key) -> Decision:
        """How an invocation with this key runs."""
        return Decision.EAGER if torch.is_grad_enabled() else self._policy.decide(key)

    def perform(self, decision: Decision, key: Key, invocation: Invocation, tensors: Sequence[torch.Tensor]) -> Any:
        """Run what was decided, be it by another rank: each runs as many forwards whatever it has captured."""
        forward, tree = invocation.forward, invocation.tree
        self.has_replayed = decision is Decision.REPLAY
        match decision:
            case Decision.EAGER:
                return forward(tree)
            case Decision.CAPTURE:
                self.num_trials += 1
                return self._capture(key, forward, tree, tensors)
            case Decision.COMPARE:
                self.num_trials += 1
                return self._compare(key, forward, tree, tensors)
            case Decision.REPLAY:
                self.num_replays += 1
                result = self._replayed(key, forward, tree, tensors)
                return closed(result if invocation.lends else clone(result))

    def forget(self, module: nn.Module) -> None:
        """The component isn't what it was: its weights are others, or its code is."""
        self._remove(self._policy.forget(lambda key: key.module is module))

    def make_room(self) -> bool:
        """Free what graphs take, as memory is short; false if there were none."""
        return self._remove(self._policy.evict_all())

    def _capture(self, key: Key, forward: Callable[[Tree], Any], tree: Tree, tensors: Sequence[torch.Tensor]) -> Any:
        """Run eagerly, and make a graph of the same if that promises to be faster."""
        generators, versions = default_states(), _versions(tensors)
        warmed = self._recorder.warm_up(forward, tree)
        try:
            if not is_worth_capturing(warmed.launch_s, warmed.total_s):
                logger.debug("%s: no graph, launches take %s", self._name(key.module), warmed)
                self._policy.refuse(key)
                return warmed.result
            if self._num_broken[key.module, key.method] >= MAX_BROKEN:
                raise Unfit("captures of such calls were cut off")
            if reason := unfit(key.module):
                raise Unfit(reason)
            if _versions(tensors) != versions:
                raise Unfit("it writes to its arguments")
            if any(not torch.equal(*pair) for pair in zip(default_states(), generators, strict=True)):
                raise Unfit("it draws random numbers")
            check_result(warmed.result, self._device_type)
            recording = self._recorder.record(forward, tree, tensors)
        except Unfit as problem:
            self._refuse(key, str(problem))
            self._num_broken[key.module, key.method] += isinstance(problem, Broken)
            if isinstance(problem, Leaking):
                self._remove(self._policy.evict_all())
                self._recorder.renew()
            return warmed.result
        self._recordings[key] = recording
        self._remove(self._policy.captured(key, recording.size_bytes, recording.pool_growth_bytes))
        return warmed.result

    def _compare(self, key: Key, forward: Callable[[Tree], Any], tree: Tree, tensors: Sequence[torch.Tensor]) -> Any:
        """Run eagerly and as a graph, for arguments that it wasn't captured with: which is faster, and is it right?

        Twice each, as the first eager forward after a capture takes memory from the device again, and the first replay
        uploads the graph.
        """

        def again() -> Any:
            # Models take things out of the dicts that they are given.
            return self._replayed(key, forward, rebuilt(tree, lambda _path, leaf: leaf), tensors)

        forward(rebuilt(tree, lambda _path, leaf: leaf))
        again()
        replayed, replay_s = self._recorder.timed(lambda: clone(again()))
        result, eager_s = self._recorder.timed(lambda: forward(tree))
        logger.debug("%s: %.2f ms as a graph, %.2f without", self._name(key.module), 1e3 * replay_s, 1e3 * eager_s)
        if (error := relative_error(closed(replayed), result)) != 0:
            self._refuse(key, f"a graph returned something else (relative error {error:.2g})")
        elif not pays(replay_s, eager_s):
            self._policy.refuse(key)
            self._remove([key])
        else:
            self._policy.proved(key)
        return result

    def _replayed(self, key: Key, forward: Callable[[Tree], Any], tree: Tree, tensors: Sequence[torch.Tensor]) -> Any:
        """The result of a replay, opened; of a forward where nothing was captured."""
        recording = self._recordings.get(key)
        return opened(forward(tree)) if recording is None else recording.replay(tensors)

    def _refuse(self, key: Key, problem: str) -> None:
        self._policy.refuse(key)
        self._remove([key])
        self._tell(key.module, key.method, problem)

    def _tell(self, module: nn.Module, method: str, problem: str) -> None:
        if (module, method, problem) not in self._noted:
            self._noted.add((module, method, problem))
            name = self._name(module)
            logger.warning("%s.%s: no CUDA graph, %s", name, method, problem)
            self._note(name, f"some calls run without CUDA graphs: {problem}")

    def _name(self, module: nn.Module) -> str:
        return self._names.get(module, type(module).__name__)

    def _remove(self, keys: Sequence[Key]) -> bool:
        had = [self._recordings.pop(key, None) for key in keys]
        if any(had) and not self._recordings:
            self._recorder.renew()
        return any(had)


def graphs_on(
    device: torch.device, max_bytes: int, components: Mapping[str, Any], note: Callable[[str, str], None]
) -> Graphs | None:
    """The graphs of a pipeline's components; None where there are none."""
    if device.type != "cuda" or not max_bytes:
        return None
    names = {part: name for name, part in components.items() if isinstance(part, nn.Module)}
    return Graphs(device, GraphPolicy(max_bytes), CudaRecorder(device), names, note)


def _versions(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Which change with each write."""
    return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]
