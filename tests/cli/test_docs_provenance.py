"""docs/provenance.md says what is done."""

import hashlib
import re
import shlex
import sys
from pathlib import Path

import pytest

from sgld.media.hook import load_hook

from .conftest import Sgld

PAGE = (Path(__file__).parents[2] / "docs" / "provenance.md").read_text()
(PROGRAM,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
(COMMAND,) = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
BROKEN = "\n\ndef broken(path: Path, media_type: str) -> None:\n    raise OSError('no key')\n"


@pytest.fixture
def _hooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_hooks.py").write_text(PROGRAM + BROKEN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_hooks", raising=False)
    load_hook.cache_clear()


@pytest.mark.usefixtures("_hooks")
def test_the_example(sgld: Sgld) -> None:
    done = sgld(*shlex.split(COMMAND)[1:])

    digest = hashlib.sha256(Path(done.out[0]).read_bytes()).hexdigest()
    assert Path("made.log").read_text() == f"image/png {digest}\n"


@pytest.mark.usefixtures("_hooks")
def test_what_fails_is_not_kept(sgld: Sgld) -> None:
    done = sgld("generate", "--prompt", "a", "--num-frames", "2", "--output-hook", "my_hooks:broken")

    assert (done.code, done.out, done.err[-1]) == (
        1,
        [],
        "sgld: error: the output hook failed, so the file isn't kept: OSError: no key",
    )
    assert not list(Path("outputs").iterdir())


@pytest.mark.parametrize("command", [["generate", "--prompt", "a"], ["serve", "--port", "0", "--data-dir", "data"]])
def test_a_hook_that_is_missing_is_told_at_the_start(sgld: Sgld, command: list[str]) -> None:
    done = sgld(*command, "--output-hook", "my_hoooks:write_down")

    assert (done.code, len(done.err)) == (2, 1)
    assert "output_hook is 'my_hoooks:write_down': it can't be loaded: No module named 'my_hoooks'" in done.err[0]
