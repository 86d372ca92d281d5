"""Everything worth running on a borrowed machine, the most important first, within a budget.

Each stage is a process of its own that writes its result after every case. So whenever this one is
killed, what there is so far lies under --out; DIR/suite.json says which stages are done. A stage
that hangs or dies costs its own rows alone.
"""

import argparse
import ctypes
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

# (benchmark, its arguments): by how much one would miss it.
STAGES = [
    ("attention", ["--shapes", "8x2048x16x1x128"]),
    ("block", ["--shapes", "4x2048x4096x16x256x4"]),
    ("attention", ["--shapes", "2x8192x16x1x128", "--variants", "alibi"]),
    ("attention", ["--shapes", "8x2048x16x1x256", "8x2048x16x1x64", "--variants", "alibi"]),
    ("loss", ["--shapes", "8192x4096x256000"]),
    ("decode", []),
    ("train", []),
    ("attention", ["--shapes", "1x16384x16x1x128", "4x4096x16x1x128", "--variants", "alibi"]),
    ("block", ["--shapes", "8x2048x2048x16x128x4", "8x2048x1024x16x64x4"]),
    ("attention", ["--shapes", "2x8192x16x1x128", "2x8192x16x1x256", "2x8192x16x1x64",
                   "--variants", "plain"]),
    ("attention", ["--shapes", "8x2048x16x4x128", "8x2048x16x16x128"]),
]
CPU_STAGES = [("attention", []), ("block", []), ("loss", []), ("decode", [])]
_TIMED = ("attention", "block", "loss", "decode")


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m benchmarks suite", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--budget", type=float, default=540, metavar="SECONDS")
  parser.add_argument("--out", required=True, metavar="DIR", type=pathlib.Path)
  parser.add_argument("--check", action="store_true",
                      help="first run the tests that need this machine's accelerator")
  args = parser.parse_args(argv)
  end = time.monotonic() + args.budget
  args.out.mkdir(parents=True, exist_ok=True)

  platform = _platform()
  stages = STAGES if platform in ("gpu", "tpu") else CPU_STAGES
  if stages is CPU_STAGES:
    print("There is no accelerator here: XLA's rows alone, on small shapes.", flush=True)
  plan = [{"stage": " ".join([name, *rest]), "status": "not begun"} for name, rest in stages]
  commands = [[name, *rest, "--out", str(args.out)] for name, rest in stages]
  if args.check and stages is STAGES:
    plan.insert(0, {"stage": f"tests marked {platform}", "status": "not begun"})
    commands.insert(0, None)
  for stage, command in zip(plan, commands, strict=True):
    left = end - time.monotonic()
    if left < 10:
      stage["status"] = "left out: no time"
      _write(args.out, platform, plan)
      continue
    stage["status"] = "running"
    _write(args.out, platform, plan)
    print(f"\n== {stage['stage']} ({left:.0f} s left)", flush=True)
    start = time.monotonic()
    if command is None:
      status = _run([sys.executable, "-m", "pytest", "-m", platform], left)
    else:
      seconds = ["--seconds", f"{left - 5:.0f}"] if command[0] in _TIMED else []
      status = _run([sys.executable, "-m", "benchmarks", *command, *seconds], left)
    stage.update(status=status, seconds=round(time.monotonic() - start, 1))
    _write(args.out, platform, plan)
    if status == "interrupted":
      break
  print("\n" + "\n".join(f"{s['status']:20} {s['stage']}" for s in plan))
  return int(any(s["status"].startswith(("failed", "killed")) for s in plan))


def _platform() -> str:
  """Asked in another process: this one must not take the accelerator's memory."""
  done = subprocess.run(
      [sys.executable, "-c", "import jax; print(jax.default_backend())"],
      capture_output=True, text=True, check=False, timeout=120)
  return done.stdout.strip().splitlines()[-1] if done.returncode == 0 else "cpu"


def _run(command, seconds) -> str:
  process = subprocess.Popen(command, start_new_session=True,
                             preexec_fn=_die_with_parent if sys.platform == "linux" else None)
  try:
    status = process.wait(seconds)
    return "done" if status == 0 else f"failed with {status}"
  except subprocess.TimeoutExpired:
    return "killed: out of time"
  except KeyboardInterrupt:
    return "interrupted"
  finally:
    if process.poll() is None:
      os.killpg(process.pid, signal.SIGKILL)
      process.wait()


def _die_with_parent():
  pr_set_pdeathsig = 1
  ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _write(out, platform, plan):
  part = out / "suite.part"
  part.write_text(json.dumps({"platform": platform, "stages": plan}, indent=1) + "\n")
  part.replace(out / "suite.json")
