"""Live compilations for chips that are not here."""

import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import pytest

from palm_haiku.kernels import aot
from palm_haiku.kernels.aot import __main__ as command, ptxas
from tests.kernels.aot import programs

_NEW = jax.__version_info__ >= (0, 12)


def array(*shape, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype)


@pytest.fixture(autouse=True)
def no_leftovers(tmp_path, monkeypatch):
  """Whatever happens, no dump may stay."""
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
  yield
  assert not list(tmp_path.glob("palm-haiku-aot-*"))


# ---- what is bad on purpose


def test_a_planted_spill_is_flagged():
  report = aot.report(programs.normalize, array(128, 256, dtype=jnp.float32), target="h200")
  kernel, = report.kernels
  assert (kernel.name, kernel.source) == ("normalize_0", "mosaic_gpu")
  assert kernel.resources.spill_stores > 0 and not kernel.resources.serialized
  assert kernel.resources.registers == 255
  assert kernel.shared_memory >= 128 * 256 * 4
  problem, = report.problems
  assert "spills" in problem


@pytest.mark.full
def test_half_of_it_does_not_spill():
  report = aot.report(programs.normalize, array(64, 256, dtype=jnp.float32), target="h200")
  assert not report.problems


def _hopper_attention(block_q, block_kv, dim):
  return aot.report(
      programs.hopper_attention, array(1, 2048, 16, dim, dtype=jnp.float16),
      *[array(1, 2048, 1, dim, dtype=jnp.float16)] * 2, target="h200", square=(2048, 2048),
      block_q=block_q, block_kv=block_kv)


@pytest.mark.full
def test_planted_serialized_wgmma_is_flagged():
  report = _hopper_attention(128, 128, 128)
  kernel, = report.kernels
  assert kernel.resources.serialized
  # Two fences for each wgmma: what tells it without ptxas's word.
  main = kernel.code.main_loop
  assert main.mix["WARPGROUP"] == 2 * main.mix["HGMMA"]
  assert any("serialized" in problem for problem in report.problems)


@pytest.mark.full
@pytest.mark.parametrize("target", ["h200", "v5e"])
def test_a_planted_square_buffer_is_flagged(target):
  def arguments(length):
    return array(1, length, 16, 128), array(1, length, 1, 128), array(1, length, 1, 128)

  report = aot.report(programs.scores_in_memory, *arguments(1920), target=target,
                      square=(1920, 1920))
  assert any("as large as T x S" in problem for problem in report.problems)
  assert report.memory["temp"] >= 1920**2 * 16 * 2
  assert report.memory["argument"] == (16 + 2) * 1920 * 128 * 2
  if target == "v5e":  # XLA's attention of a block at a time is the same program everywhere
    from palm_haiku.kernels import flash_attention
    report = aot.report(flash_attention, *arguments(384), target=target, square=(384, 384),
                        implementation="xla")
    assert not report.square


# ---- figures that are known


@pytest.mark.full
@pytest.mark.parametrize("dim, block_kv, loop", [
    (64, 128, (454 if _NEW else 455, 12)), (128, 128, (496 if _NEW else 494, 16)),
    (256, 64, (476 if _NEW else 448, 20))])
def test_the_hopper_attention_of_jax(dim, block_kv, loop):
  if (jax.__version__, ptxas.version()) not in (("0.11.2", "13.0.88"), ("0.12.0.1", "13.0.88")):
    pytest.skip("the figures are those of jax 0.11.2 and 0.12.0.1 with ptxas 13.0.88")
  kernel, = _hopper_attention(64, block_kv, dim).kernels
  main = kernel.code.main_loop
  assert (main.instructions, main.mix["HGMMA"]) == loop
  assert (kernel.resources.registers, kernel.resources.spill_stores) == (168, 0)
  assert not kernel.problems


@pytest.mark.full
@pytest.mark.parametrize("target", ["v5e", "v6e"])
def test_matrix_cycles_of_an_xla_matmul_agree_with_its_macs(target):
  report = aot.report(programs.matmul, array(2048, 2048), array(2048, 4096), target=target,
                      flops=2 * 2048 * 2048 * 4096)
  kernel, = [k for k in report.kernels if k.matrix]
  chip = report.chip
  cycles = 2048 * 2048 * 4096 / (chip.mxus * chip.mxu_dim**2 * chip.mxu_rows)
  assert kernel.schedule.matmul_cycles == pytest.approx(cycles, rel=0.01)
  assert 0.9 < report.utilization() < 1


