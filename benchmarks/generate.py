"""Generation beside PaLM-jax: tokens a second, one sequence and many, with int8 and with a draft.

All take turns in one process, round after round; what counts are medians of ratios to PaLM-jax's
`sample` in the same round. It has no cache and computes the whole text anew at each token, so the
ratios grow with prompt and length; as many steps of ours are as many steps of its. The model is
PaLM-jax's PaLM-lite of its demo, with random weights: a draft is the model itself, the best that
can be guessed, so its row shows what checking costs.
"""

import argparse
import statistics
import time

import jax
import numpy as np
import rich.progress

from palm_haiku import PaLMConfig, train_step
from palm_haiku.generate import generate
from palm_haiku.recipe import TrainConfig

from . import results, table
from .train import PEER, PalmJax, Shape, absent

METHOD = "calls in turns, wall clock, medians; times as fast in the same round"
COLUMNS = {"implementation": "implementation", "batch": "sequences",
           "shape": "dim x depth x heads x dim_head", "prompt": "prompt", "tokens": "tokens each",
           "rate": "tokens/s", "spread": "min-max", "faster": "times PaLM-jax"}


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m benchmarks generate", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--shape", default="512x8x8x64", metavar="DxLxHxDh",
                      help="dim, depth, heads, dim_head (default 512x8x8x64)")
  parser.add_argument("--num-tokens", type=int, default=256, help="vocabulary (default 256)")
  parser.add_argument("--prompt", type=int, default=100, help="its tokens (default 100)")
  parser.add_argument("--length", type=int, default=128, help="tokens to add (default 128)")
  parser.add_argument("--batch", type=int, default=16, help="of the rows with many (default 16)")
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--out", metavar="DIR", help="default benchmarks/results")
  args = parser.parse_args(argv)
  shape = Shape.parse(f"1x1x{args.shape}")
  model = PaLMConfig(args.num_tokens, shape.dim, shape.depth, shape.heads, shape.dim_head,
                     position="alibi", norm="rms", shared_kv=True)
  params = jax.jit(lambda: train_step.init(TrainConfig(model=model)))().params

  def ours(batch, **options):
    prompt = np.ones((batch, args.prompt), int)
    return lambda key: generate(params, model, prompt, args.length, key=key, top_k=25, **options)

  calls = {}
  if reason := absent(PEER):
    print(f"{PEER}: {reason}")
  else:
    peer = PalmJax(shape, args.num_tokens)
    state = peer.init()
    prompt = np.ones(args.prompt, np.int32)
    calls[PEER, 1] = lambda key: peer.sample(state, prompt, args.length, key)
  for name, options in (("float32", {}), ("int8 weights", dict(weights="int8")),
                        ("int8 weights and cache", dict(weights="int8", cache_dtype="int8")),
                        ("float32, itself as draft", dict(draft=(params, model)))):
    for batch in (1, args.batch):
      calls[name, batch] = ours(batch, **options)

  rates = {case: [] for case in calls}
  for turn in rich.progress.track(range(args.rounds + 1), "rounds", transient=True):
    for (name, batch), call in calls.items():
      start = time.perf_counter()
      jax.block_until_ready(call(jax.random.key(turn)))
      if turn:  # The first compiles.
        rates[name, batch].append(batch * args.length / (time.perf_counter() - start))
  result = results.document("generate")
  result["timing"] = METHOD
  theirs = rates.get((PEER, 1))
  for (name, batch), rate in rates.items():
    faster = theirs and statistics.median(a / b for a, b in zip(rate, theirs))
    results.add(result, [{
        "implementation": name, "batch": batch, "shape": args.shape, "variant": str(batch),
        "prompt": args.prompt, "tokens": args.length, "rate": statistics.median(rate),
        "faster": faster, "spread": f"{min(rate):.0f}-{max(rate):.0f}", "rates": rate}])
  print(table.text(COLUMNS, result["rows"]))
  print(results.save(result, args.out))
  return 0
