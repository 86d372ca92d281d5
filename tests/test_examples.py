import dataclasses
import importlib.util
import json
import pathlib
import re
import shlex

import pytest

from palm_haiku import cli, configs

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


def load(name):
  spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.full
def test_train_with_optax(tmp_path, capsys):
  (tmp_path / "text").write_text("All work and no play makes Jack a dull boy. " * 50)
  example = load("train_with_optax")
  example.BATCH, example.LENGTH = 4, 32
  assert example.main([str(tmp_path / "text"), "--steps", "25"]) < 2.5
  assert "step 20: " in capsys.readouterr().out


@pytest.mark.full
def test_compare_attention(capsys):
  assert load("compare_attention").main(["--length", "64"]) < 1e-5
  out = capsys.readouterr().out
  assert "palm/layers/parallel_block/query" in out and "reason=" in out


@pytest.mark.full
def test_judge_a_kernel(capsys):
  report = load("judge_a_kernel").main(["h200", "--dim-head", "64", "--seq-len", "256"])
  (kernel,) = report.kernels_named("flash_attention_forward")
  assert kernel.source == "mosaic_gpu" and not report.problems
  assert "registers, spills 0/0 bytes" in capsys.readouterr().out


@pytest.mark.full
def test_train_short_test_long(tmp_path, capsys, monkeypatch):
  (tmp_path / "text").write_text("All work and no play makes Jack a dull boy. " * 50)
  example = load("train_short_test_long")
  monkeypatch.setattr(example, "TRAINED", 8)
  monkeypatch.setattr(example, "LENGTHS", (8, 128))
  sizes = dict(dim=16, depth=1, heads=1, dim_head=16)
  monkeypatch.setattr(example, "configs", {
      name: dataclasses.replace(configs[name], **sizes) for name in example.MODELS.values()})
  ratios = example.main(["--data", str(tmp_path / "text"), "--steps", "2", "--batch-size", "2",
                         "--seeds", "1", "--out", str(tmp_path / "out")])
  assert set(ratios) == {"rotary", "alibi"} and "at 128 tokens" in capsys.readouterr().out
  fields = json.loads((tmp_path / "out/length.json").read_text())
  losses = {(row["position"], row["seq_len"]): row["nats_per_token"] for row in fields["rows"]}
  assert len(losses) == 4 and "jax" in fields["versions"]
  for position, ratio in ratios.items():
    assert ratio == pytest.approx(losses[position, 128] / losses[position, 8])
  assert (tmp_path / "out/length.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", ["cloud_tpu.sh", "jobset.yaml", "slurm.sh"])
def test_a_job_that_is_started_again_always_resumes(name):
  text = (EXAMPLES / "cluster" / name).read_text()
  command = re.search(r"palm-haiku train (.*?--resume)\b", text, re.DOTALL)[1]
  command = command.replace("\\\n", " ").replace("$JOB_COMPLETION_INDEX", "0")
  args = cli._parser().parse_args(["train", *shlex.split(command)])
  # Before the first checkpoint too: nothing depends on what is there.
  assert args.resume and args.out.name and "$(" not in command


def test_each_example_is_tested():
  tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
  assert {path.stem for path in EXAMPLES.glob("*.py")} <= tested
