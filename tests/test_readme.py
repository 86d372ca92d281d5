"""The README's examples are run, or compared with the files they show."""

import pathlib
import re

from palm_haiku import kernels
from palm_haiku.kernels.explain import OPS

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_usage_example_runs():
  code = re.search(r"## Usage\n\n```python\n(.*?)```", README, re.DOTALL)[1]
  # The same lines, on a small model.
  for old, new in (("20000", "200"), ("dim=512", "dim=32"), ("depth=12", "depth=2"),
                   ("(1, 2048)", "(1, 32)")):
    assert old in code
    code = code.replace(old, new)
  scope = {}
  exec(code, scope)
  assert scope["logits"].shape == (1, 32, 200)


def test_the_support_table_is_true():
  rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (\w+) \| (\w+) \| (\w+) \|$", README, re.MULTILINE)
  assert {row[0] for row in rows} >= set(OPS)
  for op, xla, *others in rows:
    assert (xla == "works") == hasattr(kernels, op)
    works = {name for name, state in zip(("mosaic_gpu", "mosaic_tpu", "triton"), others)
             if state == "works"}
    assert works == set(OPS[op].backends if op in OPS else ())


def test_files_that_it_names_exist():
  for name in re.findall(r"\]\((examples/\w+\.py)\)", README):
    assert (ROOT / name).is_file()
  layout = re.search(r"## Layout\n\n```\n(.*?)```", README, re.DOTALL)[1]
  for name in re.findall(r"(\w+\.py)", layout):
    assert (ROOT / "palm_haiku" / name).is_file()
