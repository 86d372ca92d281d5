"""Planted mistakes: small changes of the code that a test must notice.

A statement that a mistake changes carries a comment `# mutant: PLACE`, at the end of one of its
lines or on the line before it. A mistake is the name of a place, a regular expression and its
replacement, applied to the statement as `ast.unparse` writes it: on one line and without comments,
of a compound statement only the header. So a formatter changes nothing here, and a rename matters
only where an expression contains the name. Where several statements are one place, all change.

    FORGETS_A_WAIT = Mistake("ready", *DROPPED)
    OFF_BY_ONE = Mistake("causal edge", "<=", "<")
    with planted(module, OFF_BY_ONE):
      ...  # the module's functions compute something else

A missing place, or a statement that stays as it was, raises `LookupError`.
"""

import ast
import contextlib
import inspect
import io
import re
import tokenize
import types
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax

_mutated = jax.make_user_context(None)

DROPPED = (r"(?s).+", "pass")  # the statement is left out


class Mistake(NamedTuple):
  """A change of the statements at one place: `re.sub(pattern, replacement, statement)`."""

  place: str
  pattern: str
  replacement: str | Callable[[re.Match], str]


def text(path: str | Path, mistake: Mistake) -> str:
  """The source text of a file with a mistake in it."""
  return ast.unparse(_mutate(Path(path).read_text(), mistake)[0])


@contextlib.contextmanager
def planted(module: types.ModuleType, *mistakes: Mistake, traced: bool = True):
  """Plants mistakes in a module's functions, also in those that others have imported from it.

  JAX keeps what it traced and compiled before, but takes none of it here, nor of this afterwards.

  Args:
    module: whose functions change.
    mistakes: all at once.
    traced: False where these functions run without jit, and no trace is of them.
  """
  source, kept = Path(module.__file__).read_text(), {}
  try:
    for mistake in mistakes:
      tree, qualnames = _mutate(source, mistake)
      if None in qualnames:
        raise LookupError(f"{mistake.place!r} is in no function, where alone a module can change")
      codes = dict(_codes(compile(tree, module.__file__, "exec")))
      for qualname in qualnames:
        function = _function(module, qualname)
        kept.setdefault(function, function.__code__)
        function.__code__ = codes[qualname]
    with _mutated(object()) if traced else contextlib.nullcontext():
      yield
  finally:
    for function, code in kept.items():
      function.__code__ = code


def _mutate(source: str, mistake: Mistake) -> tuple[ast.Module, set[str]]:
  """The program with a mistake, and the qualified names of the outermost functions around it."""
  tree = ast.parse(source)
  marked = _marked(tree, source).get(mistake.place)
  if not marked:
    raise LookupError(f"no statement is marked `# mutant: {mistake.place}`")
  replacements = {statement: _replacement(statement, mistake) for statement in marked}

  class Plant(ast.NodeTransformer):
    def visit(self, node):
      node = self.generic_visit(node)
      return replacements.get(node, node)

  qualnames = {_outermost_function(tree, statement) for statement in marked}
  return ast.fix_missing_locations(Plant().visit(tree)), qualnames  # pyright: ignore[reportReturnType]


def _marked(tree: ast.Module, source: str) -> dict[str, list[ast.stmt]]:
  statements = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
  marked = {}
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    if token.type != tokenize.COMMENT or not (mark := re.search("# mutant: (.+)", token.string)):
      continue
    line = token.start[0]
    if token.line[:token.start[1]].strip():
      statement = max((s for s in statements if s.lineno <= line <= _header_end(s)),
                      key=lambda s: (s.lineno, s.col_offset), default=None)
    else:
      statement = min((s for s in statements if s.lineno > line),
                      key=lambda s: (s.lineno, s.col_offset), default=None)
    if statement is None:
      raise LookupError(f"line {line}: `{token.string}` marks no statement")
    for place in mark[1].split(","):
      marked.setdefault(place.strip(), []).append(statement)
  return marked


def _header_end(statement: ast.stmt) -> int:
  body = getattr(statement, "body", None)
  return max(statement.lineno, body[0].lineno - 1) if body else statement.end_lineno or 0


def _replacement(statement: ast.stmt, mistake: Mistake) -> list[ast.stmt]:
  nested = {name: getattr(statement, name) for name in ("body", "orelse", "finalbody", "handlers")
            if getattr(statement, name, None)}
  header, end = statement, ""
  if nested:
    empty = {name: [ast.Pass()] if name == "body" else [] for name in nested}
    header, end = type(statement)(**vars(statement) | empty), "\n    pass"
  before = ast.unparse(header).removesuffix(end)
  after = re.sub(mistake.pattern, mistake.replacement, before)
  if after == before:
    raise LookupError(f"{mistake} does not change `{before}`")
  changed = ast.parse(after + end).body
  for node in changed:
    for name in nested if type(node) is type(statement) else ():
      setattr(node, name, nested[name])
    ast.copy_location(node, statement)
  return changed


def _outermost_function(tree: ast.AST, statement: ast.stmt, prefix="") -> str | None:
  """The qualified name of the outermost function around a statement."""
  for node in ast.iter_child_nodes(tree):
    if statement is not node and statement not in ast.walk(node):
      continue
    if isinstance(node, ast.FunctionDef):
      return prefix + node.name
    inner = f"{prefix}{node.name}." if isinstance(node, ast.ClassDef) else prefix
    return _outermost_function(node, statement, inner)
  return None


def _codes(code: types.CodeType):
  for const in code.co_consts:
    if isinstance(const, types.CodeType):
      yield const.co_qualname, const
      yield from _codes(const)


def _function(module: types.ModuleType, qualname: str) -> types.FunctionType:
  value = module
  for name in qualname.split("."):
    value = inspect.getattr_static(value, name)
  for name in ("fget", "__func__", "func"):  # properties, class methods, cached properties
    value = getattr(value, name, value)
  return inspect.unwrap(value)
