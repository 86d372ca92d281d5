"""Real processes on this machine, joined by `jax.distributed`."""

import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

import pytest

from palm_haiku import checkpoint, cli, runlog
from palm_haiku.corpus import build
from tests.short_runs import TEXT

ROOT = pathlib.Path(__file__).parents[1]
# The optimizer whose learning rate does not depend on the number of steps, nor do its programs.
CONSTANT = "--optimizer=palm"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  path = tmp_path_factory.mktemp("data") / "text"
  path.write_text(TEXT)
  return path


class Job:
  """`palm-haiku train` in some processes, each with `devices` devices."""

  def __init__(self, text, out, *options, processes, devices=1, missing=0, timeout=120):
    # Kept while the job lasts: nobody else is given the port. gRPC shares it by this option.
    self.port = socket.socket()
    self.port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    self.port.bind(("localhost", 0))
    port = self.port.getsockname()[1]
    command = [
        sys.executable, "-m", "palm_haiku", "train", "--dim=16", "--depth=1", "--heads=2",
        "--dim-head=8", "--num-tokens=128", f"--data={text}", "--batch-size=4", "--seq-len=32",
        "--log-every=4", "--eval-every=4", "--checkpoint-every=5", f"--out={out}", *options]
    env = os.environ | {
        "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    self.processes = []
    for number in range(processes - missing):
      job = [] if processes == 1 else [
          f"--coordinator=localhost:{port}", f"--num-processes={processes}",
          f"--process-id={number}", f"--start-timeout={timeout}"]
      self.processes.append(subprocess.Popen(
          command + job, cwd=ROOT, env=env, text=True,
          stdout=subprocess.PIPE, stderr=subprocess.STDOUT))

  def wait(self):
    """Exit statuses, and what the processes printed."""
    texts = [process.communicate(timeout=240)[0] for process in self.processes]
    self.port.close()
    return [process.returncode for process in self.processes], texts

  def wait_for_step(self, out, step):
    deadline = time.monotonic() + 240
    while not any(row["step"] >= step for row in runlog.read_metrics(out / runlog.METRICS)):
      assert time.monotonic() < deadline and self.processes[0].poll() is None
      time.sleep(0.01)


def alone(text, out, *options):
  """`palm-haiku train` in this process, on one device."""
  status = cli.main([
      "train", "--dim=16", "--depth=1", "--heads=2", "--dim-head=8", "--num-tokens=128",
      f"--data={text}", "--batch-size=4", "--seq-len=32", "--log-every=4", "--eval-every=4",
      "--checkpoint-every=5", "--mesh=one-chip", f"--out={out}", *options])
  assert status == 0


def losses(out):
  return {row["step"]: [row["loss"], row.get("eval_loss", 0)]
          for row in runlog.read_metrics(out / runlog.METRICS)}


def assert_same(got, want):
  assert got.keys() == want.keys()
  for step, values in want.items():
    assert got[step] == pytest.approx(values, rel=1e-5), step


@pytest.fixture(scope="module")
def undisturbed(text, tmp_path_factory):
  """Losses of 20 steps in one process on one device."""
  out = tmp_path_factory.mktemp("one") / "out"
  alone(text, out, "--steps=20", CONSTANT)
  return losses(out)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_killed_process_ends_the_job_and_another_job_goes_on(text, tmp_path, capsys):
  out = tmp_path / "out"
  job = Job(text, out, "--steps=1000000", CONSTANT, "--mesh=data=2,model=2", processes=2,
            devices=2)
  job.wait_for_step(out, 8)
  job.processes[1].kill()
  statuses, texts = job.wait()
  # Between two steps, where nothing waits for the other process, it is XLA that notices.
  ours, of_xla = "another process of the job died", "indicates that another task died"
  assert (statuses[0] == 1 and ours in texts[0]) or (
      statuses[0] == -signal.SIGABRT and of_xla in texts[0]), texts
  whole = [step for step in checkpoint.Checkpoints(out / "checkpoints").steps()
           if checkpoint.Checkpoints(out / "checkpoints").problem(step) is None]
  assert whole and whole[-1] >= 5
  kept = {step: x for step, x in losses(out).items() if step <= whole[-1]}
  alone(text, out, f"--steps={whole[-1] + 4}", "--resume")
  assert f"resuming from step {whole[-1]}" in capsys.readouterr().out
  assert kept.items() <= losses(out).items()


@pytest.mark.timeout(900)
def test_two_processes_train_as_one(text, tmp_path, undisturbed):
  out = tmp_path / "out"
  statuses, texts = Job(text, out, "--steps=12", CONSTANT, "--mesh=data=2,model=2", "--resume",
                        processes=2, devices=2).wait()
  assert statuses == [0, 0] and "beginning anew" in texts[0], texts
  assert "step 12/12" in texts[0] and "step 12/12" not in texts[1]
  assert_same(losses(out), {step: x for step, x in undisturbed.items() if step <= 12})
  alone(text, out, "--steps=20", "--resume")
  assert_same(losses(out), undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_more_processes_go_on(text, tmp_path, undisturbed):
  out = tmp_path / "out"
  alone(text, out, "--steps=12", CONSTANT)
  statuses, texts = Job(text, out, "--steps=20", "--mesh=fsdp", "--resume", processes=4).wait()
  assert statuses == [0] * 4 and "resuming from step 12" in texts[0], texts
  assert_same(losses(out), undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sigterm_to_one_process_saves_and_ends_all(text, tmp_path):
  out = tmp_path / "out"
  job = Job(text, out, "--steps=1000000", "--checkpoint-every=1000000", "--mesh=fsdp", processes=2)
  job.wait_for_step(out, 4)
  job.processes[1].send_signal(signal.SIGTERM)
  statuses, texts = job.wait()
  assert statuses == [128 + signal.SIGTERM] * 2, texts
  saved, = checkpoint.Checkpoints(out / "checkpoints").steps()
  assert f"stopped by SIGTERM at step {saved}, which is saved" in texts[0]
  assert checkpoint.Checkpoints(out / "checkpoints").problem(saved) is None


@pytest.mark.timeout(300)
def test_a_missing_host_is_named_in_time(text, tmp_path):
  job = Job(text, tmp_path / "out", "--mesh=fsdp", processes=2, missing=1, timeout=3)
  statuses, texts = job.wait()
  assert statuses == [1]
  assert texts[0].strip() == (
      "palm-haiku: error: the job did not start: the 2 processes were not there within 3 seconds; "
      "see that every host runs and reaches " + texts[0].strip().split()[-1])


@pytest.mark.parametrize("options, message", [
    (["--coordinator=localhost:1"], "--num-processes and --process-id come together"),
    (["--coordinator=localhost:1", "--num-processes=2", "--process-id=2"], "from 0 to 1; got 2"),
    (["--mesh=fsdp=3"], "'fsdp=3' is for 3 devices; there are 8"),
])
def test_bad_options(text, tmp_path, options, message, capsys):
  assert cli.main(["train", f"--data={text}", f"--out={tmp_path / 'out'}", *options]) == 2
  error = capsys.readouterr().err.strip()
  assert message in error and len(error.splitlines()) == 1 and not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_killed_at_twenty_random_moments(text, tmp_path):
  """Two processes; each time one of them is killed, and the job starts again on one or two."""
  out, rng = tmp_path / "out", random.Random(0)
  reference = tmp_path / "reference"
  alone(text, reference, "--steps=400")
  for kill in range(20):
    processes = rng.choice([2, 2, 1])
    options = ["--mesh=fsdp" if processes == 2 else "--mesh=one-chip"] + ["--resume"] * (kill > 0)
    job = Job(text, out, "--steps=400", *options, processes=processes)
    before = max(losses(out), default=0)
    job.wait_for_step(out, min(before + 8, 400))
    time.sleep(rng.uniform(0, 0.5))
    rng.choice(job.processes).kill()
    job.wait()
    if max(losses(out)) >= 400:
      break
  alone(text, out, "--steps=400", "--resume")
  assert_same(losses(out), losses(reference))


@pytest.fixture
def mixed(tmp_path):
  """A mixture of two tokenised corpora."""
  for name, text in (("a", TEXT), ("b", TEXT.upper())):
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"text": text[k: k + 200 - k // 40 % 190]}) + "\n"
                            for k in range(0, len(text), 200)))
    build.build(build.Settings((str(path),), held_out=0.2, unit_bytes=2000), "bytes",
                tmp_path / name)
  return f"{tmp_path / 'a'}:0.7,{tmp_path / 'b'}:0.3"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("packing", [[], ["--packing=best-fit", "--mask-documents"]])
def test_a_run_on_shards_killed_at_random_goes_on_elsewhere(mixed, tmp_path, packing):
  """On other meshes and numbers of processes; its losses are those of the undisturbed run."""
  options = ["--batch-size=8", "--log-every=1", "--seq-len=64", CONSTANT, *packing]
  alone(mixed, tmp_path / "one", "--steps=160", *options)
  out, rng = tmp_path / "out", random.Random(len(packing))
  for processes, devices, mesh in ((1, 4, "data=2,fsdp=2"), (2, 2, "fsdp=4"),
                                   (4, 2, "data=4,model=2")):
    job = Job(mixed, out, "--steps=1000000", f"--mesh={mesh}", *options, "--resume",
              processes=processes, devices=devices)
    job.wait_for_step(out, max(losses(out), default=0) + rng.randrange(8, 30))
    for process in job.processes:
      process.kill()
    job.wait()
  assert max(losses(out)) < 160
  alone(mixed, out, "--steps=160", *options, "--resume")
  assert_same(losses(out), losses(tmp_path / "one"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_four_processes_train_on_shards_as_one(mixed, tmp_path):
  source, out = mixed, tmp_path / "out"
  alone(source, tmp_path / "one", "--steps=20", "--batch-size=8", CONSTANT)
  statuses, texts = Job(source, out, "--steps=12", "--batch-size=8", CONSTANT,
                        "--mesh=data=4,fsdp=2", processes=4, devices=2).wait()
  assert statuses == [0] * 4, texts
  assert_same(losses(out), {k: x for k, x in losses(tmp_path / "one").items() if k <= 12})
  alone(source, out, "--steps=20", "--batch-size=8", "--resume")
  assert_same(losses(out), losses(tmp_path / "one"))
