"""One part of bench/parallel.py, in a rank: forwards of one model on one GPU, and shared by several.

Weights are random, drawn on each device from one seed, so all ranks have the same. What one GPU returns for the same
arguments, run eagerly by the same process, is what others are compared with.
"""

import contextlib
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs where the package isn't installed, too
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import torch
import torch.distributed as dist
from crews import Row, Teller
from diffusers import ContextParallelConfig
from real_models import MODELS

from sgld.config import EngineConfig
from sgld.ipc.seats import Seat
from sgld.models.load import LoadedModel
from sgld.models.placement import compile_components
from sgld.models.sharing import Sharing
from sgld.parallel import ParallelConfig, Ranks
from sgld.worker.axes import hypothesis
from sgld.worker.comparison import relative_error
from sgld.worker.distributed import follow, lead
from sgld.worker.graphs import graphs_on
from sgld.worker.invocation import Invocation
from sgld.worker.rows import row_axes
from sgld.worker.runtime import Runtime

# A graph is captured with the third use, and compared with the next one.
NUM_WARM_UP, REPEATS = 5, 7
# So many are enough where they took so long together.
FEW, FEW_MS = 3, 700.0
TEXT = 512
BESIDE = "beside one another"
TITLES = {"flux": "FLUX", "wan": "Wan", "vae": "VAE"}
"""Models, by the name of what of `real_models` they are; the VAE is FLUX's."""
_NAMES = {"flux": "transformer", "wan": "transformer", "vae": "vae"}
_TIMEOUT = timedelta(seconds=300)
Run = Callable[[], Any]


