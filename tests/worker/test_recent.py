from sgld.worker.recent import MAX_KEYS, Recent


def test_only_what_was_used_last_is_kept() -> None:
    recent = Recent[int]()
    for number in range(MAX_KEYS):
        recent[str(number)] = number
    assert recent.recall("0") == 0
    recent["new"] = -1
    assert len(recent) == MAX_KEYS
    assert (recent.recall("0"), recent.recall("1"), recent.recall("2"), recent.recall("new")) == (0, None, 2, -1)
