import shlex
import shutil

import pytest

from palm_haiku import cli, demo, platforms
from tests import short_runs

NOISE = ("ERROR", "WARNING", "warning:", "Warning:", "Traceback")
needs_no_chip = pytest.mark.skipif(
    platforms._chip_possible(), reason="JAX looks for the chip of this machine")

# One process and a small model of the same kind: what is looked at is what is printed.
RUN = """
import dataclasses, io, contextlib, shlex, sys
import jax
from palm_haiku import cli, config, demo
jax.config.update("jax_compilation_cache_dir", sys.argv[1] + "/cache")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
for name in ("palm-tiny", "palm-lite-tiny"):
  config.configs[name] = dataclasses.replace(
      config.configs[name], dim=16, depth=1, heads=1, dim_head=16, ff_mult=1)
class Tee(io.StringIO):
  def write(self, text):
    sys.__stdout__.write(text)
    return super().write(text)
with contextlib.redirect_stdout(Tee()) as out:
  assert demo.main(["--steps", "1", "--out", sys.argv[1]]) == 0
  lines = out.getvalue().partition("What to type next")[2].splitlines()
  for command in [line.strip() for line in lines if line.startswith("  ")]:
    assert cli.main(shlex.split(command)[1:]) == 0, command
"""


@pytest.mark.full
@needs_no_chip
def test_the_demo_and_what_it_says_to_type_next(tmp_path):
  out = short_runs.output("-c", RUN, tmp_path)
  run = tmp_path / "demo"
  for text in ("palm-haiku train", "train loss", "held-out loss", "nats per token",
               "bits per byte", "palm-haiku generate", "The for statement", "What to type next",
               f"palm-haiku generate {run}"):
    assert text in out, text
  assert (run / "loss.png").exists() and (run / "checkpoints" / "1").is_dir()
  commands = [line.strip() for line in out.partition("What to type next")[2].splitlines()
              if line.startswith(f"  {cli.typed()} ")]
  assert [shlex.split(command)[1] for command in commands] == [
      "generate", "train", "train", "train", "info"]
  assert "step 3/3" in out and "540,356,474,880" in out
  assert not [line for line in out.splitlines() if any(word in line for word in NOISE)]


def test_what_to_type_next_leaves_other_runs_alone(tmp_path):
  for name in ("demo", "demo-2", "mine"):
    (tmp_path / name).mkdir()
  assert demo._fresh(tmp_path / "demo") == tmp_path / "demo-3"
  commands = demo._next(tmp_path, tmp_path / "demo", 1)
  assert str(tmp_path / "mine-2") in commands[2] and str(tmp_path / "alibi") in commands[3]
  for command in commands:
    cli._parser().parse_args(command)


def test_a_command_is_shown_as_it_is_typed(tmp_path, monkeypatch):
  program = tmp_path / "my bin" / "palm-haiku"
  program.parent.mkdir()
  program.touch(mode=0o755)
  monkeypatch.setattr(cli.sys, "executable", str(program.with_name("python")))
  monkeypatch.setenv("PATH", "")
  assert cli.typed("info") == f"'{program}' info"
  monkeypatch.chdir(tmp_path)
  assert cli.typed("generate", "a b") == "'my bin/palm-haiku' generate 'a b'"
  monkeypatch.setenv("PATH", str(program.parent))
  assert shutil.which("palm-haiku") and cli.typed("info") == "palm-haiku info"
