"""What do quantized weights cost and save: memory, time of a step, and error against bf16?

A FLUX transformer of real widths with a fifth of its layers and random weights (all blocks the same, so that files are
written fast), in each form that sgld loads: made while loading (`--quantization`), or as a checkpoint that is written
here and loaded as `--transformer-weights-path` does. Peak of loading is the GPU's. A step is one forward of one row,
eager, the median of `--repeats`; the error is that of its result at 512x512 to the one in bf16, in the L2 norm.

    python bench/quantization.py --device cuda --out bench/results/quantization_gpu

`--tiny --device cpu` tries it out. Forms whose library or device isn't there are listed with what is missing. On an
H100 with 16 cores it should take three minutes; forms for which no time is left are listed as such, and the report is
written after each form.
"""

import argparse
import gc
import json
import math
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs where the package isn't installed, too

import msgspec
import reports
import torch
from accelerate import init_empty_weights
from diffusers import BitsAndBytesConfig, FluxTransformer2DModel, TorchAoConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sgld.errors import ModelError
from sgld.models.linears import fp8_rows
from sgld.models.quantization import Activations, Family, Quantization, detect
from sgld.models.quantized import load_weights, quantize
from sgld.models.requirements import check
from sgld.models.weight_files import place_of, read_header, weights_at
from sgld.outcome import one_line

REAL: dict[str, Any] = {"num_layers": 4, "num_single_layers": 8, "guidance_embeds": True}
TINY: dict[str, Any] = {
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (8, 12, 12),
    "guidance_embeds": True,
}
BLOCK = ("transformer_blocks.", "single_transformer_blocks.")
# What libraries raise where something of theirs isn't there.
UNAVAILABLE = (
    ModelError,
    ImportError,
    RuntimeError,
    ValueError,
    AssertionError,
    AttributeError,
    TypeError,
    LookupError,
    OSError,
)
LIBRARIES = ("torch", "diffusers", "transformers", "torchao", "bitsandbytes", "gguf")


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A form of the weights, and what was measured; None on a CPU, or where it can't be had (`problem`)."""

    name: str
    weights_gb: float | None = None
    load_s: float | None = None
    load_peak_gb: float | None = None
    step_512_ms: float | None = None
    step_1024_ms: float | None = None
    step_peak_gb: float | None = None
    error: float | None = None
    problem: str = ""


