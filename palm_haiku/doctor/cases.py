"""Problems that a kernel is checked on: one op at one shape, and its program."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from palm_haiku import kernels
from palm_haiku.config import PaLMConfig
from palm_haiku.kernels.core import chips
from palm_haiku.kernels.explain import OPS


@dataclasses.dataclass(frozen=True)
class Case:
  """One check, of plain values, so that another process can be told it.

  Attributes:
    op: name of a public op.
    implementation: that is checked; "auto" for whatever `auto` takes here.
    sizes: of the op's arrays, by name.
    label: "small", "real" or "model".
    dtype: of all floating-point arrays.
    backward: with the gradients of all floating-point arrays.
    interpreted: in the kernel's interpreter, on a CPU.
    alibi: attention has a bias.
    window: keys that a query sees, its own included; None for all before it.
  """

  op: str
  implementation: str
  sizes: Mapping[str, int]
  label: str = "small"
  dtype: str = "bfloat16"
  backward: bool = False
  interpreted: bool = False
  alibi: bool = True
  window: int | None = None

  @property
  def name(self) -> str:
    """The check's subject, in words."""
    return (f"{self.op} {self.implementation}, {'backward' if self.backward else 'forward'}, "
            f"{self.label}" + ", interpreted" * self.interpreted)


# A kernel meets the ends of its blocks in the small ones; the real ones take a chip milliseconds.
SMALL = {
    "flash_attention": dict(batch=1, length=150, heads=4, kv_heads=1, dim_head=128),
    "linear_cross_entropy": dict(tokens=130, dim=128, vocabulary=300),
    "decode_attention": dict(batch=2, length=152, heads=8, kv_heads=1, dim_head=128),
    "parallel_attention_ffn": dict(batch=1, length=130, heads=2, kv_heads=1, dim_head=64, dim=128,
                                   hidden=256),
}
# An interpreter takes seconds for more.
INTERPRETED = {
    "flash_attention": dict(batch=1, length=70, heads=2, kv_heads=1, dim_head=64),
    "decode_attention": dict(batch=1, length=72, heads=2, kv_heads=1, dim_head=128),
    "linear_cross_entropy": dict(tokens=70, dim=128, vocabulary=150),
    "parallel_attention_ffn": dict(batch=1, length=70, heads=2, kv_heads=1, dim_head=64, dim=128,
                                   hidden=128),
}
REAL = {
    "flash_attention": dict(batch=1, length=4096, heads=16, kv_heads=1, dim_head=128),
    "linear_cross_entropy": dict(tokens=4096, dim=2048, vocabulary=32768),
    "decode_attention": dict(batch=16, length=8192, heads=16, kv_heads=1, dim_head=128),
    "parallel_attention_ffn": dict(batch=1, length=2048, heads=16, kv_heads=1, dim_head=128,
                                   dim=2048, hidden=8192),
}
CPU_REAL = {
    "flash_attention": dict(batch=1, length=512, heads=8, kv_heads=1, dim_head=64),
    "linear_cross_entropy": dict(tokens=512, dim=256, vocabulary=2048),
    "decode_attention": dict(batch=4, length=2048, heads=8, kv_heads=1, dim_head=64),
    "parallel_attention_ffn": dict(batch=1, length=512, heads=4, kv_heads=1, dim_head=64, dim=256,
                                   hidden=1024),
}


def all_for(platform: str, chip: str | None) -> list[Case]:
  """Doctor's checks on a machine: small ones first, then real ones; on a CPU XLA's, then what
  interpreters run.

  Args:
    platform: "cpu", "gpu" or "tpu".
    chip: its name in `chips`, if it has one.
  """
  passes = [(op, backward) for op in OPS for backward in (False, True)
            if not backward or op != "decode_attention"]
  if platform == "cpu":
    # A backward pass runs the forward kernel too.
    last = dict(passes)
    return [Case(op, "xla", CPU_REAL[op], "real", backward=last[op]) for op in OPS] + [
        Case(op, name, INTERPRETED[op], backward=last[op], interpreted=True)
        for op in OPS for name in OPS[op].backends]
  if platform == "tpu":
    names = ["mosaic_tpu"]
  else:
    names = ["mosaic_gpu"] * (chip in chips.HOPPER) + ["triton"]
  return [Case(op, name, sizes[op], label, backward=backward)
          for label, sizes in (("small", SMALL), ("real", REAL)) for op, backward in passes
          for name in names if name in OPS[op].backends]


