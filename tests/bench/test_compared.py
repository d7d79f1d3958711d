from typing import Any

import numpy as np
import pytest
import settling
from compare import relative_error
from compared import ratio, text, usual_s
from rows import CHOSEN, NUM_STAGGERED, ROWS
from settling import Known, Settling, is_compiled, is_done, is_steady, known_of, unsettled
from sides import busy


def measured(row: str, side: str, warm_s: list[float], step_ms: list[float]) -> dict[str, Any]:
    notes = {"step_tflop": 60.0, "roof_tflops": 800.0} if side == "eager" else {}
    return {
        "row": row,
        "side": side,
        "first_s": 1.0,
        "warm_s": warm_s,
        "step_ms": step_ms,
        "launch_us": 10.0,
        "notes": notes,
    }


def report() -> dict[str, Any]:
    """A run in which sgld is twice as fast."""
    return {
        "command": "python bench/compare.py",
        "machine": "H200, Python 3.12",
        "versions": {"torch": "2"},
        "options": {},
        "starts": [],
        "models": [],
        "skipped": ["sdxl-1024"],
        "problems": ["flux, http: code 1: Traceback\nKeyError: 'x'"],
        "measured": [
            measured("flux-1024", "eager", [5.0, 4.0, 9.0], [150.0]),
            measured("flux-1024", "sgld-early", [3.0], [90.0]),
            measured("flux-1024", "sgld", [2.0, 2.5, 2.6], [75.0]),
            measured("flux-1024-http", "http", [2.7], []),
        ],
        "ticks": [{"row": "flux-1024", "lost": 0.02, "variants": {"graph": 84}}],
        "pictures": {"flux-1024": {"sgld to sgld-exact": 0.01}},
    }


def test_ratios_are_of_medians_and_stand_beside_what_was_wanted() -> None:
    lines = text(report()).splitlines()

    row = next(line for line in lines if line.startswith("| flux 1024x1024, 28 steps | 10.0"))
    assert [cell.strip() for cell in row.split("|")[3:]] == (
        ["5.000", "", "2.500", "1.00", "3.000", "2.00x", "1.25x", "2.00x", "1.3x", "", "1x", ""]
    )


def test_shares_of_the_roof_are_those_of_steps() -> None:
    assert "| flux 1024x1024, 28 steps | 60.0 | 150.0 ms, 50% |  | 75.0 ms, 100% | 72% | 2.0% | graph 84 |" in text(
        report()
    )


def test_time_outside_of_forwards_is_that_between_the_first_and_the_last() -> None:
    args = {"requests": ["a"], "cost_key": "transformer.forward(1)", "variant": "graph"}
    other = {"requests": ["a"], "cost_key": "vae.decode(1)"}
    ticks = [{"ts": 0, "dur": 40, "args": args}, {"ts": 50, "dur": 50, "args": args}]
    ticks += [{"ts": 500, "dur": 9, "args": other}, {"ts": 90, "dur": 9, "args": args | {"requests": ["b"]}}]

    assert busy(ticks, ["a"], "transformer") == {"lost": pytest.approx(0.1), "variants": {"graph": 2}}


def test_rounds_are_steady_when_three_took_as_long_as_one_another() -> None:
    assert is_steady([[9.0, 9.0], [1.0, 2.0], [1.02, 2.0], [1.0, 2.05]])
    assert not is_steady([[1.0, 2.0], [1.0, 2.0], [1.0, 1.7]])
    assert not is_steady([[1.0, 2.0], [1.0, 2.0]])


def test_what_was_measured_before_compilation_counts_where_nothing_came_after_it() -> None:
    early = report() | {"measured": [m for m in report()["measured"] if m["side"] != "sgld"]}

    row = next(line for line in text(early).splitlines() if line.startswith("| flux 1024x1024, 28 steps | 10.0"))
    assert [cell.strip() for cell in row.split("|")[3:9]] == ["5.000", "", "3.000", "1.00", "3.000", "1.67x"]
    assert "Left out, as there was no time for it: sdxl-1024." in text(early)


def test_denoisers_are_compiled_when_they_say_so_not_when_they_are_going_to_be() -> None:
    aside = "bf16; compiled by a process of its own once it has computed for 60 s"
    assert not is_compiled({"vae": "bf16", "transformer": aside})
    assert is_compiled({"transformer": f"{aside}; compiled"})
    assert is_compiled({"transformer": f"{aside}; some calls run without compilation: x"})
    assert is_compiled({"unet": "fp32; not compiled: few weights"})


