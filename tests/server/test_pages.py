"""The pages that ship."""

import re
from pathlib import Path

import pytest

from sgld.server import pages

from .fakes import running

FOLDER = Path(pages.__file__).parent / "dashboard"


@pytest.mark.parametrize("path", ["/", "/docs", "/dashboard.css", "/dashboard.js", "/docs.js"])
async def test_pages_need_no_key_and_are_read_again_only_when_they_change(tmp_path: Path, path: str) -> None:
    async with running(tmp_path, api_key=("secret",)) as server:
        first = await server.http.get(path)
        again = await server.http.get(path, headers={"if-none-match": first.headers["etag"]})

    assert first.status_code == 200
    assert "default-src 'none'" in first.headers["content-security-policy"]
    assert (again.status_code, again.content) == (304, b"")


def test_nothing_comes_from_elsewhere() -> None:
    texts = [path.read_text() for path in FOLDER.iterdir()]

    assert [
        url for text in texts for url in re.findall(r"https?://\S+|//\w+\.\w+\S*", text) if "w3.org" not in url
    ] == []
    assert sum(map(len, texts)) < 60_000


def test_what_can_be_typed_into_has_a_label() -> None:
    page = (FOLDER / "dashboard.html").read_text()
    fields = re.findall(r"<(?:input|textarea|select)\b[^>]*>", page)
    labelled = re.findall(r"<label[^>]*>[^<]*(<(?:input|select)\b[^>]*>)", page)
    by_id = [field for field in fields if (found := re.search(r'id="(\w+)"', field)) and f'for="{found[1]}"' in page]

    assert [field for field in fields if field not in labelled + by_id] == []
