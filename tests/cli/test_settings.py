from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cli.page_config import PAGE_CONFIG
from sgld.config import EMBEDDED_IMAGE_MODEL, EMBEDDED_VIDEO_MODEL, NoiseConfig
from sgld.errors import InvalidRequest
from sgld.media.images import encode_image
from sgld_cli.options import UsageError
from sgld_cli.settings import Setting, accept, build, component_flags, merge, refuse_unknown, show
from sgld_cli.sources import read_config, read_picture

# With what one GPU can do.
ONE_GPU = PAGE_CONFIG.replace("num_gpus: 2", "num_gpus: 1").replace("sp_size: 2", "sp_size: 1")


def write(folder: Path, text: str, name: str = "config.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_example_of_the_page_works(tmp_path: Path) -> None:
    settings = build(merge([accept(read_config(write(tmp_path, ONE_GPU)), "config.yaml")]))
    assert settings.engine.model_path == "FastVideo/FastHunyuan-diffusers"
    assert settings.engine.dit_precision == "bf16"
    assert settings.engine.vae_tiling
    assert settings.output.output_path == "outputs/"
    (params,) = settings.params
    assert (params.num_frames, params.width, params.height, params.fps, params.seed) == (45, 1280, 720, 24.0, 1024)


@pytest.mark.parametrize("line", ["nnodes: 2", "use-fsdp-inference: true"])
def test_what_needs_a_later_feature_is_refused_by_the_name_that_was_used(line: str, tmp_path: Path) -> None:
    name = line.partition(":")[0]
    with pytest.raises(UsageError, match=rf"^{name} in my.yaml .*isn't supported yet"):
        merge([accept(read_config(write(tmp_path, line)), "my.yaml")])


def test_flags_undo_what_a_file_asks_of_later_features(tmp_path: Path) -> None:
    config = accept(
        read_config(write(tmp_path, PAGE_CONFIG.replace("tp_size: 1", "tp_size: 2") + "use_fsdp_inference: true\n")),
        "page.yaml",
    )
    flags = accept({"--tp-size": "1", "--sp-degree": "1", "--use-fsdp-inference": ["false"]}, "flag")
    merged = merge([flags, config])
    assert merged["tp_size"] == merged["sp_degree"] == Setting(1, "flag")
    assert "use_fsdp_inference" not in merged
    with pytest.raises(UsageError, match=r"^use_fsdp_inference in page\.yaml isn't supported yet"):
        merge([config])


def test_later_features_of_a_flag_are_refused_whatever_the_file_says() -> None:
    with pytest.raises(UsageError, match=r"^--nnodes isn't supported yet"):
        merge([accept({"--nnodes": "2"}, "flag"), accept({"nnodes": 1}, "c.yaml")])


@pytest.mark.parametrize(
    "flag",
    ["--perf-dump-path", "--text-encoder-weights-path", "--use-fsdp-inference", "--enable-teacache"],
)
def test_later_flags_are_refused_by_name(flag: str) -> None:
    with pytest.raises(UsageError, match=rf"^{flag} isn't supported yet"):
        refuse_unknown([flag, "x"])


def test_values_that_state_what_is_done_today_are_accepted() -> None:
    file = accept({"enable_teacache": "none", "nnodes": 1}, "c.yaml")
    assert merge([accept({"--use-fsdp-inference": ["false"], "--nnodes": ["1"]}, "flag"), file]) == merge([file])
    assert merge([file]) == merge([])


@pytest.mark.parametrize(
    ("name", "raw"), [("enable_teacache", True), ("--use-fsdp-inference", []), ("perf_dump_path", "x")]
)
def test_other_values_of_later_settings_are_refused(name: str, raw: object) -> None:
    with pytest.raises(UsageError, match=f"^{name} isn't supported yet"):
        merge([accept({name: raw}, "flag")])


@pytest.mark.parametrize(
    ("name", "meant"), [("num_infernce_steps", "num_inference_steps"), ("--modle-path", "--model-path")]
)
def test_unknown_names_come_with_a_suggestion(name: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"{name} is unknown; did you mean {meant}?"):
        accept({name: 5}, "flag")


def test_unknown_names_without_a_likeness_come_without() -> None:
    with pytest.raises(UsageError, match=r"^xyzzy in c\.json is unknown$"):
        accept({"xyzzy": 5}, "c.json")


def test_stray_words_are_refused() -> None:
    with pytest.raises(UsageError, match="'cat' belongs to no flag"):
        refuse_unknown(["cat"])


def test_flags_override_the_file_and_the_file_the_picture() -> None:
    merged = merge([accept({"--seed": "1"}, "flag"), accept({"seed": 2, "fps": 8}, "c.yaml"), accept({"fps": 9}, "p")])
    assert merged["seed"] == Setting(1, "flag")
    assert merged["fps"] == Setting(8.0, "c.yaml")
    assert merged["height"] == Setting(None, "default")


def test_file_of_prompts_hides_the_prompt_of_a_lower_source() -> None:
    merged = merge([accept({"--prompt-path": "p.txt"}, "flag"), accept({"prompt": "a cat"}, "c.yaml")])
    assert (merged["prompt"].value, merged["prompt_path"].value) == ((), "p.txt")


def test_prompt_and_file_of_prompts_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="can't be given together"):
        accept({"--prompt-path": "p.txt", "--prompt": ["a"]}, "flag")


