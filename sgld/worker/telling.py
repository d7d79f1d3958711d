"""What a rank tells of its tasks' calls: of one tick together, and of what its device isn't done with yet later."""

from collections.abc import Callable, Sequence

from sgld.messages import CallInfo, Idle, Launched, Pending, Ran, Stepped, TickMode
from sgld.parallel import Ranks
from sgld.worker.ahead import LOOK_S, Ahead, News
from sgld.worker.calls import Call
from sgld.worker.executor import Tick
from sgld.worker.task import Task


class Telling:
    """What is to be told, in the order in which it happened.

    :param emit: told what happened, in one message: each wakes the front, and takes as long as a handover to a task.
    :param now_ns: the clock of the host.
    """

    def __init__(self, emit: Callable[[Sequence[News]], None], now_ns: Callable[[], int]) -> None:
        self._emit = emit
        self._ahead = Ahead(now_ns)
        self._news: list[News] = []
        """What happened in this tick."""

    @property
    def is_ahead(self) -> bool:
        """Whether ticks are on their way of which nothing was told."""
        return len(self._ahead) > 0

    def hold(self, is_interrupted: Callable[[float], bool]) -> bool:
        """Wait as long as the device has enough to do; whether something came up until then.

        :param is_interrupted: whether something came up within so many seconds.
        """
        while not is_interrupted(min(spare_s := self._ahead.spare_s(), LOOK_S)):
            self.look()
            if not spare_s:
                return False
        return True

    def look(self) -> None:
        """Tell what the device has done by now."""
        self._note_over()
        self.tell()

    def wait(self) -> None:
        """Before a tick is launched: wait until the device isn't further behind than it may be."""
        self._ahead.wait()
        self.look()

    def tell(self) -> None:
        """Tell what happened."""
        if self._news:
            news, self._news = self._news, []
            self._emit(news)

    def pending(self, call: CallInfo) -> None:
        """A call waits."""
        self._news.append(Pending(call=call))

    def free(self, ranks: Ranks) -> None:
        """Some ranks have nothing to do: told with the calls that follow, which have the choice of these by that."""
        self._news.append(Idle(first_rank=ranks.first))

    def ran(self, calls: Sequence[Call], tick: Tick, ranks: Ranks | None = None) -> None:
        """A tick was launched.

        :param ranks: those that ran it, where that is chosen for each forward.
        """
        mode: TickMode = "proof" if tick.is_proof else "merged" if tick.is_merged else "single"
        call_ids = tuple(call.id for call in calls)
        ran = Ran(
            call_ids=call_ids,
            cost_key=tick.cost_key,
            rows=sum(call.rows for call in calls),
            elapsed_s=0.0,
            is_timed=tick.is_timed,
            mode=mode,
            variant=tick.variant,
            num_reused=tick.num_reused,
            ranks=ranks,
        )
        self._ahead.add(ran, tick.span)
        self._note_over()
        if self._ahead:
            self._news.append(Launched(call_ids=call_ids))

    def stepped(self, task: Task) -> None:
        """A task is a step further."""
        is_of_tick = bool(self._news)
        step = Stepped(
            request_id=task.request_id,
            step=task.step,
            num_steps=task.num_steps,
            stage=task.stage,
            num_skipped_calls=task.skips.num,
        )
        if self._ahead.stepped(step):
            return
        self._news.append(step)
        if not is_of_tick:
            self.tell()  # nothing ran for this step: the tick may be long

    def ended(self, tell_end: Callable[[], None]) -> None:
        """A task has ended: that doesn't wait for the rest of the tick, and comes after all else about it."""
        if not self._ahead.ended(tell_end):
            self.tell()
            tell_end()

    def _note_over(self) -> None:
        for tick in self._ahead.over():
            self._news += [tick.ran, *tick.steps]
            for tell_end in tick.ends:
                self.tell()
                tell_end()
