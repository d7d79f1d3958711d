"""Pipeline classes of diffusers, unmodified: four requests at once give the pictures of four plain calls."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from pipelines import BUILDERS, SHARING, build

from sgld.testing import run_together
from worker.matrix import TABLE, Case, difference, table, together
from worker.requests import picture, request, requests

# Combined pipelines use arguments that diffusers has deprecated.
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")]

# For float32; the largest difference seen is 1e-6.
MERGED_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def cases(request: pytest.FixtureRequest) -> Iterator[list[Case]]:
    """Those that were run; with --write-table they become the table."""
    ran: list[Case] = []
    yield ran
    if request.config.getoption("--write-table", default=False):
        TABLE.write_text(table(ran, TABLE.read_text()))


@pytest.fixture(scope="module", params=BUILDERS)
def case(request: pytest.FixtureRequest, cases: list[Case]) -> Case:
    cases.append(Case(request.param))
    return cases[-1]


def test_interleaved_requests_are_bit_identical_to_plain_calls(case: Case) -> None:
    report, _ = together(case.pipeline, case.requests(), merge=False)

    assert difference(report.outputs, case.plain) == 0
    assert (report.merged_calls, report.largest_batch) == (0, 1)
    assert report.mode in ("interleave", "exclusive")
    case.seen["interleaved"] = "identical"


def test_merged_requests_equal_plain_calls(case: Case) -> None:
    report, largest_batch = together(case.pipeline, case.requests())

    error = difference(report.outputs, case.plain)
    assert error <= MERGED_TOLERANCE
    assert (report.mode == "merge") == case.entry.merges
    # The others say why they don't; they may share forwards until they turn out to be exclusive.
    assert largest_batch >= 3 or not case.entry.merges
    assert case.entry.merges == (not case.entry.because)
    case.seen |= {"merged": f"{error:.0e}" if error else "0", "batch": str(largest_batch), "mode": report.mode}


def test_requests_of_two_sizes_equal_plain_calls(case: Case) -> None:
    if not case.entry.other_size:
        pytest.skip("it has one size only")
    calls = case.requests(num_other_size=2)[2:]
    expected = case.plain[:2] + case.run_plain(calls)

    report, largest_batch = together(case.pipeline, case.requests(num_other_size=2))

    error = difference(report.outputs, expected)
    assert error <= MERGED_TOLERANCE
    assert largest_batch >= 2 or not case.entry.merges
    case.seen["two sizes"] = f"{error:.0e}" if error else "0"


def test_pictures_tell_prompts_and_seeds_apart(case: Case) -> None:
    """Else the tests above would pass with mixed up requests."""
    changes: list[dict[str, Any]] = [
        {},
        {"prompt": "the blue dog under a hill"},
        {"generator": torch.Generator().manual_seed(7)},
    ]
    latent = {"output_type": case.kwargs.get("output_type", "latent")}
    first, prompt, seed = case.run_plain([request(case.name, 0, case.kwargs, **latent, **c) for c in changes])

    assert float((first - prompt).abs().max()) > 5 * MERGED_TOLERANCE
    assert float((first - seed).abs().max()) > 0.1


def test_pipeline_has_its_row_in_the_docs(case: Case) -> None:
    [row] = [line for line in TABLE.read_text().splitlines() if line.startswith(f"| {case.title} | ")]
    cells = [cell.strip() for cell in row.split("|")]
    assert (cells[2], cells[-2]) == (case.entry.kind, case.entry.because)
    assert cells[-3] == ("shared" if case.shares_tokens else "")
    assert case.shares_tokens == (case.name in SHARING)


def test_docs_have_no_other_rows() -> None:
    assert TABLE.read_text().count("\n| `") == len(BUILDERS)


def test_merging_is_not_repeated_for_requests_alone() -> None:
    pipeline, kwargs = build("flux")
    report = run_together(pipeline, [request("flux", 0, kwargs)])

    assert (report.merged_calls, report.largest_batch) == (0, 1)
    assert len(report.outputs) == 1


def test_no_calls_give_no_outputs() -> None:
    pipeline, _ = build("flux")
    assert run_together(pipeline, []).outputs == []


def test_bad_argument_is_the_output_of_its_request_only() -> None:
    pipeline, kwargs = build("flux")
    plain = [picture(pipeline(**call)) for call in requests("flux", kwargs)]
    calls = requests("flux", kwargs)
    calls[1]["colour"] = "red"
    calls[2]["prompt"] = None

    outputs = run_together(pipeline, calls).outputs

    assert isinstance(outputs[1], TypeError)
    assert isinstance(outputs[2], ValueError)
    for index in (0, 3):
        torch.testing.assert_close(picture(outputs[index]), plain[index], rtol=0, atol=MERGED_TOLERANCE)


class Spoiled(FluxTransformer2DModel):  # type: ignore[misc]
    """A denoiser that fails when any row of its batch is marked."""

    batches: list[int]

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        self.batches.append(len(hidden_states))
        if bool((hidden_states == MARK).any()):
            raise RuntimeError("a row is marked")
        return super().forward(hidden_states=hidden_states, **kwargs)


MARK = 1234.5


def spoil_at(step: int) -> Any:
    """A callback that marks the latents after a step."""

    def callback(_pipeline: Any, index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": torch.full_like(tensors["latents"], MARK)} if index == step else {}

    return callback


def test_exception_inside_a_merged_forward_is_the_output_of_the_culprit_only() -> None:
    pipeline, kwargs = build("flux")
    steps = {"num_inference_steps": 6}
    plain = [picture(pipeline(**request("flux", index, kwargs, **steps))) for index in range(4)]
    pipeline.transformer.__class__, pipeline.transformer.batches = Spoiled, []
    calls = [request("flux", index, kwargs, **steps) for index in range(4)]
    calls[1]["callback_on_step_end"] = spoil_at(3)

    report = run_together(pipeline, calls)

    assert isinstance(report.outputs[1], RuntimeError)
    assert str(report.outputs[1]) == "a row is marked"
    for index in (0, 2, 3):
        torch.testing.assert_close(picture(report.outputs[index]), plain[index], rtol=0, atol=MERGED_TOLERANCE)
    assert report.mode == "merge"
    # After the merged forward that failed each of the four alone; then the other three together.
    batches = ",".join(map(str, pipeline.transformer.batches))
    assert "4,1,1,1,1,3" in batches


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("name", ["flux", "wan"])
def test_pipeline_is_left_as_it_was(name: str, merge: bool) -> None:
    pipeline, kwargs = build(name)
    before = picture(pipeline(**request(name, 0, kwargs)))
    components = dict(pipeline.components)
    config, attributes = dict(pipeline.scheduler.config), _plain_state(pipeline.scheduler)
    own = {key: id(value) for key, value in vars(pipeline).items()}

    run_together(pipeline, requests(name, kwargs), merge=merge)

    assert all(pipeline.components[key] is value for key, value in components.items())
    assert {key: id(value) for key, value in vars(pipeline).items()} == own
    assert dict(pipeline.scheduler.config) == config
    assert _plain_state(pipeline.scheduler) == attributes
    assert torch.equal(picture(pipeline(**request(name, 0, kwargs))), before)


def _plain_state(scheduler: Any) -> dict[str, str]:
    return {key: repr(value) for key, value in vars(scheduler).items()}
