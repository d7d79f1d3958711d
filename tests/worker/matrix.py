"""The parity matrix: each tiny pipeline, plain and with several requests at once, and the table of what came of it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pipelines import BUILDERS, build

from sgld.models.token_plans import plan_of
from sgld.testing import Report, run_together
from sgld.worker.calls import Call
from sgld.worker.executor import Executor, Tick
from worker.requests import picture, request

TABLE = Path(__file__).parents[2] / "docs" / "pipelines.md"
_HEAD = """# Pipelines that are tested

Each has tiny random components and runs on a CPU in float32. Four requests at once, with different prompts, seeds,
numbers of steps and guidance, are compared with four plain calls of the pipeline. *Interleaved* requests take turns;
*merged* ones share forwards where that is proved right. The difference is the largest of any pixel in [0, 1];
*batch* is the most requests in one forward of the denoiser. *Two sizes*: two requests of each of two sizes at once.
*Tokens*: several GPUs can share those of its denoiser, which returns the same (tests/models/test_sequence.py).

`python -m pytest tests/worker/test_parity.py --write-table` writes this page.

| Pipeline | Kind | Interleaved | Merged | Batch | Mode | Two sizes | Tokens | Notes |
|---|---|---|---|---|---|---|---|---|
"""


@dataclass
class Case:
    """One pipeline of the matrix, and what was seen of it."""

    name: str
    seen: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.entry = BUILDERS[self.name]
        self.pipeline, self.kwargs = build(self.name)

    @property
    def title(self) -> str:
        """What its row in the table begins with."""
        variant = f" ({self.entry.variant})" if self.entry.variant else ""
        return f"`{type(self.pipeline).__name__}`{variant}"

    def requests(self, *, num_other_size: int = 0) -> list[dict[str, Any]]:
        """Four requests with generators that nothing was drawn from; the last ones can have another size."""
        sizes: list[dict[str, Any]] = [{}] * (4 - num_other_size) + [self.entry.other_size] * num_other_size
        return [request(self.name, index, self.kwargs | size) for index, size in enumerate(sizes)]

    @cached_property
    def plain(self) -> list[torch.Tensor]:
        """What plain calls give."""
        return self.run_plain(self.requests())

    def run_plain(self, calls: Sequence[dict[str, Any]]) -> list[torch.Tensor]:
        """What the pipeline gives when it is called without sgld."""
        return [picture(self.pipeline(**call)) for call in calls]

    @property
    def is_complete(self) -> bool:
        """Whether all tests of it were run, and passed."""
        wanted = {"interleaved", "merged"} | ({"two sizes"} if self.entry.other_size else set())
        return wanted <= self.seen.keys()

    @property
    def shares_tokens(self) -> bool:
        """Whether several GPUs can share the tokens of its denoiser, which pipelines mustn't change for that."""
        return self.entry.merges and any(
            part is not None and plan_of(type(part)) for part in self.pipeline.components.values()
        )

    def row(self) -> str:
        """The row of the table."""
        seen = [self.seen.get(column, "") for column in ("interleaved", "merged", "batch", "mode", "two sizes")]
        tokens = "shared" if self.shares_tokens else ""
        return f"| {' | '.join([self.title, self.entry.kind, *seen, tokens, self.entry.because])} |"


@contextmanager
def denoiser_batches() -> Iterator[list[int]]:
    """How many requests shared each merged forward of a denoiser."""
    sizes: list[int] = []
    run = Executor.run

    def watched(self: Executor, calls: Sequence[Call]) -> Tick:
        tick = run(self, calls)
        if tick.is_merged and calls[0].kind == "denoise":
            sizes.append(len({call.request_id for call in calls}))
        return tick

    Executor.run = watched  # type: ignore[method-assign]
    try:
        yield sizes
    finally:
        Executor.run = run  # type: ignore[method-assign]


def together(pipeline: Any, calls: Sequence[dict[str, Any]], *, merge: bool = True) -> tuple[Report, int]:
    """Run requests at once; also the most of them that shared a forward of the denoiser."""
    with denoiser_batches() as sizes:
        report = run_together(pipeline, calls, merge=merge)
    return report, max(sizes, default=1)


def difference(outputs: Sequence[Any], expected: Sequence[torch.Tensor]) -> float:
    """The largest of any pixel; not a number where a picture has such a pixel."""
    differences = [(picture(output) - plain).abs().max() for output, plain in zip(outputs, expected, strict=True)]
    return float(torch.stack(differences).max())


def table(cases: Sequence[Case], before: str) -> str:
    """The page with a row for each case that is complete, and with those of others as they were before."""
    rows = {line.split(" | ")[0]: line for line in before.splitlines() if line.startswith("| `")}
    rows |= {f"| {case.title}": case.row() for case in cases if case.is_complete}
    return _HEAD + "".join(f"{rows[title]}\n" for title in sorted(rows, key=str.lower))
