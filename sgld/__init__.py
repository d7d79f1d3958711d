"""sgld: continuous batching of denoising steps for every diffusers pipeline."""

from importlib.metadata import version

from sgld.config import EngineConfig, OutputConfig, ParallelConfig
from sgld.sampling_params import SamplingParams

__all__ = ["EngineConfig", "OutputConfig", "ParallelConfig", "SamplingParams"]
__version__ = version("sgld")
