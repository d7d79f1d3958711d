"""All that crosses a process boundary: commands to rank 0 of a replica, and its replies.

Pixels don't travel in messages: a `TensorRef` says in which slots of the tensor queue they are.
"""

from typing import Literal

import msgspec

from sgld.events import Stage
from sgld.parallel import Ranks
from sgld.request import NO_LIMITS, Limits
from sgld.sampling_params import SamplingParams

CallKind = Literal["encode", "denoise", "decode"]
TickMode = Literal["single", "merged", "proof"]
"""One forward for each call; one for all; or both, to compare them."""
Variant = Literal["eager", "compiled", "graph", "compiled graph"]
"""How a forward ran: kernel by kernel, compiled, or replayed as a graph of either. Each takes a time of its own."""
MAX_MESSAGE_BYTES = 64 * 1024


class TensorRef(msgspec.Struct, frozen=True, array_like=True):
    """One tensor in the tensor queue: uint8, C order, in as many slots as it needs."""

    slots: tuple[int, ...]
    shape: tuple[int, ...]


class CallInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the scheduler knows of a call.

    Calls with an equal `merge_key` may share a forward; None: this call never does. Calls with an equal `cost_key`
    take the same time.
    """

    id: int
    request_id: str
    kind: CallKind
    component: str
    merge_key: str | None
    cost_key: str
    rows: int
    step_index: int
    num_steps: int
    is_exclusive: bool = False
    """Its task changes what it shares: until that ends nobody else's calls run."""
    max_degree: int = 1
    """So many ranks may share its forward, a power of two."""
    is_bound: bool = True
    """Only the first ranks can run it: others lack the component, or what is done around it."""


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The model that a replica serves."""

    model_path: str
    pipeline_class: str
    device: str
    precisions: dict[str, str]
    """Component name to the dtype of its parameters."""
    fps: float | None
    """Frames per second that the model's author recommends."""
    device_name: str = ""
    """What it is: forwards take the same time on devices with the same name."""
    identity: str | None = None
    """Names the configurations of its components; None: nothing that is learned of it is kept."""
    decisions: dict[str, str] = {}
    """Component name, or `model`, to how it was loaded."""
    is_whole: bool = False
    """Its pipeline runs as diffusers has it: one request at a time."""
    inputs: tuple[str, ...] = ()
    """Which of `image` and `mask_image` it takes."""
    call_defaults: dict[str, int] = {}
    """Width, height, frames and steps of requests that leave them open, as far as they are known."""
    makes_videos: bool = True
    """False: it makes pictures only, as far as its pipeline tells."""


def with_note(model: ModelInfo, component: str, note: str) -> ModelInfo:
    """The model with one more decision; several replicas may find out the same."""
    said = model.decisions.get(component)
    if said and f"; {note}; " in f"; {said}; ":
        return model
    return msgspec.structs.replace(model, decisions=model.decisions | {component: f"{said}; {note}" if said else note})


class Command(msgspec.Struct, frozen=True, tag_field="type"):
    """From the front to rank 0."""


class Start(Command, frozen=True, kw_only=True, tag="start"):
    """Make the task of a request; it runs to its first call."""

    request_id: str
    params: SamplingParams
    limits: Limits = NO_LIMITS


class Run(Command, frozen=True, kw_only=True, tag="run"):
    """Run these calls as one forward; then the calls that follow them, `num_ticks` times in all.

    It ends early when the calls that follow don't share a merge key, and when any other command arrives.
    """

    call_ids: tuple[int, ...]
    num_ticks: int = 1
    ranks: Ranks | None = None
    """Of a replica that chooses for each forward: those that run this one, while others run others; None: all."""


class Cancel(Command, frozen=True, kw_only=True, tag="cancel"):
    """End the task of a request at the call where it waits."""

    request_id: str


class LoadLora(Command, frozen=True, kw_only=True, tag="load_lora"):
    """Read a LoRA adapter as it is on disk now; `LoraLoaded` or `LoraFailed` answers."""

    path: str
    alpha: float | None = None


class UnloadLora(Command, frozen=True, kw_only=True, tag="unload_lora"):
    """Forget a LoRA adapter; requests that use it go on."""

    path: str
    alpha: float | None = None


class Exit(Command, frozen=True, tag="exit"):
    """Cancel all tasks and leave."""


class Reply(msgspec.Struct, frozen=True, tag_field="type"):
    """From rank 0 to the front."""


class Alive(Reply, frozen=True, kw_only=True, tag="alive"):
    """A sign of life from a rank that is busy with `stage` and can't answer."""

    stage: str


class Ready(Reply, frozen=True, kw_only=True, tag="ready"):
    """The model is loaded."""

    model: ModelInfo


class LoadFailed(Reply, frozen=True, kw_only=True, tag="load_failed"):
    """The model can't be served; the rank leaves."""

    message: str


class Pending(Reply, frozen=True, kw_only=True, tag="pending"):
    """A task waits for this call. Sent again with the same id, it replaces what was said before."""

    call: CallInfo


