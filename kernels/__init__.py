"""Pure functions of arrays behind the model: each op with one file per backend."""

from .alibi import alibi_slopes
from .attention import flash_attention
from .core.dispatch import IMPLEMENTATIONS, Implementation
from .cross_entropy import linear_cross_entropy
from .decode import decode_attention
from .explain import explain
from .export import export_for
from .interpreters import interpret
from .parallel_block import parallel_attention_ffn
from .tune import load_tuning, tune

__all__ = [
    "IMPLEMENTATIONS",
    "Implementation",
    "alibi_slopes",
    "decode_attention",
    "explain",
    "export_for",
    "flash_attention",
    "interpret",
    "linear_cross_entropy",
    "load_tuning",
    "parallel_attention_ffn",
    "tune",
]
