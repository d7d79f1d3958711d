"""Learning axes: the pipeline runs with one sample and with two, and what its calls look like is compared.

It uses the arguments of a real request and one step, and ends where decoding begins, so nothing has to be known of
the pipeline.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from sgld.errors import Cancelled
from sgld.outcome import Outcome, Raised, Value, outcome_of
from sgld.worker.arguments import parameters_of
from sgld.worker.axes import CallAxes, Unmergeable, learned, skeleton
from sgld.worker.binding import bind, release
from sgld.worker.calls import Call
from sgld.worker.executor import single
from sgld.worker.padding import with_padding
from sgld.worker.runtime import Runtime
from sgld.worker.task import Task
from sgld.worker.trees import opened
from sgld.worker.verdicts import AxesKey, axes_key

logger = logging.getLogger(__name__)
Kwargs = dict[str, Any]
Recording = list[tuple[AxesKey, Any, Any]]
"""Of each call: its key, and the skeletons of its arguments and its result."""
Answer = Callable[[Call], Outcome | None]
RunAlone = Callable[[Kwargs, Answer], None]
"""Runs the pipeline with these arguments until `Answer`, which gets its calls, has none."""

# Given by a request for all of its steps or samples; a probe has one step and its own noise.
_LEFT_OUT = ("latents", "timesteps", "sigmas", "callback", "callback_on_step_end")


def probed_axes(
    pipeline: Any, kwargs: Kwargs, pulse: Callable[[], None] = lambda: None, runtime: Runtime | None = None
) -> dict[AxesKey, CallAxes]:
    """The axes of the calls that the pipeline makes for such a request; empty when it can't be asked.

    :param pulse: called after each forward.
    :param runtime: runs the components.
    """
    alone = functools.partial(_run_alone, pipeline, runtime)
    for num_steps, double in _ATTEMPTS:
        one = _reduced(pipeline, kwargs, num_steps)
        two = double(pipeline, one)
        if two is None:
            continue
        with torch.random.fork_rng(_devices()):
            outcome = outcome_of(functools.partial(_probed, alone, one, two, pulse))
        if isinstance(outcome, Value):
            return outcome.value
        logger.debug("%s refuses a probe with %s: %r", type(pipeline).__name__, double.__name__, outcome.error)
    return {}


def _devices() -> list[int]:
    """The GPU of this process. Each other one that is asked for anything would keep hundreds of megabytes for it."""
    is_used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return [torch.cuda.current_device()] if is_used else []


def _probed(alone: RunAlone, one: Kwargs, two: Kwargs, pulse: Callable[[], None]) -> dict[AxesKey, CallAxes]:
    recording = _recorded(alone, one, pulse)
    axes = _compared(recording, _recorded(alone, two, pulse))
    return _with_padding(alone, one, recording, axes, pulse)


def _reduced(pipeline: Any, kwargs: Kwargs, num_steps: int) -> Kwargs:
    """The request with few steps and noise of its own."""
    accepted = parameters_of(pipeline)
    reduced = {name: value for name, value in kwargs.items() if name not in _LEFT_OUT}
    ours = {
        "num_inference_steps": num_steps,
        "generator": torch.Generator().manual_seed(0),
        "strength": 1.0,
        "num_images_per_prompt": 1,
        "num_videos_per_prompt": 1,
    }
    return reduced | {name: value for name, value in ours.items() if name in accepted}


def _prompts(kwargs: Kwargs) -> Kwargs:
    """The arguments that each sample has its own of; there are others, such as a system prompt."""
    return {name: value for name, value in kwargs.items() if name.startswith(("prompt", "negative_prompt"))}


def _with_two_prompts(_pipeline: Any, kwargs: Kwargs) -> Kwargs | None:
    doubled = {name: [value, value] for name, value in _prompts(kwargs).items() if isinstance(value, str)}
    doubled |= {name: value * 2 for name, value in _prompts(kwargs).items() if isinstance(value, list)}
    return kwargs | doubled if doubled else None


def _with_two_outputs(pipeline: Any, kwargs: Kwargs) -> Kwargs | None:
    accepted = parameters_of(pipeline)
    names = [name for name in ("num_images_per_prompt", "num_videos_per_prompt") if name in accepted]
    return kwargs | dict.fromkeys(names, 2) if names else None


def _with_two_pictures(pipeline: Any, kwargs: Kwargs) -> Kwargs | None:
    """Two prompts with a picture, or the frames of a video, for each."""
    doubled = {name: [value, value] for name, value in kwargs.items() if _is_picture(value)}
    return _with_two_prompts(pipeline, kwargs | doubled) if doubled else None


def _is_picture(value: Any) -> bool:
    return isinstance(value, Image.Image) or (isinstance(value, list) and bool(value) and all(map(_is_picture, value)))


_ATTEMPTS = ((1, _with_two_prompts), (1, _with_two_pictures), (1, _with_two_outputs), (2, _with_two_prompts))


def _recorded(alone: RunAlone, kwargs: Kwargs, pulse: Callable[[], None]) -> Recording:
    """Run the pipeline alone and note its calls."""
    recording = []

    def answer(call: Call) -> Outcome | None:
        if call.kind == "decode":
            # It isn't merged, and not every pipeline can leave it out.
            return None
        key, arguments, outcome = axes_key(call), skeleton(call.tree), single(call)
        pulse()
        if isinstance(outcome, Value):
            recording.append((key, arguments, skeleton(opened(outcome.value))))
        return outcome

    alone(kwargs, answer)
    return recording


def _run_alone(pipeline: Any, runtime: Runtime | None, kwargs: Kwargs, answer: Answer) -> None:
    """Run the pipeline until `answer`, which gets its calls, has none."""

    def body(task: Task) -> Any:
        bound = bind(pipeline, task, runtime=runtime)
        try:
            return bound(**kwargs)
        finally:
            release(bound)

    task = Task("probe", body)
    task.advance()
    while (call := task.call) is not None:
        outcome = answer(call)
        if outcome is None:
            task.cancel()
        else:
            task.advance(outcome)
    for snapshot in task.snapshots:
        snapshot.restore()
    if isinstance(task.end, Raised) and not isinstance(task.end.error, Cancelled):
        raise task.end.error


def _with_padding(
    alone: RunAlone, kwargs: Kwargs, one: Recording, axes: dict[AxesKey, CallAxes], pulse: Callable[[], None]
) -> dict[AxesKey, CallAxes]:
    """The axes completed by what the pipeline pads where it gets two prompts of different lengths.

    It ends before the first forward of the denoiser where nothing is padded, as most pipelines pad to one length.
    """
    longer = {name: [text, f"{text} {text}"] for name, text in _prompts(kwargs).items() if isinstance(text, str)}
    found: dict[AxesKey, CallAxes] = {}

    def answer(call: Call) -> Outcome | None:
        if call.kind == "decode":
            return None
        if call.kind == "denoise" and not any(key[:2] == (call.component, call.method) for key in found):
            if (padded := _padded_axes(call, one, axes)) is None:
                return None
            found.update(padded)
        outcome = single(call)
        pulse()
        return outcome

    ended = outcome_of(functools.partial(alone, kwargs | longer, answer))
    if isinstance(ended, Raised):
        logger.debug("the pipeline pads nothing: %r", ended.error)
    return axes | found


def _padded_axes(call: Call, one: Recording, axes: dict[AxesKey, CallAxes]) -> dict[AxesKey, CallAxes] | None:
    """The axes of all that are called like this, with what it shows of padding; None: it shows that there is none."""
    alike = {key: known for key, known in axes.items() if key[:2] == (call.component, call.method)}
    first = next(((key, tree) for key, tree, _ in one if key in alike), None)
    if first is None:
        return {}
    padded = with_padding(axes[first[0]], first[1], call.tree)
    if not padded.lengths:
        return None
    return {key: replace(known, lengths=padded.lengths, masks=padded.masks) for key, known in alike.items()}


def _compared(one: Recording, two: Recording) -> dict[AxesKey, CallAxes]:
    axes: dict[AxesKey, CallAxes] = {}
    for key in dict.fromkeys(key for key, _, _ in one):
        try:
            found = {_axes_of(*pair) for pair in zip(_calls(one, key), _calls(two, key), strict=True)}
        except (Unmergeable, ValueError) as error:
            logger.debug("axes of %s.%s can't be learned: %s", key[0], key[1], error)
            continue
        if len(found) == 1 and (arguments := found.pop())[0]:
            axes[key] = CallAxes(dict(arguments[0]), dict(arguments[1]))
    return axes


def _calls(recording: Recording, key: AxesKey) -> Iterator[tuple[Any, Any]]:
    return ((arguments, result) for other, arguments, result in recording if other == key)


def _axes_of(one: tuple[Any, Any], two: tuple[Any, Any]) -> Any:
    return tuple(tuple(learned(a, b).items()) for a, b in zip(one, two, strict=True))
