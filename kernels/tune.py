"""The search for block sizes: on the device at hand, or by static figures without one."""

import itertools
import json
import statistics
import time

import jax
import jax.numpy as jnp

from . import alibi
from .attention import configs
from .core import chips, dispatch

# Each kernel's fields of `configs.HopperConfig`, and what they may be. A backward of one kernel has
# no choice: its tiles fill shared memory.
SPACE = {
    "forward": dict(block_kv=(64, 128), stages=(2, 3, 4)),
    "dq": dict(dq_block_kv=(64, 128), dq_k_stages=(1, 2, 3), dq_v_stages=(1, 2)),
    "dkv": dict(dkv_block_q=(64, 128), dkv_stages=(1, 2, 3)),
}


def tune(dim_heads=(64, 128, 256), *, chip: str | None = None, batch: int = 1, length: int = 4096,
         heads: int = 16, kv_heads: int = 1, dtype: str = "bfloat16",
         path: str | None = None) -> dict:
  """Searches block sizes for the Hopper attention kernels (causal, with ALiBi).

  Each candidate that fits in shared memory is timed if the default device is a Hopper GPU.
  Otherwise it is compiled ahead of time for `chip`: one that spills or has its products
  serialized is out, and the rest are ranked by the instructions of the main loop for one row and
  key, then by tiles in flight. That ranks inner loops; it is no time.

  Nothing changes until `load_tuning(path)` is called.

  Args:
    dim_heads: which of 64, 128, 256 to search for.
    chip: "h100" or "h200"; None for the one at hand, or h200.
    batch, length, heads, kv_heads, dtype: the attention to be fast at.
    path: a JSON file to write the table to.

  Returns:
    The table: {"backend", "chip", "how": "measured" | "static", "jax", "workload", "blocks":
    {dim_head: the best fields}, "trials": [{"dim_head", "kernel", fields, "figure": seconds, or
    instructions for a row and key; None if it cannot run, "problem"}]}.

  Raises:
    ValueError: a chip that is not Hopper.
  """
  at_hand = dispatch.target()
  measured = at_hand.platform == "gpu" and at_hand.chip in ("h100", "h200")
  chip = chip or (at_hand.chip if measured else "h200")
  if chip not in ("h100", "h200"):
    raise ValueError(f"tune searches for h100 and h200; got {chip}")
  measured = measured and chip == at_hand.chip
  shape = dict(batch=batch, length=length, heads=heads, kv_heads=kv_heads, dtype=dtype)
  blocks, trials = {}, []
  for dim_head in dim_heads:
    best = configs.mosaic_gpu(chip, dim_head)
    for kernel, space in SPACE.items():
      if kernel != "forward" and best.rows is not None:
        continue
      results = []
      for values in itertools.product(*space.values()):
        fields = dict(zip(space, values))
        config = best._replace(**fields)
        if shared_memory(kernel, config, dim_head) > chips.hopper(chip).shared_memory:
          continue
        judge = _seconds if measured else _instructions
        figure, problem = judge(kernel, config, chip, dim_head, shape)
        trials.append(dict(dim_head=dim_head, kernel=kernel, **fields, figure=figure,
                           problem=problem))
        if figure is not None:
          results.append((figure, [-value for value in values], config))
      if results:
        best = min(results)[2]
    blocks[str(dim_head)] = best._asdict()
  table = dict(backend="mosaic_gpu", chip=chip, how="measured" if measured else "static",
               jax=jax.__version__, workload=shape, blocks=blocks, trials=trials)
  if path is not None:
    with open(path, "w") as file:
      json.dump(table, file, indent=1)
  return table


def load_tuning(path: str) -> None:
  """Makes the block sizes of a table that `tune` wrote take effect in this process.

  Programs that are compiled already keep theirs.

  Raises:
    ValueError: the file is no such table.
  """
  try:
    with open(path) as file:
      table = json.load(file)
    if table["backend"] != "mosaic_gpu":
      raise KeyError(table["backend"])
    entries = {(table["chip"], int(dim_head)): configs.HopperConfig(**blocks)
               for dim_head, blocks in table["blocks"].items()}
  except (OSError, KeyError, TypeError, ValueError) as e:
    raise ValueError(f"{path} is no table of tune(): {type(e).__name__} {e}") from None
  configs.MOSAIC_GPU.update(entries)


def shared_memory(kernel: str, config: configs.HopperConfig, dim_head: int) -> int:
  """Bytes of a block's tiles in 16 bits, the small tables and barriers rounded up to 2 KiB."""
  row = 2 * dim_head
  if kernel == "forward":
    return row * (128 + 2 * config.stages * config.block_kv) + 2048
  if kernel == "dq":
    stages = config.dq_k_stages + config.dq_v_stages
    return row * (2 * 128 + stages * config.dq_block_kv) + 2048
  keys, weights = (64, 4 * 64 * config.dkv_block_q) if dim_head > 128 else (128, 0)
  table = 4 * 4 * config.dkv_block_q * config.dkv_stages
  return row * 2 * (keys + config.dkv_stages * config.dkv_block_q) + weights + table + 2048


def program(kernel, config, chip, dim_head, batch, length, heads, kv_heads, dtype):
  """(a function that runs the kernel, the types of its arguments)."""
  from .attention import mosaic_gpu  # As everywhere: imported when it is first needed.
  array = lambda n: jax.ShapeDtypeStruct((batch, length, n, dim_head), dtype)
  options = dict(segment_ids=None, alibi_slopes=jnp.asarray(alibi.alibi_slopes(heads)),
                 query_offset=0, is_causal=True, scale=dim_head**-0.5, window=None, chip=chip,
                 config=configs.HopperConfig(*config))
  query, key = array(heads), array(kv_heads)
  if kernel == "forward":
    return lambda *qkv: mosaic_gpu.forward(*qkv, **options), (query, key, key)
  lse = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)

  def gradients(*arrays):
    dquery, dkey, dvalue = mosaic_gpu.backward(*arrays, **options)
    return dquery if kernel == "dq" else (dkey, dvalue)  # the other kernel is dead code

  return gradients, (query, key, key, query, lse, query)


def _seconds(kernel, config, chip, dim_head, shape, repeats=20):
  """Median over runs on random inputs, or None and why it does not run."""
  function, types = program(kernel, config, chip, dim_head, **shape)
  keys = jax.random.split(jax.random.key(0), len(types))
  arrays = [jax.random.normal(k, t.shape, t.dtype) for k, t in zip(keys, types)]
  function, times = jax.jit(function), []
  try:
    for _ in range(repeats + 3):
      start = time.perf_counter()
      jax.block_until_ready(function(*arrays))
      times.append(time.perf_counter() - start)
  except (ValueError, jax.errors.JaxRuntimeError) as e:
    return None, str(e).split("\n")[0]
  return statistics.median(times[3:]), None


def _instructions(kernel, config, chip, dim_head, shape):
  """Instructions of the main loop for a row and key, or None and what is wrong with the kernel."""
  from . import aot  # Its wheels are needed here alone.
  try:
    report = aot.report(program, target=chip, kernel=kernel, config=tuple(config), chip=chip,
                        dim_head=dim_head, **shape)
  except aot.AotError as e:
    return None, str(e)
  (compiled,) = report.kernels_named(f"flash_attention_{kernel}")
  if compiled.problems:
    return None, "; ".join(compiled.problems)
  width = {"forward": config.block_kv, "dq": config.dq_block_kv, "dkv": config.dkv_block_q}[kernel]
  instructions = compiled.code.main_loop.instructions  # pyright: ignore  (a GPU's kernel)
  return instructions / (64 * width), None
