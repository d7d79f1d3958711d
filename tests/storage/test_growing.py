from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import anyio
import pytest
from anyio.to_thread import run_sync

from sgld.storage.growing import Growing


def appending(*pieces: bytes, then: Callable[[], None] = lambda: None) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with path.open("ab") as file:
            for piece in pieces:
                file.write(piece)
                file.flush()
                then()

    return write


async def test_parts_come_while_the_file_is_written(tmp_path: Path) -> None:
    go = anyio.Event()
    parts: list[bytes] = []
    write = appending(b"abcd", b"ef", then=lambda: anyio.from_thread.run(go.wait))
    with closing(Growing(write)) as growing:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run_sync, growing, tmp_path / "a")
            async for part in growing.parts(4):
                parts.append(part)
                go.set()

    assert parts == [b"abcd", b"ef"]
    assert (tmp_path / "a").read_bytes() == b"abcdef"


@pytest.mark.parametrize(("pieces", "expected"), [((), []), ((b"abcd", b"efgh"), [b"abcd", b"efgh"])])
async def test_there_is_no_empty_part(tmp_path: Path, pieces: tuple[bytes, ...], expected: list[bytes]) -> None:
    """Also where it has got its name before anybody looks."""
    with closing(Growing(appending(*pieces))) as growing:
        await run_sync(growing, tmp_path / "a.tmp")
        (tmp_path / "a.tmp").rename(tmp_path / "a")

        assert [part async for part in growing.parts(4)] == expected