@dataclass(frozen=True)
class Work:
    """A forward. `size`: width and height of a picture in pixels, or frames, height and width of a clip."""

    model: str
    size: tuple[int, ...]
    rows: int = 1

    @property
    def name(self) -> str:
        size = f"{self.size[0]}²" if len(self.size) == 1 else "x".join(map(str, self.size))
        return f"{TITLES[self.model]} {size}" + (f", {self.rows} rows" if self.rows > 1 else "")

    def tiny(self) -> "Work":
        """Small enough to try the bench out."""
        *frames, height, width = self.size if len(self.size) > 1 else (*self.size, *self.size)
        sides = [max(side // 128 * 16, 16) for side in (height, width)]
        return replace(self, size=(9, *sides) if frames else (sides[0],))


@dataclass(frozen=True)
class Part:
    """What one set of ranks measures, all of the same model.

    :ivar by: whose code shares the forward, `sgld` or `diffusers`.
    :ivar has_one: also what one GPU takes.
    :ivar all_degrees: on fewer of them, too, where each forward may take as many as it likes.
    :ivar beside: of these also a forward on each GPU at the same time.
    :ivar is_aside: it is measured while others compile.
    :ivar copies: no forwards are measured, but requests to so many copies of a model.
    """

    name: str
    by: str
    works: tuple[Work, ...]
    expected_s: float
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    is_compiled: bool = False
    has_one: bool = False
    all_degrees: bool = False
    beside: tuple[Work, ...] = ()
    is_aside: bool = False
    copies: int = 0

    @property
    def model(self) -> str:
        return self.works[0].model if self.works else "sdxl"

    def tiny(self) -> "Part":
        """The same of small works."""
        small = {work: work.tiny() for work in self.works}
        return replace(self, works=tuple(small.values()), beside=tuple(small[work] for work in self.beside))

    @property
    def layout(self) -> str:
        shape = self.parallel
        if shape.enable_cfg_parallel:
            return "rows"
        if shape.num_ranks == 1 or self.model == "vae":
            return "" if shape.num_ranks == 1 else "tiles"
        named = {"ulysses": shape.ulysses, "ring": shape.ring}
        return " x ".join(f"{name} {num}" for name, num in named.items() if num > 1)


def build(model: str, device: torch.device, *, is_tiny: bool) -> Any:
    """The same weights on each rank."""
    part = MODELS["wan" if model == "wan" else "flux"].parts[_NAMES[model]]
    if is_tiny and model != "vae":
        part = replace(part, tiny={**part.tiny, "num_attention_heads": 4})
    before = torch.get_default_dtype()
    torch.set_default_dtype(_dtype(device))
    try:
        torch.manual_seed(0)
        module = part.build(str(device), is_tiny=is_tiny)
    finally:
        torch.set_default_dtype(before)
    if model == "vae":
        module.enable_tiling()
    return module.eval().requires_grad_(False)


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def arguments(work: Work, config: Any, device: torch.device) -> Row:
    """What a pipeline gives the model in a step."""
    torch.manual_seed(1)
    draw = functools.partial(torch.randn, device=device, dtype=_dtype(device))
    rows = work.rows
    if work.model == "vae":
        [side] = work.size
        return {"z": draw(rows, config.latent_channels, side // 8, side // 8)}
    if work.model == "wan":
        frames, height, width = work.size
        return {
            "hidden_states": draw(rows, config.in_channels, (frames - 1) // 4 + 1, height // 8, width // 8),
            "timestep": torch.full((rows,), 500, device=device),
            "encoder_hidden_states": draw(rows, TEXT, config.text_dim),
            "return_dict": False,
        }
    side = work.size[0] // 16
    places = torch.arange(side, device=device, dtype=_dtype(device))
    grid = torch.meshgrid(places, places, indexing="ij")
    return {
        "hidden_states": draw(rows, side**2, config.in_channels),
        "encoder_hidden_states": draw(rows, TEXT, config.joint_attention_dim),
        "pooled_projections": draw(rows, config.pooled_projection_dim),
        "timestep": torch.full((rows,), 0.5, device=device, dtype=_dtype(device)),
        "guidance": torch.full((rows,), 3.5, device=device, dtype=_dtype(device)),
        "img_ids": torch.stack([torch.zeros_like(grid[0]), *grid], dim=-1).reshape(-1, 3),
        "txt_ids": torch.zeros(TEXT, 3, device=device, dtype=_dtype(device)),
        "return_dict": False,
    }


def median_ms(run: Run, device: torch.device, *, warm_up: int = 2) -> float:
    """What a forward takes until its result is there."""
    for _ in range(warm_up if device.type == "cuda" else 0):
        run()
    taken: list[float] = []
    while len(taken) < (REPEATS if sum(taken) < FEW_MS else FEW):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        taken.append(1e3 * (time.perf_counter() - start))
    return statistics.median(taken)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Measuring:
    """One part in one rank, with its model on its GPU."""

    def __init__(self, part: Part, seat: Seat, teller: Teller, device: torch.device, module: Any) -> None:
        self.part, self.seat, self.teller, self.device, self.module = part, seat, teller, device, module
        self.method = "decode" if part.model == "vae" else "forward"
        self.calls = {work: arguments(work, module.config, device) for work in part.works}
        self.references: dict[Work, Any] = {}
        """What one GPU returns, on rank 0."""
        if seat.index == 0:
            self.references = {work: self.plain(work) for work in part.works}

    def plain(self, work: Work) -> Any:
        """A forward as the model's own code runs it."""
        function = self.module if self.method == "forward" else self.module.decode
        return function(**self.calls[work])

    def row(self, work: Work, by: str, gpus: int, how: str, ms: float, error: float, layout: str | None = None) -> None:
        """Say what was measured."""
        known = {"model": work.model, "size": work.size, "rows": work.rows, "work": work.name, "by": by, "gpus": gpus}
        shape = (self.part.layout if gpus > 1 else "") if layout is None else layout
        said = {"layout": shape, "how": how, "ms": ms, "error": error, "is_aside": self.part.is_aside}
        self.teller.row(known | said)

    def error(self, work: Work, result: Any) -> float:
        """Of a result, against one GPU's."""
        return relative_error(result, self.references[work])

    def runtime(self, *, has_graphs: bool) -> Runtime:
        """What runs forwards as the engine does."""
        names = {_NAMES[self.part.model]: self.module}
        note = functools.partial(print, file=sys.stderr)
        graphs = graphs_on(self.device, EngineConfig().graphs.max_bytes, names, note) if has_graphs else None
        compiled = {self.module: _NAMES[self.part.model]} if self.part.is_compiled else None
        return Runtime(compiled=compiled, graphs=graphs)

    def run(self, runtime: Runtime, work: Work, ranks: Ranks | None = None) -> Any:
        """A forward through a runtime."""
        kwargs = self.calls[work]
        tree = ((), kwargs)
        is_parted = self.part.parallel.enable_cfg_parallel and runtime.ranks is not None
        axes = row_axes(hypothesis(tree), tree, tree) if is_parted else None
        invocation = Invocation(self.module, self.method, (), dict(kwargs), fixed=(), axes=axes)
        leader: Any = runtime.ranks
        with contextlib.nullcontext() if ranks is None else leader.on(ranks):
            return runtime.run(invocation)

    def measured(
        self, runtime: Runtime, work: Work, gpus: int, ranks: Ranks | None = None, layout: str | None = None
    ) -> None:
        """Warm up until graphs are there, then measure."""
        run = functools.partial(self.run, runtime, work, ranks)
        warm_up = NUM_WARM_UP if runtime.graphs is not None else 2
        ms = median_ms(run, self.device, warm_up=warm_up)
        variant = runtime.variant
        self.row(work, "sgld", gpus, variant, ms, self.error(work, run()), layout)


def measure(seat: Seat, teller: Teller, part: Part, device_type: str, is_tiny: bool) -> None:
    """Entry of a rank."""
    teller.gate("imported")
    device = torch.device(device_type, seat.index) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with torch.no_grad():
        measuring = Measuring(part, seat, teller, device, build(part.model, device, is_tiny=is_tiny))
        (by_sgld if part.by == "sgld" else by_diffusers)(measuring)


def by_sgld(measuring: Measuring) -> None:
    """As the engine has it: rank 0 leads the others, which follow until it is done."""
    part, seat, module = measuring.part, measuring.seat, measuring.module
    name, num_ranks = _NAMES[part.model], part.parallel.num_ranks
    if part.is_compiled:
        compile_components({name: module}, in_order=num_ranks > 1)
    if part.has_one and seat.index == 0:
        on_one(measuring)
    if num_ranks == 1:
        shared(measuring, measuring.runtime(has_graphs=True))
        return
    is_vae = part.model == "vae"
    sharing = Sharing(vaes=(name,)) if is_vae else Sharing(denoisers=(name,), max_degrees={name: num_ranks})
    model = LoadedModel(
        SimpleNamespace(components={name: module}),
        measuring.device,
        {},
        "bench",
        compiled=(name,) if part.is_compiled else (),
        sharing=sharing,
    )
    config = EngineConfig(parallel=part.parallel)
    if seat.index:
        follow(seat, model, config)
        return
    runtime = measuring.runtime(has_graphs=True)
    runtime.ranks = lead(seat, model, config, functools.partial(print, file=sys.stderr))
    shared(measuring, runtime)


def on_one(measuring: Measuring) -> None:
    """What one GPU takes: the model's own code, and as the engine runs it."""
    runtime = measuring.runtime(has_graphs=True)
    for work in measuring.part.works:
        plain_ms = median_ms(functools.partial(measuring.plain, work), measuring.device)
        measuring.row(work, "diffusers", 1, "eager", plain_ms, 0.0)
        measuring.measured(runtime, work, 1)
    if runtime.graphs is not None:
        runtime.graphs.make_room()


def shared(measuring: Measuring, runtime: Runtime) -> None:
    """What all ranks take, as graphs where these are kept, and eagerly; and some of them."""
    part, parallel = measuring.part, measuring.part.parallel
    num_ranks = parallel.num_ranks
    if part.is_compiled:
        for work in part.works:
            measuring.run(runtime, work)
        measuring.teller.gate("compiled")
    eager = measuring.runtime(has_graphs=False)
    eager.ranks = runtime.ranks
    for work in part.works:
        every = Ranks(0, num_ranks) if parallel.elastic_sp else None
        layout = f"ulysses {num_ranks}" if parallel.elastic_sp else part.layout
        measuring.measured(runtime, work, num_ranks, every, layout)
        if not part.is_compiled and runtime.graphs is not None and "graph" in runtime.variant:
            measuring.measured(eager, work, num_ranks, every, layout)
        # What one GPU takes is known from before they shared anything.
        fewer = [degree for degree in parallel.degrees[:-1] if degree > part.has_one] if part.all_degrees else []
        for degree in reversed(fewer):
            named = f"ulysses {degree}" if degree > 1 else "elastic"
            measuring.measured(runtime, work, degree, Ranks(0, degree), named)
        if work in part.beside:
            beside(measuring, runtime, work)


def beside(measuring: Measuring, runtime: Runtime, work: Work) -> None:
    """As many forwards as there are GPUs, each on one: until the last result has come back to the first GPU."""
    num_ranks = measuring.part.parallel.num_ranks

    def run() -> Any:
        away = [measuring.run(runtime, work, Ranks(rank, 1)) for rank in range(1, num_ranks)]
        own = measuring.run(runtime, work, Ranks())
        return [own, *(each.result() for each in away)]

    ms = median_ms(run, measuring.device, warm_up=NUM_WARM_UP)
    error = max(measuring.error(work, result) for result in run())
    measuring.row(work, "sgld", num_ranks, BESIDE, ms, error, "1 each")


def by_diffusers(measuring: Measuring) -> None:
    """Diffusers' own context parallelism, eager or compiled as its documentation has it."""
    part, seat, module = measuring.part, measuring.seat, measuring.module
    meet(seat, measuring.device)
    shape = part.parallel
    module.enable_parallelism(config=ContextParallelConfig(ulysses_degree=shape.ulysses, ring_degree=shape.ring))
    if part.is_compiled:
        module.compile_repeated_blocks()
        for work in part.works:
            measuring.plain(work)
        _wait(measuring.device)
        measuring.teller.gate("compiled")
    for work in part.works:
        dist.barrier()
        ms = median_ms(functools.partial(measuring.plain, work), measuring.device)
        result = measuring.plain(work)
        if seat.index == 0:
            how = "compiled" if part.is_compiled else "eager"
            measuring.row(work, "diffusers", shape.num_ranks, how, ms, measuring.error(work, result))
    # Nobody leaves while another one still waits for it.
    _wait(measuring.device)
    dist.barrier()


def meet(seat: Seat, device: torch.device) -> None:
    """The ranks of a plain program find each other."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store = dist.FileStore(seat.meeting, seat.num_ranks)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=seat.index, world_size=seat.num_ranks, timeout=_TIMEOUT)
