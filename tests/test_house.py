"""Rules of the layout and of the style, read from the source text."""

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).parents[1]
OPS = ("attention", "cross_entropy", "decode", "parallel_block")
BACKENDS = ("mosaic_gpu", "mosaic_tpu", "triton")  # beginnings of their files' names
# Functions that a backend's files offer to the op around them.
OFFERED = ("unsupported", "forward", "backward", "logit_gradient", "in_projection",
           "out_projection", "swiglu_gradient", "input_gradient")
# Public functions with more than 12 parameters, all but a few of them options.
WIDE = {"palm_haiku/generate.py:generate",
        "kernels/parallel_block/__init__.py:parallel_attention_ffn"}
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


@functools.cache
def parsed(path):
  return ast.parse(path.read_text())


def sources(*folders):
  for folder in folders:
    for path in sorted((ROOT / folder).rglob("*.py")):
      if folder == "kernels" or not path.is_relative_to(ROOT / "palm_haiku/kernels"):
        yield path.relative_to(ROOT), parsed(path)


def parameters(function):
  args = function.args
  return [a for a in (*args.posonlyargs, *args.args, *args.kwonlyargs)
          if a.arg not in ("self", "cls")]


def public_functions(tree):
  for node in tree.body:
    if isinstance(node, FUNCTION) and not node.name.startswith("_"):
      yield node
    elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
      yield from (method for method in node.body if isinstance(method, FUNCTION)
                  and (method.name in ("__init__", "__call__") or method.name[0] != "_"))


def imported(path, tree):
  """The modules that a file of `kernels` imports from the package, as parts of paths below it."""
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom) and node.level:
      base = path.parts[1:len(path.parts) - node.level]
      module = (*base, *(node.module or "").split(".")) if node.module else base
      yield from ((*module, name.name) for name in node.names)


def foreign_backends(path, tree):
  return [parts for parts in imported(path, tree)
          if len(parts) > 1 and parts[0] in OPS and parts[0] != path.parts[1]
          and any(part.startswith(BACKENDS) for part in parts[1:])]


def test_no_op_imports_another_ops_backend():
  found = {str(path): foreign for path, tree in sources("kernels")
           if path.parts[1] in OPS and (foreign := foreign_backends(path, tree))}
  assert not found
  # The check sees both forms of such an import.
  for text in ("from ..decode.mosaic_gpu_merge import merge", "from ..decode import triton"):
    assert foreign_backends(Path("kernels/attention/new.py"), ast.parse(text))


def imports_by_string(tree):
  """Lines that import a module, or take a backend of a folder, by a name that is computed."""
  called = lambda node: node.func.attr if isinstance(node.func, ast.Attribute) else (
      getattr(node.func, "id", ""))
  return [node.lineno for node in ast.walk(tree)
          if isinstance(node, ast.Call) and called(node) in ("import_module", "__import__")
          or isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.modules"]


def test_no_backend_is_imported_by_string():
  # A job names the function that it compiles, for the process that does.
  found = {str(path): lines for path, tree in sources("kernels")
           if path.parts[1] != "aot" and (lines := imports_by_string(tree))}
  assert not found
  for text in ("importlib.import_module('.attention')", "import_module(name)", "__import__(name)",
               "sys.modules[name]"):
    assert imports_by_string(ast.parse(text))


def test_the_pipeline_knows_no_op():
  known = {str(path): parts for path, tree in sources("kernels") for parts in imported(path, tree)
           if path.parts[1] == "core" and parts and parts[0] in OPS}
  assert not known
  assert len((ROOT / "kernels/core/op.py").read_text().splitlines()) < 250


def device_kernel(path, function):
  """A function of refs or pointers, whose parameters its language makes one each."""
  return path.stem == "triton_kernels" or any(
      a.arg.endswith(("_ref", "_smem")) for a in parameters(function))


def test_functions_are_short_and_take_few_parameters():
  long, wide, refs = {}, {}, {}
  for path, tree in sources("palm_haiku", "kernels", "benchmarks", "examples"):
    for node in ast.walk(tree):
      if isinstance(node, FUNCTION):
        name, lines = f"{path}:{node.name}", node.end_lineno - node.lineno + 1
        count = len(parameters(node))
        if lines > 120:
          long[name] = lines
        if device_kernel(path, node):
          if count > 16 and path.stem != "triton_kernels":  # Triton has no tuples of pointers
            refs[name] = count
        elif count > 12:
          wide[name] = count
  assert not long and not refs, (long, refs)
  assert wide.keys() <= WIDE, wide


def test_parameters_are_annotated():
  bare, count = [], 0
  for path, tree in sources("palm_haiku", "kernels"):
    for function in public_functions(tree):
      op = path.parts[1] in OPS and path.stem != "__init__" or path.parts[1] in (
          "core", "hopper", "tpu", "triton", "aot")
      if path.parts[0] == "palm_haiku" or not op or function.name in OFFERED:
        count += len(parameters(function))
        bare += [f"{path}:{function.name}({a.arg})" for a in parameters(function)
                 if a.annotation is None]
  assert len(bare) <= 0.1 * count, "\n".join(bare)


def test_docstrings_begin_with_a_noun_or_a_verb():
  documented = (ast.Module, ast.ClassDef, *FUNCTION)
  found = [f"{path}:{getattr(node, 'name', 'module')}"
           for path, tree in sources("palm_haiku", "kernels", "benchmarks", "examples", "tests")
           for node in ast.walk(tree) if isinstance(node, documented)
           and (ast.get_docstring(node) or "").startswith(("What ", "How "))]
  assert not found
