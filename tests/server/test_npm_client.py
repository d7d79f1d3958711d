"""OpenAI's client of npm, unchanged, against `sgld serve` with the models that ship."""

import shutil
import subprocess
from pathlib import Path

import pytest

from sgld.config import EMBEDDED_IMAGE_MODEL, EMBEDDED_VIDEO_MODEL

from .test_serve import program
from .test_survival import sgld_serve

pytestmark = pytest.mark.npm
SOURCE = Path(__file__).parent / "npm"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the program and what it needs."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("there is no Node")
    folder = tmp_path_factory.mktemp("npm")
    for name in ("package.json", "client.mjs"):
        shutil.copy(SOURCE / name, folder)
    subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--silent"], cwd=folder, check=True, timeout=200)
    return folder


@pytest.mark.parametrize(("what", "model"), [("pictures", EMBEDDED_IMAGE_MODEL), ("videos", EMBEDDED_VIDEO_MODEL)])
def test_the_client_works(folder: Path, tmp_path: Path, what: str, model: str) -> None:
    with sgld_serve(tmp_path, model) as (_, client):
        run(folder, str(client.base_url), what)


def test_edits(folder: Path, tmp_path: Path) -> None:
    """The models that ship have no pipeline for edits."""
    with program(tmp_path) as (_, url):
        run(folder, url, "edits")


def run(folder: Path, url: str, what: str) -> None:
    argv = ["node", "client.mjs", url.rstrip("/"), what]
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, timeout=200)

    assert done.stdout.strip() == "done", done.stderr
