"""Train a PaLM on your own text through `hk.transform` and optax, with nothing else between.

  python examples/train_with_optax.py my_text.txt --steps 200
"""

import argparse
import pathlib

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

from palm_haiku import PaLM

BATCH, LENGTH = 8, 128


def main(argv=None) -> float:
  """Returns the last loss, in nats per byte."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("text", type=pathlib.Path)
  parser.add_argument("--steps", type=int, default=200)
  args = parser.parse_args(argv)
  text = np.frombuffer(args.text.read_bytes(), np.uint8)

  model = hk.without_apply_rng(hk.transform(lambda tokens: PaLM(
      num_tokens=256, dim=128, depth=4, heads=4, dim_head=32)(tokens)))
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-3))

  @jax.jit
  def step(params, opt_state, tokens):
    def loss_of(params):
      logits = model.apply(params, tokens[:, :-1])
      return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    loss, grads = jax.value_and_grad(loss_of)(params)
    updates, opt_state = optimizer.update(grads, opt_state)
    return optax.apply_updates(params, updates), opt_state, loss

  params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, LENGTH), jnp.int32))
  opt_state = jax.jit(optimizer.init)(params)
  rng = np.random.default_rng(0)
  for i in range(1, args.steps + 1):
    starts = rng.integers(0, len(text) - LENGTH, (BATCH, 1))
    tokens = text[starts + np.arange(LENGTH + 1)].astype(np.int32)
    params, opt_state, loss = step(params, opt_state, tokens)
    if i == 1 or i % 20 == 0:
      print(f"step {i}: {loss:.3f} nats per byte")
  return float(loss)


if __name__ == "__main__":
  main()
