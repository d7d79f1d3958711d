"""Calls that come again and again are replayed as CUDA graphs: the host launches one instead of a thousand kernels.

What is equal for all uses of a graph is its key; what may differ are the values of tensors among the arguments. What
can't be a graph runs as it always did.
"""

import logging
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sgld.messages import Variant
from sgld.worker.comparison import relative_error
from sgld.worker.effects import Effects
from sgld.worker.graph_keys import Key, flattened, key_of, unfit
from sgld.worker.graph_orders import Agreement, GraphOrder, Obeyed, Ordered, Refusal, Shared, refusal_of
from sgld.worker.graph_policy import Decision, GraphPolicy, is_worth_capturing, pays
from sgld.worker.invocation import Invocation, Tree
from sgld.worker.recorder import (
    Broken,
    CaptureFailed,
    CudaRecorder,
    Forward,
    Recorder,
    Recording,
    Slow,
    Unfit,
    Warmed,
    check_result,
)
from sgld.worker.trees import clone, closed, copied
from sgld.worker.uploads import Uploads

logger = logging.getLogger(__name__)
MAX_BROKEN = 3
"""So many calls of a method may turn out to be what the device doesn't capture before no others are tried."""


class Graphs:
    """The graphs of all components of a rank.

    :param device: where they run.
    :param recorder: makes them.
    :param names: of components, for people.
    :param note: told which calls can't be graphs, and why.
    :param frees_host: others wait while the host launches what isn't a graph.
    """

    def __init__(
        self,
        device: torch.device,
        policy: GraphPolicy[Key],
        recorder: Recorder,
        names: Mapping[nn.Module, str],
        note: Callable[[str, str], None] = lambda component, note: None,
        *,
        frees_host: bool = False,
    ) -> None:
        self.num_trials = 0
        """Calls that took longer than the next ones will, as a graph was made or compared with an eager forward."""
        self.num_replays = 0
        self.has_replayed = False
        """Whether the last call was a replay."""
        self.obeyed = Obeyed()
        """What came of the last order."""
        self._device_type = device.type
        self._policy = policy
        self._is_led = False
        """Whether another rank decides what this one shares with it."""
        self._ordered: GraphPolicy[Key] = GraphPolicy(sys.maxsize)
        """Of what it decides: nothing of that goes unless it says so, or some ranks would replay alone."""
        self._recorder = recorder
        self._names = names
        self._note = note
        self._frees_host = frees_host
        self._recordings: dict[Key, Recording] = {}
        self._uploads: dict[Key, Uploads] = {}
        self._uploading: set[tuple[nn.Module, str]] = set()
        """Methods whose forwards take tensors of the host to the device."""
        self._has_lost = False
        self._gone: list[Key] = []
        """Graphs of what ranks share that the others don't know to be gone."""
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

    def order(
        self, invocation: Invocation, variant: Variant, part: Hashable, ranks: Hashable = None
    ) -> GraphOrder | None:
        """Decide for several ranks how they run an invocation; None: eagerly.

        :param part: what of it each rank runs.
        :param ranks: those that are told.
        """
        try:
            fixed = Shared(invocation.fixed, part, ranks)
            key, _ = key_of(replace(invocation, fixed=fixed), variant, self._device_type)
        except Unfit as problem:
            self._tell(invocation.module, invocation.method, str(problem))
            return None
        decision, gone = self.decide(key), [key for key in self._gone if _told(key) == ranks]
        self._gone = [key for key in self._gone if _told(key) != ranks]
        return GraphOrder(decision, key[2:], tuple((self._name(key.module), *key[1:]) for key in gone))

    def obey(self, invocation: Invocation, ordered: Ordered) -> Any:
        """Run this rank's share as rank 0 decided: what ranks send one another all of them replay, or none."""
        order = ordered.order
        self._is_led = not ordered.is_own
        if self._is_led:
            modules = {name: module for module, name in self._names.items()}
            gone = {Key(modules[name], *rest) for name, *rest in order.gone if name in modules}
            self._remove(self._ordered.forget(gone.__contains__))
            self._gone.clear()
        self.obeyed = Obeyed()
        key = Key(invocation.module, invocation.method, *order.rest)
        _, tensors = flattened(invocation.tree, self._device_type)
        return self.perform(order.decision, key, invocation, tensors, ordered.agree)

    def heard(self, order: GraphOrder, module: nn.Module, method: str, obeyed: Obeyed) -> None:
        """What came of an order to ranks of which this one isn't one: it keeps account of their graphs."""
        key = Key(module, method, *order.rest)
        if obeyed.refusal is not None:
            # What leaks there nothing writes to here.
            self._refuse(key, replace(obeyed.refusal, is_leaking=False))
            if obeyed.refusal.is_leaking:
                # There, all graphs went that ranks share.
                self.lose_shared()
        elif order.decision is Decision.CAPTURE:
            self._remove(self._policy.captured(key, obeyed.size_bytes, 0))
        elif order.decision is Decision.COMPARE:
            self._policy.proved(key)

    def key(self, invocation: Invocation, variant: Variant = "eager") -> tuple[Key, list[torch.Tensor]]:
        """What an invocation must share with others that use its graph, and the tensors that may differ.

        :raises Unfit: it can't be a graph.
        """
        return key_of(invocation, variant, self._device_type)

    def decide(self, key: Key) -> Decision:
        """How an invocation with this key runs."""
        return Decision.EAGER if torch.is_grad_enabled() else self._policy.decide(key)

    def perform(
        self,
        decision: Decision,
        key: Key,
        invocation: Invocation,
        tensors: Sequence[torch.Tensor],
        agree: Agreement = lambda refusal: refusal,
    ) -> Any:
        """Run what was decided.

        :param agree: of what ranks share: what one of them refuses none of them replays.
        """
        forward, tree = invocation.forward, invocation.tree
        self.has_replayed = decision is Decision.REPLAY
        match decision:
            case Decision.EAGER:
                return forward(tree)
            case Decision.CAPTURE:
                self.num_trials += 1
                return self._capture(key, forward, tree, tensors, agree)
            case Decision.COMPARE:
                self.num_trials += 1
                return self._compare(key, forward, tree, tensors, agree)
            case Decision.REPLAY:
                self.num_replays += 1
                result = self._replayed(key, tensors)
                return closed(result if invocation.lends else clone(result))

    def forget(self, module: nn.Module) -> None:
        """The component isn't what it was: its weights are others, or its code is."""
        for policy in (self._policy, self._ordered):
            self._remove(policy.forget(lambda key: key.module is module))

    def make_room(self) -> bool:
        """Free what graphs take, as memory is short; false if there were none."""
        return self._remove(self._policy.evict())

    def lose_shared(self) -> bool:
        """Graphs of what ranks share go here, and with the next orders everywhere; whether others still have some.

        Another rank has lost its own, or has no room beside them.
        """
        self._remove(self._policy.evict(_is_shared))
        return bool(self._gone)

    def take_loss(self) -> bool:
        """Whether graphs went since it was asked last that another rank may order to be replayed."""
        had, self._has_lost = self._has_lost, False
        return had

    def _capture(
        self, key: Key, forward: Forward, tree: Tree, tensors: Sequence[torch.Tensor], agree: Agreement
    ) -> Any:
        """Run eagerly, and make a graph of the same if that promises to be faster.

        Where that fails, the forward may need tensors of the host: it is watched once, and captured with these.
        """
        effects = Effects(tree, tensors)
        warmed = self._recorder.warm_up(forward, copied(tree))
        uploads: Uploads | None = None
        refusal = agree(self._objection(key, effects, warmed))
        if refusal is None:
            refusal = agree(self._record(key, forward, effects))
        if refusal is not None and refusal.may_upload:
            uploads = Uploads(self._device_type)
            with uploads.watched():
                self._recorder.warm_up(forward, copied(tree))
            refusal = agree(self._record(key, forward, effects, uploads) if uploads.order else refusal)
        if refusal is not None:
            self._refuse(key, refusal)
            return warmed.result
        if uploads is not None:
            self._uploading.add((key.module, key.method))
            self._uploads[key] = uploads
        recording, num_uploaded = self._recordings[key], uploads.size_bytes if uploads is not None else 0
        size_bytes = recording.size_bytes + num_uploaded
        self.obeyed = Obeyed(size_bytes=size_bytes + recording.pool_growth_bytes)
        self._remove(self._policy_of(key).captured(key, size_bytes, recording.pool_growth_bytes))
        return warmed.result

    def _objection(self, key: Key, effects: Effects, warmed: Warmed) -> Refusal | None:
        """What speaks against capturing a forward that was warmed up."""
        try:
            # What ranks share the device is busy with while it waits for the launches of others: that looks like work.
            is_worth = is_worth_capturing(warmed.launch_s, warmed.total_s, frees_host=self._frees_host)
            if not _is_shared(key) and not is_worth:
                raise Slow(f"launches take {warmed.launch_s} of {warmed.total_s} s")
            if self._num_broken[key.module, key.method] >= MAX_BROKEN:
                raise Unfit("captures of such calls were cut off")
            if reason := unfit(key.module):
                raise Unfit(reason)
            effects.check()
            check_result(warmed.result, self._device_type)
            if (key.module, key.method) in self._uploading:
                raise CaptureFailed("it takes tensors of the host to the device")
        except Unfit as problem:
            return refusal_of(problem)
        return None

    def _record(self, key: Key, forward: Forward, effects: Effects, uploads: Uploads | None = None) -> Refusal | None:
        """Capture a forward; what came in the way."""

        def with_uploads(tree: Tree) -> Any:
            with uploads.given() if uploads is not None else nullcontext():
                return forward(tree)

        try:
            self._recordings[key] = self._recorder.record(with_uploads, effects.tree, effects.tensors)
        except Unfit as problem:
            self._num_broken[key.module, key.method] += isinstance(problem, Broken)
            return refusal_of(problem)
        return None

    def _compare(
        self, key: Key, forward: Forward, tree: Tree, tensors: Sequence[torch.Tensor], agree: Agreement
    ) -> Any:
        """Run eagerly and as a graph, for arguments that it wasn't captured with: which is faster, and is it right?

        Twice each, as the first eager forward after a capture takes memory from the device again, and the first replay
        uploads the graph.
        """
        known, uploads = self._uploads.get(key), Uploads(self._device_type)
        with uploads.watched() if known is not None else nullcontext():
            forward(copied(tree))
        self._replayed(key, tensors)
        replayed, replay_s = self._recorder.timed(lambda: clone(self._replayed(key, tensors)))
        result, eager_s = self._recorder.timed(lambda: forward(tree))
        logger.debug("%s: %.2f ms as a graph, %.2f without", self._name(key.module), 1e3 * replay_s, 1e3 * eager_s)
        refusal = None
        if known is not None and uploads.order != known.order:
            refusal = Refusal("it copies something else to the device each time")
        elif (error := relative_error(closed(replayed), result)) != 0:
            refusal = Refusal(f"a graph returned something else (relative error {error:.2g})")
        elif not pays(replay_s, eager_s, frees_host=self._frees_host):
            refusal = Refusal()
        if (refusal := agree(refusal)) is not None:
            self._refuse(key, refusal)
        else:
            self._policy_of(key).proved(key)
        return result

    def _replayed(self, key: Key, tensors: Sequence[torch.Tensor]) -> Any:
        """The result of a replay, opened."""
        recording = self._recordings.get(key)
        if recording is None:
            # What ranks send one another must be in the graphs of all of them, or of none.
            raise RuntimeError(f"{self._name(key.module)}: this rank has lost a graph that others replay")
        return recording.replay(tensors)

    def _policy_of(self, key: Key) -> GraphPolicy[Key]:
        """That of who decides about a graph."""
        return self._ordered if self._is_led and _is_shared(key) else self._policy

    def _refuse(self, key: Key, refusal: Refusal) -> None:
        self.obeyed = Obeyed(refusal)
        if refusal.is_passing:
            self._policy_of(key).postpone(key)
        else:
            self._policy_of(key).refuse(key)
        self._remove([key])
        if refusal.is_leaking:
            # Other graphs write to what it keeps.
            lost = self._ordered.evict()
            # What leaks on one of those that share it all of them hear of.
            self._has_lost |= bool(lost) and self._policy_of(key) is self._policy
            self._remove([*self._policy.evict(), *lost])
            self._recorder.renew()
        if refusal.said:
            self._tell(key.module, key.method, refusal.said)

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
        for key in keys:
            self._uploads.pop(key, None)
        self._gone += [key for key in keys if _is_shared(key)]
        if any(had) and not self._recordings:
            self._recorder.renew()
        return any(had)


def graphs_on(
    device: torch.device,
    max_bytes: int,
    components: Mapping[str, Any],
    note: Callable[[str, str], None] = lambda component, note: None,
    *,
    frees_host: bool = False,
) -> Graphs | None:
    """The graphs of a pipeline's components; None where there are none."""
    if device.type != "cuda" or not max_bytes:
        return None
    names = {part: name for name, part in components.items() if isinstance(part, nn.Module)}
    return Graphs(device, GraphPolicy(max_bytes), CudaRecorder(device), names, note, frees_host=frees_host)


def _is_shared(key: Key) -> bool:
    return isinstance(key.fixed[1], Shared)


def _told(key: Key) -> Hashable:
    """Which ranks share a graph."""
    return key.fixed[1].ranks if isinstance(key.fixed[1], Shared) else None
