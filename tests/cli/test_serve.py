import socket
from pathlib import Path

import pytest

from .conftest import Sgld


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--api-key-file", "missing"], "No such file"),
        (["--ssl-certfile", "missing.pem"], "belong together"),
        (["--ssl-certfile", "missing.pem", "--ssl-keyfile", "missing.pem"], "No such file"),
        (["--port", "70000"], "--port is '70000'"),
        (["--max-steps", "0"], "--max-steps is '0'"),
        (["--modle-path", "a"], "did you mean --model-path?"),
    ],
)
def test_what_can_not_be_served_is_said_before_a_model_is_loaded(sgld: Sgld, flags: list[str], problem: str) -> None:
    done = sgld("serve", "--data-dir", "data", *flags)

    assert (done.code, done.out, len(done.err)) == (2, [], 1)
    assert problem in done.err[0]


def test_an_address_in_use(sgld: Sgld) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = sgld("serve", "--data-dir", "data", "--port", str(taken.getsockname()[1]))

    assert done.code == 2
    assert "in use" in done.err[0]


def test_a_config_file_of_generate_serves_too(sgld: Sgld, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("prompt: [a cat]\nnum_inference_steps: 3\noutput_path: out\nport: 70000\n")

    done = sgld("serve", "--config", "config.yaml")

    assert "port in config.yaml is 70000" in done.err[0]
