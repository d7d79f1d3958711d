"""The docs and the README say what the code does."""

import argparse
import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _auth

from sgld_cli.later import LATER
from sgld_cli.main import build_parser
from sgld_cli.options import Option, options
from sgld_cli.settings import refuse_unknown

ROOT = Path(__file__).parent.parent
CLI = (ROOT / "docs" / "cli.md").read_text()
STRUCTURE = (ROOT / "docs" / "structure.md").read_text()
README = (ROOT / "README.md").read_text()
POST_PROCESSING = (ROOT / "docs" / "post_processing.md").read_text()
VARIABLES = (ROOT / "docs" / "environment_variables.md").read_text()


def row(option: Option) -> str:
    """The row of an option in docs/cli.md."""
    flags = ", ".join(f"`{flag}`" for flag in option.flags)
    is_empty = option.default in (None, (), {}, "")
    default = "" if is_empty else f"`{str(option.default).lower() if option.kind == 'switch' else option.default}`"
    return f"| {flags} | {values(option)} | {default} | {option.description} |"


def values(option: Option) -> str:
    if option.metavar.startswith("{"):
        return " ".join(f"`{value}`" for value in option.metavar.strip("{}").split(","))
    return {"switch": "`true` `false`", "list": f"{option.metavar}..."}.get(option.kind, option.metavar)


@pytest.mark.parametrize("option", options(), ids=lambda option: option.name)
def test_every_option_has_its_row(option: Option) -> None:
    assert row(option) in CLI.splitlines()


def test_no_row_is_left_of_an_option_that_went() -> None:
    known = {flag for option in options() for flag in option.flags} | {"--config", "--from", "--print-config", "--json"}

    assert set(re.findall(r"^\| `(--[a-z0-9-]+)", CLI, re.MULTILINE)) <= known


@pytest.mark.parametrize("command", ["generate", "serve"])
def test_every_flag_is_listed(command: str) -> None:
    (commands,) = [action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)]
    parser: argparse.ArgumentParser = commands.choices[command]
    flags = {action.option_strings[0] for action in parser._actions} - {"-h"}
    listed = {flag for flag in flags if flag.replace("--no-", "--") not in flags - {flag}}
    # Those whose feature isn't there yet are listed as keys.
    keys = {flag: flag.removeprefix("--").replace("-", "_") for flag in listed}

    assert [flag for flag in sorted(listed) if not re.search(rf"`({flag}|{keys[flag]})[` ]", CLI)] == []


def read_variables(source: str) -> Iterator[str]:
    """The environment variables that a module reads; fails where it reads one that isn't named there."""
    accesses = ast.walk(ast.parse(source))
    for node in accesses:
        match node:
            case ast.Subscript(value=ast.Attribute(attr="environ"), slice=ast.Constant(value=str(name))):
                yield name
            case ast.Call(
                func=ast.Attribute(value=ast.Attribute(attr="environ")) | ast.Attribute(attr="getenv"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield name


def test_every_variable_that_is_read_is_listed_and_no_other() -> None:
    sources = [path.read_text() for package in ("sgld", "sgld_cli") for path in (ROOT / package).rglob("*.py")]
    read = [name for source in sources for name in read_variables(source)]
    ours, of_libraries = VARIABLES.split("What libraries read", 1)

    assert len(read) == sum(len(re.findall(r"\benviron\b|\bgetenv\b", source)) for source in sources)
    listed = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", ours, re.MULTILINE)
    assert {name.strip("`") for names in listed for name in names.split(", ")} == set(read)
    hub = "".join(Path(module.__file__ or "").read_text() for module in (constants, _auth))
    assert set(re.findall(r"^\| `(\w+)`", of_libraries, re.MULTILINE)) <= set(re.findall(r"\"(\w+)\"", hub))


def test_keys_that_are_refused_until_later_are_listed() -> None:
    assert [name for name in LATER if f"`{name}`" not in CLI] == []


def test_every_module_has_its_line() -> None:
    sections = dict(re.findall(r"^((?:sgld|sgld_cli|bench)/\S*)(.*?)(?=^\S)", STRUCTURE, re.MULTILINE | re.DOTALL))
    modules = [path.relative_to(ROOT) for name in ("sgld", "sgld_cli", "bench") for path in (ROOT / name).rglob("*.py")]

    missing = [
        str(path)
        for path in modules
        if path.name != "__init__.py" and not re.search(rf"(?<!\w){path.name}\b", sections.get(f"{path.parent}/", ""))
    ]

    assert missing == []


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README + POST_PROCESSING, re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if "sgld generate" in line or "sgld info" in line]


@pytest.mark.parametrize("command", commands())
def test_commands_of_the_readme_and_of_pages_are_understood(command: str) -> None:
    words = shlex.split(command.rpartition("sgld ")[2])

    _, extras = build_parser().parse_known_args(words)

    refuse_unknown(extras)


def test_links_lead_to_files() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text())]

    assert [(page.name, link) for page, link in links if not (page.parent / link).exists()] == []
