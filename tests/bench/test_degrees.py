import json
from dataclasses import replace
from pathlib import Path

import degrees
import msgspec
import policies
import pytest

from sgld.engine.cost import LearnedTime, at_degree
from sgld.engine.demand import CallClass, Profile
from sgld.engine.learned import Learned

TABLE = degrees.read(degrees.TABLE)


@pytest.mark.parametrize("way", ["sp 4", "dp 4", "elastic"])
def test_every_request_is_played_to_its_end(way: str) -> None:
    found = degrees.point(TABLE, 0.2, way, 60)
    assert found is not None
    assert set(found.p95_by_class) == {"512²", "768²", "1024²", "1536²"}
    assert 0 < found.mean_s <= found.p95_s


def test_where_ranks_are_chosen_a_lone_request_is_as_fast_as_the_fastest_way() -> None:
    large = replace(TABLE, mix=[replace(TABLE.mix[-1], share=1.0)])
    elastic, shared = (degrees.point(large, 0.01, way, 12) for way in ("elastic", "sp 4"))
    assert elastic is not None
    assert shared is not None
    assert elastic.mean_s < 1.3 * shared.mean_s, "it tries one, two and four GPUs first"


def test_report_of_a_replay_is_a_table_of_whole_requests(tmp_path: Path) -> None:
    def profile(side: int, num_steps: int) -> Profile:
        step: CallClass = ("denoise", f"transformer.forward({side}x64)", 1)
        ends: list[tuple[CallClass, int]] = [(("encode", "text(8)", 1), 1), (("decode", f"vae({side}x8)", 1), 1)]
        return Profile(repr((side, side, 1, num_steps, None)), None, ((step, num_steps), *ends))

    mix = policies.mix_of("C", 0.5)
    times: list[LearnedTime] = [("text(8)", 1, "eager", 0.02)]
    for of in mix:
        step, decode = f"transformer.forward({of.side}x64)", f"vae({of.side}x8)"
        times += [(step, 1, "graph", 0.1), (at_degree(step, 2), 1, "graph", 0.06), (decode, 1, "eager", 0.05)]
    learned = Learned(times=tuple(times), profiles=tuple(profile(of.side, of.num_steps) for of in mix))
    report = {"mix": "C", "steps": 0.5, "num_ranks": 4, "gap_s": 0.002, "leads_s": {}}
    alone = {"lone_s": {of.name: 0.02 + 0.05 + 0.002 + of.num_steps * 0.06 + 0.3 for of in mix}, "alone_s": {}}
    (tmp_path / "r.json").write_text(json.dumps(report | alone | {"learned": msgspec.to_builtins(learned)}))

    table = degrees.read(tmp_path / "r.json")

    assert [of.num_steps for of in table.mix] == [20, 20, 25, 35]
    assert table.mix[0].tick_s(1, 1, 2) == pytest.approx(0.06)
    assert (table.gaps_s, table.modelled[0]) == ((0.002,), "512² on 4 (as on one)")
    # A gap before each forward of two of the ranks.
    assert table.mix[0].rest_s == pytest.approx(0.3 - 10 * 0.002)
