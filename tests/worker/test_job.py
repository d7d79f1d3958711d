"""What of a job tells how long it takes, and the task that it becomes."""

from sgld.worker.job import seldom, size_of


def test_signs_of_life_are_a_second_apart() -> None:
    now, pulses = [100.0], []
    called = seldom(lambda: pulses.append(now[0]), lambda: now[0])
    for now[0] in (100.0, 100.5, 100.9, 101.0, 101.5, 102.0):
        called()
    assert pulses == [100.0, 101.0, 102.0]


def test_sizes_tell_what_a_step_costs() -> None:
    size = {"height": 16, "width": 8, "prompt": "a", "generator": None, "num_inference_steps": 3}
    assert size_of(size) == size_of(size | {"prompt": "b", "num_inference_steps": 9}) == "height=16,width=8,prompt"
    assert size_of(size | {"negative_prompt": "c"}) != size_of(size)
