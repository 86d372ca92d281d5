"""Draws results: bars for each shape, and throughput over the sequence's length."""

import argparse
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from . import results  # noqa: E402

_WIDTH = 9.0  # inches; 100 dots each: a README is about that wide
_COLORS = {"mosaic_gpu": "#d62728", "mosaic_tpu": "#d62728", "triton": "#ff7f0e", "auto": "#d62728",
           "xla": "#7f7f7f", "jax-nn-xla": "#bcbd22", "cudnn": "#2ca02c", "tokamax-gpu": "#1f77b4",
           "tokamax-tpu": "#1f77b4", "jax-splash": "#9467bd", "jax-flash": "#8c564b",
           "jax-mosaic-gpu": "#17becf", "palm-haiku": "#d62728", "palm-jax": "#7f7f7f"}


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m benchmarks plot", description=__doc__)
  parser.add_argument("--results", metavar="DIR", help="default benchmarks/results")
  parser.add_argument("--out", metavar="DIR", help="default the same")
  args = parser.parse_args(argv)
  drawn = []
  for result in results.load(args.results):
    drawn += draw(result, pathlib.Path(args.out or args.results or results.FOLDER))
  for path in drawn:
    print(path)
  if not drawn:
    print("benchmarks plot: no result has anything to draw")
  return 0


def draw(result: dict, folder: pathlib.Path) -> list[pathlib.Path]:
  """The plots of one result, as PNG and SVG beside each other."""
  folder.mkdir(parents=True, exist_ok=True)
  rows = [row for row in result["rows"] if _value(row) is not None]
  if not rows:
    return []
  stem = results.path(result).stem
  drawn = _save(_bars(result, rows), folder / f"{stem}-bars")
  lengths = {row.get("length") or _length(row) for row in rows}
  if result["benchmark"] == "attention" and len(lengths) > 1:
    drawn += _save(_over_length(result, rows), folder / f"{stem}-length")
  return drawn


def _value(row):
  return next((row[key] for key in ("tflops", "useful", "per_tensor", "trained") if key in row),
              None)


def _unit(rows):
  if "tflops" in rows[0]:
    return "TFLOP/s"
  if "useful" in rows[0]:
    return "useful work, % of peak (static cycles)"
  if "trained" in rows[0]:
    return "tokens trained on per second"
  return "instructions per wgmma (fewer is better)"


def _length(row):
  return int(row["shape"].split("x")[1]) if "shape" in row else 0


def _case(row):
  where = row.get("shape") or " ".join(
      f"{key} {row[key]}" for key in ("dim_head", "length") if row.get(key))
  return where, row.get("variant") or "", row["pass"]


def _bars(result, rows):
  """One row of axes for each pass and variant; groups of bars for each shape."""
  panels = list(dict.fromkeys(_case(row)[1:] for row in rows))
  figure, axes = plt.subplots(len(panels), 1, figsize=(_WIDTH, 1.2 + 2.3 * len(panels)),
                              squeeze=False, layout="constrained")
  every = list(dict.fromkeys(row["implementation"] for row in rows))
  colors = {name: _COLORS.get(name) or f"C{i}" for i, name in enumerate(every)}
  for axis, panel in zip(axes[:, 0], panels, strict=True):
    here = [row for row in rows if _case(row)[1:] == panel]
    shapes = list(dict.fromkeys(_case(row)[0] for row in here))
    names = [name for name in every if name in {row["implementation"] for row in here}]
    width = 0.8 / len(names)
    for i, name in enumerate(names):
      values = {_case(row)[0]: _value(row) for row in here if row["implementation"] == name}
      at = [shapes.index(shape) + (i - (len(names) - 1) / 2) * width for shape in values]
      bars = axis.bar(at, list(values.values()), width * 0.92, color=colors[name])
      axis.bar_label(bars, fmt="%.3g", fontsize=7)
    axis.set_xticks(range(len(shapes)), shapes, fontsize=8)
    axis.set_xlim(-0.5, len(shapes) - 0.5)
    axis.set_title(" ".join(filter(None, panel)), fontsize=9, loc="left")
    _style(axis)
  axes[0, 0].legend([plt.Rectangle((0, 0), 1, 1, color=colors[name]) for name in every], every,
                    ncols=min(6, len(every)), fontsize=8, frameon=False, loc="lower left",
                    bbox_to_anchor=(0, 1.12))
  figure.supylabel(_unit(rows), fontsize=9)
  _title(figure, result)
  return figure


def _over_length(result, rows):
  panels = sorted({(row["shape"].rpartition("x")[2], row["variant"], row["pass"])
                   for row in rows})
  columns = min(2, len(panels))
  lines = -(-len(panels) // columns)
  figure, axes = plt.subplots(lines, columns, figsize=(_WIDTH, 1 + 2.6 * lines), squeeze=False,
                              layout="constrained")
  for axis, (dim, variant, what) in zip(axes.flat, panels, strict=False):
    here = [row for row in rows if (row["shape"].rpartition("x")[2], row["variant"],
                                    row["pass"]) == (dim, variant, what)]
    for name in dict.fromkeys(row["implementation"] for row in here):
      points = sorted((_length(row), row["tflops"]) for row in here
                      if row["implementation"] == name)
      axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name,
                color=_COLORS.get(name))
    axis.set_xscale("log", base=2)
    ticks = sorted({_length(row) for row in here})
    axis.set_xticks(ticks, [str(t) for t in ticks], fontsize=8)
    axis.set_title(f"dim_head {dim}, {variant}, {what}", fontsize=9, loc="left")
    _style(axis)
  for axis in axes.flat[len(panels):]:
    axis.remove()
  axes[0, 0].legend(fontsize=8, frameon=False)
  figure.supxlabel("sequence length", fontsize=9)
  figure.supylabel("TFLOP/s, counted causally", fontsize=9)
  _title(figure, result)
  return figure


def _style(axis):
  axis.spines[["top", "right"]].set_visible(False)
  axis.grid(axis="y", alpha=0.3)
  axis.set_axisbelow(True)
  axis.tick_params(labelsize=8)
  axis.set_ylim(bottom=0)


def _title(figure, result):
  figure.suptitle(f"{result['benchmark']}, {result['device']}, {result['date'][:10]}, "
                  f"jax {result['versions'].get('jax', '?')}", fontsize=10)


def _save(figure, path):
  paths = [path.with_name(path.name + suffix) for suffix in (".png", ".svg")]
  for file in paths:
    # No date in the SVG: the same results give the same file.
    figure.savefig(file, dpi=100, metadata={"Date": None} if file.suffix == ".svg" else None)
  plt.close(figure)
  return paths
