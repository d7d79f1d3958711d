from typing import Any

import pytest
from forwards import BESIDE, Part, Work, measure
from parallel import GUIDANCE, WAN, as_text, chosen, degrees, groups

from sgld.ipc.seats import ALONE

Row = dict[str, Any]


def row(gpus: int, ms: float, **others: Any) -> Row:
    known = {"model": "flux", "size": (1024,), "rows": 1, "work": "FLUX 1024²", "by": "sgld", "gpus": gpus, "ms": ms}
    return known | {"layout": "", "how": "graph", "error": 1e-3, "is_aside": False} | others


ROWS = [
    row(1, 170.0, by="diffusers", how="eager"),
    row(1, 160.0),
    row(1, 120.0, how="compiled graph"),
    row(4, 48.0, layout="ulysses 4"),
    row(4, 40.0, layout="ulysses 4", how="compiled graph"),
    row(4, 176.0, layout="1 each", how=BESIDE),
    row(4, 60.0, layout="ring 4"),
    row(4, 140.0, layout="ulysses 4", by="diffusers", how="eager"),
]


def test_gains_are_on_the_best_of_one_gpu_and_on_plain_diffusers() -> None:
    text = as_text({"command": "x", "machine": "a GPU", "measured": ROWS, "problems": ["tiles: time is up"]})
    assert "| FLUX 1024² | sgld | 4 | ulysses 4 | compiled graph | 40.0 | 3.00x | 4.25x | 0.001 |" in text
    assert "| FLUX 1024² | diffusers | 4 | ulysses 4 | eager | 140.0 | 0.86x | 1.21x | 0.001 |" in text
    assert f"| 1 each | {BESIDE} | 176.0 | 2.73x | 3.86x | 0.001 |" in text
    assert text.endswith("- tiles: time is up\n")


def test_the_table_for_the_simulation_has_what_elastic_ranks_do() -> None:
    assert degrees(ROWS) == [
        {"side": 1024, "rows": 1, "degree": 1, "seconds": 0.16},
        {"side": 1024, "rows": 1, "degree": 4, "seconds": 0.048},
    ]


@pytest.mark.parametrize("gpus", [2, 4])
def test_parts_fit_the_gpus_and_have_one_model_each(gpus: int) -> None:
    every = [part for group in groups(gpus, has_room=True) for part in group if not part.copies]
    assert all(part.parallel.num_ranks <= gpus for part in every)
    assert all({work.model for work in part.works} == {part.model} for part in every)
    assert len({part.name for part in every}) == len(every)


@pytest.mark.parametrize(
    ("words", "by", "wanted"),
    [
        (["rows of Wan"], ["sgld", "diffusers"], [["rows of Wan"]]),
        (["Wan, compiled"], ["sgld"], [["Wan, compiled", "tokens of Wan, compiled"]]),
        (["Wan, compiled"], ["diffusers"], [["tokens of Wan, compiled, diffusers"]]),
    ],
)
def test_parts_are_chosen_by_words_and_by_whose_code_it_is(
    words: list[str], by: list[str], wanted: list[list[str]]
) -> None:
    found = chosen(groups(2, has_room=True), words, by)
    assert [[part.name for part in group] for group in found] == wanted


def test_small_works_are_of_the_same_kind() -> None:
    assert WAN.tiny() == Work("wan", (9, 48, 96))
    assert GUIDANCE.tiny().rows == 2
    assert Work("flux", (1536,)).tiny().name == "FLUX 192²"


class Listener:
    """Hears what a rank says; its gates are open."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def row(self, row: Row) -> None:
        self.rows.append(row)

    def gate(self, name: str) -> None:
        pass


@pytest.mark.parametrize("work", [Work("flux", (64,), 2), Work("wan", (5, 32, 32))])
def test_one_gpu_is_measured_with_and_without_the_engine(work: Work) -> None:
    listener = Listener()
    measure(ALONE, listener, Part("one", "sgld", (work,), 1, has_one=True), "cpu", True)  # type: ignore[arg-type]
    assert [(row["by"], row["gpus"], row["error"]) for row in listener.rows] == [
        ("diffusers", 1, 0.0),
        ("sgld", 1, 0.0),
        ("sgld", 1, 0.0),
    ]
    assert all(row["ms"] > 0 for row in listener.rows)
