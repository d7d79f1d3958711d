from pathlib import Path

import msgspec
import pytest
import ticks

from sgld.engine.trace import Trace
from sgld.messages import CallInfo, CallKind, Ran, TickMode
from sgld.parallel import Ranks


def ran(
    trace: Trace,
    request: str,
    start_s: float,
    end_s: float,
    kind: CallKind = "denoise",
    mode: TickMode = "single",
    lead_s: float = 0.0,
    ranks: Ranks | None = None,
) -> None:
    """A tick of one call of a request."""
    call = CallInfo(
        id=1,
        request_id=request,
        kind=kind,
        component=kind,
        merge_key=None,
        cost_key=kind,
        rows=1,
        step_index=0,
        num_steps=2,
    )
    elapsed_s, started_ns = end_s - start_s, round(1e9 * start_s)
    told = Ran(call_ids=(1,), cost_key=kind, rows=1, elapsed_s=elapsed_s, is_timed=True, mode=mode, variant="eager")
    trace.ran(msgspec.structs.replace(told, started_ns=started_ns, lead_s=lead_s, ranks=ranks), [call])


def two_requests(path: Path) -> None:
    """The second one comes while the first one decodes; nobody is there between 2 and 5."""
    trace = Trace(path)
    trace.span("r1-0", "queued", 0.0, 0.0)
    ran(trace, "r1-0", 0.0, 1.0)
    ran(trace, "r1-0", 1.1, 2.0, "decode")
    trace.span("r2-0", "queued", 5.0, 5.0)
    ran(trace, "r2-0", 5.0, 6.0)
    ran(trace, "r2-0", 6.1, 9.0, mode="proof")
    ran(trace, "r2-0", 9.0, 10.0)
    trace.close()


def test_what_passes_until_the_next_forward_counts_where_there_is_work(tmp_path: Path) -> None:
    two_requests(tmp_path / "trace")

    found = {key: elapsed_s for key, _, _, elapsed_s in ticks.forwards(ticks.read(tmp_path / "trace"))}

    assert found["denoise"] == pytest.approx((1.1 + 1.1 + 1.0) / 3)
    assert found["decode"] == pytest.approx(0.9)


def test_only_what_began_when_all_was_warm_is_looked_at(tmp_path: Path) -> None:
    two_requests(tmp_path / "trace")

    assert [key for key, *_ in ticks.forwards(ticks.read(tmp_path / "trace"), since_s=5.0)] == ["denoise"]


def test_trace_that_has_no_end_is_read_up_to_there(tmp_path: Path) -> None:
    two_requests(tmp_path / "trace")
    whole = (tmp_path / "trace").read_text()
    (tmp_path / ".cut.tmp").write_text(whole[: whole.index('"ts":9000000')])

    found = ticks.read(tmp_path / "cut")

    assert len(found.ticks) == 4
    assert found.arrived_s == {"r1-0": 0.0, "r2-0": 5.0}


def test_what_follows_is_decided_when_its_launch_begins(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace")
    ran(trace, "r1-0", 0.0, 1.0)
    ran(trace, "r1-0", 1.0, 2.0, lead_s=0.2)
    ran(trace, "r1-0", 2.0, 3.0, "decode", lead_s=0.3)
    ran(trace, "r2-0", 3.0, 4.0, lead_s=0.1)
    trace.close()

    assert ticks.leads_s(ticks.read(tmp_path / "trace")) == pytest.approx({"denoise": 0.25, "decode": 0.1})


def test_what_comes_to_an_idle_device_says_nothing_of_when_the_next_one_is_chosen(tmp_path: Path) -> None:
    two_requests(tmp_path / "trace")

    assert ticks.leads_s(ticks.read(tmp_path / "trace")) == {}


def side_by_side(path: Path) -> None:
    """One has all ranks until another one comes; then each has its own."""
    trace = Trace(path)
    trace.span("r1-0", "queued", 0.0, 0.0)
    ran(trace, "r1-0", 0.0, 0.5, ranks=Ranks(0, 2))
    ran(trace, "r1-0", 0.5, 1.0, ranks=Ranks(0, 2), lead_s=0.2)
    trace.span("r2-0", "queued", 0.5, 0.5)
    ran(trace, "r2-0", 1.0, 1.5, "encode", ranks=Ranks(0, 1))
    ran(trace, "r1-0", 1.0, 3.0, ranks=Ranks(1, 1))
    ran(trace, "r2-0", 1.51, 2.5, ranks=Ranks(0, 1))
    ran(trace, "r1-0", 3.03, 4.0, "decode", ranks=Ranks(0, 1))
    trace.close()


def test_forwards_are_those_of_the_ranks_that_shared_them(tmp_path: Path) -> None:
    side_by_side(tmp_path / "trace")

    trace = ticks.read(tmp_path / "trace")
    found = {key: elapsed_s for key, _, _, elapsed_s in ticks.forwards(trace)}

    assert trace.num_ranks == 2
    assert found == pytest.approx(
        {"denoise on 2 ranks": 0.5, "denoise": (2.0 + 0.99) / 2, "encode": 0.5, "decode": 0.97}
    )
    assert ticks.leads_s(trace) == pytest.approx({"denoise": 0.2})


def test_gap_is_what_passed_since_the_end_of_what_a_forward_waited_for(tmp_path: Path) -> None:
    """Nothing waits for what is launched ahead, while all ranks share a forward."""
    side_by_side(tmp_path / "trace")

    found = ticks.gaps_s(ticks.read(tmp_path / "trace"))

    assert [ranks for ranks, _ in found] == [Ranks(0, 1), Ranks(0, 1)]
    assert [seconds for _, seconds in found] == pytest.approx([0.01, 0.03])


def test_there_is_no_trace(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ticks.read(tmp_path / "trace")
