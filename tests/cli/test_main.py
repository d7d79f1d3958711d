import resource
import subprocess
import sys
from typing import ClassVar, Self

import pytest

from sgld import __version__
from sgld.errors import ModelError, ModelLost
from sgld_cli.main import main

from .conftest import FakeEngine, Sgld

HEAVY = ("torch", "numpy", "anyio", "PIL", "rich", "yaml", "diffusers")


def loaded_by(*argv: str) -> set[str]:
    """The heavy modules that a command loads."""
    script = (
        "import contextlib, sys; from sgld_cli.main import main\n"
        f"with contextlib.suppress(SystemExit): main({list(argv)!r})\n"
        f"sys.stderr.write(' '.join(name for name in {HEAVY!r} if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


@pytest.mark.parametrize("argv", [("--help",), ("generate", "--help"), ("info", "--help"), ("version",), ()])
def test_help_loads_nothing_heavy(argv: tuple[str, ...]) -> None:
    assert loaded_by(*argv) == set()


def test_bad_input_is_found_without_torch() -> None:
    assert "torch" not in loaded_by("generate", "--prompt", "a", "--output-path", "/dev/null/x")


@pytest.mark.parametrize("argv", [("--help",), ("generate", "--help")])
def test_help_answers_at_once(argv: tuple[str, ...]) -> None:
    def seconds() -> float:
        """CPU time: help waits for nothing, and others may use the machine."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "sgld_cli", *argv], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 0.5


def test_help_has_groups(capsys: pytest.CaptureFixture[str], sgld: Sgld) -> None:
    with pytest.raises(SystemExit) as left:
        sgld("generate", "--help")
    assert left.value.code == 0
    text = capsys.readouterr().out
    for title in ("model and runtime:", "sampling:", "output:", "HTTP server (accepted and ignored here):"):
        assert title in text
    assert "--perf-dump-path" not in text


@pytest.mark.parametrize("argv", [("version",), ("--version",)])
def test_version_names_what_it_runs_on(argv: tuple[str, ...], sgld: Sgld) -> None:
    done = sgld(*argv)
    assert done.code == 0
    assert done.out[0] == f"sgld {__version__}"
    assert [line.split()[0] for line in done.out] == ["sgld", "python", "torch", "diffusers", "transformers"]


def test_no_command_shows_the_help(sgld: Sgld) -> None:
    done = sgld()
    assert (done.code, done.out[0].startswith("usage: sgld")) == (0, True)


@pytest.mark.parametrize("argv", [("paint",), ("info", "x"), ("version", "x"), ("--verbose",)])
def test_usage_errors_are_one_line(argv: tuple[str, ...], sgld: Sgld) -> None:
    done = sgld(*argv)
    assert (done.code, done.out, len(done.err)) == (2, [], 1)
    assert done.err[0].startswith("sgld: error: ")


class Broken(FakeEngine):
    """An engine that raises in its task group, as an engine does whose start fails."""

    error: ClassVar[Exception]

    async def __aenter__(self) -> Self:
        raise ExceptionGroup("errors in a task group", [self.error])


def test_a_bug_is_one_line_unless_a_traceback_is_wanted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Broken.error = RuntimeError("oh\nno")
    command = ["generate", "--prompt", "a", "--no-save-output"]
    assert main(command, engine_class=Broken) == 1
    assert capsys.readouterr().err.startswith("sgld: error: RuntimeError: oh no (a bug of sgld")
    monkeypatch.setenv("SGLD_TRACEBACK", "1")
    with pytest.raises(ExceptionGroup):
        main(command, engine_class=Broken)


@pytest.mark.parametrize(("kind", "code"), [(ModelError, 2), (ModelLost, 1)])
def test_errors_in_groups_keep_their_exit_code(
    capsys: pytest.CaptureFixture[str], kind: type[Exception], code: int
) -> None:
    Broken.error = kind("There is no such model.")
    assert main(["generate", "--prompt", "a", "--no-save-output"], engine_class=Broken) == code
    assert capsys.readouterr().err == "sgld: error: There is no such model.\n"
