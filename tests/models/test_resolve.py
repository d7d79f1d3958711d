import json
from pathlib import Path

import pytest

from sgld.config import EMBEDDED_IMAGE_MODEL, EMBEDDED_VIDEO_MODEL
from sgld.errors import ModelError
from sgld.models.resolve import DEFAULTS_FILE, EMBEDDED, INDEX_FILE, defaults, model_index, resolve


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / INDEX_FILE).write_text(json.dumps({"_class_name": "FluxPipeline"}))
    return tmp_path


def test_folder_is_loaded_from_where_it_is(folder: Path) -> None:
    source = resolve(str(folder))
    assert (source.folder, source.pretrained_name) == (folder, str(folder))
    assert model_index(source) == {"_class_name": "FluxPipeline"}


@pytest.mark.parametrize("name", [EMBEDDED_IMAGE_MODEL, EMBEDDED_VIDEO_MODEL])
def test_models_that_ship_are_found_by_name(name: str) -> None:
    assert EMBEDDED[name].name == name.removeprefix("sgld/").replace("-", "_")


@pytest.mark.parametrize("name", ["black-forest-labs/FLUX.1-dev", "gpt2", "a-b/c_d.e"])
def test_other_names_are_on_the_hub(name: str) -> None:
    source = resolve(name)
    assert (source.folder, source.pretrained_name, defaults(source)) == (None, name, {})


@pytest.mark.parametrize("name", ["./missing", "/missing/model", "~/missing", "~nobody-at-all/x", "a/b/c", " "])
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="there is no folder"):
        resolve(name)


def test_name_that_no_file_system_takes_is_refused() -> None:
    with pytest.raises(ModelError, match="there is no folder"):
        resolve("/" + "x" * 5000)


def test_folder_without_an_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no model_index\.json; a model is a folder"):
        resolve(str(tmp_path))


def test_file_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"model_index\.json is a file; a model is a folder"):
        resolve(str(folder / INDEX_FILE))


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b""])
def test_index_that_can_not_be_read_is_told_in_one_line(folder: Path, content: bytes) -> None:
    (folder / INDEX_FILE).write_bytes(content)
    with pytest.raises(ModelError, match=r"model_index\.json of .* can't be read: ") as caught:
        model_index(resolve(str(folder)))
    assert "\n" not in str(caught.value)


def test_recommended_params_are_those_of_the_folder(folder: Path) -> None:
    assert defaults(resolve(str(folder))) == {}
    (folder / DEFAULTS_FILE).write_text('{"num_inference_steps": 7}')
    assert defaults(resolve(str(folder))) == {"num_inference_steps": 7}
