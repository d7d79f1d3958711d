"""Overlays and sources made of a few small files, and the process that materialises one."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sgld.config import EngineConfig
from sgld.models.manifest import MANIFEST_FILE
from sgld.models.overlay import find_model
from sgld.models.resolve import INDEX_FILE, ModelSource

INDEX = {"_class_name": "P", "_diffusers_version": "0.42.1", "unet": ["diffusers", "U"]}
UNET_TREE = {"type": "tree", "src": "weights", "dst_dir": "unet"}
# Waits for a line of the pipe `go` of the source.
WAITING = """
from pathlib import Path

def materialize(*, overlay_dir, source_dir, output_dir, manifest):
    (Path(output_dir) / "unet").mkdir()
    (Path(output_dir) / "unet" / "half").write_text("")
    with (Path(source_dir).parent / "log").open("a") as log:
        log.write("made\\n")
    (Path(source_dir).parent / "go").read_text()
"""


def write(folder: Path, files: Mapping[str, str | bytes]) -> Path:
    """A folder with these files, by path."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def source_in(folder: Path) -> Path:
    return write(folder / "source", {"weights/a.safetensors": "A", "weights/more/b.json": "B", "notes.txt": "N"})


def overlay_in(
    folder: Path,
    source: str | Path | None,
    *,
    index: Any = INDEX,
    files: Mapping[str, str] | None = None,
    **manifest: Any,
) -> Path:
    """An overlay; by default it makes a UNet of the folder `weights` of its source."""
    fields = {"file_mappings": [UNET_TREE], **manifest}
    if source is not None:
        fields["source_model_id"] = str(source)
    content = {INDEX_FILE: json.dumps(index), MANIFEST_FILE: json.dumps(fields), "README.md": "an overlay"}
    return write(folder / "overlay", {**content, **(files or {})})


def made(model_path: str | Path, **config: Any) -> ModelSource:
    return find_model(EngineConfig(model_path=str(model_path), **config))


def folder_of(model_path: str | Path, **config: Any) -> Path:
    folder = made(model_path, **config).folder
    assert folder is not None
    return folder


def names_in(folder: Path) -> list[str]:
    """The files of a materialised model without its marker."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")
    return sorted(str(path.relative_to(folder)) for path in paths)


def start_making(model_path: Path) -> "subprocess.Popen[str]":
    """A process that materialises a model and prints its folder; its first line says that it begins."""
    program = (
        "import sys; from sgld.config import EngineConfig; from sgld.models.overlay import find_model; print('begins',"
        " flush=True); print(find_model(EngineConfig(model_path=sys.argv[1], trust_remote_code=True)).folder)"
    )
    return subprocess.Popen([sys.executable, "-c", program, str(model_path)], stdout=subprocess.PIPE, text=True)
