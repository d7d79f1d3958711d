import msgspec
import pytest

from sgld.errors import DeadlineImpossible, EngineClosed, InvalidRequest, ModelError, QueueFull, RankLost, SgldError
from sgld.events import Cancelled, Failed
from sgld.sampling_params import SamplingParams
from sgld.server.errors import from_event, from_sgld, from_validation


@pytest.mark.parametrize(
    ("error", "status", "code", "param"),
    [
        (InvalidRequest("no", "size"), 400, "invalid_value", "size"),
        (DeadlineImpossible("no"), 400, "deadline_impossible", "deadline_s"),
        (QueueFull("no"), 429, "queue_full", None),
        (EngineClosed("no"), 503, "shutting_down", None),
        (ModelError("no"), 503, "model_error", None),
        (RankLost("no"), 500, "rank_lost", None),
    ],
)
def test_errors_of_the_engine(error: SgldError, status: int, code: str, param: str | None) -> None:
    answer = from_sgld(error)

    assert (answer.status, answer.code, answer.body.error.param) == (status, code, param)


@pytest.mark.parametrize(("predicted_s", "header"), [(None, "5"), (0.2, "1"), (7.3, "8"), (1000.0, "120")])
def test_a_full_queue_says_when_there_is_room(predicted_s: float | None, header: str) -> None:
    assert from_sgld(QueueFull("no", predicted_s)).headers == {"retry-after": header}


@pytest.mark.parametrize(
    ("event", "status"),
    [
        (Failed(request_id="r", code="invalid_request", message="no"), 400),
        (Failed(request_id="r", code="model_error", message="no"), 503),
        (Failed(request_id="r", code="pipeline_failed", message="no"), 500),
        (Failed(request_id="r", code="anything", message="no"), 500),
        (Cancelled(request_id="r"), 409),
    ],
)
def test_ends_that_are_no_results_are_not_worth_another_try(event: Failed | Cancelled, status: int) -> None:
    answer = from_event(event)

    assert (answer.status, answer.headers) == (status, {"x-should-retry": "false"})


@pytest.mark.parametrize(
    ("given", "param"), [({"width": "a"}, "width"), ({"image_path": [1]}, "image_path[0]"), (3, None)]
)
def test_wrong_types_name_their_field(given: object, param: str | None) -> None:
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.convert(given, SamplingParams)

    error = from_validation(caught.value).body.error
    assert (error.param, "`" in error.message) == (param, False)
