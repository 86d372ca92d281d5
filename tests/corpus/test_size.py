"""Corpora of some size: memory and bytes read, where little text shows nothing."""

import pathlib
import subprocess
import sys

import pytest

from tests.corpus import measure


@pytest.mark.full
def test_memory_does_not_grow_with_200_mb(tmp_path):
  source = tmp_path / "part.jsonl"
  measure.write_corpus(source, 4 * 10**6)
  part = source.read_bytes()
  with open(source, "ab") as stream:
    for _ in range(49):
      stream.write(part)
  figures = measure.in_process("tokenise_and_read", source, tmp_path / "out")
  made = figures["tokenise"]
  assert made["bytes"] > 0.98 * 50 * len(part) > 196e6
  assert made["peak_mb"] < min(1000, made["before_mb"] + 60)
  assert figures["read"]["bytes_over_needed"] <= 2
  assert figures["pack"]["peak_mb"] < made["before_mb"] + 100
  assert figures["pack"]["padding"] < 0.01


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_memory_and_start_do_not_grow_with_2_gb(tmp_path):
  subprocess.run([sys.executable, "-m", "tests.corpus.measure", str(tmp_path / "data")], check=True,
                 cwd=pathlib.Path(__file__).parents[2])