def of_model(config: PaLMConfig, dtype: str, *, training: bool) -> list[Case]:
  """The ops of a model: sizes that choose its kernels as they are, others cut down."""
  heads = config.heads if config.heads <= 16 else max(1, 16 // config.kv_heads) * config.kv_heads
  attention = dict(batch=1, length=1024, heads=heads, kv_heads=config.kv_heads,
                   dim_head=config.dim_head)
  dims = dict(dim=min(config.dim, 4096), hidden=min(config.dim_ff, 8192))
  shared: dict[str, Any] = dict(
      label="model", dtype=dtype, alibi=config.position == "alibi", window=config.window)
  cases = [Case("flash_attention", "auto", attention, backward=training, **shared),
           Case("parallel_attention_ffn", "auto", attention | dims, backward=training, **shared)]
  if training:
    loss = dict(tokens=1024, dim=dims["dim"], vocabulary=min(config.num_tokens, 32768))
    return [*cases, Case("linear_cross_entropy", "auto", loss, backward=True, **shared)]
  return [*cases, Case("decode_attention", "auto", attention, **shared)]


def arrays(case: Case) -> dict[str, Any]:
  """Random arrays, by the names of the op's arguments; in each dtype the same, but rounded."""
  rng = np.random.default_rng(0)
  return _arguments(
      case, lambda *shape, scale=1.0: jnp.asarray(
          (scale * rng.standard_normal(shape, np.float32)).astype(case.dtype)),
      lambda low, high, size: jnp.asarray(rng.integers(low, high, size, np.int32)))


def operands(case: Case) -> list:
  """The types of the arrays that decide whether a kernel takes a case, for `kernels.explain`."""
  given = _arguments(
      case, lambda *shape, scale=1.0: jax.ShapeDtypeStruct(shape, jnp.dtype(case.dtype)),
      lambda low, high, size: jax.ShapeDtypeStruct((size,), jnp.int32))
  names = {"linear_cross_entropy": ("x", "embedding"), "parallel_attention_ffn": ("x", "params")}
  return [given[name] for name in names.get(case.op, ("query", "key", "value"))]


def _arguments(case, normal, integers):
  """By name; normal(*shape, scale=) and integers(low, high, size) make them."""
  n = case.sizes
  if case.op == "linear_cross_entropy":
    return dict(x=normal(n["tokens"], n["dim"]), embedding=normal(n["vocabulary"], n["dim"]),
                targets=integers(0, n["vocabulary"], n["tokens"]))
  if case.op == "parallel_attention_ffn":
    dim, hidden, heads, width = n["dim"], n["hidden"], n["heads"], n["dim_head"]
    row = lambda *shape: normal(dim, *shape, scale=dim**-0.5)
    key = (n["kv_heads"], width) if n["kv_heads"] > 1 else (width,)
    params = dict(norm=normal(dim), query=row(heads, width), key=row(*key),
                  value=row(*key), gate=row(hidden), up=row(hidden),
                  attn_out=normal(heads, width, dim, scale=(heads * width)**-0.5),
                  ff_out=normal(hidden, dim, scale=hidden**-0.5))
    return dict(x=normal(n["batch"], n["length"], dim), params=params)
  cache = n["batch"], n["length"], n["kv_heads"], n["dim_head"]
  queries = 1 if case.op == "decode_attention" else n["length"]
  query = normal(n["batch"], queries, n["heads"], n["dim_head"])
  if case.op == "decode_attention":
    return dict(query=query, key=normal(*cache), value=normal(*cache),
                lengths=integers(1, n["length"] + 1, n["batch"]))
  return dict(query=query, key=normal(*cache), value=normal(*cache))


def program(case: Case, implementation: str) -> Callable[[dict, Any], dict[str, Any]]:
  """A function of a case's arrays and, for the backward pass, of the result's cotangent.

  It returns results by name: "out", and gradients as "d" and the array's name.
  """
  def forward(given):
    return _call(case, implementation, **given)

  def both(given, cotangent):
    # Integers have no gradients.
    floating = {name: x for name, x in given.items()
                if jnp.issubdtype(jax.tree.leaves(x)[0].dtype, jnp.floating)}
    out, pull = jax.vjp(lambda floating: forward({**given, **floating}), floating)
    gradients, = pull(cotangent.astype(out.dtype))
    return {"out": out} | {f"d{name}": x for name, x in _flat(gradients)}

  return both if case.backward else lambda given, cotangent: {"out": forward(given)}


def _flat(tree):
  for name, x in tree.items():
    yield from _flat(x) if isinstance(x, dict) else [(name, x)]


def _call(case, implementation, **given):
  window = None if case.window is None else (case.window - 1, 0)
  options = dict(implementation=implementation)
  if case.op == "linear_cross_entropy":
    scale = case.sizes["dim"]**-0.5
    return kernels.linear_cross_entropy(**given, scale=scale, z_loss=1e-4, **options)[0]
  options |= dict(
      alibi_slopes=kernels.alibi_slopes(case.sizes["heads"]) if case.alibi else None,
      local_window_size=window)
  if case.op == "parallel_attention_ffn":
    return kernels.parallel_attention_ffn(**given, rotary=not case.alibi, **options)
  if case.op == "decode_attention":
    names = "query", "key", "value", "lengths"  # not in this order, once JAX has sorted them
    return kernels.decode_attention(*(given[name] for name in names), **options)
  return kernels.flash_attention(**given, **options)
