"""Do the models that ship with sgld draw what held-out prompts ask for?

python bench/quality.py [--num-images 64] [--num-clips 32]

Writes bench/results/quality.md and quality.json.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import diffusers
import reports
import torch
from diffusers import DiffusionPipeline

import sgld.models.embedded.evaluation as evaluation
from sgld.models.embedded.networks import DEFAULTS_FILE
from sgld.models.embedded.scenes import draw_scenes

RESULTS = Path(__file__).parent / "results"
MODELS = Path(evaluation.__file__).parent


def measure(name: str, num_prompts: int, seed: int) -> dict[str, Any]:
    """PSNR of the autoencoder in dB, rate and number of prompts by attribute, seconds for one picture or clip."""
    folder = MODELS / name
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    options = json.loads((folder / DEFAULTS_FILE).read_text())
    options.pop("fps", None)
    moving = "num_frames" in options
    scenes, prompts = evaluation.held_out_prompts(num_prompts, seed, moving=moving)
    start = time.perf_counter()
    evaluation.generate_pixels(pipeline, prompts[:1], seed, options)
    seconds = time.perf_counter() - start
    score = evaluation.score(pipeline, scenes, prompts, options)
    size = (options.get("num_frames", 1), options["height"], options["width"])
    psnr = evaluation.autoencoder_psnr(pipeline.vae, draw_scenes(16, seed, moving=moving), size)
    rates = {attribute: [score.right[attribute], score.asked[attribute]] for attribute in sorted(score.asked)}
    return {"model": name, "options": options, "autoencoder_psnr_db": psnr, "seconds_for_one": seconds, "right": rates}


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = ["# Do the embedded models draw what held-out prompts ask for?", "", f"`{report['command']}`", ""]
    lines += [f"{report['machine']}; {report['versions']}.", ""]
    cells = (
        (model["model"], name, right, asked, f"{right / asked:.0%}")
        for model in report["models"]
        for name, (right, asked) in model["right"].items()
    )
    lines += reports.table(["model", "what", "right", "prompts", "rate"], cells)
    for model in report["models"]:
        lines += ["", f"{model['model']}: autoencoder {model['autoencoder_psnr_db']:.1f} dB, one sample alone in"]
        lines[-1] += f" {model['seconds_for_one']:.1f} s, with {model['options']}."
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-images", type=int, default=64)
    parser.add_argument("--num-clips", type=int, default=32)
    parser.add_argument("--seed", type=int, default=123)
    arguments = parser.parse_args()
    wanted = (("tiny_image", arguments.num_images), ("tiny_video", arguments.num_clips))
    report = {
        "command": reports.command(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, diffusers {diffusers.__version__}",
        "models": [measure(name, count, arguments.seed) for name, count in wanted if count],
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "quality.json").write_text(json.dumps(report, indent=2) + "\n")
    (RESULTS / "quality.md").write_text(table(report))
    print(table(report))


if __name__ == "__main__":
    main()
