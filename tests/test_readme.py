"""Examples, commands, tables and links of the README and the docs."""

import pathlib
import re
import shlex

import numpy as np
import pytest

from palm_haiku import kernels, options
from palm_haiku.kernels.explain import OPS

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_example_in_python_runs():
  code = re.search(r"## In Python\n\n```python\n(.*?)```", README, re.DOTALL)[1]
  # The same lines, on a small model.
  for old, new in (("20000", "200"), ("dim=512", "dim=32"), ("depth=12", "depth=2"),
                   ("(1, 2049)", "(1, 33)")):
    assert old in code
    code = code.replace(old, new)
  scope = {}
  exec(code, scope)
  assert abs(float(scope["loss"]) - np.log(200)) < 5


@pytest.mark.parametrize("path", ["README.md", *(f"docs/{path.name}" for path in sorted(
    (ROOT / "docs").glob("*.md")))])
def test_commands_are_ones_that_there_are(path):
  """Each `palm-haiku ...` of a block of shell is read by the command line's own parser."""
  blocks = re.findall(r"```sh\n(.*?)```", (ROOT / path).read_text(), re.DOTALL)
  lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
  parser = options.parser(dict.fromkeys(
      ("train", "tokenize", "data", "generate", "eval", "plan", "convert", "info", "doctor")))
  for line in lines:
    words = shlex.split(line, comments=True)
    if words[:1] == ["palm-haiku"]:
      words = words[1: words.index(">") if ">" in words else None]
      parser.parse_args(words)


def test_links_lead_somewhere():
  for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
      if not link.startswith(("http", "#")):
        target, _, anchor = link.partition("#")
        assert (path.parent / target).exists(), f"{path.name}: {link}"
        if anchor:
          titles = re.findall(r"^#+ (.*)$", (path.parent / target).read_text(), re.MULTILINE)
          assert anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-")
                            for title in titles}, f"{path.name}: {link}"


def test_the_support_table_is_true():
  rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (\w+) \| (\w+) \| (\w+) \|$", README, re.MULTILINE)
  assert {row[0] for row in rows} >= set(OPS)
  for op, xla, *others in rows:
    assert (xla == "works") == hasattr(kernels, op)
    works = {name for name, state in zip(("mosaic_gpu", "mosaic_tpu", "triton"), others)
             if state == "works"}
    assert works == set(OPS[op].backends if op in OPS else ())


def test_files_of_the_layout_exist():
  design = (ROOT / "docs" / "design.md").read_text()
  layout = re.search(r"## Files\n\n```\n(.*?)```", design, re.DOTALL)[1]
  for name in re.findall(r"(\w+\.py)", layout):
    assert (ROOT / "palm_haiku" / name).is_file()