class Bench:
    """The model in bf16 on disk, and what is made of it.

    :param folder: for all files.
    """

    def __init__(self, folder: Path, device: torch.device, sizes: dict[str, Any], repeats: int) -> None:
        self.folder, self.device, self.repeats = folder, device, repeats
        self.is_gpu = device.type == "cuda"
        self.base = folder / "bf16"
        self.base_file = self.base / "diffusion_pytorch_model.safetensors"
        self.input_scales: dict[str, Tensor] = {}
        self.expected: Tensor | None = None
        self.started = 0.0
        _random_model(sizes, device).save_pretrained(self.base, max_shard_size="100GB")
        _free()

    def row(self, name: str, make: Callable[["Bench"], nn.Module]) -> Row:
        """Load one form and run it."""
        _free()  # the form before this one is gone only now
        try:
            before = self._allocated()
            self.begin()
            model = make(self).to(self.device)
            self._synchronize()
            load_s = time.perf_counter() - self.started
            weights, load_peak = self._allocated() - before, self._peak() - before
            step_512 = self._step_ms(model, 512)
            self._reset_peak()
            step_1024 = self._step_ms(model, 1024)
            return Row(
                name=name,
                weights_gb=_gb(weights if self.is_gpu else _num_bytes(model)),
                load_s=round(load_s, 1),
                load_peak_gb=_gb(load_peak) if self.is_gpu else None,
                step_512_ms=step_512,
                step_1024_ms=step_1024,
                step_peak_gb=_gb(self._peak()) if self.is_gpu else None,
                error=self._error(model),
            )
        except UNAVAILABLE as error:
            return Row(name=name, problem=one_line(error))
        finally:
            _free()

    def begin(self) -> None:
        """What is measured of loading begins here."""
        self._reset_peak()
        self.started = time.perf_counter()

    def bf16(self) -> nn.Module:
        return FluxTransformer2DModel.from_pretrained(self.base, dtype=torch.bfloat16)  # type: ignore[no-any-return]

    def calibrate(self, model: nn.Module) -> None:
        """Note the scales of activations that a checkpoint with static scales needs: the largest of one forward."""
        hooks = []
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):

                def note(_module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                    self.input_scales[name] = args[0].abs().amax().float() / torch.finfo(torch.float8_e4m3fn).max

                hooks.append(module.register_forward_pre_hook(note))
        model(**self.inputs(model, 512))
        for hook in hooks:
            hook.remove()

    def inputs(self, model: nn.Module, size: int) -> dict[str, Any]:
        """Arguments of a forward for a picture of that size; those of a FLUX pipeline."""
        config: Any = model.config
        generator = torch.Generator().manual_seed(1)
        side = size // 16 if self.is_gpu else size // 128

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.device, torch.bfloat16)

        ids = torch.zeros(side * side, 3, device=self.device)
        ids[:, 1] = torch.arange(side * side, device=self.device) // side
        ids[:, 2] = torch.arange(side * side, device=self.device) % side
        num_text = 512 if self.is_gpu else 16
        return {
            "hidden_states": noise(1, side * side, config.in_channels),
            "encoder_hidden_states": noise(1, num_text, config.joint_attention_dim),
            "pooled_projections": noise(1, config.pooled_projection_dim),
            "timestep": torch.full((1,), 0.5, device=self.device, dtype=torch.bfloat16),
            "guidance": torch.full((1,), 3.5, device=self.device),
            "img_ids": ids,
            "txt_ids": torch.zeros(num_text, 3, device=self.device),
            "return_dict": False,
        }

    def _error(self, model: nn.Module) -> float:
        result = model(**self.inputs(model, 512))[0].float()
        if self.expected is None:
            self.expected = result
            self.calibrate(model)
        return round(float((result - self.expected).norm() / self.expected.norm()), 5)

    def _step_ms(self, model: nn.Module, size: int) -> float:
        inputs = self.inputs(model, size)
        times = []
        for _ in range(self.repeats + 2):
            self._synchronize()
            start = time.perf_counter()
            model(**inputs)
            self._synchronize()
            times.append(1e3 * (time.perf_counter() - start))
        return round(statistics.median(times[2:]), 2)

    def _synchronize(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.is_gpu else 0

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.is_gpu else 0

    def _reset_peak(self) -> None:
        if self.is_gpu:
            torch.cuda.reset_peak_memory_stats()


def _random_model(sizes: dict[str, Any], device: torch.device) -> FluxTransformer2DModel:
    """All blocks of a kind have the same weights; a forward keeps activations of about the same size."""
    with init_empty_weights():
        model = FluxTransformer2DModel(**sizes)
    model = nn.Module.to(model.to_empty(device=device), torch.bfloat16)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            parameter.normal_(std=parameter.shape[1] ** -0.5)
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    for kind in BLOCK:
        blocks = getattr(model, kind.rstrip("."))
        for block in blocks[1:]:
            block.load_state_dict(blocks[0].state_dict())
    return model


def online(family: Family, activations: Activations) -> Callable[[Bench], nn.Module]:
    """`--quantization`."""

    def make(bench: Bench) -> nn.Module:
        model = bench.bf16()
        found = check(Quantization(family, 8, "", "option", activations), "transformer", _capability(bench.device))
        quantize(model, found, (), bench.device)
        return model

    return make


def checkpoint(write: Callable[[Bench, Path], Path | None]) -> Callable[[Bench], nn.Module]:
    """`--transformer-weights-path` of what `write` writes: a file that it returns, or into the folder."""

    def make(bench: Bench) -> nn.Module:
        folder = bench.folder / "checkpoint"
        folder.mkdir(exist_ok=True)
        try:
            path = write(bench, folder) or folder
            _free()
            bench.begin()
            weights = weights_at(place_of(str(path)))
            found = detect(weights, weights.config)
            assert found is not None
            found = check(found, "transformer", _capability(bench.device))
            config = FluxTransformer2DModel.load_config(bench.base)
            return load_weights(FluxTransformer2DModel, config, weights, found, torch.bfloat16)
        finally:
            for file in folder.iterdir():
                file.unlink()

    return make


def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def _base_tensors(bench: Bench) -> dict[str, Tensor]:
    return load_file(bench.base_file)


def _is_quantized(name: str, tensor: Tensor) -> bool:
    return name.startswith(BLOCK) and tensor.ndim == 2 and ".norm" not in name


def write_fp8_rows(bench: Bench, folder: Path) -> Path:
    """FP8 with a scale for each row, without a config."""
    made: dict[str, Tensor] = {}
    for name, tensor in _base_tensors(bench).items():
        if _is_quantized(name, tensor):
            codes, scale = fp8_rows(tensor.to(bench.device))
            made[name], made[name + "_scale"] = codes.cpu(), scale.flatten().cpu()
        else:
            made[name] = tensor
    save_file(made, folder / "rows.safetensors")
    return folder / "rows.safetensors"


def write_modelopt_fp8(bench: Bench, folder: Path) -> None:
    """As NVIDIA's Model Optimizer exports: a scale for each weight, and one for its activations."""
    made: dict[str, Tensor] = {}
    limit = torch.finfo(torch.float8_e4m3fn).max
    for name, tensor in _base_tensors(bench).items():
        if _is_quantized(name, tensor):
            weight = tensor.to(bench.device).float()
            scale = weight.abs().amax() / limit
            made[name] = (weight / scale).clamp(-limit, limit).to(torch.float8_e4m3fn).cpu()
            made[name + "_scale"] = scale.cpu()
            layer = name.removesuffix(".weight")
            made[f"{layer}.input_scale"] = bench.input_scales[layer].cpu()
        else:
            made[name] = tensor
    save_file(made, folder / "model.safetensors")
    config = dict(FluxTransformer2DModel.load_config(bench.base))
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8"}
    (folder / "config.json").write_text(json.dumps(config))


def write_gguf(kind: str) -> Callable[[Bench, Path], Path]:
    """Weights of blocks in a type of GGUF, others in bf16."""

    def write(bench: Bench, folder: Path) -> Path:
        import gguf

        path = folder / f"flux-{kind}.gguf"
        writer = gguf.GGUFWriter(path, "flux")
        known: dict[str, Any] = {}  # all blocks of a kind have the same weights
        for name, tensor in _base_tensors(bench).items():
            if not _is_quantized(name, tensor):
                writer.add_tensor(name, tensor.float().numpy())
                continue
            of_block = ".".join(name.split(".")[:1] + name.split(".")[2:])
            as_type = gguf.GGMLQuantizationType[kind]
            if of_block not in known:
                known[of_block] = gguf.quants.quantize(tensor.float().numpy(), as_type)
            writer.add_tensor(name, known[of_block], raw_dtype=as_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def write_by_diffusers(config: Callable[[], Any]) -> Callable[[Bench, Path], None]:
    """What diffusers quantizes and saves: a folder with config.json."""

    def write(bench: Bench, folder: Path) -> None:
        model = FluxTransformer2DModel.from_pretrained(
            bench.base, quantization_config=config(), dtype=torch.bfloat16, device_map=bench.device.type
        )
        model.save_pretrained(folder)

    return write


def torchao(name: str, **options: Any) -> Callable[[], Any]:
    def config() -> Any:
        from torchao import quantization

        made = {key: getattr(quantization, value)() for key, value in options.items()}
        return TorchAoConfig(getattr(quantization, name)(**made))

    return config


def bitsandbytes(**options: Any) -> Callable[[], Any]:
    return lambda: BitsAndBytesConfig(**options)


FORMS: dict[str, Callable[[Bench], nn.Module]] = {
    "bf16": Bench.bf16,
    "--quantization fp8": online("fp8", "full"),
    "--quantization fp8_dynamic": online("fp8", "rows"),
    "--quantization int8": online("int8", "full"),
    "--quantization int8_dynamic": online("int8", "rows"),
    "FP8 file, scales of rows": checkpoint(write_fp8_rows),
    "ModelOpt FP8 folder, static scales": checkpoint(write_modelopt_fp8),
    "GGUF Q8_0": checkpoint(write_gguf("Q8_0")),
    "torchao Int8WeightOnly": checkpoint(write_by_diffusers(torchao("Int8WeightOnlyConfig"))),
    "torchao Float8 dynamic, by rows": checkpoint(
        write_by_diffusers(torchao("Float8DynamicActivationFloat8WeightConfig", granularity="PerRow"))
    ),
    "bitsandbytes nf4": checkpoint(
        write_by_diffusers(
            bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
        )
    ),
    "bitsandbytes LLM.int8": checkpoint(write_by_diffusers(bitsandbytes(load_in_8bit=True))),
    "GGUF Q4_0": checkpoint(write_gguf("Q4_0")),
}


def _num_bytes(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def _gb(num_bytes: int) -> float:
    return round(num_bytes / 1e9, 3)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def table(rows: list[Row], report: dict[str, Any]) -> str:
    """The report for people."""
    machine = f"{report['machine']}; {reports.versions(report)}. {report['model']}."
    lines = [
        "# What do quantized weights cost and save?",
        "",
        f"`{report['command']}`",
        "",
        f"{machine} Steps of one row, eager, in milliseconds; GB of the GPU.",
        "",
    ]
    cells = []
    for row in rows:
        numbers = [row.weights_gb, row.load_peak_gb, row.step_512_ms, row.step_1024_ms, row.step_peak_gb]
        shown = ["" if number is None else f"{number:.2f}" for number in numbers]
        cells.append(
            [row.name, *([row.problem, *[""] * 5] if row.problem else [*shown, f"{100 * (row.error or 0):.2f} %"])]
        )
    head = ["form", "weights", "peak of loading", "step, 512x512", "step, 1024x1024", "peak of a step", "error to bf16"]
    lines += reports.table(head, cells)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--tiny", action="store_true", help="a model of some kilobytes")
    parser.add_argument("--only", help="only forms whose name has this in it, and bf16")
    parser.add_argument("--seconds", type=float, default=220.0, help="no form begins later than that")
    parser.add_argument("--out", type=Path, help="writes FILE.json and FILE.md")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    start = time.perf_counter()
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")
    forms = {name: make for name, make in FORMS.items() if name == "bf16" or (args.only or "") in name}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(Path(temporary), device, TINY if args.tiny else REAL, args.repeats)
        for name, make in forms.items():
            has_time = time.perf_counter() - start < args.seconds
            rows.append(bench.row(name, make) if has_time else Row(name=name, problem="no time was left"))
            print(f"{time.perf_counter() - start:.0f} s: {rows[-1]}", flush=True)
            write(rows, bench, args)
    print(args.out.with_suffix(".md").read_text() if args.out else "")


def write(rows: list[Row], bench: Bench, args: argparse.Namespace) -> None:
    """The report so far."""
    if not args.out:
        return
    num_parameters = sum(math.prod(info.shape) for info in read_header(bench.base_file).tensors.values())
    where = torch.cuda.get_device_name() if bench.is_gpu else platform.machine()
    report = {
        "command": f"python bench/quantization.py --device {args.device}{' --tiny' if args.tiny else ''}",
        "machine": f"{where}, Python {platform.python_version()}",
        "versions": _versions(),
        "model": f"FLUX with {num_parameters / 1e9:.2g} billion parameters",
        "rows": [msgspec.to_builtins(row) for row in rows],
    }
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    args.out.with_suffix(".md").write_text(table(rows, report))


if __name__ == "__main__":
    main()
