"""Results, tables, plots and the README's numbers, from made-up rows."""

import json

import pytest

from benchmarks import measure, plot, report, results, table
from benchmarks.block import Shape
from benchmarks.shapes import Attention


def _result(rows, benchmark="attention", device="NVIDIA H200", date="2026-01-02T03:04:05+00:00"):
  return {"benchmark": benchmark, "device": device, "date": date, "commit": "0123", "driver": None,
          "versions": {"jax": "9.9"}, "timing": measure.METHOD, "rows": rows}


def _row(name, length, tflops, what="forward", **more):
  return {"implementation": name, "shape": f"1x{length}x16x1x128", "dtype": "bfloat16",
          "variant": "alibi", "pass": what, "ms": 1.5, "tflops": tflops, "error": 0.001} | more


def test_results_are_saved_whole_and_resumed(tmp_path):
  result = results.document("attention", device="NVIDIA H200")
  results.add(result, [_row("xla", 1024, 1.0), _row("triton", 1024, 2.0)])
  path = results.save(result, tmp_path)
  assert path.name == f"{result['date'][:10]}-nvidia-h200-attention.json"
  assert {"date", "device", "commit", "versions", "python", "driver"} <= result.keys()
  assert result["versions"]["jax"] and not list(tmp_path.glob("*.part"))

  again = results.resume(results.document("attention", device="NVIDIA H200"), tmp_path)
  results.add(again, [_row("xla", 1024, 3.0), _row("xla", 2048, 4.0)])
  results.save(again, tmp_path)
  rows = results.newest("attention", tmp_path)["rows"]
  assert [(r["implementation"], r["shape"].split("x")[1], r["tflops"]) for r in rows] == [
      ("triton", "1024", 2.0), ("xla", "1024", 3.0), ("xla", "2048", 4.0)]
  # Rows of another version are not mixed in.
  other = json.loads(path.read_text())
  path.write_text(json.dumps(other | {"versions": {"jax": "0"}}))
  assert not results.resume(results.document("attention", device="NVIDIA H200"), tmp_path)["rows"]
  path.write_text("{")
  assert not results.resume(results.document("attention", device="NVIDIA H200"), tmp_path)["rows"]


def test_tables():
  rows = [{"a": "x", "b": 1.23456}, {"a": "long", "b": 123.456, "c": True}, {"a": None}]
  columns = {"a": "name", "b": "ms", "c": "flag"}
  assert table.text(columns, rows).splitlines()[:2] == ["name    ms  flag", "x     1.23"]
  assert table.markdown(columns, rows).splitlines() == [
      "| name | ms | flag |", "| --- | ---: | --- |", "| x | 1.23 |  |", "| long | 123 | yes |",
      "|  |  |  |"]


def test_readme_tables_come_from_the_results():
  found = [_result([_row("xla", 1024, 7.0)], date="2026-01-01"), _result(
      [_row("xla", 1024, 41.5), _row("cudnn", 1024, None, absent="no such GPU")])]
  text = ("# Title\n<!-- benchmarks:attention -->\nold\n<!-- /benchmarks:attention -->\nend\n"
          "<!-- benchmarks:attention@h200 --><!-- /benchmarks:attention@h200 -->")
  filled = report.fill(text, found)
  assert filled.count("| 41.5 |") == 2 and "| 7 |" not in filled and "old" not in filled
  assert "No row for cudnn: no such GPU." in filled and "jax 9.9" in filled
  assert filled.startswith("# Title\n") and "\nend\n" in filled
  assert report.fill(filled, found) == filled
  with pytest.raises(ValueError, match="no result is called attention@tpu"):
    report.fill(text.replace("h200", "tpu"), found)
  with pytest.raises(ValueError, match="are closed by"):
    report.fill("<!-- benchmarks:attention --> never closed", found)


def test_report_writes_and_checks_a_file(tmp_path, capsys):
  (tmp_path / "r.json").write_text(json.dumps(_result([_row("xla", 1024, 41.5)])))
  readme = tmp_path / "README.md"
  readme.write_text("<!-- benchmarks:attention --><!-- /benchmarks:attention -->")
  options = [str(readme), "--results", str(tmp_path)]
  assert report.main([*options, "--check"]) == 1
  assert report.main(options) == 0
  assert "41.5" in readme.read_text()
  assert report.main([*options, "--check"]) == 0
  capsys.readouterr()


