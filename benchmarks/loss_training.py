"""Training PaLM-lite with a large vocabulary: the project's loss beside one that keeps the logits.

Both train the same model, from the same state, in turns in one process. Memory is what the
compiled step takes, without its state and with it. What the layers keep for the backward pass is
the same for both, and with "remat none" most of it.
"""

import dataclasses
import statistics
import time

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from palm_haiku import PaLM, configs, recipe, train_step

from . import results, table

SHAPE = "4x512x32000"
COLUMNS = {"implementation": "loss", "shape": "batch x T x vocabulary", "remat": "remat",
           "seconds": "step s", "ratio": "of the time", "memory": "MiB of temporaries",
           "share": "of the memory", "peak": "MiB with the state", "peak_share": "of it"}


class FullLogits(recipe.TrainConfig):
  """Training as one writes it without the op: the logits of all tokens, and their softmax."""

  def build_model(self):
    def loss(tokens, targets, segment_ids=None):
      model = PaLM.from_config(self.model, dtype=jnp.dtype(self.dtype), remat=self.remat,
                               implementation=self.implementation)
      logits = model(tokens, segment_ids=segment_ids)
      log_z = jax.nn.logsumexp(logits, axis=-1)
      return log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0], log_z

    return hk.without_apply_rng(hk.transform(loss))


def compare(shape: str = SHAPE, rounds: int = 7, remat: str = "attention",
            depth: int | None = None) -> list[dict]:
  """A row for each loss.

  Args:
    shape: "4x512x32000": batch, length, vocabulary.
    rounds: how many steps of each are timed; medians of neighbours' ratios are compared. With 0
      nothing runs: memory alone.
    remat: what the backward pass of the layers computes again; see `PaLM`.
    depth: of the model, if not PaLM-lite's own.
  """
  batch, length, vocabulary = map(int, shape.split("x"))
  model = dataclasses.replace(configs["palm-lite"], num_tokens=vocabulary)
  if depth:
    model = dataclasses.replace(model, depth=depth)
  options = dict(model=model, batch_size=batch, seq_len=length, remat=remat)
  tokens = np.random.default_rng(0).integers(0, vocabulary, (batch, length + 1))
  tokens = {"tokens": jnp.asarray(tokens, jnp.int32)}
  steps, states, rows, times = {}, {}, {}, {"linear_cross_entropy": [], "full logits": []}
  for name, kind in zip(times, (recipe.TrainConfig, FullLogits)):
    config = kind(**options)
    init = jax.jit(lambda config=config: train_step.init(config))
    states[name] = init() if rounds else jax.eval_shape(init)
    steps[name] = jax.jit(
        lambda state, batch, config=config: train_step.train_step(config, state, batch),
        donate_argnums=0).lower(states[name], tokens).compile()
    memory = steps[name].memory_analysis()
    peak = (memory.temp_size_in_bytes + memory.argument_size_in_bytes
            + memory.output_size_in_bytes - memory.alias_size_in_bytes)
    rows[name] = dict(implementation=name, shape=shape, remat=remat,
                      memory=memory.temp_size_in_bytes / 2**20,
                      peak=peak / 2**20)
  losses = {}
  for turn in range(rounds and rounds + 1):
    for name, step in steps.items():
      start = time.perf_counter()
      states[name], losses[name] = jax.block_until_ready(step(states[name], tokens))
      if turn:
        times[name].append(time.perf_counter() - start)
  full = rows["full logits"]
  if rounds:
    a, b = (float(loss["loss"]) for loss in losses.values())
    if abs(a - b) > 1e-3 * abs(b):
      raise AssertionError(f"the two losses differ after {rounds + 1} steps: {a} and {b}")
    for name, row in rows.items():
      row |= dict(
          seconds=round(statistics.median(times[name]), 3),
          ratio=round(statistics.median(
              x / y for x, y in zip(times[name], times["full logits"], strict=True)), 3))
  for row in rows.values():
    row |= dict(
        share=round(row["memory"] / full["memory"], 3),
        peak_share=round(row["peak"] / full["peak"], 3))
  for row in rows.values():
    row |= dict(memory=round(row["memory"]), peak=round(row["peak"]))
  return list(rows.values())


def main(args) -> int:
  result = results.document("loss-training")
  result["rows"] = [row for shape in args.shapes or [SHAPE]
                    for remat in ("attention", "none")
                    for row in compare(shape, args.rounds, remat)]
  print(table.text(COLUMNS, result["rows"]))
  print(results.save(result, args.out))
  return 0
