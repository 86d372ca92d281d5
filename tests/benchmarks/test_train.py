import json

import pytest

from benchmarks import train


def test_shapes():
  assert train.Shape.parse("4x1024") == train.Shape()
  assert str(train.Shape.parse("2x16x8x3")) == "2x16x8x3x8x64"
  for text in ("", "4xmany", "0x8", "1x2x3x4x5x6x7"):
    with pytest.raises(ValueError, match="a shape is"):
      train.Shape.parse(text)


@pytest.mark.full
def test_a_comparison_where_the_peer_is_absent(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(train, "DEPTHS", (1,))
  monkeypatch.setattr(train.importlib.metadata, "version", absent_peer)
  assert train.main(["--shapes", "1x8x8x1x2x4", "--implementations", "xla", "palm-jax", "cuda",
                     "--rounds", "1", "--out", str(tmp_path)]) == 0
  result = json.loads(next(tmp_path.glob("train-*.json")).read_text())
  assert result["versions"]["jax"] and result["versions"]["PaLM-jax"] is None
  ours, peer, unknown = result["results"][0]["rows"]
  assert result["results"][0]["shape"]["seq"] == 8
  assert peer["absent"] == "not installed; pip install PaLM-jax"
  assert unknown["absent"].startswith("implementation must be one of")
  assert ours["device"] and ours["peak_bytes"] > 1e8
  for times in (ours["step_seconds"], ours["tokens_per_second"], ours["compile_seconds"]["1"]):
    assert len(times) == 1 and times[0] > 0
  out = capsys.readouterr().out
  assert "absent" in out and "tokens/s" in out


def absent_peer(name, version=train.importlib.metadata.version):
  if name == "PaLM-jax":
    raise train.importlib.metadata.PackageNotFoundError(name)
  return version(name)


def test_ratios_are_of_neighbours():
  assert train.ratio([1, 2, 30], [2, 4, 10]) == 0.5
