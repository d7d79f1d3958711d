import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sgld.config import cache_root
from sgld.models.materialize import TEMPORARY, materialized_root
from sgld_cli.main import main


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_DIFFUSION_CACHE_ROOT", str(tmp_path))
    (materialized_root() / f"org__model-1{TEMPORARY}").mkdir(parents=True)
    (cache_root() / "learned").mkdir()
    (cache_root() / "learned" / "times-abc.json").write_text('{"model": "org/other"}')


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["cache", *argv]) == 0
    return capsys.readouterr().out


def test_list_has_a_row_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    header, *rows = printed(capsys, "list").splitlines()
    assert header.split() == ["name", "state", "size", "last", "used", "made", "of,", "or", "about"]
    assert [row.split()[:2] for row in rows] == [["org__model-1", "interrupted"], ["times-abc", "learned"]]
    assert rows[1].endswith("org/other")


def test_list_as_json_has_all(capsys: pytest.CaptureFixture[str]) -> None:
    items = json.loads(printed(capsys, "list", "--json"))
    assert [(item["kind"], item["state"]) for item in items] == [("model", "interrupted"), ("learned", "current")]


def test_prune_removes_what_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "prune", "--dry-run", "--all").splitlines() == [
        "would remove org__model-1 (0 B)",
        "would remove times-abc (22 B)",
    ]
    assert printed(capsys, "prune") == "removed org__model-1 (0 B)\n"
    assert printed(capsys, "prune") == "nothing to remove\n"
    assert printed(capsys, "prune", "--older-than", "1") == "nothing to remove\n"
    assert [item["name"] for item in json.loads(printed(capsys, "prune", "times-abc", "--json"))] == ["times-abc"]
    assert printed(capsys, "list") == "nothing is kept\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "give one of: sgld cache list, sgld cache prune"),
        (("prune", "missing"), "the cache has no 'missing'"),
        (("prune", "--older-than", "soon"), "--older-than is 'soon': it is a number of days"),
        (("prune", "--older-than", "-1"), "--older-than is '-1': it is a number of days"),
        (("list", "--jsno"), "--jsno is unknown"),
    ],
)
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], message: str) -> None:
    assert main(["cache", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_reader_that_leaves_is_no_error() -> None:
    command = [sys.executable, "-m", "sgld_cli", "cache", "list"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")
