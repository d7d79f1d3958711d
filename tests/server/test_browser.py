"""The dashboard in a browser, in front of a real server: with the models that ship, or, where any picture will do, with
an engine that paints at once.

It needs Playwright and Chromium: `pytest -m browser`;
with `SGLD_SCREENSHOTS=docs/images` it takes the pictures of the docs.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image
from pipelines import build

pytestmark = pytest.mark.browser
ROOT = Path(__file__).parents[2]
TIMEOUT_MS = 120_000
KEY = "secret"
SGLD = ("sgld_cli", "serve")
PAINTS_AT_ONCE = ("tests.server.program",)
SCREENS: dict[str, dict[str, Any]] = {
    "dashboard": {"viewport": {"width": 1360, "height": 900}, "color_scheme": "light"},
    "dashboard-dark": {"viewport": {"width": 1360, "height": 900}, "color_scheme": "dark"},
    "dashboard-phone": {"viewport": {"width": 400, "height": 860}, "has_touch": True},
}
PROMPTS = [
    "a beautiful sunset over the mountains",
    "a night sky over the sea",
    "snowy mountains at dawn",
    "a desert at noon",
    "sunset over the sea",
    "a night sky over the mountains",
]


@contextmanager
def server(folder: Path, port: int = 0, *flags: str, module: Sequence[str] = SGLD) -> Iterator[str]:
    """`sgld serve` in a process of its own; its URL."""
    argv = [
        sys.executable,
        "-m",
        *module,
        "--port",
        str(port),
        "--data-dir",
        str(folder),
        "--shutdown-timeout-s",
        "0",
        *flags,
    ]
    environment = {**os.environ, "SGLANG_DIFFUSION_CACHE_ROOT": str(folder / "cache")}
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment) as process:
        assert process.stderr is not None
        try:
            found = re.search(r"http://\S+", process.stderr.readline())
            assert found, process.stderr.read()
            if module == SGLD:
                warm_up(found[0])
            yield found[0]
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)


def warm_up(url: str) -> None:
    """Make a picture, and leave no trace of it."""
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx2.Client(base_url=url, timeout=120, headers=headers) as client:
        # It waits for the model.
        body = {"prompt": "a red circle", "num_inference_steps": 2}
        made = client.post("/v1/images/generations", json=body).raise_for_status().json()["id"]
        client.delete(f"/v1/images/{made}").raise_for_status()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("there is no Chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture
def errors() -> list[str]:
    """What pages complained about."""
    return []


@contextmanager
def opened(browser: Any, url: str, errors: list[str], **options: Any) -> Iterator[Any]:
    """The dashboard in a new window."""
    context = browser.new_context(**options)
    context.set_default_timeout(TIMEOUT_MS)
    page = context.new_page()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(url)
    page.locator("#connection[data-state=live]").wait_for()
    yield page
    context.close()


def ask(page: Any, prompt: str, *, steps: int, **fields: str) -> None:
    page.fill("#prompt", prompt)
    page.fill("[name=num_inference_steps]", str(steps))
    for name, value in fields.items():
        if not page.locator(f"[name={name}]").is_visible():
            page.click("#more summary")
        page.fill(f"[name={name}]", value)
    # The server's answer enables it again.
    page.press("#prompt", "Control+Enter")
    page.locator("#generate:enabled").wait_for()


def take_picture(page: Any, name: str) -> None:
    """For people to look at."""
    if folder := os.environ.get("SGLD_SCREENSHOTS"):
        picture = Image.open(BytesIO(page.screenshot(full_page=True))).convert("RGB").quantize(256)
        picture.save(Path(folder) / f"{name}.png", optimize=True)


def test_a_prompt_becomes_a_picture(tmp_path: Path, browser: Any, errors: list[str]) -> None:
    flags = ("--max-running-requests", "1")
    with server(tmp_path, 0, *flags) as url, opened(browser, url, errors) as page, opened(browser, url, errors) as tab:
        ask(page, PROMPTS[0], steps=60, seed="7")
        ask(page, PROMPTS[1], steps=60)
        ask(page, PROMPTS[2], steps=60)
        page.locator("#queue li", has_text=PROMPTS[2]).wait_for()
        page.locator("#running .card", has_text=PROMPTS[0]).locator("img").wait_for()
        page.wait_for_function("() => document.querySelector('#running progress')?.value > 0")
        # Another tab sees the same, and cancels one that waits.
        tab.locator("#queue li", has_text=PROMPTS[2]).get_by_role("button").click()
        page.locator("#queue li", has_text=PROMPTS[2]).wait_for(state="detached")
        page.locator("#gallery .item", has_text=PROMPTS[0]).wait_for()
        # And one that runs.
        page.locator("#running .card", has_text=PROMPTS[1]).get_by_role("button").click()
        page.locator("#running .card").wait_for(state="detached")
        tab.locator("#gallery .item", has_text=PROMPTS[0]).click()
        tab.locator("#viewer-media img").wait_for()
        params = tab.locator("#viewer-params").inner_text()
        is_picture = tab.evaluate("document.querySelector('#viewer-media img').naturalWidth")
        finished = page.locator("#gallery .item").count()

    assert re.search(r"Steps\s+60", params)
    assert re.search(r"Seed\s+7", params)
    assert is_picture == 256
    assert finished == 1
    assert errors == []


def test_a_prompt_becomes_a_video_that_plays(tmp_path: Path, browser: Any, errors: list[str]) -> None:
    with server(tmp_path, 0, "--model-path", "sgld/tiny-video") as url, opened(browser, url, errors) as page:
        # What the model is for is chosen already.
        page.locator("#composer[data-kind=video]").wait_for()
        page.locator("#kinds label", has_text="Picture").click()
        page.locator("#kinds label", has_text="Video").click()
        ask(page, "a red circle moves right", steps=30, num_frames="9", seed="3")
        page.locator("#running .card img").wait_for()
        page.wait_for_function("() => document.querySelector('#running progress')?.value > 0")
        take_picture(page, "video-running")
        page.locator("#gallery .item video").wait_for()
        page.wait_for_function("() => document.querySelector('#gallery video').currentTime > 0")
        page.locator("#gallery .item").click()
        page.wait_for_function("() => document.querySelector('#viewer-media video')?.currentTime > 0")
        video = page.locator("#viewer-media video").evaluate(
            "v => [v.videoWidth, v.videoHeight, v.controls, v.duration]"
        )
        params = page.locator("#viewer-params").inner_text()
        take_picture(page, "video-viewer")
        page.locator("#viewer-reuse").click()
        kind = page.evaluate("document.getElementById('composer').dataset.kind")

    assert video[:3] == [192, 128, True]
    assert video[3] > 0.5
    assert re.search(r"Frames\s+9", params)
    assert kind == "video"
    assert errors == []


def test_a_picture_is_painted_anew_where_its_mask_is_white(tmp_path: Path, browser: Any, errors: list[str]) -> None:
    pipeline, _ = build("sd")
    pipeline.save_pretrained(tmp_path / "model")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "picture.png")
    Image.new("L", (64, 64), 255).save(tmp_path / "mask.png")
    flags = ("--model-path", str(tmp_path / "model"), "--device", "cpu")
    with server(tmp_path, 0, *flags) as url, opened(browser, url, errors) as page:
        page.click("#more summary")
        hidden = page.locator("#mask-field").is_hidden()
        page.set_input_files("#picture", tmp_path / "picture.png")
        page.set_input_files("#mask", tmp_path / "mask.png")
        page.evaluate(
            "const send = fetch; fetch = (path, options) =>"
            " { globalThis.sent = [...(options?.body?.keys?.() ?? [])]; return send(path, options); }"
        )
        ask(page, PROMPTS[0], steps=3, size="64x64")
        page.locator("#gallery img").wait_for()
        sent = page.evaluate("globalThis.sent")

    assert hidden
    assert {"image", "mask"} <= set(sent)
    assert errors == []


def test_it_comes_back_after_a_restart(tmp_path: Path, browser: Any, errors: list[str]) -> None:
    with server(tmp_path, module=PAINTS_AT_ONCE) as url:
        context = opened(browser, url, errors)
        page = context.__enter__()
        ask(page, PROMPTS[0], steps=4)
        page.locator("#gallery .item", has_text=PROMPTS[0]).wait_for()
    page.locator("#connection[data-state=lost]").wait_for()
    with server(tmp_path, int(url.rpartition(":")[2]), module=PAINTS_AT_ONCE):
        page.locator("#connection[data-state=live]").wait_for()
        ask(page, PROMPTS[1], steps=4)
        page.locator("#gallery .item", has_text=PROMPTS[1]).wait_for()
        page.locator("#gallery .item", has_text=PROMPTS[0]).wait_for()
        prompts = page.locator("#gallery .item .prompt").all_inner_texts()
        context.__exit__(None, None, None)

    assert prompts == [PROMPTS[1], PROMPTS[0]]
    assert errors == []


def test_a_key_is_asked_for(tmp_path: Path, browser: Any, errors: list[str]) -> None:
    with server(tmp_path, 0, "--api-key", KEY, module=PAINTS_AT_ONCE) as url:
        context = browser.new_context()
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        page.fill("#key", "wrong")
        page.press("#key", "Enter")
        page.locator("#login-problem:visible").wait_for()
        page.fill("#key", KEY)
        page.press("#key", "Enter")
        page.locator("#connection[data-state=live]").wait_for()
        ask(page, PROMPTS[0], steps=4)
        page.locator("#gallery .item", has_text=PROMPTS[0]).wait_for()
        page.click("#logout")
        page.locator("#login[open]").wait_for()
        context.close()

    assert errors == []


def test_all_of_it_is_seen_on_every_screen(tmp_path: Path, browser: Any, errors: list[str]) -> None:
    is_wide = {}
    with server(tmp_path, 0, "--max-running-requests", "3") as url:
        with opened(browser, url, errors) as page:
            for seed, prompt in enumerate(PROMPTS):
                ask(page, prompt, steps=12, seed=str(seed + 3))
            page.locator("#gallery img").nth(len(PROMPTS) - 1).wait_for()
            # Each has less to do than those before it, and goes first.
            for number, (prompt, steps) in enumerate(zip(PROMPTS[3:], (200, 140, 80), strict=True)):
                ask(page, prompt, steps=steps, seed=str(number))
                page.locator("#running .card", has_text=prompt).locator("img").wait_for()
            for prompt in PROMPTS[:3]:
                ask(page, prompt, steps=60)
            page.locator("#queue li").nth(2).wait_for()
        for name, options in SCREENS.items():
            with opened(browser, url, errors, **options) as page:
                page.locator("#gallery img").nth(len(PROMPTS) - 1).wait_for()
                is_wide[name] = page.evaluate("document.documentElement.scrollWidth > innerWidth")
                take_picture(page, name)

    assert not any(is_wide.values()), is_wide
    assert errors == []
