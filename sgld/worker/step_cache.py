"""A request's step cache: calls of its denoiser that aren't computed, since they follow from its own earlier ones.

All of it belongs to one task and ends with it; nothing is known of other requests.
"""

from collections import Counter

import torch
from torch import nn

from sgld.errors import InvalidRequest
from sgld.sampling_params import FirstBlockCache, StepCacheParams, TaylorCache
from sgld.worker.axes import is_constant
from sgld.worker.blocks import Split
from sgld.worker.calls import Call
from sgld.worker.first_block import FirstBlockSite
from sgld.worker.sites import Site
from sgld.worker.task import Task
from sgld.worker.taylor import TaylorSite
from sgld.worker.trees import leaves

SiteKey = tuple[str, str, str, int, str]


class StepCache:
    """Decides for one task which of its denoiser's calls don't run, or not as a whole."""

    def __init__(self, task: Task, params: StepCacheParams) -> None:
        self._task = task
        self._params = params
        self._sites: dict[SiteKey, Site] = {}
        self._seen: set[SiteKey] = set()
        """Sites of this step."""
        self._num_calls: Counter[tuple[str, str, str]] = Counter()
        self._step = -1
        self._splits: dict[nn.Module, Split] = {}

    def clear(self) -> None:
        """Forget all."""
        self._sites.clear()
        self._splits.clear()

    def answer(self, call: Call, context: str) -> object:
        """In the task's thread: the result of a call that is skipped; else None, and the call is told its site.

        :param context: what the pipeline calls this call, where it does.
        :raises InvalidRequest: such calls can't be cached.
        """
        if not (self._task.has_progress_bar or self._task.step):
            # The loop hasn't begun: models that run once for each request.
            return None
        self._check(call)
        site = self._site_of(call, context)
        if isinstance(site, FirstBlockSite):
            call.site = site
            return None
        assert isinstance(site, TaylorSite)
        if site.is_hopeless:
            raise InvalidRequest(f"{call.component} returns more than tensors, so no step can be skipped", "cache")
        if site.may_skip:
            return site.predicted()
        call.answered = site.note
        return None

    def _check(self, call: Call) -> None:
        if self._task.exclusive_because is not None:
            raise InvalidRequest(
                f"this pipeline changes its models while it runs (it uses {self._task.exclusive_because}), so no step "
                "can be skipped",
                "cache",
            )
        for path, leaf in leaves(call.tree):
            if not isinstance(leaf, torch.Tensor) and not is_constant(leaf):
                name, kind = ".".join(map(str, path[1:])), type(leaf).__name__
                raise InvalidRequest(
                    f"{call.component} is given a {kind} ({name}), which may have a state, so no step can be skipped",
                    "cache",
                )

    def _site_of(self, call: Call, context: str) -> Site:
        """Calls in the same place of a step, with arguments of the same shapes, have one site.

        A loop that begins again, for another part of a video, has sites of its own.
        """
        if self._task.step < self._step:
            self._sites.clear()
        if self._task.step != self._step:
            self._sites = {key: site for key, site in self._sites.items() if key in self._seen}
            self._step = self._task.step
            self._seen = set()
            self._num_calls.clear()
        place = (call.component, call.method, context)
        self._num_calls[place] += 1
        key = (*place, self._num_calls[place], _outline(call))
        self._seen.add(key)
        if key not in self._sites:
            self._sites[key] = self._new_site(call.module)
        return self._sites[key]

    def _new_site(self, module: nn.Module) -> Site:
        match self._params:
            case TaylorCache(warmup_steps=warmup_steps, interval=interval, order=order):
                return TaylorSite(warmup_steps, interval - 1, self._task.skips, order=order)
            case FirstBlockCache(warmup_steps=warmup_steps, max_skips=max_skips, threshold=threshold):
                split = self._splits.get(module) or self._splits.setdefault(module, Split(module))
                return FirstBlockSite(warmup_steps, max_skips, self._task.skips, threshold=threshold, split=split)


def _outline(call: Call) -> str:
    return repr(
        [
            (path, leaf.dtype, tuple(leaf.shape)) if isinstance(leaf, torch.Tensor) else (path, type(leaf).__name__)
            for path, leaf in leaves(call.tree)
        ]
    )