def test_two_spellings_of_one_setting_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="sets dit_precision, which is set already"):
        accept({"dit_precision": "bf16", "precision": "fp16"}, "c.yaml")


def test_shift_is_that_of_the_model_and_of_its_requests() -> None:
    given = {"--prompt": ["a"], "--flow-shift": "3", "--scheduler-config": '{"solver_order": 3}'}
    settings = build(merge([accept(given, "flag")]))
    assert settings.engine.noise == NoiseConfig(flow_shift=3, scheduler_config={"solver_order": 3})
    assert settings.params[0].flow_shift == 3


@pytest.mark.parametrize("name", ["seed", "quantization", "lora", "vae_path"])
def test_null_stands_for_the_default(name: str) -> None:
    assert accept({name: None}, "c.yaml") == {}


def test_path_of_any_component_is_a_setting_of_its_own() -> None:
    given, rest = component_flags(["--vae-path", "a", "--text-encoder-2-path=b", "--component-paths.image", "c"])
    assert (given, rest) == ({"--vae-path": "a", "--text-encoder-2-path": "b", "--component-paths.image": "c"}, [])
    flags = accept(given, "flag")
    file = accept({"component_paths": {"transformer": "d", "vae": "e"}, "scheduler_path": "f"}, "c.yaml")
    chosen = merge([flags, file])["component_paths"]
    paths = {"vae": "a", "text_encoder_2": "b", "image": "c", "transformer": "d", "scheduler": "f"}
    assert chosen == Setting(paths, "flag, c.yaml")
    assert accept({"--component-paths": '{"vae": "a"}'}, "flag") == accept({"--vae-path": "a"}, "flag")
    assert merge([])["component_paths"] == Setting({}, "default")


@pytest.mark.parametrize("name", ["transformer", "transformer_2", "tokenizer", "image_encoder", "unet", "controlnet"])
def test_no_component_is_taken_for_a_slip(name: str) -> None:
    assert component_flags([f"--{name.replace('_', '-')}-path", "x"])[1] == []


