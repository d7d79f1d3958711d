"""Code that comes with models: tests put these files into folders of models and components."""

import json
import shutil
from pathlib import Path

import torch

from own_code.flux2_tiny_autoencoder import Flux2TinyAutoEncoder

_HERE = Path(__file__).parent


def copy_code(module: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(_HERE / f"{module}.py", folder)


def save_tiny_autoencoder(folder: Path) -> Path:
    """A folder as that of fal/FLUX.2-Tiny-AutoEncoder: weights, and the class in a file that config.json names."""
    torch.manual_seed(1)
    Flux2TinyAutoEncoder(latent_channels=1).save_pretrained(folder)
    copy_code("flux2_tiny_autoencoder", folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "flux2_tiny_autoencoder.Flux2TinyAutoEncoder"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