def test_plots(tmp_path):
  rows = [_row(name, length, tflops * length / 1024, what)
          for name, tflops in (("xla", 10.0), ("mosaic_gpu", 40.0))
          for length in (1024, 2048, 4096) for what in ("forward", "backward")]
  drawn = plot.draw(_result(rows), tmp_path)
  assert sorted(p.name.partition("attention-")[2] for p in drawn) == [
      "bars.png", "bars.svg", "length.png", "length.svg"]
  import matplotlib.image
  for path in drawn:
    if path.suffix == ".png":
      height, width, _ = matplotlib.image.imread(path).shape
      assert width == 900 and height < 1200
    else:
      assert "</svg>" in path.read_text()
  assert plot.draw(_result([{"implementation": "cudnn", "absent": "x"}]), tmp_path) == []
  static = [{"implementation": "jax-splash", "variant": "", "pass": "forward", "dim_head": 128,
             "length": 2048, "useful": 16.0}]
  assert len(plot.draw(_result(static, "static", "v6e"), tmp_path)) == 2


def test_results_of_the_whole_model_have_rows_too(tmp_path):
  shape = {"batch": 2, "seq": 8, "dim": 32, "depth": 1, "heads": 2, "dim_head": 16}
  measured = {"implementation": "palm-haiku", "dtype": "float32", "device": "cpu",
              "step_seconds": [1.0, 4.0, 2.0], "peak_bytes": 3e9, "compile_seconds": {"1": [5.0]},
              "tokens_per_second": [7.0]}
  absent = {"implementation": "palm-jax", "dtype": "float32", "absent": "not installed"}
  (tmp_path / "train.json").write_text(json.dumps({
      "benchmark": "train", "date": "2026-01-02", "commit": "0123", "versions": {"jax": "9.9"},
      "platform": "Linux", "results": [{"shape": shape, "rows": [measured, absent]}]}))
  result = results.newest("train", tmp_path)
  assert (result["rows"][0]["step"], result["rows"][0]["trained"]) == (2.0, 8.0)
  filled = report.fill("<!-- benchmarks:train --><!-- /benchmarks:train -->", [result])
  assert "| palm-haiku | float32 | 2x8x32x1x2x16 | 2 | 8 | 3 | 5 | 7 |" in filled
  assert "No row for palm-jax: not installed." in filled
  assert len(plot.draw(result, tmp_path)) == 2


def test_attention_arithmetic():
  shape = Attention.parse("2x3x8x2x64")
  # Six pairs of three positions see each other; 2 FLOPs for each of 2 products.
  assert shape.flops(backward=False) == 2 * 8 * 6 * 64 * 2 * 2
  assert shape.flops(backward=False, causal=False) == 2 * 8 * 9 * 64 * 2 * 2
  assert shape.flops(backward=True) == 7 / 2 * shape.flops(backward=False)
  assert shape.bytes(False, 2) == 2 * (2 * 2 * 3 * 8 * 64 + 2 * 2 * 3 * 2 * 64)
  for wrong in ("2x3", "2x3x8x3x64", "axbxcxdxe", "0x1x1x1x1"):
    with pytest.raises(ValueError, match="an attention's shape is"):
      Attention.parse(wrong)


def test_block_arithmetic():
  shape = Shape.parse("1x4x8x2x4x4")
  products = 8 * 2 * 4 * 2 + 2 * 8 * 4 + 3 * 8 * 32
  attention = Attention(1, 4, 2, 1, 4)
  assert shape.flops(False) == 2 * 4 * products + attention.flops(False)
  with pytest.raises(ValueError, match="a block's shape is"):
    Shape.parse("1x2x3")
  grouped = Shape.parse("1x4x8x4x4x4x2x24")
  assert grouped.weights["key"] == (8, 2, 4) and grouped.weights["up"] == (8, 24)
  for text in ("1x4x8x2x4x4", "1x4x8x4x4x4x2", "1x4x8x4x4x4x1x24"):
    assert str(Shape.parse(text)) == text
