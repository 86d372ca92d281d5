import shlex
import shutil

import pytest

from palm_haiku import cli, demo, platforms
from tests import short_runs

NOISE = ("ERROR", "WARNING", "warning:", "Warning:", "Traceback")
needs_no_chip = pytest.mark.skipif(
    platforms._chip_possible(), reason="JAX looks for the chip of this machine")

RUN = """
import shlex, sys
from palm_haiku import cli
for command in sys.argv[1:]:
  assert cli.main(shlex.split(command)[1:]) == 0, command
"""


@pytest.mark.full
@needs_no_chip
def test_the_demo_and_what_it_says_to_type_next(tmp_path):
  out = short_runs.output("-m", "palm_haiku.demo", "--steps", "1", "--out", tmp_path)
  run = tmp_path / "demo"
  for text in ("palm-haiku train", "train loss", "held-out loss", "nats per token",
               "bits per byte", "palm-haiku generate", "The for statement", "What to type next",
               f"palm-haiku generate {run}"):
    assert text in out, text
  assert (run / "loss.png").exists() and (run / "checkpoints" / "1").is_dir()
  commands = [line.strip() for line in out.partition("What to type next")[2].splitlines()
              if line.startswith("  ")]
  assert {shlex.split(command)[1] for command in commands} == {"train", "generate", "info"}
  assert len(commands) == 5 and {shlex.split(command)[0] for command in commands} == {cli.typed()}
  next_out = short_runs.output("-c", RUN, *commands)
  assert "step 3/3" in next_out and "540,356,474,880" in next_out
  assert not [line for line in (out + next_out).splitlines() if any(word in line for word in NOISE)]


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
