"""The process of a rank: it loads the model, then does what the front commands."""

import faulthandler
import functools
import gc
import logging
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sgld.config import EngineConfig, cache_root
from sgld.errors import ChannelClosed, ModelError
from sgld.ipc.channel import RankEnd
from sgld.ipc.seats import ALONE, Seat
from sgld.ipc.tensor_queue import TensorWriter
from sgld.messages import AnyCommand, AnyReply, LoadFailed, Ready
from sgld.worker.heartbeat import Heart, heartbeat

if TYPE_CHECKING:
    from sgld.models.load import LoadedModel
    from sgld.models.stages import Tell

logger = logging.getLogger(__name__)
Channel = RankEnd[AnyReply, AnyCommand]


def rank_main(
    channel: Channel,
    tensors: TensorWriter,
    config: EngineConfig,
    niceness: int = 0,
    set_up: Callable[[], None] | None = None,
    seat: Seat = ALONE,
) -> None:
    """Entry of the process. It ends on `Exit`, when the model can't be loaded, and when the front is gone.

    :param niceness: of a rank that runs on the CPU.
    :param set_up: called before anything is loaded; says how it logs.
    :param seat: its place among the ranks of its replica, of which it is the first.
    """
    _begin(set_up)
    serve(channel, tensors, config, functools.partial(_load, config, niceness, seat), seat)
    # All that matters has been sent, and taking down torch takes a second.
    os._exit(0)


def follower_main(config: EngineConfig, niceness: int, set_up: Callable[[], None] | None, seat: Seat) -> None:
    """Entry of the process of another rank. It ends with rank 0, and when the front is gone."""
    _begin(set_up)
    try:
        model = _load(config, niceness, seat)
    except ModelError as error:
        # Rank 0 says it to the front.
        from sgld.worker.distributed import fail

        fail(seat, str(error))
    else:
        from sgld.worker.distributed import follow

        follow(seat, model, config)
    os._exit(0)


def _load(config: EngineConfig, niceness: int, seat: Seat, tell: "Tell | None" = None) -> "LoadedModel":
    from sgld.models.load import load
    from sgld.models.stages import nobody

    model = load(config, seat.index, tell or nobody)
    if niceness and model.device.type == "cpu":
        _give_way(niceness)
    # What torch, diffusers and the model consist of stays. To look through its 435,000 objects takes 0.24 s, in which
    # everybody would wait.
    gc.collect()
    gc.freeze()
    return model


class Variable(NamedTuple):
    """An environment variable: what the one who starts ranks has, and what they get."""

    name: str
    given: str | None
    ours: str


def rank_environment(config: EngineConfig, replica: int = 0) -> list[Variable]:
    """What the ranks of a replica get, but for what the environment says itself; of its GPUs they get their part.

    For who starts the process: a script that imports torch does so in the new process, too, before `rank_main` begins.
    What it imports may even look for GPUs there, and those that CUDA finds then are all that it ever finds.
    """
    chosen = (
        # Threads of a forward that wait spinning take the cores from one another, and from everybody else: on 2 cores
        # 20 steps of the small model that ships took 1.5 s, and 5 s beside one more busy process. Asleep it is 2.5 and
        # 3 s.
        ("OMP_WAIT_POLICY", os.environ.get("OMP_WAIT_POLICY"), "PASSIVE"),
        # Else torch takes a temporary folder: so what was compiled is there at the next start.
        ("TORCHINDUCTOR_CACHE_DIR", os.environ.get("TORCHINDUCTOR_CACHE_DIR"), _compiled_folder()),
        # No progress bars and hints of libraries on the terminal.
        ("TQDM_DISABLE", os.environ.get("TQDM_DISABLE"), "1"),
        ("DIFFUSERS_VERBOSITY", os.environ.get("DIFFUSERS_VERBOSITY"), "error"),
        ("TRANSFORMERS_VERBOSITY", os.environ.get("TRANSFORMERS_VERBOSITY"), "error"),
        ("CACHE_DIT_LOG_LEVEL", os.environ.get("CACHE_DIT_LOG_LEVEL"), "error"),
    )
    variables = [Variable(name, given, ours) for name, given, ours in chosen if given is None and ours is not None]
    if config.parallel.dp_size > 1:
        name, given = "CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES")
        variables.append(Variable(name, given, visible_devices(given, replica, config.parallel.num_ranks)))
    return variables


def _compiled_folder() -> str | None:
    """Where compiled code is kept; None where nothing can be: torch needs a folder as soon as it is imported."""
    folder = cache_root() / "torch_compile_cache"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return str(folder) if os.access(folder, os.W_OK | os.X_OK) else None


def _begin(set_up: Callable[[], None] | None = None) -> None:
    """What each rank does before it loads anything."""
    # Ctrl-C reaches the whole process group; the front decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, file=2)
    say_on_stderr()
    if set_up is not None:
        set_up()
    _leave_with_parent()
    _unname_lock()


def serve(
    channel: Channel,
    tensors: TensorWriter,
    config: EngineConfig,
    load: "Callable[[Heart], LoadedModel]",
    seat: Seat = ALONE,
) -> None:
    """Load a model and run commands until `Exit`; in a process of its own or in a thread.

    :param load: is given whom to tell how far it is.
    """
    try:
        with heartbeat(channel, "importing torch and diffusers") as heart:
            model = load(heart)
            heart("starting" if seat.num_ranks == 1 else "waiting for the other ranks")
            # Late, because it imports torch: a rank says that it lives before it does.
            from sgld.worker.rank import Rank

            rank = Rank(model, channel, tensors, config, seat)
        channel.send(Ready(model=model.info()))
        rank.run()
    except ModelError as error:
        channel.send(LoadFailed(message=str(error)))
    except ChannelClosed:
        logger.debug("the front is gone")
    finally:
        channel.close()


def visible_devices(visible: str | None, replica: int, num_gpus: int) -> str:
    """The GPUs of a replica, as CUDA reads them from its environment before it starts.

    :param visible: those that all replicas have; None: all of the machine.
    """
    places = range(replica * num_gpus, (replica + 1) * num_gpus)
    named = visible.split(",") if visible is not None else None
    return ",".join(map(str, places) if named is None else named[places.start : places.stop])


def say_on_stderr() -> None:
    """From here on what libraries and code of models print goes to stderr: stdout has the front's results only."""
    os.dup2(2, 1)


def _leave_with_parent() -> None:
    """End this process when its parent does, however that happens."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="parent-watcher", daemon=True).start()


def _give_way(niceness: int) -> None:
    """Let the front have a core when it wants one; each thread has a niceness of its own, which new ones inherit."""
    for thread in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, int(thread.name), niceness)


def _unname_lock() -> None:
    """The default of tqdm's lock is a named semaphore, which a rank that is killed leaves behind."""
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())
