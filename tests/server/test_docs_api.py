"""docs/openai_api.md says what the server does."""

import re
import shlex
import sys
from pathlib import Path

import anyio
import msgspec
import pytest

from sgld.server.request_fields import IGNORED, INTERPOLATION_FIELDS, SAMPLING_FIELDS
from sgld.server.schemas import ImageOptions
from sgld.server.video_schemas import VideoOptions

from .fakes import running
from .test_edits import png

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "openai_api.md").read_text()
COMMANDS = [
    command.strip()
    for block in re.findall(r"```bash\n(.*?)```", PAGE + (DOCS / "post_processing.md").read_text(), re.DOTALL)
    for command in block.replace("\\\n", " ").splitlines()
    if command.startswith("curl")
]
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("command", COMMANDS)
async def test_commands_do_what_they_say(tmp_path: Path, command: str) -> None:
    for name in ("room.png", "mask.png", "pose.png"):
        (tmp_path / name).write_bytes(png())
    async with running(tmp_path) as server:
        words = [word.replace("http://localhost:30000", server.url) for word in shlex.split(command)]
        done = await anyio.run_process([*words, "--fail", "--silent", "--show-error"], cwd=tmp_path)

    if "-N" in words:
        assert done.stdout.count(b"event: ") == 3
    else:
        assert msgspec.json.decode(done.stdout).get("error") is None


async def test_programs_run_one_after_the_other(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        source = "".join(PROGRAMS).replace("http://localhost:30000", server.url)
        done = await anyio.run_process([sys.executable, "-c", source])

    assert [int(line) > 0 for line in done.stdout.splitlines()] == [True] * len(PROGRAMS)


def test_every_field_is_there() -> None:
    options = {*ImageOptions.__struct_fields__, *VideoOptions.__struct_fields__}
    fields = {*options, *SAMPLING_FIELDS, *INTERPOLATION_FIELDS, *IGNORED, "num_frames", "fps"}

    assert [name for name in sorted(fields) if f"`{name}`" not in PAGE] == []
