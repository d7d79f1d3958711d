import degrees
import pytest
from policies import MIXES


@pytest.mark.parametrize("way", degrees.WAYS)
def test_every_request_is_played_to_its_end(way: str) -> None:
    known = degrees.read(degrees.TABLE)
    mix = [degrees.Shared(of.side, of.num_steps, of.share, known) for of in MIXES["C"]]
    found = degrees.point(mix, 0.2, way, 60)
    assert found is not None
    assert set(found.p95_by_class) == {"512²", "768²", "1024²", "1536²"}
    assert 0 < found.mean_s <= found.p95_s


def test_where_ranks_are_chosen_a_lone_request_is_as_fast_as_the_fastest_way() -> None:
    known = degrees.read(degrees.TABLE)
    large = degrees.Shared(1536, 35, 1.0, known)
    elastic, shared = (degrees.point([large], 0.01, way, 12) for way in ("elastic", "sp 4"))
    assert elastic is not None
    assert shared is not None
    assert elastic.mean_s < 1.3 * shared.mean_s, "it tries one, two and four GPUs first"
