"""Requests of the tiny pipelines, and calls of components without a pipeline."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from pipelines import BUILDERS
from torch import nn

from sgld.outcome import Outcome, Raised
from sgld.worker.calls import Call, current_context
from sgld.worker.executor import single
from sgld.worker.task import Task

# As many tokens each: some encoders pad to the longest prompt of a batch only.
PROMPTS = ("a red cat on the moon", "the blue dog under a hill", "a green lake over the sun", "the sun on a red hill")

_OUTPUTS = ("images", "image", "frames", "audio", "audios")


def request(name: str, index: int, kwargs: dict[str, Any], **changed: Any) -> dict[str, Any]:
    """Keyword arguments for the tiny pipeline `name`; each index has a prompt, seed, steps and guidance of its own."""
    entry = BUILDERS[name]
    own = {
        "prompt": PROMPTS[index],
        "num_inference_steps": 3 + index,
        "generator": torch.Generator().manual_seed(index),
    }
    if entry.guidance is not None:
        own[entry.guidance] = kwargs.get(entry.guidance, 3.0) + 0.5 * index
    return {"output_type": "pt"} | kwargs | own | entry.inputs(index, kwargs) | changed


def requests(name: str, kwargs: dict[str, Any]) -> list[dict[str, Any]]:
    """Four requests with generators that nothing was drawn from."""
    return [request(name, index, kwargs) for index in range(len(PROMPTS))]


def picture(output: Any) -> torch.Tensor:
    """What a pipeline returned: pictures or frames, and sound if it has any, behind each other."""
    if isinstance(output, BaseException):
        raise output
    if isinstance(output, torch.Tensor):
        return output
    made = [value for name in _OUTPUTS if (value := getattr(output, name, None)) is not None]
    return (
        torch.as_tensor(made[0]) if len(made) == 1 else torch.cat([torch.as_tensor(value).flatten() for value in made])
    )


def call_of(
    module: nn.Module, *args: Any, component: str = "transformer", method: str = "forward", **kwargs: Any
) -> Call:
    """A call as a task would make it, with gradients off."""
    with torch.no_grad():
        return Call("request", component, module, method, args, kwargs, current_context())


def values(outcomes: list[Outcome]) -> list[Any]:
    """What calls returned; raises what one of them raised."""
    found = []
    for outcome in outcomes:
        if isinstance(outcome, Raised):
            raise outcome.error
        found.append(outcome.value)
    return found


def run_to_end(task: Task, run: Callable[[Call], Outcome] = single) -> Any:
    """Run a task's calls one by one; what it returned."""
    if task.call is None and task.end is None:
        task.advance()
    while task.call is not None:
        task.advance(run(task.call))
    assert task.end is not None
    if isinstance(task.end, Raised):
        raise task.end.error
    return task.end.value


def running(body: Callable[[Task], Any], **kwargs: Any) -> Task:
    """A task that was run to its first call."""
    task = Task("request", body, **kwargs)
    task.advance()
    return task


def calls_until_end(task: Task) -> Iterator[Call]:
    """Each call where a task waits, run after it was looked at."""
    while task.call is not None:
        yield task.call
        task.advance(single(task.call))


class Function(nn.Module):
    """A component that is a function of its arguments."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


class Doubling(nn.Module):
    """A denoiser as diffusers has them: twice its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), 2.0))

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x


class Sum(BaseOutput):  # type: ignore[misc]
    """What `Doublings` returns."""

    images: torch.Tensor


class Doublings(DiffusionPipeline):  # type: ignore[misc]
    """A pipeline that doubles its input at every step."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.register_modules(transformer=transformer)

    @torch.no_grad()
    def __call__(self, x: torch.Tensor, num_inference_steps: int = 3, output_type: str = "pt") -> Sum:
        with self.progress_bar(total=num_inference_steps) as bar:
            for _ in range(num_inference_steps):
                x = self.transformer(x)
                bar.update()
        return Sum(images=x)