def test_slip_is_not_taken_for_a_component() -> None:
    assert component_flags(["--modle-path", "x"]) == ({}, ["--modle-path", "x"])


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"vae_path": "a", "component_paths": {"vae": "b"}}, r"sets component_paths\.vae, which is set already"),
        ({"vae_path": ""}, r"vae_path in c\.yaml is '': Expected a folder or a hub id"),
        ({"component_paths": ["vae"]}, r"component_paths in c\.yaml is \['vae'\]: Expected object"),
    ],
)
def test_path_that_is_no_path_is_refused(given: dict[str, object], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        accept(given, "c.yaml")


def test_null_excuses_no_unknown_name() -> None:
    with pytest.raises(UsageError, match=r"modle_path in c\.yaml is unknown; did you mean model_path\?"):
        accept({"modle_path": None}, "c.yaml")


@pytest.mark.parametrize(
    ("flags", "model"),
    [
        ({}, EMBEDDED_IMAGE_MODEL),
        ({"--num-frames": "1"}, EMBEDDED_IMAGE_MODEL),
        ({"--num-frames": "2"}, EMBEDDED_VIDEO_MODEL),
        ({"--num-frames": "2", "--model": "mine"}, "mine"),
    ],
)
def test_default_model_fits_the_number_of_frames(flags: dict[str, object], model: str) -> None:
    assert merge([accept(flags, "flag")])["model_path"].value == model


def test_every_prompt_gets_its_own_params(tmp_path: Path) -> None:
    path = write(tmp_path, "a cat\n\n  a dog \n", "prompts.txt")
    settings = build(merge([accept({"--prompt-path": str(path), "--seed": "7"}, "flag")]))
    assert [(params.prompt, params.seed) for params in settings.params] == [("a cat", 7), ("a dog", 7)]


def test_there_must_be_a_prompt_or_an_explicit_empty_one() -> None:
    with pytest.raises(UsageError, match="no prompt"):
        build(merge([]))
    assert build(merge([accept({"--prompt": [""]}, "flag")])).params[0].prompt == ""


def test_shown_settings_are_a_config_file_with_sources(tmp_path: Path) -> None:
    merged = merge([accept({"--seed": "1", "--prompt": ["a: #b"]}, "flag"), accept({"fps": 8}, "c.yaml")])
    text = show(merged, as_json=False)
    assert "seed: 1  # flag" in text.splitlines()
    assert "fps: 8.0  # c.yaml" in text.splitlines()
    assert "port" not in text
    again = merge([accept(read_config(write(tmp_path, text)), "again.yaml")])
    assert {name: setting.value for name, setting in again.items()} == {
        name: setting.value for name, setting in merged.items()
    }


def test_shown_file_of_prompts_can_be_read_again(tmp_path: Path) -> None:
    text = show(merge([accept({"--prompt-path": "p.txt"}, "flag")]), as_json=False)
    assert "prompt: []  # default" in text.splitlines()
    again = accept(read_config(write(tmp_path, text)), "again.yaml")
    assert merge([again])["prompt_path"] == Setting("p.txt", "again.yaml")


def test_no_prompts_hide_none_of_a_lower_source() -> None:
    merged = merge([accept({"prompt": []}, "c.yaml"), accept({"prompt": "a cat"}, "x.png")])
    assert merged["prompt"] == Setting(("a cat",), "x.png")


def test_shown_settings_as_json() -> None:
    shown = msgspec.json.decode(show(merge([accept({"--seed": "1"}, "flag")]), as_json=True))
    assert shown["seed"] == {"value": 1, "source": "flag"}
    assert shown["tp_size"] == {"value": 1, "source": "default"}


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("c.json", "{", "isn't JSON"),
        ("c.yaml", "a: [", "isn't YAML"),
        ("c.yml", "- a", "doesn't hold keys"),
        ("c.yaml", "1: 2", "doesn't hold keys"),
        ("c.toml", "a = 1", "'.toml'"),
        ("c.yaml", "prompt: 2024-99-99", "month must be in 1..12"),
        ("c.yaml", "seed: !!bool maybe", "can't be read: 'maybe'"),
        ("c.yaml", "seed: !!timestamp x", "holds a value that can't be read"),
        ("c.yaml", "prompt: " + "[" * 5000, "nested too deeply"),
        ("c.json", "[" * 5000, "nested too deeply"),
    ],
)
def test_bad_config_files_are_refused_in_one_line(name: str, text: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=problem) as caught:
        read_config(write(tmp_path, text, name))
    assert "\n" not in str(caught.value)


def test_missing_config_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_config(tmp_path / "c.yaml")


@pytest.mark.parametrize("text", ["&a {x: *a}", "{x: {null: 1}}"])
def test_yaml_that_is_no_json_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^diffusers_kwargs in c\.yaml is .* isn't JSON"):
        accept(read_config(write(tmp_path, f"diffusers_kwargs: {text}")), "c.yaml")


