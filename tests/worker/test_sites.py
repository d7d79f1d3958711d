from sgld.worker.sites import Site


def schedule(site: Site, num_calls: int) -> str:
    """C for each call that is computed, s for one that is skipped."""
    made = ""
    for _ in range(num_calls):
        skips = site.may_skip
        (site.skipped if skips else site.computed)()
        made += "s" if skips else "C"
    return made


def test_warm_up_is_computed_and_then_one_call_in_so_many() -> None:
    assert schedule(Site(warmup_steps=3, max_skips=2), 10) == "CCCssCssCs"
    assert schedule(Site(warmup_steps=1, max_skips=1), 5) == "CsCsC"


def test_skipped_calls_are_counted() -> None:
    site = Site(warmup_steps=1, max_skips=3)
    schedule(site, 6)
    assert site.skips.num == 4
