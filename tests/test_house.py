"""The rules of the house that a parse of its files can check."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import palm_haiku

KERNELS = Path(palm_haiku.__file__).parent / "kernels"
OPS = ("attention", "cross_entropy", "decode", "parallel_block")
BACKENDS = ("xla", "mosaic_gpu", "mosaic_tpu", "triton")


def imports(path: str, source: str) -> Iterator[tuple[str, ...]]:
  """What a file of `kernels` imports from there: ("attention", "xla", "attend"), names included."""
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names = [alias.name.split(".") for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      package = path.split("/")[:-1]
      package = ["palm_haiku", "kernels", *package][:len(package) + 3 - node.level]
      module = (node.module or "").split(".") if node.module else []
      names = [[*(package if node.level else []), *module, alias.name] for alias in node.names]
    else:
      continue
    for name in names:
      if name[:2] == ["palm_haiku", "kernels"]:
        yield tuple(name[2:])


def trespasses(path: str, source: str) -> list[tuple[str, ...]]:
  """A file's imports of, and attributes that reach into, the files of another op's backends."""
  op = path.split("/")[0]
  others = set(OPS) - {op} if op in OPS else set(OPS) if op in ("core", "hopper", "tpu", "triton") \
      else set()
  found = [name for name in imports(path, source)
           if name[0] in others and len(name) > 1 and name[1].startswith(BACKENDS)]
  for node in ast.walk(ast.parse(source)):
    if (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        and node.value.id in others and node.attr.startswith(BACKENDS)):
      found.append((node.value.id, node.attr))
  return found


def test_an_op_takes_no_file_of_another_ops_backend():
  found = {}
  for path in KERNELS.rglob("*.py"):
    name = path.relative_to(KERNELS).as_posix()
    if problems := trespasses(name, path.read_text()):
      found[name] = problems
  assert not found


@pytest.mark.parametrize("source", [
    "from ..attention import mosaic_gpu_mask as masking",
    "from ..attention.xla import attend",
    "from palm_haiku.kernels.attention import triton_kernels",
    "def f():\n  from ..attention.triton import forward",
    "from .. import attention\nattention.xla.attend",
])
def test_a_trespass_is_noticed(source):
  assert trespasses("decode/mosaic_gpu.py", source)
  assert not trespasses("attention/mosaic_gpu.py", source)
  assert not trespasses("decode/fused.py", "from ..attention import flash_attention")


def test_kernels_know_nothing_of_the_model():
  for path in KERNELS.rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      module = getattr(node, "module", None) or ""
      names = [alias.name for alias in getattr(node, "names", ())
               if isinstance(node, ast.Import)] + [module]
      assert not any(name.split(".")[0] == "haiku" for name in names), path
      assert not any(name.startswith("palm_haiku.") and not name.startswith("palm_haiku.kernels")
                     for name in names), path