def test_file_of_prompts_with_an_impossible_name_is_refused() -> None:
    with pytest.raises(UsageError, match="embedded null byte"):
        build(merge([accept({"prompt_path": "a\0b"}, "c.yaml")]))


def write_picture(path: Path, metadata: dict[str, object]) -> Path:
    path.write_bytes(encode_image(np.zeros((4, 4, 3), np.uint8), "png", metadata=metadata))
    return path


def test_picture_chooses_only_what_sgld_writes_into_it(tmp_path: Path) -> None:
    written = {"model_path": "m", "vae_tiling": True, "component_paths": {"vae": "v"}}
    params = {"prompt": "a", "seed": 3}
    strange = {"output_path": "/tmp", "output_file_name": "x.png", "prompt_path": "/etc/passwd", "num_gpus": 2}
    path = write_picture(
        tmp_path / "x.png", {"version": "1", **written, **strange, "params": {**params, **strange, "model_path": "n"}}
    )
    assert read_picture(path) == {**written, **params}


def test_picture_with_deeply_nested_metadata_is_refused(tmp_path: Path) -> None:
    chunks = PngInfo()
    chunks.add_itxt("sgld", '{"params": ' + "[" * 5000)
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png", pnginfo=chunks)
    with pytest.raises(UsageError, match="nested too deeply"):
        read_picture(tmp_path / "x.png")


def test_pictures_in_further_arguments_are_looked_at_first(tmp_path: Path) -> None:
    given = {"prompt": ["a cat"], "diffusers_kwargs": '{"mask_image": {"$image": "none.png"}}'}
    with pytest.raises(InvalidRequest, match=r"there is no image 'none\.png'"):
        build(merge([accept(given, "flag")]))
    given["diffusers_kwargs"] = '{"mask_image": {"$image": "https://host/mask.png"}}'
    assert build(merge([accept(given, "flag")])).params[0].diffusers_kwargs["mask_image"]["$image"].startswith("https")


def lora_of(*texts: str, **file: object) -> object:
    """The adapters of a run without a model."""
    flags = {"--lora": list(texts)} if texts else {}
    settings = build(merge([accept({**flags, "--prompt": ["a"]}, "flag"), accept(file, "c.yaml")]))
    lora = settings.params[0].lora
    return None if lora is None else [msgspec.to_builtins(choice) for choice in lora]


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("./a.safetensors=0.5", {"path": "./a.safetensors", "scale": 0.5}),
        ("owner/name:a.safetensors", {"path": "owner/name:a.safetensors"}),
        ("a=b.safetensors", {"path": "a=b.safetensors"}),
        ('{"path": "a", "target": "unet"}', {"path": "a", "target": "unet"}),
    ],
)
def test_adapters_are_written_as_paths_with_scales_or_as_json(text: str, choice: object) -> None:
    assert lora_of(text) == [choice]


def test_several_adapters_are_given_at_once_or_as_a_list() -> None:
    two = [{"path": "./a", "scale": 2.0}, {"path": "./b"}]
    assert lora_of("./a=2", "./b") == two == lora_of('[{"path": "./a", "scale": 2}, {"path": "./b"}]')
    assert lora_of(lora=["./a=2", {"path": "./b"}]) == two


def test_adapters_of_the_start_have_nicknames_and_are_those_of_prompts_that_choose_none() -> None:
    start = {"lora_path": ["./a.safetensors", "./b.safetensors"], "lora_scale": [0.5, 2]}
    a, b = {"nickname": "a", "path": "./a.safetensors", "scale": 0.5}, {"nickname": "b", "path": "./b.safetensors"}
    assert lora_of(**start) == [a, b | {"scale": 2.0}]
    assert lora_of("b=-1", **start) == [b | {"scale": -1.0}]
    assert lora_of("[]", **start) == []
    assert lora_of() is None


def test_adapters_that_are_not_there_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="there is no LoRA adapter 'style'; none is loaded"):
        lora_of("style=0.5")
    with pytest.raises(UsageError, match="--lora is"):
        lora_of("{")
