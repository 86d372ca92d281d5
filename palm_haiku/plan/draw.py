"""Pictures of plans."""

import pathlib

from palm_haiku import plotting

_PARTS = {"state_bytes": ("parameters, optimizer", "#1f77b4"),
          "temporary_bytes": ("activations, temporaries", "#ff7f0e"),
          "code_bytes": ("program", "#7f7f7f")}
_GOOD, _BAD, _REST = "#2ca02c", "#d62728", "#7f7f7f"


def one(found: dict, title: str, path: pathlib.Path) -> None:
  """The time that each resource is busy in a step, and a chip's memory against its limit."""
  with plotting.defaults() as Figure:
    _one(Figure(figsize=(9, 3.4), layout="constrained"), found, title, path)


def _one(figure, found, title, path):
  left, right = figure.subplots(1, 2, width_ratios=(3, 2))
  achieved = found["achieved"]
  bars = {"products" + ("" if achieved == 1 else f", {achieved:.0%} of peak"):
              found["compute_seconds"] / achieved,
          "products, at peak": found["compute_seconds"], "memory": found["memory_seconds"],
          "network inside": found["network_seconds"]["inside"],
          "network between": found["network_seconds"]["between"]}
  if achieved == 1:
    del bars["products, at peak"]
  longest = max(bars.values())
  drawn = left.barh(list(bars), list(bars.values()),
                    color=[_BAD if t == longest else _REST for t in bars.values()])
  left.bar_label(drawn, fmt=" %.3g", fontsize=8)
  left.invert_yaxis()
  left.set_xlabel("seconds of a step, if all overlap", fontsize=9)
  bottom = 0.0
  for key, (name, color) in _PARTS.items():
    size = found[key] / 2**30
    right.bar(0, size, 0.5, bottom=bottom, label=f"{name}, {size:.3g}", color=color)
    bottom += size
  limit = found["hbm_limit_bytes"] / 2**30
  right.axhline(limit, color="black", linestyle="--", linewidth=1, label=f"limit, {limit:.4g}")
  right.set_xticks([])
  right.set_xlim(-0.6, 0.6)
  right.set_ylim(0, 1.1 * max(limit, bottom))
  right.set_ylabel("GiB of a chip", fontsize=9)
  right.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
  _finish(figure, (left, right), f"{title}: MFU {found['mfu']:.1%}"
          + (" at most" if achieved == 1 else ""), path)


def ranking(rows: list[dict], title: str, path: pathlib.Path) -> None:
  """Time and memory of each candidate, best first."""
  there = [row for row in rows if row["error"] is None]
  with plotting.defaults() as Figure:
    figure = Figure(figsize=(9, 1.4 + 0.26 * max(1, len(there))), layout="constrained")
    _ranking(figure, there, len(rows) - len(there), title, path)


def _ranking(figure, there, failed, title, path):
  left, right = figure.subplots(1, 2, sharey=True)
  names = [f"{row['mesh']} {row['remat']}" for row in there]
  colors = [_GOOD if row["fits"] else _BAD for row in there]
  left.barh(names, [row["step_seconds"] for row in there], color=colors)
  left.set_xlabel("seconds of a step", fontsize=9)
  right.barh(names, [row["hbm_per_chip_bytes"] / 2**30 for row in there], color=colors)
  if there:
    right.axvline(there[0]["hbm_limit_bytes"] / 2**30, color="black", linestyle="--", linewidth=1)
    left.invert_yaxis()
  right.set_xlabel("GiB of a chip, and its limit", fontsize=9)
  _finish(figure, (left, right), title + (f" ({failed} without a plan)" if failed else ""), path)


def _finish(figure, axes, title, path):
  for axis in axes:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    axis.grid(axis="both", alpha=0.3)
    axis.set_axisbelow(True)
  figure.suptitle(title, fontsize=10)
  figure.savefig(path, dpi=100)
