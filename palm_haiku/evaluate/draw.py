"""Picture of evaluations."""

import pathlib

from palm_haiku import plotting
from palm_haiku.evaluate import Evaluation


def losses(rows: list[tuple[str, int | None, Evaluation]], path: pathlib.Path) -> None:
  """The loss of each model by length and, at its longest one, by position.

  Args:
    rows: (model, trained length, evaluation), with as many evaluations of a model as lengths.
    path: of the PNG.
  """
  with plotting.defaults() as Figure:
    _losses(Figure(figsize=(10, 3.8), layout="constrained"), rows, path)


def _losses(figure, rows, path):
  # Nats of tokens compare where a token has the same bytes, that is for one text and tokenizer.
  in_bits = len({of.bytes_per_token for _, _, of in rows}) > 1
  unit = "bits per byte" if in_bits else "nats per token"
  left, right = figure.subplots(1, 2)
  for number, name in enumerate(dict.fromkeys(name for name, _, _ in rows)):
    color = f"C{number % 10}"
    trained = next(trained for other, trained, _ in rows if other == name)
    ofs = sorted((of for other, _, of in rows if other == name), key=lambda of: of.seq_len)
    left.plot([of.seq_len for of in ofs],
              [of.bits_per_byte if in_bits else of.nats_per_token for of in ofs],
              "o-", color=color, markersize=4, label=name)
    longest = ofs[-1]
    scale = longest.bits_per_byte / longest.nats_per_token if in_bits else 1.0
    parts = longest.by_position(4)
    right.plot([part["last"] for part in parts],
               [part["nats_per_token"] * scale for part in parts],
               color=color, label=f"{name}, {longest.seq_len:,} tokens")
    for axis in (left, right) if trained else ():
      axis.axvline(trained, color=color, linestyle="--", linewidth=0.8, alpha=0.6)
  for axis, label in ((left, "tokens in a sequence"), (right, "tokens read so far")):
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axis.set_xlabel(label, fontsize=9)
    axis.set_ylabel(f"loss, {unit}", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, frameon=False)
  figure.suptitle("dashed: the length that a model was trained at", fontsize=9)
  figure.savefig(path, dpi=100)
