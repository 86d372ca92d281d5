"""Train short, test long: the loss of rotary positions and of ALiBi beyond the trained length.

  python examples/train_short_test_long.py                    # on Python's own documentation
  python examples/train_short_test_long.py --data 'books/*.txt' --steps 2000

Trains palm-tiny (rotary) and palm-lite-tiny (ALiBi) at length 128, evaluates them on held-out text
at lengths up to 32 times that, and draws the curves of figure 1 of arXiv:2108.12409.
"""

import argparse
import importlib.metadata
import json
import pathlib
import platform
import time

import numpy as np

from palm_haiku import configs, data, plotting
from palm_haiku.evaluate import Text, evaluate, prepare
from palm_haiku.pretrained import load
from palm_haiku.recipe import TrainConfig
from palm_haiku.train import train

TRAINED = 128
LENGTHS = (128, 256, 512, 1024, 2048, 4096)
MODELS = {"rotary": "palm-tiny", "alibi": "palm-lite-tiny"}


def losses(config, out):
  """Trains a model, or finishes its training, and yields its loss at each length."""
  train(config, out, resume=True)
  model = load(out)
  corpus = data.load_corpus(config.data, model.tokenizer, config.eval_fraction)
  text = Text(config.data, corpus.eval, corpus.eval_bytes_per_token)
  params = prepare(model.params, model.config)
  for length in LENGTHS:
    one = evaluate(params, model.config, text, seq_len=length)
    yield {"seq_len": length, "nats_per_token": one.nats_per_token,
           "bits_per_byte": one.bits_per_byte, "tokens": int(one.tokens.sum())}


def by_length(rows, position):
  """Losses, [seeds, lengths]."""
  return np.array([[row["nats_per_token"] for row in rows if row["position"] == position
                    and row["seq_len"] == length] for length in LENGTHS]).T


def draw(rows, path):
  """Each seed as a thin line, their means as a thick one."""
  with plotting.defaults() as Figure:
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    for color, (position, name) in zip(("tab:red", "tab:blue"), MODELS.items()):
      seeds = by_length(rows, position)
      axis.plot(LENGTHS, seeds.T, color=color, alpha=0.35, linewidth=0.8)
      axis.plot(LENGTHS, seeds.mean(0), "o-", color=color, markersize=4,
                label=f"{name} ({position})")
    axis.axvline(TRAINED, color="black", linestyle="--", linewidth=0.8, label="trained length")
    axis.set_xscale("log", base=2)
    axis.set_xticks(LENGTHS, [f"{length:,}" for length in LENGTHS])
    axis.set_xlabel("tokens in a sequence")
    axis.set_ylabel("held-out loss, nats per token")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main(argv=None) -> dict[str, float]:
  """Returns by position the loss at 16 times the trained length over that at the trained length."""
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--data", default="pydoc", metavar="SOURCE", help="as for palm-haiku train")
  parser.add_argument("--steps", type=int, default=200)
  parser.add_argument("--batch-size", type=int, default=16)
  parser.add_argument("--seeds", type=int, default=3, metavar="N")
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/length"),
                      metavar="DIR", help="runs that it holds already go on (default runs/length)")
  parser.add_argument("--figure", type=pathlib.Path, metavar="FILE.png",
                      help="with a FILE.json beside it (default in --out)")
  args = parser.parse_args(argv)
  start, rows = time.process_time(), []
  for seed in range(args.seeds):
    for position, name in MODELS.items():
      config = TrainConfig(
          model=configs[name], data=args.data, steps=args.steps, batch_size=args.batch_size,
          seq_len=TRAINED, seed=seed, log_every=50, eval_every=args.steps)
      for loss in losses(config, args.out / f"{position}-{seed}"):
        rows.append({"position": position, "seed": seed} | loss)
        print(f"{position}, seed {seed}, {loss['seq_len']} tokens: "
              f"{loss['nats_per_token']:.4f} nats per token", flush=True)

  figure = args.figure or args.out / "length.png"
  draw(rows, figure)
  ratios = {}
  for position in MODELS:
    mean = by_length(rows, position).mean(0)
    ratios[position] = float(mean[LENGTHS.index(16 * TRAINED)] / mean[0])
    print(f"{position}: {ratios[position] - 1:+.1%} at {16 * TRAINED} tokens")
  versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "dm-haiku")}
  figure.with_suffix(".json").write_text(json.dumps({
      "data": args.data, "steps": args.steps, "batch_size": args.batch_size,
      "trained_seq_len": TRAINED, "models": MODELS, "loss_at_16_times_the_length": ratios,
      "cpu_seconds": round(time.process_time() - start),
      "versions": {"python": platform.python_version()} | versions, "rows": rows}, indent=1))
  return ratios


if __name__ == "__main__":
  main()
