"""The planting of mistakes: where it changes the code, never silently changing nothing."""

import importlib.util
import textwrap

import pytest

from tests.mutants import DROPPED, Mistake, planted, text

PROGRAM = '''
import functools

def decorated(f):
  @functools.wraps(f)
  def inner(*args):
    return f(*args)
  return inner

def clip(x, low, high):
  if (
      x <
      low  # mutant: lower edge
  ):
    return low
  return (x if x <= high
          else high)  # mutant: upper edge

def total(xs):
  result = 0
  # mutant: walk
  for x in xs:
    result += x  # mutant: sum, unused
  return result

class Counter:
  @property
  def next(self):
    def one():
      return 1  # mutant: step
    return one()

  @decorated
  def add(self, n):
    n += 1  # mutant: sum
    return n

LIMIT = 3  # mutant: constant
'''


@pytest.fixture
def module(tmp_path):
  path = tmp_path / "program.py"
  path.write_text(textwrap.dedent(PROGRAM))
  spec = importlib.util.spec_from_file_location("program", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def results(module, total=None):
  counter = module.Counter()
  return (module.clip(1, 1, 4), module.clip(5, 1, 4), (total or module.total)([1, 2, 3]),
          counter.next, counter.add(1))


@pytest.mark.parametrize("mistake, wrong", [
    (("lower edge", "x < low", "True"), (1, 1, 6, 1, 2)),
    (("upper edge", "<=", ">"), (4, 5, 6, 1, 2)),
    (("walk", "in (.*):", r"in \1[1:]:"), (1, 4, 5, 1, 2)),
    (("sum", *DROPPED), (1, 4, 0, 1, 1)),  # at both of its places
    (("unused", "$", "; result += 1"), (1, 4, 9, 1, 2)),
    (("step", "1", "2"), (1, 4, 6, 2, 2))], ids=lambda x: x[0])
def test_a_mistake_lasts_as_long_as_its_context(module, mistake, wrong):
  total = module.total  # as another module would have imported it
  with planted(module, Mistake(*mistake)):
    assert results(module, total) == wrong
  assert results(module, total) == (1, 4, 6, 1, 2)
  changed = {}
  exec(text(module.__file__, Mistake(*mistake)), changed)
  members = {name: staticmethod(value) if name in ("clip", "total") else value
             for name, value in changed.items()}
  assert results(type("module", (), members)) == wrong


@pytest.mark.parametrize("mistake, message", [
    (("nowhere", "a", "b"), "no statement is marked `# mutant: nowhere`"),
    (("sum", "-=", "+="), "does not change `result [+]= x`"),
    (("constant", "3", "4"), "is in no function")])
def test_a_mistake_that_changes_nothing_is_an_error(module, mistake, message):
  with pytest.raises(LookupError, match=message):
    with planted(module, Mistake(*mistake)):
      pass
  assert results(module) == (1, 4, 6, 1, 2)
