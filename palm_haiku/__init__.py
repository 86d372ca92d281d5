"""PaLM in JAX and Haiku, with fused Pallas kernels."""

from palm_haiku import interrupts as interrupts, platforms  # in this order
from palm_haiku.config import PaLMConfig, configs
from palm_haiku.model import KVCache, PaLM, ParallelBlock
from palm_haiku.pretrained import load_run

__all__ = ["KVCache", "PaLM", "PaLMConfig", "ParallelBlock", "configs", "load_run"]

platforms.leave_out_absent()
