from io import StringIO

import pytest
from rich.console import Console

from sgld.events import Progress, Queued, Restarted, Started
from sgld_cli.progress import Bars, Lines, Output, duration, speed, waiting

CAT = Output(2, 3, "a\ncat")


class Clock:
    """A clock that goes on by half a second whenever it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.5
        return self.now


def step(number: int, num_steps: int, eta_s: float | None = None) -> Progress:
    return Progress(request_id="r", step=number, num_steps=num_steps, eta_s=eta_s)


def later(number: int, num_steps: int) -> Progress:
    """A step of what follows the model."""
    return Progress(request_id="r", step=number, num_steps=num_steps, eta_s=None, stage="postprocess")


def lines_of(num_steps: int) -> list[str]:
    stream = StringIO()
    display = Lines(stream, Clock())
    display.show(CAT, Started(request_id="r"))
    for number in range(1, num_steps + 1):
        display.show(CAT, step(number, num_steps))
    display.end(CAT)
    return stream.getvalue().splitlines()


@pytest.mark.parametrize(("num_steps", "num_lines"), [(4, 4), (10, 10), (50, 10), (1000, 10), (1, 1)])
def test_plain_output_has_a_line_every_tenth(num_steps: int, num_lines: int) -> None:
    assert len(lines_of(num_steps)) == num_lines


def test_plain_line_names_the_output_its_speed_and_time_left() -> None:
    assert lines_of(4)[0] == "[2/3] a cat: step 1/4 (25 %), 2.00 it/s, ETA 1.5 s"


def test_what_follows_the_model_is_counted_anew() -> None:
    stream = StringIO()
    display = Lines(stream, Clock())
    for event in (step(1, 2), step(2, 2), later(1, 20), later(2, 20), later(20, 20)):
        display.show(CAT, event)
    assert [line.partition(", ")[0] for line in stream.getvalue().splitlines()] == [
        "[2/3] a cat: step 1/2 (50 %)",
        "[2/3] a cat: step 2/2 (100 %)",
        "[2/3] a cat: post-processing 2/20 (10 %)",
        "[2/3] a cat: post-processing 20/20 (100 %)",
    ]


def test_bars_say_what_they_count() -> None:
    bars = Bars(Console(file=StringIO(), force_terminal=True, width=120), Clock())
    with bars.progress:
        for event, shown in ((step(2, 2), "step 2/2"), (later(1, 8), "post-processing 1/8")):
            bars.show(CAT, event)
            (task,) = bars.progress.tasks
            assert task.fields["status"].startswith(shown)
            assert (task.completed, task.total) == (event.step, event.num_steps)


def test_plain_output_shows_waiting_and_restarts() -> None:
    stream = StringIO()
    display = Lines(stream)
    display.show(CAT, Queued(request_id="r", position=0, eta_s=None))
    display.show(CAT, Queued(request_id="r", position=3, eta_s=90.0))
    display.show(CAT, Restarted(request_id="r", attempt=2))
    assert stream.getvalue().splitlines() == [
        "[2/3] a cat: queued, 3 before it, done in 1:30",
        "[2/3] a cat: a rank was lost; attempt 2",
    ]


def test_predicted_time_left_comes_before_the_estimate() -> None:
    assert speed(step(1, 4, eta_s=20.0), 1.0) == "1.00 it/s, ETA 20 s"
    assert speed(step(1, 4, eta_s=20.0), 0.0) == "ETA 20 s"
    assert speed(step(1, 4), 0.0) == ""


def test_durations_and_queue() -> None:
    assert [duration(seconds) for seconds in (0.44, 12.3, 187.0)] == ["0.4 s", "12 s", "3:07"]
    assert waiting(Queued(request_id="r", position=0, eta_s=None)) == "queued, next"


def test_long_prompts_are_cut() -> None:
    assert len(Output(1, 1, "x" * 100).label) == 40
    assert Output(1, 1, "").label == "output"


def test_bars_show_what_runs_and_results_go_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    stream = StringIO()
    bars = Bars(Console(file=stream, force_terminal=True, width=120), Clock())
    with bars.progress:
        bars.show(CAT, Queued(request_id="r", position=2, eta_s=None))
        bars.show(CAT, Started(request_id="r"))
        bars.show(CAT, step(1, 4))
        bars.progress.refresh()
        bars.result("outputs/cat.png")
        bars.note("a note")
        bars.end(CAT)
        assert not bars.progress.tasks
    shown = stream.getvalue()
    assert "[2/3] a cat" in shown
    assert "step 1/4, 2.00 it/s" in shown
    assert capsys.readouterr() == ("outputs/cat.png\n", "a note\n")