def test_code_is_all_there_when_none_is_on_its_way_and_none_came_meanwhile() -> None:
    said = {"transformer": "bf16; compiled by a process of its own; compiled"}

    assert is_done(Known(said, num_changes=2), Known(said, num_changes=2))
    assert not is_done(Known(said, num_changes=2), Known(said, num_changes=4))
    assert not is_done(Known(said, is_compiling=True), Known(said, is_compiling=True))
    assert known_of(
        said, [{"is_compiling": False, "num_code_changes": 2}, {"is_compiling": True, "num_code_changes": 1}]
    ) == (Known(said, is_compiling=True, num_changes=3))


async def test_singles_are_settled_once_three_rounds_took_as_long_and_no_code_is_left() -> None:
    changes, took = [0, 0, 0, 1, 2], [5.0, 1.0, 1.0, 1.0, 1.0, 1.0]

    async def one(request: dict[str, Any]) -> float:
        return took.pop(0)

    async def known() -> Known:
        return Known({}, num_changes=changes.pop(0) if changes else 2)

    assert await Settling([ROWS["flux-256"]], {}, 60.0, one, known).singles()
    assert took == [1.0]


async def test_staggered_requests_are_settled_once_they_bring_no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settling, "_LOOK_S", 0.0)
    ran: list[str] = []
    code = [Known({})]

    async def one(request: dict[str, Any]) -> float:
        pytest.fail("code is read soonest where there are no requests")

    async def together(first: int) -> None:
        ran.append("together")
        if ran.count("together") == 1:
            code[:] = [Known({}, num_changes=2), Known({}, is_compiling=True, num_changes=1)]

    async def known() -> Known:
        ran.append("compiling" if code[-1].is_compiling else "known")
        return code.pop() if len(code) > 1 else code[0]

    assert await Settling([ROWS["flux-256-staggered"]], {}, 60.0, one, known).staggered(together)
    assert ran == ["known", "together", "compiling", "known", "together", "known"]


async def test_what_has_no_time_to_settle_says_so() -> None:
    async def never(*_: Any) -> Any:
        pytest.fail("there is no time")

    assert not await Settling([ROWS["flux-256"]], {}, 0.0, never, never).singles()
    assert not await Settling([ROWS["flux-256-staggered"]], {}, 0.0, never, never).staggered(never)


def test_what_was_measured_while_code_came_is_marked() -> None:
    compiling = Known({}, is_compiling=True)
    note = unsettled(Known({}), compiling, is_settled=True)
    assert note == unsettled(compiling, compiling, is_settled=True) == {"unsettled": "code was being compiled"}
    assert unsettled(Known({}), Known({}), is_settled=True) == {}
    assert unsettled(Known({}), Known({}), is_settled=False)

    found = report()
    found["measured"][2]["notes"] = note
    line = next(line for line in text(found).splitlines() if line.startswith("| flux 1024x1024, 28 steps | 10.0"))
    assert "| 2.500 † |" in line
    assert "| 2.00x † |" in line
    assert "†" not in text(report())


def test_a_request_of_usual_length_is_computed_of_steps_and_of_what_is_no_step() -> None:
    row = ROWS["wan-81f-480p"]
    assert usual_s(measured(row.name, "sgld", [7.4], [1000.0]), row) == pytest.approx(7.4 + 44)

    found = report() | {"measured": [measured(row.name, side, [9.0], [1000.0]) for side in ("eager", "sgld")]}
    assert "| wan 81x480x832, 6 steps | 50 | 53.00 |  | 53.00 | 1.00x | 1.35x |" in text(found)
    assert "computed" not in text(report())


def test_problems_are_told_by_their_last_line() -> None:
    assert "- flux, http: KeyError: 'x'" in text(report())


def test_a_side_that_is_missing_has_no_ratio() -> None:
    assert np.isnan(ratio(None, measured("flux-256", "sgld", [1.0], []), "warm_s"))


def test_staggered_requests_have_25_steps_in_the_mean() -> None:
    row = ROWS["sdxl-512-staggered"]

    steps = [row.steps_of(index) for index in range(NUM_STAGGERED)]

    assert (min(steps), max(steps)) == (20, 30)
    assert sum(steps) / len(steps) == pytest.approx(row.num_steps, abs=0.5)


def test_each_row_that_was_to_reach_something_is_measured_by_default() -> None:
    assert {"sdxl-1024", "flux-256-http", "wan-81f-480p"} <= set(CHOSEN)
    assert "z-image-512" not in CHOSEN


def test_the_error_of_pictures_is_relative_to_their_values() -> None:
    picture = np.full((1, 2, 2, 3), 255, np.uint8)

    assert relative_error(picture, picture) == 0
    assert relative_error(np.zeros_like(picture), picture) == pytest.approx(2.0)
