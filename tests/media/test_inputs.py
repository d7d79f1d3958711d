import base64
import threading
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from PIL import Image

from sgld.errors import InvalidRequest
from sgld.media import inputs
from sgld.media.images import load_image
from sgld.media.inputs import InputPolicy, Reference, as_files, references, replaced, scheme_of
from sgld.sampling_params import SamplingParams

ANY = InputPolicy()
REMOTE_ONLY = InputPolicy(allow_files=False)


def png(colour: str = "red", mode: str = "RGB") -> bytes:
    buffer = BytesIO()
    Image.new(mode, (4, 2), colour).save(buffer, "PNG")
    return buffer.getvalue()


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


@pytest.fixture(autouse=True)
def _no_descriptor_is_left() -> Iterator[None]:
    def held() -> list[str]:
        links = Path("/proc/self/fd").iterdir()
        return [target for link in links if link.is_symlink() and "sgld-input" in (target := str(link.readlink()))]

    yield
    assert held() == []


def test_references_are_found_at_any_depth() -> None:
    value = {"a": [{"$image": "x"}, [{"$image": "y", "mode": "L"}]], "b": {"c": {"$image": "z"}}, "d": 1}
    assert list(references(value)) == [Reference("x"), Reference("y", "L"), Reference("z")]
    assert replaced(value, lambda r: r.source) == {"a": ["x", ["y"]], "b": {"c": "z"}, "d": 1}


@pytest.mark.parametrize("value", [{"$image": 1}, {"$image": "x", "mode": "P"}, {"$image": "x", "b": 1}])
def test_reference_of_another_form_is_refused(value: Any) -> None:
    with pytest.raises(InvalidRequest, match=r'a picture is \{"\$image": "..."\}'):
        list(references([value]))


@pytest.mark.parametrize(
    ("source", "scheme"),
    [
        ("a.png", "file"),
        ("/etc/passwd", "file"),
        ("data:image/png,x", "data"),
        ("https://host/a.png", "http"),
        ("HTTP://host", "http"),
    ],
)
def test_scheme_tells_how_a_source_is_read(source: str, scheme: str) -> None:
    assert scheme_of(source, ANY) == scheme
    if scheme == "file":
        with pytest.raises(InvalidRequest, match="isn't read here"):
            scheme_of(source, REMOTE_ONLY)
    else:
        assert scheme_of(source, REMOTE_ONLY) == scheme


@pytest.mark.parametrize("source", ["file:///etc/passwd", "ftp://host/a.png", "s3://bucket/a"])
def test_other_schemes_are_refused_everywhere(source: str) -> None:
    with pytest.raises(InvalidRequest, match=r"a file, a data URL, or an http\(s\) URL"):
        scheme_of(source, ANY)


async def test_data_url_is_a_file_as_long_as_the_request_lasts() -> None:
    url = data_url(png())
    params = SamplingParams(image_path=(url,), diffusers_kwargs={"masks": [{"$image": url, "mode": "L"}]})
    async with as_files(params, REMOTE_ONLY) as readable:
        (path,) = readable.image_path
        assert load_image(Path(path)).getpixel((0, 0)) == (255, 0, 0)
        assert readable.diffusers_kwargs == {"masks": [{"$image": path, "mode": "L"}]}
        (reference,) = references(readable.diffusers_kwargs)
        assert load_image(Path(reference.source), reference.mode).mode == "L"
    with pytest.raises(InvalidRequest, match="there is no image"):
        load_image(Path(path))


async def test_file_gets_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(png())
    monkeypatch.chdir(tmp_path)
    async with as_files(SamplingParams(image_path=("a.png",)), ANY) as readable:
        assert readable.image_path == (str(tmp_path / "a.png"),)


async def test_params_without_pictures_stay_as_they_are() -> None:
    params = SamplingParams(prompt="a cat", diffusers_kwargs={"a": {"b": [1]}})
    async with as_files(params, REMOTE_ONLY) as readable:
        assert readable is params


@pytest.mark.parametrize(
    ("source", "policy", "message"),
    [
        ("data:image/png;base64", ANY, "no comma"),
        ("data:image/png;base64,%%%", ANY, "can't be read"),
        ("data:text/plain,hello", ANY, "isn't an image"),
        (data_url(png()), InputPolicy(max_bytes=10), "the limit is 10"),
        (data_url(png()), InputPolicy(max_pixels=1), "at most 1 are allowed"),
        ("http://127.0.0.1:1/a.png", ANY, "isn't a public address"),
        ("there-is-none.png", ANY, "there is no image"),
        ("there-is-none.png", REMOTE_ONLY, "isn't read here"),
    ],
)
async def test_picture_that_can_not_be_had_is_refused(source: str, policy: InputPolicy, message: str) -> None:
    for params in (
        SamplingParams(image_path=(data_url(png()), source)),
        SamplingParams(diffusers_kwargs={"control_image": {"$image": source}}),
    ):
        with pytest.raises(InvalidRequest, match=message):
            async with as_files(params, policy):
                pass


async def test_slow_servers_leave_threads_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    can_answer, others_ran = threading.Event(), anyio.Event()

    def download(*_args: Any, **_kwargs: Any) -> bytes:
        assert can_answer.wait(20)
        return png()

    async def asks() -> None:
        async with as_files(SamplingParams(image_path=("http://host/a.png",)), ANY):
            pass

    async def works() -> None:
        await anyio.to_thread.run_sync(lambda: None)
        others_ran.set()

    monkeypatch.setattr(inputs, "download", download)
    async with anyio.create_task_group() as tasks:
        for _ in range(100):
            tasks.start_soon(asks)
        await anyio.wait_all_tasks_blocked()
        try:
            with anyio.fail_after(60):
                tasks.start_soon(works)
                await others_ran.wait()
        finally:
            can_answer.set()


async def test_too_many_pictures_are_refused() -> None:
    params = SamplingParams(diffusers_kwargs={"images": [{"$image": "a.png"}] * 65})
    with pytest.raises(InvalidRequest, match="65 pictures, the limit is 64"):
        async with as_files(params, ANY):
            pass


async def test_values_nested_too_deeply_are_refused() -> None:
    deep: Any = 1
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(InvalidRequest, match="nested too deeply"):
        async with as_files(SamplingParams(diffusers_kwargs={"a": deep}), ANY):
            pass
