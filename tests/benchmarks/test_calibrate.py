import dataclasses
import json
import types

import numpy as np
import pytest

from benchmarks import calibrate, results
from palm_haiku.kernels import aot
from palm_haiku.kernels.aot import times
from palm_haiku.kernels.core import chips

KERNELS = [calibrate.Kernel("bf16", dim, (1024, dim // parts, 1024))
           for dim, parts in ((1024, 1), (2048, 1), (2048, 2), (4096, 1), (4096, 4), (8192, 4))]
CYCLES = {kernel: 1e4 + 7.0 * kernel.dim + 3 * kernel.blocks[1] for kernel in KERNELS}
TRUE = times.Model(chips.tpu("v6e").clock, 0.3e-6, 9e-6, 0.0, 0.0)


def timings(model, cores=1, wrong=1.0):
  """Times of a chip that is just like the model, but for one kernel."""
  found = []
  for kernel in KERNELS:
    for tokens in (1024, 4096, 5000):
      timing = calibrate.Timing(kernel, tokens, 50_000, 1.0)
      steps = timing.steps(cores)
      seconds = model.seconds(steps * CYCLES[kernel], steps)
      found.append(calibrate.Timing(kernel, tokens, 50_000,
                                    seconds * (wrong if kernel == KERNELS[4] else 1.0)))
  return found


def test_the_fit_finds_the_constants():
  for chip, model in (("v6e", TRUE), ("tpu7x", times.Model(1.8e9, 0.9e-6, 3e-6, 0.0, 0.0))):
    found, rows, halves = calibrate.judged(timings(model), CYCLES, chip)
    assert (found.clock, found.step, found.launch) == pytest.approx(
        (model.clock, model.step, model.launch), rel=1e-6)
    assert found.error == found.ninetieth == 0
    assert [half["kernels"] for half in halves] == [3, 3] and len(rows) == 18
    assert halves[1]["ranked"] == "6 of 6"
    assert halves[1]["flops"] > 1


def test_the_error_is_that_of_kernels_that_were_not_fitted():
  held_out = sorted(CYCLES, key=str)[1::2]
  assert KERNELS[4] in held_out
  model, rows, halves = calibrate.judged(timings(TRUE, wrong=1.25), CYCLES, "v6e")
  assert halves[0]["worst"] == 0 and halves[1]["worst"] == pytest.approx(20)  # 1 - 1/1.25
  assert model.ninetieth == pytest.approx(0.2) and model.error == 0
  assert {row["half"] for row in rows if abs(row["error"]) > 0.1} == {"held out"}
  assert model.step == pytest.approx(TRUE.step)


def test_blocks_of_tokens_are_shared_by_the_cores():
  kernel = calibrate.Kernel("f32", 4096, (1024, 1024, 512))
  steps = lambda tokens, cores: calibrate.Timing(kernel, tokens, 1025, 1.0).steps(cores)
  assert steps(1024, 1) == steps(1024, 2) == steps(2048, 2) == 1 * 4 * 3
  assert steps(2049, 2) == 2 * 4 * 3 and steps(2049, 1) == 3 * 4 * 3


def wheel(folder, timed):
  """Timings as tokamax's wheel has them."""
  problems = {}
  for t in timed:
    for residuals in (False, True):
      problem = json.dumps(dict(
          x=f"{t.kernel.dtype}[{t.tokens},{t.kernel.dim}]", labels=f"i32[{t.tokens}]",
          w=f"bf16[{t.kernel.dim},{t.vocabulary}]", reduction="sum", return_residuals=residuals))
      config = json.dumps({f"{axis}_block_size": n for axis, n in zip("bhv", t.kernel.blocks)})
      ms = 1e3 * t.seconds
      problems.setdefault(problem, {})[config] = dict(evaluation_times_ms=[ms * 3, ms, ms])
  for name in calibrate.FOLDERS.values():
    (folder / name).mkdir(parents=True)
    (folder / name / calibrate.FILE).write_text(json.dumps(problems))
  return folder


def test_the_command(tmp_path, monkeypatch, capsys):
  timed = timings(TRUE)
  data = wheel(tmp_path / "data", timed)
  found = calibrate.published(data / "tpu_v6_lite" / calibrate.FILE)
  assert len(found) == len(timed)  # residuals left out
  assert sorted(t.seconds for t in found) == pytest.approx(sorted(t.seconds for t in timed))
  compiled = []

  def run(job):
    compiled.append(job)
    return types.SimpleNamespace(versions={"libtpu": "1"}, kernel=calibrate.Kernel(
        "bf16", job.kwargs["dim"], job.kwargs["blocks"]))

  monkeypatch.setattr(aot, "run", run)
  monkeypatch.setattr(calibrate, "cycles_of_step", lambda report: CYCLES[report.kernel])
  out = tmp_path / "out"
  assert calibrate.main(["--chip", "v6e", "--data", str(data), "--out", str(out)]) == 0
  assert len(compiled) == len(KERNELS) and {job.target for job in compiled} == {"v6e"}
  result, = (json.loads(path.read_text()) for path in out.glob("*.json"))
  assert len(list(out.glob("*.png"))) == 1
  assert result["model"]["step"] == pytest.approx(TRUE.step) and len(result["rows"]) == len(timed)
  assert "held out" in capsys.readouterr().out
  assert not any("seconds" in row for row in result["rows"])  # nothing of what was measured
  compiled.clear()
  assert calibrate.main(["--chip", "v5p", "--data", str(data), "--out", str(out),
                         "--kernels", "4"]) == 0
  assert len(compiled) == 4
  with pytest.raises(ValueError, match="at least 4"):
    calibrate.main(["--kernels", "3"])


def test_it_says_what_to_install(monkeypatch):
  monkeypatch.setattr(calibrate.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match="pip install tokamax"):
    calibrate.main([])


@pytest.mark.parametrize("chip", list(calibrate.FOLDERS))
def test_the_models_are_those_of_the_results(chip):
  result = [r for r in results.load() if (r["benchmark"], r["device"]) == ("calibration", chip)][-1]
  model = times.MODELS[chip, "loss"]
  assert dataclasses.asdict(model) == pytest.approx(result["model"], rel=1e-3)
  held_out, = (half for half in result["halves"] if half["half"] == "held out")
  assert (model.error, model.ninetieth) == pytest.approx(
      (held_out["median"] / 100, held_out["ninetieth"] / 100))
  errors = np.abs([row["error"] for row in result["rows"] if row["half"] == "held out"])
  assert held_out["median"] == pytest.approx(100 * np.median(errors), abs=0.06)
  assert held_out["median"] <= 3 and held_out["ninetieth"] <= 6


@pytest.mark.full
@pytest.mark.parametrize("chip", list(calibrate.FOLDERS))
def test_three_published_timings_of_a_chip(chip):
  pytest.importorskip("tokamax")
  timed = calibrate.most_timed(
      calibrate.published(calibrate._installed() / calibrate.FOLDERS[chip] / calibrate.FILE), 1)
  three = sorted(timed, key=lambda t: t.tokens)[:: max(1, len(timed) // 3)][:3]
  cycles = calibrate.cycles_of_step(aot.run(calibrate.job(three[0], chip)))
  tpu, model = chips.tpu(chip), times.MODELS[chip, "loss"]
  errors = [model.seconds(steps * cycles, steps) / t.seconds - 1 for t in three
            for steps in (t.steps(tpu.cores // tpu.devices),)]
  assert np.median(np.abs(errors)) < 0.03 and np.abs(errors).max() < 0.06, errors