@pytest.mark.full
def test_two_for_tpus_at_once_and_trips_of_inner_loops():
  jobs = [aot.job(programs.loop, array(2048, 256), target="v5e", start=start, stop=70)
          for start in (0, 3)]
  trips = {}
  for job, report in aot.run_all(jobs, workers=2):
    assert isinstance(report, aot.Report), report
    trips[job.kwargs["start"]] = [r.trips for r in report.kernels[0].schedule.root
                                  if r.kind == "loop"]
  assert trips == {0: [10, 70], 3: [10, 67]}


@pytest.mark.full
def test_kernels_of_xla_and_the_backward_pass():
  report = aot.report(programs.matmul, array(512, 512), array(512, 512), target="a100",
                      backward=True)
  assert {kernel.source for kernel in report.kernels} == {"xla"}
  assert sum(kernel.code.mix.get("HMMA", 0) > 0 for kernel in report.kernels) >= 3
  assert all(kernel.shared_memory is not None for kernel in report.kernels)
  assert "ptxas" in report.versions


@pytest.mark.full
def test_a_pod():
  report = aot.report("tests.kernels.aot.programs:pod", target="v5e:4x4")
  assert report.memory["output"] == 4096 * 4096 * 2 // 16
  before = dict(os.environ)
  assert aot.devices("v5e:4x4*2")[-1].slice_index == 1
  assert os.environ == before  # else processes started later take this machine for a TPU host


# ---- what goes wrong


@pytest.mark.full
def test_a_program_that_does_not_compile_says_why():
  with pytest.raises(aot.AotError, match="refuse does not compile for v5e: ValueError: this pro"):
    aot.report(programs.refuse, array(2), target="v5e")


@pytest.mark.full
def test_a_compiler_that_dies_or_hangs_is_survived():
  with pytest.raises(aot.AotError, match="died .signal SIGABRT"):
    aot.report(programs.crash, array(2), target="h200")
  start = time.monotonic()
  with pytest.raises(aot.AotError, match="hang for h200: not compiled after 8 s"):
    aot.report(programs.hang, array(2), target="h200", timeout=8)
  assert time.monotonic() - start < 30


@pytest.mark.full
def test_a_killed_caller_leaves_nothing(tmp_path):
  code = ("import jax, sys, tempfile; tempfile.tempdir = sys.argv[1]\n"
          "from palm_haiku.kernels import aot\n"
          "aot.report('tests.kernels.aot.programs:hang', jax.ShapeDtypeStruct((2,), 'float32'),"
          " target='h200')")
  caller = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=os.getcwd(),
                            env=dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)))

  def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
      time.sleep(0.2)
    assert condition()

  def processes(*which):
    listed = subprocess.run(["ps", *which, "-o", "pid="], capture_output=True, text=True)
    return listed.stdout.split()

  folders = lambda: list(tmp_path.glob("palm-haiku-aot-*/*"))
  try:
    wait_for(folders)
    server, = processes("--ppid", str(caller.pid))
    wait_for(lambda: len(processes("-s", server)) == 3)  # it, the one that waits, the compiler
    assert len(os.listdir(f"/proc/{server}/task")) == 1  # else forks may hang
  finally:
    caller.send_signal(signal.SIGKILL)
    caller.wait()
  wait_for(lambda: not folders() and not processes("-s", server))


@pytest.mark.full
def test_settings_that_jax_reads_when_it_is_imported(monkeypatch):
  output = lambda: aot.report(programs.widest, array(2), target="v5e").memory["output"]
  monkeypatch.setenv("JAX_ENABLE_X64", "1")
  wide = output()
  monkeypatch.setenv("JAX_ENABLE_X64", "0")
  assert wide == 2 * output()
  monkeypatch.setenv("JAX_ENABLE_X64", "perhaps")
  with pytest.raises(aot.AotError, match="the compiler died .exit status 1.*invalid truth value"):
    output()


def test_functions_that_no_process_could_find_are_refused():
  with pytest.raises(aot.AotError, match="top of a module"):
    aot.report(lambda x: x, array(2), target="h200")
  with pytest.raises(aot.AotError, match="arguments cannot be sent"):
    aot.report(programs.matmul, array(2), target="h200", option=lambda: 0)
  with pytest.raises(aot.AotError, match="no target is called"):
    aot.report(programs.matmul, array(2), target="h300")
  with pytest.raises(aot.AotError, match="No module named 'nowhere'"):
    aot.report("nowhere:f", array(2), target="v5e")


# ---- the command line


def test_the_command_line(capsys):
  here = pathlib.Path(programs.__file__)
  assert command.main(["v5e", f"{here}:loop", "bf16[2048,256]", "start=0", "stop=4"]) == 0
  out = capsys.readouterr().out
  assert "libtpu" in out and "static estimate" in out and "<- body" in out
  assert command.main(["v5e", f"{here}:loop", "bf17[2]"]) == 1
  assert "an array is written as in" in capsys.readouterr().err
