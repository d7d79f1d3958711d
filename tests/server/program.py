"""`sgld serve` with an engine that does what prompts say, as a program of its own."""

import sys

from sgld_cli import serve
from sgld_cli.main import build_parser

from .fakes import FakeEngine

if __name__ == "__main__":
    raise SystemExit(serve.run(build_parser().parse_args(["serve", *sys.argv[1:]]), FakeEngine()))