class Launched(Reply, frozen=True, kw_only=True, tag="launched"):
    """A tick that the device goes on with: its calls don't wait any more, and `Ran` follows when it is over."""

    call_ids: tuple[int, ...]


class Ran(Reply, frozen=True, kw_only=True, tag="ran"):
    """A tick: these calls ran; `is_timed` is False where a proof or a retry went into the time."""

    call_ids: tuple[int, ...]
    cost_key: str
    rows: int
    elapsed_s: float
    is_timed: bool
    started_ns: int = 0
    """On the clock of `time.monotonic_ns`, which the processes of a host share."""
    launch_s: float = 0.0
    """What the host took to give it to the device; all of it where it waits for that."""
    lead_s: float = 0.0
    """How long before the device began with it the host did, while that was busy."""
    mode: TickMode = "single"
    variant: Variant = "eager"
    num_reused: int = 0
    """Calls that were answered with what was known, without a forward."""
    ranks: Ranks | None = None
    """Those that ran it, where each forward has its own."""


class Judged(Reply, frozen=True, kw_only=True, tag="judged"):
    """How the calls of components merge, sent when it has changed: everything that is known."""

    modes: dict[str, str]
    reasons: dict[str, str]
    """Component to why some of its calls don't merge, as last found out."""


class LoraLoaded(Reply, frozen=True, kw_only=True, tag="lora_loaded"):
    """A LoRA adapter was read, or it was there already."""

    path: str
    alpha: float | None = None
    size_bytes: int
    num_layers: dict[str, int]
    """How many it changes in each component."""
    num_unmatched: int = 0
    """Layers that fit nothing in the model."""


class LoraFailed(Reply, frozen=True, kw_only=True, tag="lora_failed"):
    """A LoRA adapter can't be used."""

    path: str
    alpha: float | None = None
    message: str


class LoraDropped(Reply, frozen=True, kw_only=True, tag="lora_dropped"):
    """A LoRA adapter gave way to others, and has to be read again."""

    path: str
    alpha: float | None = None


class LorasHeld(Reply, frozen=True, kw_only=True, tag="loras_held"):
    """How much adapters take, sent when it has changed."""

    num_adapters: int = 0
    """In memory."""
    adapter_bytes: int = 0
    num_slots: int = 0
    """Combinations of adapters on the device."""
    slot_bytes: int = 0


class Noted(Reply, frozen=True, kw_only=True, tag="noted"):
    """Something was found out of a component while it ran; it goes with the decisions of the model."""

    component: str
    note: str


class Compiling(Reply, frozen=True, kw_only=True, tag="compiling"):
    """Whether code is on its way that later forwards will run, sent when it has changed."""

    is_pending: bool


class Idle(Reply, frozen=True, kw_only=True, tag="idle"):
    """A `Run` has come to its end; its ranks, of which this is the first, wait for commands."""

    first_rank: int = 0


class Stepped(Reply, frozen=True, kw_only=True, tag="stepped"):
    """A task finished denoising step `step` of `num_steps` (counted from 1), or of what follows the pipeline that call.

    `num_skipped_calls`: how many calls of its denoiser its step cache skipped so far.
    """

    request_id: str
    step: int
    num_steps: int
    stage: Stage = "denoise"
    num_skipped_calls: int = 0


class Previewed(Reply, frozen=True, kw_only=True, tag="previewed"):
    """The picture predicted at a step, (H, W, 3)."""

    request_id: str
    step: int
    pixels: TensorRef


class Decoded(Reply, frozen=True, kw_only=True, tag="decoded"):
    """Frames of the result from `index` on, (F, H, W, 3 or 4); they replace what was sent for those before."""

    request_id: str
    index: int
    is_video: bool
    pixels: TensorRef


class Heard(Reply, frozen=True, kw_only=True, tag="heard"):
    """The next piece of the result's sound: float32, (samples, channels), as bytes."""

    request_id: str
    sample_rate: int
    samples: TensorRef


class Finished(Reply, frozen=True, kw_only=True, tag="finished"):
    """The task returned; all its frames have been sent.

    `postprocessing`: what was done to them after the pipeline, and by what.
    """

    request_id: str
    postprocessing: tuple[str, ...] = ()


class TaskFailed(Reply, frozen=True, kw_only=True, tag="task_failed"):
    """The task raised; `code` is that of an error in sgld.errors."""

    request_id: str
    code: str
    message: str


class TaskCancelled(Reply, frozen=True, kw_only=True, tag="task_cancelled"):
    """The task ended because it was told to."""

    request_id: str


AnyCommand = Start | Run | Cancel | LoadLora | UnloadLora | Exit
AnyReply = (
    Alive
    | Ready
    | LoadFailed
    | Pending
    | Launched
    | Ran
    | Judged
    | LoraLoaded
    | LoraFailed
    | LoraDropped
    | LorasHeld
    | Noted
    | Compiling
    | Idle
    | Stepped
    | Previewed
    | Decoded
    | Heard
    | Finished
    | TaskFailed
    | TaskCancelled
)
