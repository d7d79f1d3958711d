import logging

import pytest
import torch

from sgld.worker.digests import Digests
from sgld.worker.verdicts import MAX_REFUSALS, Proof, Verdicts
from worker.requests import Doubling, call_of

KEYS = Digests()


def test_proofs_add_up() -> None:
    verdicts, call = Verdicts(), call_of(Doubling(), torch.ones(1, 2))
    one, other = ((0, 0), "value"), ((0, 1), "value")
    assert verdicts.covered("key") == set()
    verdicts.accept("key", call, {one})
    verdicts.accept("key", call, {other})
    assert verdicts.covered("key") == {one, other}
    assert verdicts.modes == {"transformer": "merge"}


def test_one_forward_in_a_thousand_is_due() -> None:
    proof = Proof(set())
    assert [index for index in range(1, 2001) if proof.is_due()] == [1000, 2000]


def test_refused_key_is_no_key() -> None:
    verdicts, call = Verdicts(), call_of(Doubling(), torch.ones(1, 2))
    key = verdicts.merge_key(call, KEYS)
    assert key is not None
    verdicts.accept(key, call, set())
    verdicts.refuse(key, call, "it differs")
    assert verdicts.merge_key(call, KEYS) is None
    assert not verdicts.proved
    assert verdicts.merge_key(call_of(Doubling(), torch.ones(1, 3)), KEYS) is not None


@pytest.mark.parametrize("is_proved", [True, False])
def test_form_with_refusals_only_is_given_up(is_proved: bool, caplog: pytest.LogCaptureFixture) -> None:
    verdicts = Verdicts()
    if is_proved:
        verdicts.accept("another", call_of(Doubling(), torch.ones(1, 99)), set())
    for size in range(1, MAX_REFUSALS + 1):
        call = call_of(Doubling(), torch.ones(1, size))
        key = verdicts.merge_key(call, KEYS)
        assert key is not None
        verdicts.refuse(key, call, "it differs")
    is_tried = verdicts.merge_key(call_of(Doubling(), torch.ones(1, 50)), KEYS) is not None
    assert is_tried is is_proved
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_call_with_a_state_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    verdicts = Verdicts()
    for _ in range(3):
        call = call_of(Doubling(), torch.ones(1, 2), generator=torch.Generator())
        assert verdicts.merge_key(call, KEYS) is None
    assert caplog.messages == [
        "transformer.forward is interleaved, not merged: "
        "argument (1, 'generator') is a Generator, which may have a state"
    ]


def test_pinned_traits_change_the_keys_of_calls_that_wait(caplog: pytest.LogCaptureFixture) -> None:
    verdicts = Verdicts()
    calls = [call_of(Doubling(), torch.ones(1, 2), ids=torch.full((1, 2), n)) for n in (1, 2)]
    keys = [verdicts.merge_key(call, KEYS) for call in calls]
    assert keys[0] == keys[1]
    verdicts.pin(calls[0], {((1, "ids"), "value")}, "it differs")
    pinned = [verdicts.merge_key(call, KEYS) for call in calls]
    assert pinned[0] != pinned[1]
    assert None not in pinned
    assert caplog.messages == ["transformer.forward is merged only with equal value of ids: it differs"]
