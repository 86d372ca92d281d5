"""Logs of a training run: JSON lines, TensorBoard, a picture, a progress bar."""

import contextlib
import json
import os
import pathlib
from typing import Any

import numpy as np
import rich.console
import rich.progress

from palm_haiku import plotting, terminal

METRICS = "metrics.jsonl"
_NO_EVENTS = "TensorBoard's files could not be written"


class RunLog:
  """Records metrics of a run under its directory and shows them in the terminal.

  `metrics.jsonl` has one object a line; `loss.png` is drawn from it; `tensorboard/` holds the
  same numbers.
  """

  def __init__(self, directory: pathlib.Path, *, steps: int, start: int,
               console: rich.console.Console):
    """Opens the log.

    Args:
      directory: of the run; must exist.
      steps: length of the whole run.
      start: step to go on from. Lines of later steps, left by a run that was killed after its
        last checkpoint, are dropped: they will be written again.
      console: where progress goes.
    """
    self._directory = directory
    self._console = console
    self._steps = steps
    self.path = directory / METRICS
    self._open(start)
    self._progress = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("{task.fields[status]}", markup=False),
        rich.progress.TimeRemainingColumn(),
        console=console, disable=not console.is_terminal)
    self._task = self._progress.add_task("compiling", total=steps, completed=start, status="")
    self._progress.start()

  def _open(self, start):
    rows, damaged = _parse(self.path)
    self._rows = [row for row in rows if row["step"] <= start]
    if damaged:
      self.say(f"{self.path.name}: {damaged} damaged {'line is' if damaged == 1 else 'lines are'} "
               "dropped")
    draft = self.path.with_suffix(".draft")
    draft.write_text("".join(json.dumps(row) + "\n" for row in self._rows))
    draft.rename(self.path)
    self._file = open(self.path, "a", buffering=1)
    self._tensorboard = None
    with self._tolerating(_NO_EVENTS):
      from palm_haiku import tensorboard
      self._tensorboard = tensorboard.EventFile(
          self._directory / "tensorboard", start + 1 if start else None)

  def _close(self):
    if self._tensorboard is not None:
      with self._tolerating(_NO_EVENTS):
        self._tensorboard.close()
    with contextlib.suppress(OSError):  # told where it was written
      self._file.close()

  @contextlib.contextmanager
  def _tolerating(self, what):
    """Makes a line of any error of what only illustrates the run."""
    try:
      yield
    except Exception as error:
      self.say(f"{what}: {terminal.one_line(error) or type(error).__name__}")

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._progress.stop()
    self._close()
    if self._rows:
      with self._tolerating("loss.png could not be drawn"):
        plot_loss(self._rows, self._directory / "loss.png")

  def advance(self, step: int) -> None:
    """Moves the progress bar."""
    self._progress.update(self._task, completed=step, description="training")

  def write(self, row: dict[str, Any]) -> None:
    """Records the metrics of one step; `row` has at least "step" and "loss"."""
    try:
      self._file.write(json.dumps(row) + "\n")
    except OSError as error:  # whose file Python does not name
      raise OSError(error.errno, error.strerror, str(self.path)) from error
    self._rows.append(row)
    if self._tensorboard is not None:
      events, self._tensorboard = self._tensorboard, None
      with self._tolerating(_NO_EVENTS):
        events.write(row["step"], {name: x for name, x in row.items() if name != "step"})
        self._tensorboard = events
    status = _status(row)
    self._progress.update(self._task, status=status)
    if not self._console.is_terminal:
      terminal.say(self._console, f"step {row['step']}/{self._steps}  {status}")

  def rewind(self, step: int) -> None:
    """Forgets what was recorded after a step that the run goes back to."""
    self._close()
    self._open(step)
    self._progress.update(self._task, completed=step)

  def say(self, message: str) -> None:
    """Prints a line above the progress bar."""
    terminal.say(self._console, message)


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
  """The rows of a metrics file, but for lines that are damaged."""
  return _parse(path)[0]


def _parse(path: pathlib.Path) -> tuple[list[dict[str, Any]], int]:
  """The rows of a metrics file, and how many lines before the last one are none.

  The last line is cut short where a run was killed while it wrote.
  """
  if not path.exists():
    return [], 0
  lines = [line for line in path.read_text(errors="replace").split("\n") if line.strip()]
  rows = list(map(_row, lines))
  return [row for row in rows if row is not None], rows[:-1].count(None)


def _row(line: str) -> dict[str, Any] | None:
  """The numbers on a line with a step and a loss."""
  try:
    row = json.loads(line)
    if not isinstance(row, dict) or type(row.get("step")) is not int or row["step"] < 1:
      return None
    row = {name: x for name, x in row.items() if type(x) in (int, float)}
  except (ValueError, RecursionError):
    return None
  return row if "loss" in row else None


def plot_loss(rows: list[dict[str, Any]], path: os.PathLike) -> None:
  """Draws training and held-out loss over steps.

  Args:
    rows: of `metrics.jsonl`.
    path: of the picture; its suffix chooses the format.
  """
  steps = np.array([row["step"] for row in rows])
  loss = np.array([row["loss"] for row in rows])
  held_out = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
  with plotting.defaults() as Figure:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    smoothing = max(1, len(loss) // 50)
    if smoothing > 1:
      axes.plot(steps, loss, color="tab:blue", alpha=0.25, linewidth=1)
      mean = np.convolve(loss, np.ones(smoothing) / smoothing, mode="valid")
      axes.plot(steps[smoothing - 1:], mean, color="tab:blue", label="train")
    else:
      axes.plot(steps, loss, color="tab:blue", label="train")
    if held_out:
      axes.plot(*zip(*held_out), "o-", color="tab:orange", markersize=4, label="held out")
      axes.annotate(f"{held_out[-1][1]:.3f}", held_out[-1], xytext=(0, 8),
                    textcoords="offset points", ha="right", color="tab:orange")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path = pathlib.Path(path)
    draft = path.with_stem(path.stem + ".draft")
    try:
      figure.savefig(draft, dpi=150)
      draft.rename(path)
    finally:
      draft.unlink(missing_ok=True)


def _status(row) -> str:
  parts = [f"loss {row['loss']:.3f}"]
  if "eval_loss" in row:
    parts.append(f"held out {row['eval_loss']:.3f}")
  if "tokens_per_second" in row:
    parts.append(f"{row['tokens_per_second']:,.0f} tokens/s")
  if row.get("data_wait", 0) > 0.02:
    parts.append(f"{row['data_wait']:.0%} of the time waiting for data")
  if "mfu" in row:
    parts.append(f"MFU {row['mfu']:.1%}")
  if "memory_bytes" in row:
    parts.append(terminal.size(row["memory_bytes"]))
  return "  ".join(parts)
