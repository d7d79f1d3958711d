from budget import Budget


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_what_takes_as_long_as_before_is_done_while_it_fits() -> None:
    clock, done = _Clock(), []
    for one in Budget(10, clock).as_many(range(9)):
        clock.now += 3
        done.append(one)
    assert done == [0, 1, 2]


def test_the_first_is_done_in_any_case_and_all_without_a_limit() -> None:
    assert list(Budget(0).as_many(range(3))) == [0]
    assert list(Budget(None).as_many(range(3))) == [0, 1, 2]


def test_parts_share_what_is_left() -> None:
    clock = _Clock()
    budget = Budget(12, clock)
    clock.now = 2
    assert budget.share(1, 4) == 2.5
    assert Budget(None).share(1, 4) is None
