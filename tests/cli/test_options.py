import argparse

import msgspec
import pytest

from sgld.config import AttentionConfig, EngineConfig, OutputConfig, ParallelConfig, ServerConfig
from sgld.sampling_params import FirstBlockCache, SamplingParams, TaylorCache
from sgld_cli.later import LATER
from sgld_cli.options import Parser, UsageError, add_flags, options, options_by_name, with_dashes

STRUCTS = (EngineConfig, ParallelConfig, AttentionConfig, OutputConfig, ServerConfig, SamplingParams)


def given(*argv: str) -> dict[str, object]:
    parser = Parser()
    add_flags(parser)
    found: dict[str, object] = vars(parser.parse_args(argv)).get("given", {})
    return found


@pytest.mark.parametrize("struct", STRUCTS)
def test_every_field_is_an_option_with_a_description(struct: type[EngineConfig]) -> None:
    groups = {f.name for f in msgspec.structs.fields(struct) if isinstance(f.default, msgspec.Struct)}
    # The command line does nothing with previews.
    for name in set(struct.__struct_fields__) - groups - {"num_previews"}:
        assert options_by_name()[name].description, name


def test_no_name_or_alias_belongs_to_two_options() -> None:
    names = [name for option in options() for name in (option.name, *option.aliases)]
    assert len(names) == len(set(names))
    assert not LATER.keys() & set(names)


def test_help_text_can_be_formatted() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    assert "--num-inference-steps N" in parser.format_help()


def test_underscores_are_dashes_in_flags_but_not_in_values() -> None:
    assert with_dashes(["--num_frames", "5", "--prompt=a_b", "--output_path=c_d", "e_f", "--", "-x_y"]) == [
        "--num-frames", "5", "--prompt=a_b", "--output-path=c_d", "e_f", "--", "-x_y",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "raw"),
    [
        (["--save-output"], "true"),
        (["--save-output", "false"], "false"),
        (["--save-output=true"], "true"),
        (["--no-save-output"], "false"),
        (["--no-save-output", "--save-output"], "true"),
    ],
)
def test_switches_have_three_forms_and_the_last_one_counts(argv: list[str], raw: str) -> None:
    assert given(*argv) == {"--save-output": raw}


def test_prompts_add_up() -> None:
    assert given("--prompt", "a", "b", "--prompt", "c") == {"--prompt": ["a", "b", "c"]}


def test_flags_cannot_be_abbreviated() -> None:
    with pytest.raises(UsageError):
        given("--num-inf", "5")


@pytest.mark.parametrize(
    ("name", "raw", "value"),
    [
        ("height", "512", 512),
        ("guidance_scale", "1e-1", 0.1),
        ("save_output", "FALSE", False),
        ("image_path", "a.png", ("a.png",)),
        ("image_path", ["a.png", "b.png"], ("a.png", "b.png")),
        ("diffusers_kwargs", '{"eta": 0.5}', {"eta": 0.5}),
        ("diffusers_kwargs", {"eta": [1]}, {"eta": [1]}),
        ("negative_prompt", "null", "null"),
        ("dit_precision", "bf16", "bf16"),
        ("cache", '{"method": "taylor", "interval": 2}', TaylorCache(interval=2)),
        ("cache", {"method": "first_block"}, FirstBlockCache()),
    ],
)
def test_raw_values_are_converted(name: str, raw: object, value: object) -> None:
    assert options_by_name()[name].convert(raw) == value


@pytest.mark.parametrize(
    ("name", "raw", "expected"),
    [
        ("height", "tall", "int"),
        ("height", "0", ">= 1"),
        ("device", "tpu", "{auto,cpu,cuda}"),
        ("diffusers_kwargs", "{", "truncated"),
        ("diffusers_kwargs", "[]", "object"),
        ("prompt", 5, "array"),
        ("save_output", "maybe", "bool"),
        ("cache", "{}", "method"),
        ("cache", '{"method": "magic"}', "magic"),
        ("cache", '{"method": "taylor", "interval": 1}', ">= 2"),
        ("cache", '{"method": "first_block", "interval": 2}', "interval"),
    ],
)
def test_wrong_values_are_refused_with_what_is_expected(name: str, raw: object, expected: str) -> None:
    with pytest.raises(UsageError, match=expected.replace("{", r"\{")):
        options_by_name()[name].convert(raw)
