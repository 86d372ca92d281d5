import io
import itertools
import json
import os
import struct
import subprocess
import sys

import jax
import matplotlib.figure
import numpy as np
import pytest
import rich.console
from tensorboardX.proto import event_pb2

from palm_haiku import failures, memory, runlog


def log(path, start=0, terminal=False):
  stream = io.StringIO()
  console = rich.console.Console(file=stream, force_terminal=terminal, width=120)
  return runlog.RunLog(path, steps=10, start=start, console=console), stream


def test_rows_are_lines_and_the_curve_is_drawn(tmp_path):
  record, stream = log(tmp_path)
  with record:
    record.write({"step": 1, "loss": 2.5})
    # Rows are on disk at once: a killed run keeps them.
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 2.5}
    record.advance(1)
    record.write({"step": 2, "loss": 2.25, "eval_loss": 2.375, "tokens_per_second": 1234.5,
                  "mfu": 0.4567})
  assert stream.getvalue().splitlines() == [
      "step 1/10  loss 2.500",
      "step 2/10  loss 2.250  held out 2.375  1,234 tokens/s  MFU 45.7%"]
  assert [row["step"] for row in runlog.read_metrics(record.path)] == [1, 2]
  assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
  assert list((tmp_path / "tensorboard").iterdir())


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path):
  with log(tmp_path)[0] as record:
    for step in (1, 2, 3):
      record.write({"step": step, "loss": 1.0})
  with open(record.path, "a") as file:
    file.write('{"step": 4, "lo')  # killed while writing
  with log(tmp_path, start=2)[0] as record:
    record.write({"step": 3, "loss": 0.5})
  assert runlog.read_metrics(record.path) == [
      {"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 0.5}]


def test_a_terminal_gets_a_progress_bar(tmp_path):
  record, stream = log(tmp_path, terminal=True)
  with record:
    record.write({"step": 5, "loss": 2.5})
    record.advance(5)
    record.say("a word")
  assert "5/10" in stream.getvalue() and "loss 2.500" in stream.getvalue()
  assert "a word" in stream.getvalue()


def test_a_long_run_is_smoothed(tmp_path, monkeypatch):
  figures = []

  class Kept(matplotlib.figure.Figure):

    def __init__(self, *args, **options):
      super().__init__(*args, **options)
      figures.append(self)

  monkeypatch.setattr(matplotlib.figure, "Figure", Kept)
  rows = [{"step": 10 * n, "loss": 1 / n} | ({} if n % 100 else {"eval_loss": 2 / n})
          for n in range(1, 301)]
  runlog.plot_loss(rows, tmp_path / "curve.svg")
  assert "<svg" in (tmp_path / "curve.svg").read_text()
  each, mean, held_out = (line.get_xydata() for line in figures[0].axes[0].lines)
  np.testing.assert_allclose(each, [(row["step"], row["loss"]) for row in rows])
  np.testing.assert_allclose(held_out, [(1000, 0.02), (2000, 0.01), (3000, 2 / 300)])
  # A point is the mean of the six losses up to it.
  np.testing.assert_allclose(mean, [
      (10 * n, np.mean([1 / k for k in range(n - 5, n + 1)])) for n in range(6, 301)])


def events(directory):
  """The events of a directory's files, in the order of the files' names."""
  for path in sorted(directory.iterdir()):
    content = path.read_bytes()
    while content:  # size, its checksum, an event, its checksum
      size, = struct.unpack("<Q", content[:8])
      yield event_pb2.Event.FromString(content[12: 12 + size])
      content = content[16 + size:]


def test_tensorboard_gets_every_number_at_its_step(tmp_path, monkeypatch):
  clock = itertools.count(1_000_000_000)  # of which a file's name has ten digits
  monkeypatch.setattr("time.time", lambda: float(next(clock)))
  for start, rows in ((0, [5, 6]), (5, [6])):
    with log(tmp_path, start=start)[0] as record:
      for step in rows:
        record.write({"step": step, "loss": step / 2, "eval_loss": step / 4})
        path = max((tmp_path / "tensorboard").iterdir())
        assert list(events(path.parent))[-1].step == step  # there at once
      if not start:
        record.rewind(5)
  told = list(events(tmp_path / "tensorboard"))
  assert [e.step for e in told if e.HasField("session_log")] == [6, 6]
  assert [(value.tag, value.simple_value, e.step) for e in told for value in e.summary.value] == [
      (name, step / n, step) for step in (5, 6, 6) for name, n in (("loss", 2), ("eval_loss", 4))]


def test_tensorboard_on_a_full_disk_is_one_line(tmp_path):
  record, stream = log(tmp_path)
  with record:
    record.write({"step": 1, "loss": 2.5})
    full = open("/dev/full", "wb")
    record._tensorboard._writer._py_recordio_writer._writer = full
    for step in range(2, 9):
      record.write({"step": step, "loss": 2.5})
  said = stream.getvalue().splitlines()
  assert [line for line in said if "TensorBoard" in line] == [
      "TensorBoard's files could not be written: [Errno 28] No space left on device"]
  assert len(runlog.read_metrics(record.path)) == 8


def test_metrics_on_a_full_disk_name_the_file(tmp_path):
  record, _ = log(tmp_path)
  with pytest.raises(OSError, match="metrics.jsonl") as error, record:
    record._file = open("/dev/full", "a", buffering=1)
    record.write({"step": 1, "loss": 2.5})
  assert failures.line(error.value, "train") == (
      f"{tmp_path / 'metrics.jsonl'}: No space left on device")


def test_an_empty_log_draws_nothing(tmp_path):
  with log(tmp_path)[0]:
    pass
  assert not (tmp_path / "loss.png").exists()
  assert runlog.read_metrics(tmp_path / "absent.jsonl") == []


def test_damage_to_a_line_costs_no_other(tmp_path):
  good = [{"step": step, "loss": 1 / step} for step in range(1, 7)]
  lines = [json.dumps(row) for row in good]
  bad = ["null", "", "  ", "[]", "NaN", "7", '"step"', '{"step": 3, "lo{"step": 4, "loss": 1}',
         '{"step": null, "loss": 1.0}', '{"step": "3", "loss": 1.0}', '{"step": true, "loss": 1}',
         '{"step": 3, "loss": null}', '{"step": -3, "loss": 1.0}', '{"step": 3}',
         "\x00\x00\x00", "\ufffd", "[" * 100_000]
  lines[2:2] = bad
  path = tmp_path / "metrics.jsonl"
  path.write_text("\n".join(lines) + "\n")
  with open(path, "ab") as file:
    file.write(b'{"step": 7, "loss": 1.0, "eval_loss": null, "mfu": "x"}\n\xff\xfe\n')
    file.write(b'{"step": 8, "loss": NaN}\n{"step": 9, "loss": Infinity, "eval_loss": 2.0}\n{"st')
  good += [{"step": 7, "loss": 1.0}]
  rows = runlog.read_metrics(path)
  assert rows[:7] == good and [row["step"] for row in rows[7:]] == [8, 9]
  record, stream = log(tmp_path, start=8)
  with record:
    record.write({"step": 9, "loss": 0.5})
  assert f"metrics.jsonl: {len(bad) - 2 + 1} damaged lines are dropped" in stream.getvalue()
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  assert rows[:7] == good and rows[8:] == [{"step": 9, "loss": 0.5}]
  assert (tmp_path / "loss.png").exists()


def test_pictures_do_not_depend_on_settings(tmp_path, monkeypatch):
  plain, other = tmp_path / "plain.png", tmp_path / "other.png"
  rows = [{"step": step, "loss": 1.0} for step in range(3)]
  runlog.plot_loss(rows, plain)
  monkeypatch.setenv("MPLBACKEND", "module://nowhere.backend")
  with matplotlib.rc_context({"text.usetex": True, "font.size": 30}):
    runlog.plot_loss(rows, other)
    assert matplotlib.rcParams["font.size"] == 30
  assert os.environ["MPLBACKEND"] == "module://nowhere.backend"
  assert other.read_bytes() == plain.read_bytes()


def test_what_only_illustrates_a_run_does_not_end_it(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "palm_haiku.tensorboard", None)
  monkeypatch.delattr("palm_haiku.tensorboard", raising=False)
  monkeypatch.setattr(runlog, "plot_loss", lambda *_: 1 / 0)
  record, stream = log(tmp_path)
  with record:
    record.write({"step": 1, "loss": 2.5, "memory_bytes": 3 * 2**30})
  said = stream.getvalue().splitlines()
  assert len(said) == 3 and "TensorBoard's files could not be written: import of" in said[0]
  assert said[1:] == ["step 1/10  loss 2.500  3.00 GiB",
                      "loss.png could not be drawn: division by zero"]


def test_memory_of_a_process():
  before = memory.peak(jax.devices()[0])
  assert 2**24 < before < 2**40
  ballast = np.ones(2**26)
  assert memory.peak(jax.devices()[0]) >= max(before, ballast.nbytes)
  # Of a process that a larger one has started, its own.
  code = "import jax; from palm_haiku import memory; print(memory.peak(jax.devices()[0]))"
  small = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
  assert 2**24 < int(small.stdout) < 2**29
