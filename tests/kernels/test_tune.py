"""The search for block sizes, and the tables that it writes."""

import importlib
import json

import pytest

from palm_haiku import kernels
from palm_haiku.kernels import tune as tune_op
from palm_haiku.kernels.attention import configs


@pytest.fixture
def module(monkeypatch):
  monkeypatch.setattr(configs, "MOSAIC_GPU", dict(configs.MOSAIC_GPU))
  return importlib.import_module("palm_haiku.kernels.tune")


def test_takes_the_best_that_runs_and_changes_nothing(module, monkeypatch, tmp_path):
  def judge(kernel, config, chip, dim_head, shape):
    assert chip == "h200" and shape["length"] == 256
    if kernel == "forward" and config.block_kv == 128:
      return None, "spills"
    return float(config.stages + config.dq_k_stages + config.dkv_block_q), None

  monkeypatch.setattr(module, "_instructions", judge)
  before, path = dict(configs.MOSAIC_GPU), tmp_path / "table.json"
  table = tune_op(dim_heads=(64, 256), length=256, path=str(path))
  assert configs.MOSAIC_GPU == before
  assert json.loads(path.read_text()) == table and table["how"] == "static"
  for blocks in table["blocks"].values():
    assert (blocks["block_kv"], blocks["stages"], blocks["dq_k_stages"]) == (64, 2, 1)
  assert any(trial["problem"] == "spills" for trial in table["trials"])
  # 128 keys twice over at head_dim 256 do not fit beside Q and dO.
  assert not any(trial["dim_head"] == 256 and trial.get("dq_block_kv") == 128
                 and trial["dq_k_stages"] == 2 for trial in table["trials"])

  kernels.load_tuning(str(path))
  assert configs.mosaic_gpu("h200", 256)._asdict() == table["blocks"]["256"]
  assert configs.MOSAIC_GPU["h100", 256] == before["h100", 256]


def test_equal_figures_go_to_more_tiles_in_flight(module, monkeypatch):
  monkeypatch.setattr(module, "_instructions", lambda *_: (1.0, None))
  assert tune_op(dim_heads=(64,))["blocks"]["64"]["stages"] == 4


def test_refuses_a_chip_that_is_not_hopper():
  with pytest.raises(ValueError, match="h100 and h200; got a100"):
    tune_op(chip="a100")


@pytest.mark.parametrize("text", [
    "", "[]", '{"backend": "triton"}',
    '{"backend": "mosaic_gpu", "chip": "h200", "blocks": {"64": {}}}'])
def test_refuses_a_file_that_is_no_table(text, tmp_path):
  path = tmp_path / "table.json"
  path.write_text(text)
  with pytest.raises(ValueError, match="is no table of tune"):
    kernels.load_tuning(str(path))


@pytest.mark.slow
def test_static_search_compiles(module, monkeypatch):
  monkeypatch.setattr(module, "SPACE", {
      "forward": dict(block_kv=(64, 128), stages=(2,)), "dq": dict(dq_block_kv=(64,)),
      "dkv": dict(dkv_block_q=(64,))})
  table = tune_op(dim_heads=(64, 128))
  assert [trial["problem"] for trial in table["trials"]] == [None] * 6
  assert table["blocks"]["128"]["block_kv"] == 128
  # A backward of one kernel has nothing to choose.
  assert {trial["kernel"] for trial in table["trials"] if trial["dim_head"] == 128} == {"forward"}
