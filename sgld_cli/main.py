"""`sgld`: reads the command line and runs a command.

`--help` answers at once: what takes long to import is imported inside the commands.
"""

import argparse
import faulthandler
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sgld.errors import SgldError
from sgld.fields import FieldError
from sgld_cli.errors import BAD_INPUT, FAILED, INTERRUPTED, error_line, exit_code_of
from sgld_cli.options import (
    HTTP_GROUP,
    OUTPUT_GROUP,
    SAMPLING_GROUP,
    STORAGE_GROUP,
    Parser,
    UsageError,
    add_flags,
    with_dashes,
)
from sgld_cli.settings import component_flags, refuse_unknown

if TYPE_CHECKING:
    from sgld_cli.generate import EngineFactory

_GENERATE_NOTES = """\
Every option is a key of the config file, too: --num-frames is num_frames. Flags come before the file, the file before
the picture of --from. Switches are --flag, --flag true|false or --no-flag; --a_b is --a-b. Paths of the outputs go to
stdout, all else to stderr. Exit codes: 0 done, 1 a generation failed, 2 bad input, 130 interrupted.
"""
_SERVE_NOTES = """\
Every option is a key of the config file, too; the same file can serve `sgld generate`. SIGTERM and Ctrl-C let requests
end for --shutdown-timeout-s, a second one ends them.
"""


def main(argv: Sequence[str] | None = None, *, engine_class: "EngineFactory | None" = None) -> int:
    """Run `sgld` with these arguments, by default those of the process.

    :param engine_class: makes the engine of `generate`, for tests.
    :return: the exit code.
    """
    try:
        return _run(with_dashes(sys.argv[1:] if argv is None else argv), engine_class)
    except KeyboardInterrupt:
        print("sgld: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        code, message = _outcome(_innermost(error))
        if message is None:
            raise
        print(error_line(message), file=sys.stderr)
        return code


def _outcome(error: Exception) -> tuple[int, str | None]:
    """The exit code and the message for an error; no message where the traceback is wanted."""
    match error:
        case UsageError() | FieldError():
            return BAD_INPUT, str(error)
        case SgldError():
            return exit_code_of(error), str(error)
        case _ if os.environ.get("SGLD_TRACEBACK"):
            return FAILED, None
        case _:
            return FAILED, f"{type(error).__name__}: {error} (a bug of sgld; SGLD_TRACEBACK=1 shows where)"


def _innermost(error: Exception) -> Exception:
    """The first error in groups of groups, which task groups make even of a single one."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


def _run(argv: Sequence[str], engine_class: "EngineFactory | None") -> int:
    parser = build_parser()
    args, extras = parser.parse_known_args(argv)
    components, unknown = component_flags(extras)
    refuse_unknown(unknown)
    if components:
        vars(args).setdefault("given", {}).update(components)
    # kill -USR1 shows where a process is that seems to hang; its ranks do the same.
    faulthandler.register(signal.SIGUSR1, file=2)
    match args.command:
        case "generate":
            from sgld_cli import generate

            return generate.run(args, engine_class)
        case "serve":
            from sgld_cli import serve

            return serve.run(args)
        case "info":
            from sgld_cli import info

            return info.run(args)
        case "cache":
            from sgld_cli import cache

            return cache.run(args)
        case "version":
            from sgld_cli import version

            return version.run()
        case _:
            parser.print_help()
            return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(prog="sgld", description="Generate pictures and videos with diffusion models.")
    parser.add_argument(
        "--version", action="store_const", const="version", dest="command", help="same as: sgld version"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    _add_generate(commands.add_parser("generate", help="generate pictures or a video", epilog=_GENERATE_NOTES))
    _add_serve(commands.add_parser("serve", help="serve a model over HTTP", epilog=_SERVE_NOTES))
    _add_info(commands.add_parser("info", help="show what a model consists of"))
    _add_cache(commands.add_parser("cache", help="show or remove what is kept between starts"))
    commands.add_parser("version", help="show the versions of sgld and what it runs on")
    return parser


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.usage = "sgld generate --prompt PROMPT [PROMPT ...] [options]"
    parser.description = "Generate pictures or a video and write them to files."
    parser.add_argument("--config", metavar="FILE", help="JSON or YAML file with settings")
    parser.add_argument("--from", dest="picture", metavar="FILE", help="repeat a picture from its metadata")
    parser.add_argument("--print-config", action="store_true", help="show the merged settings and leave")
    parser.add_argument("--json", action="store_true", help="print one JSON object per output instead of paths")
    add_flags(parser, ignored=[HTTP_GROUP])


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.usage = "sgld serve [--model-path PATH] [--port N] [options]"
    parser.description = "Load a model and serve it over HTTP, as OpenAI's API and SGLang's."
    parser.add_argument("--config", metavar="FILE", help="JSON or YAML file with settings")
    add_flags(parser, ignored=[SAMPLING_GROUP, OUTPUT_GROUP])


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.usage = "sgld info --model-path PATH [options]"
    parser.description = "Show the components of a model, how they would be loaded, and what sgld has learned of them."
    parser.add_argument("--config", metavar="FILE", help="JSON or YAML file with settings")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_flags(parser, ignored=[SAMPLING_GROUP, STORAGE_GROUP, OUTPUT_GROUP, HTTP_GROUP])


def _add_cache(parser: argparse.ArgumentParser) -> None:
    parser.description = "Models that overlays made, and what sgld learned of models: shown, or removed."
    commands = parser.add_subparsers(dest="cache_command", metavar="COMMAND", title="commands")
    listing = commands.add_parser("list", help="show what is kept")
    pruning = commands.add_parser("prune", help="remove what no start would use again, or what is said")
    pruning.add_argument("names", metavar="NAME", nargs="*", help="names that sgld cache list shows")
    pruning.add_argument("--older-than", metavar="DAYS", help="what wasn't used for so many days")
    pruning.add_argument("--all", action="store_true", help="everything")
    pruning.add_argument("--dry-run", action="store_true", help="only show what would be removed")
    for command in (listing, pruning):
        command.add_argument("--json", action="store_true", help="print JSON")
