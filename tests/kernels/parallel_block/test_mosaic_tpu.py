"""The block's TPU kernels in JAX's TPU interpreter, and compiled ahead of time.

The interpreter looks for races and reads out of bounds, and fills fresh memory with NaN.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from palm_haiku.kernels import aot, tuning
from palm_haiku.kernels.parallel_block import mosaic_tpu, mosaic_tpu_backward, mosaic_tpu_plan, xla
from palm_haiku.kernels.tuning import ProductTpu

# Small enough that little has several blocks, a block several tiles, and a tile several parts.
BLOCKS = (
    ProductTpu(rows=64, columns=128, work=2**22, code=2**21, part=16),
    ProductTpu(rows=96, columns=256, work=2**23, code=2**30, part=32),
)
IN, OUT = ("query", "key", "value", "act", "gate", "up"), ("y",)
SWIGLU, INPUT = ("dgate", "dup", "dact"), ("dh",)


@dataclasses.dataclass(frozen=True)
class Case:
  """The products of one layer, forward and backward."""

  num_tokens: int = 70
  dim: int = 256
  heads: int = 1
  dim_head: int = 128
  hidden: int = 384
  dtype: str = "bfloat16"
  norm: str = "layer"
  rotary: bool = True
  values: bool = True
  keep: bool = True
  residual: bool = True
  offset: float = 0.0  # of x, common to all channels
  seed: int = 0


@st.composite
def cases(draw, max_tokens=150):
  size = st.one_of(st.integers(1, max_tokens), st.sampled_from([1, 16, 63, 64, 65, 96, 129]))
  return Case(
      num_tokens=draw(size), dim=128 * draw(st.integers(1, 3)), heads=draw(st.integers(1, 3)),
      dim_head=draw(st.sampled_from([64, 128, 256])), hidden=128 * draw(st.integers(1, 4)),
      dtype=draw(st.sampled_from(["bfloat16", "bfloat16", "float32"])),
      norm=draw(st.sampled_from(["layer", "rms"])), rotary=draw(st.booleans()),
      values=draw(st.booleans()), keep=draw(st.booleans()), residual=draw(st.booleans()),
      offset=draw(st.sampled_from([0.0, 30.0])), seed=draw(st.integers(0, 10**6)))


def inputs(case: Case) -> dict:
  """Random arrays, rounded to the case's dtype: the oracle computes with the same numbers."""
  rng = np.random.default_rng(case.seed)
  c, m = case, case.num_tokens
  normal = lambda *sizes, dtype=c.dtype, scale=1.0: jnp.asarray(
      scale * rng.normal(size=sizes), dtype)
  weight = lambda *sizes: normal(*sizes, scale=sizes[0]**-0.5)
  params = dict(
      norm=1 + normal(c.dim, dtype="float32", scale=0.2),
      query=weight(c.dim, c.heads, c.dim_head), key=weight(c.dim, c.dim_head),
      value=weight(c.dim, c.dim_head), gate=weight(c.dim, c.hidden), up=weight(c.dim, c.hidden),
      attn_out=normal(c.heads, c.dim_head, c.dim, scale=(c.heads * c.dim_head)**-0.5),
      ff_out=weight(c.hidden, c.dim))
  if not c.values:
    del params["value"]
  angle = rng.uniform(0, 2 * np.pi, size=(m, c.dim_head // 2))
  return dict(
      x=normal(m, c.dim) + jnp.asarray(c.offset, c.dtype), params=params,
      rotation=tuple(jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin))
      if c.rotary else None,
      attended=normal(m, c.heads, c.dim_head), act=normal(m, c.hidden), dy=normal(m, c.dim),
      gate=normal(m, c.hidden, scale=2), up=normal(m, c.hidden),
      dquery=normal(m, c.heads, c.dim_head), dkey=normal(m, c.dim_head),
      dvalue=normal(m, c.dim_head) if c.values else None,
      dgate=normal(m, c.hidden), dup=normal(m, c.hidden))


def run(case, a, blocks):
  """Every output of the four kernels, by name."""
  p, keywords = a["params"], dict(chip=None, blocks=blocks)
  found = dict(zip(IN, mosaic_tpu.in_projection(
      a["x"], p, a["rotation"], norm=case.norm, eps=1e-5, keep=case.keep, **keywords)))
  found["y"] = mosaic_tpu.out_projection(
      a["x"] if case.residual else None, a["attended"], a["act"], p["attn_out"], p["ff_out"],
      **keywords)
  found |= zip(SWIGLU, mosaic_tpu.swiglu_gradient(
      a["dy"], a["gate"], a["up"], p["ff_out"], **keywords))
  found["dh"] = mosaic_tpu.input_gradient(
      a["dquery"], a["dkey"], a["dvalue"], a["dgate"], a["dup"], p, **keywords)
  return {name: array for name, array in found.items() if array is not None}


def results(case, arrays, blocks=BLOCKS[0]):
  params = pltpu.InterpretParams(
      detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan")
  # Every case is a compilation; optimizing it would cost more than it saves.
  compiled = jax.jit(functools.partial(run, case, blocks=blocks),
                     compiler_options={"xla_backend_optimization_level": 0})
  try:
    with pltpu.force_tpu_interpret_mode(params):
      return jax.block_until_ready(compiled(arrays))
  finally:
    pltpu.reset_tpu_interpret_mode_state()


def exact(case, a):
  """All outputs in float64 by numpy, from the formulas."""
  a = jax.tree.map(lambda x: np.asarray(x, np.float64), a)
  p, m = a["params"], case.num_tokens
  flat = lambda x: x.reshape(m, -1)
  columns = lambda w: w.reshape(case.dim, -1)
  x = a["x"] - (a["x"].mean(-1, keepdims=True) if case.norm == "layer" else 0)
  h = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["norm"]

  def rotate(x):
    if a["rotation"] is None:
      return x
    cos, sin = (t.reshape(m, *[1] * (x.ndim - 2), -1) for t in a["rotation"])
    first, second = np.split(x, 2, -1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

  sigmoid = lambda x: 1 / (1 + np.exp(-x))
  gate, up = h @ p["gate"], h @ p["up"]
  found = dict(query=rotate(np.tensordot(h, p["query"], 1)), key=rotate(h @ p["key"]),
               act=gate * sigmoid(gate) * up)
  if case.values:
    found["value"] = h @ p["value"]
  if case.keep:
    found |= dict(gate=gate, up=up)
  found["y"] = (a["x"] if case.residual else 0) + a["act"] @ p["ff_out"] + flat(
      a["attended"]) @ p["attn_out"].reshape(-1, case.dim)
  g, u, dact = a["gate"], a["up"], a["dy"] @ p["ff_out"].T
  s = sigmoid(g)
  found |= dict(dgate=dact * u * s * (1 + g * (1 - s)), dup=dact * g * s, dact=g * s * u)
  dh = (flat(a["dquery"]) @ columns(p["query"]).T + a["dkey"] @ p["key"].T
        + a["dgate"] @ p["gate"].T + a["dup"] @ p["up"].T)
  found["dh"] = dh + (a["dvalue"] @ p["value"].T if case.values else 0)
  return found


def rough(case, a):
  """All outputs by plain JAX in the case's dtype."""
  p, m, dtype = a["params"], case.num_tokens, case.dtype
  flat = lambda x: x.reshape(m, -1)
  columns = lambda w: w.reshape(case.dim, -1)
  h = xla.normalize(a["x"], p["norm"], kind=case.norm, eps=1e-5)

  def rotate(x):
    if a["rotation"] is None:
      return x
    cos, sin = (t.reshape(m, *[1] * (x.ndim - 2), -1) for t in a["rotation"])
    first, second = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], -1).astype(dtype)

  gate, up = xla.project(h, p["gate"]), xla.project(h, p["up"])
  found = dict(query=rotate(xla.project(h, p["query"])), key=rotate(xla.project(h, p["key"])),
               act=jax.nn.silu(gate) * up, gate=gate, up=up)
  if case.values:
    found["value"] = xla.project(h, p["value"])
  found["y"] = xla.project(a["attended"], p["attn_out"], axes=2) + xla.project(
      a["act"], p["ff_out"])
  if case.residual:
    found["y"] = a["x"] + xla.project(a["attended"], p["attn_out"], axes=2) + xla.project(
        a["act"], p["ff_out"])
  act, pull = jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, a["gate"], a["up"])
  found |= dict(zip(SWIGLU, (*pull(a["dy"] @ p["ff_out"].T), act)))
  dh = flat(a["dquery"]) @ columns(p["query"]).T + a["dkey"] @ p["key"].T
  if case.values:
    dh += a["dvalue"] @ p["value"].T
  return found | dict(dh=dh + a["dgate"] @ p["gate"].T + a["dup"] @ p["up"].T)


def wrong(case, arrays, found) -> list[str]:
  """The outputs more than twice as far from float64 as plain JAX is, each with its error."""
  want, compare, names = exact(case, arrays), rough(case, arrays), []
  assert found.keys() == want.keys()
  for name, got in found.items():
    assert got.shape == want[name].shape and got.dtype == case.dtype, name
    got, other = (np.asarray(x[name], np.float64) for x in (found, compare))
    # Where plain JAX happens to be exact, or nearly so: a rounding of the largest value, and those
    # of a sum in float32 with another order.
    largest = np.abs(want[name]).max()
    least = largest * (float(jnp.finfo(case.dtype).eps) + 8 * float(jnp.finfo("float32").eps))
    for norm, floor in ((lambda x: np.abs(x).max(), least),
                        (lambda x: np.sqrt(np.mean(x**2)), least / 2)):
      error, allowed = norm(got - want[name]), max(floor, 2 * norm(other - want[name]))
      if not error <= allowed:
        names.append(f"{name}: error {error:.3g}, allowed {allowed:.3g}")
  return names


def check(case, blocks=BLOCKS[0]):
  arrays = inputs(case)
  found = wrong(case, arrays, results(case, arrays, blocks))
  assert not found, f"{found} for {case}"


def one_step(size):
  """The least depth of a step, in place of all that there are."""
  return [size if size % 128 else 128]


@settings(max_examples=3)
@given(case=cases(), blocks=st.sampled_from(BLOCKS))
def test_right_on_drawn_cases(case, blocks):
  check(case, blocks)


@pytest.mark.parametrize("case", [
    Case(num_tokens=1, rotary=False, values=False, norm="rms", keep=False),
    Case(num_tokens=131, offset=30.0, dim_head=256, dtype="float32"),
    Case(num_tokens=131, offset=30.0, dim_head=64, residual=False)])
def test_right_where_it_is_easily_wrong(case):
  check(case)


def test_right_with_a_contraction_in_steps(monkeypatch):
  monkeypatch.setattr(mosaic_tpu_plan, "depths_of", one_step)
  check(Case(dim=384, heads=2))


def test_steps_of_a_contraction_divide_it():
  blocks = BLOCKS[0]._replace(work=1)
  for size, least in ((64, 64), (192, 192), (384, 128), (4544, 4544), (5504, 128)):
    plan = mosaic_tpu_plan.fit_sum(blocks, None, 64, 128, [(size, 1)], 2)
    assert plan.depths == (least,)


def skipped_statistics(monkeypatch):
  """Later blocks of rows meet what the first one left."""
  normalize = mosaic_tpu.normalize
  def first_only(*args):
    jax.lax.cond(pl.program_id(0) == 0, lambda: normalize(*args), lambda: None)
  monkeypatch.setattr(mosaic_tpu, "normalize", first_only)


def no_residual(monkeypatch):
  add = mosaic_tpu.sum_of_products
  monkeypatch.setattr(
      mosaic_tpu, "sum_of_products", lambda x, *args, **keywords: add(None, *args, **keywords))


def stale_accumulator(monkeypatch):
  monkeypatch.setattr(mosaic_tpu_plan, "clear", lambda total: jax.lax.cond(
      sum(pl.program_id(i) for i in range(3)) == 0,
      lambda: total.__setitem__(..., jnp.zeros_like(total)), lambda: None))


def gate_and_up_exchanged(monkeypatch):
  in_projection = mosaic_tpu.in_projection
  monkeypatch.setattr(mosaic_tpu, "in_projection", lambda x, p, *args, **keywords: in_projection(
      x, p | dict(gate=p["up"], up=p["gate"]), *args, **keywords))


def rotated_value(monkeypatch):
  monkeypatch.setattr(mosaic_tpu, "ROTATED", ("query", "key", "value"))


def skipped_rows(monkeypatch):
  each = mosaic_tpu_plan.each_part
  monkeypatch.setattr(mosaic_tpu_plan, "each_part", lambda plan, *rest: each(
      plan._replace(num_tokens=plan.num_tokens - plan.tile), *rest))


def gradient_of_relu(monkeypatch):
  monkeypatch.setattr(mosaic_tpu_backward.jax.nn, "sigmoid", lambda x: (x > 0).astype(x.dtype))


@pytest.mark.parametrize("mutant, finds", [
    (skipped_statistics, {"query", "key", "value", "act", "gate", "up"}), (no_residual, {"y"}),
    (stale_accumulator, {"dh"}), (gate_and_up_exchanged, {"act", "gate", "up"}),
    (rotated_value, {"value"}),
    (skipped_rows, {"query", "key", "value", "act", "gate", "up", "dh"}),
    (gradient_of_relu, {"act", "dgate", "dup", "dact"})])
def test_a_planted_error_is_found(monkeypatch, mutant, finds):
  case = Case(num_tokens=150, dim=256, hidden=256)
  arrays = inputs(case)
  mutant(monkeypatch)
  found = {line.partition(":")[0] for line in wrong(case, arrays, results(case, arrays))}
  assert found == finds


def test_the_same_bits_twice():
  case = Case(num_tokens=20, dim=128, hidden=128)
  arrays = inputs(case)
  first, second = results(case, arrays), results(case, arrays)
  for name in first:
    np.testing.assert_array_equal(first[name], second[name])


def test_what_varies_over_a_mesh_is_typed_so():
  case = Case(heads=2, hidden=256)
  arrays = inputs(case)
  mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
  split, whole = jax.P(None, "model"), jax.P()
  p = arrays["params"]

  def share(x, attended, act, attn_out, ff_out):
    y = mosaic_tpu.out_projection(None, attended, act, attn_out, ff_out, chip=None)
    return jax.lax.psum(y, "model") + x  # the sum needs a type that varies

  y = jax.eval_shape(
      jax.shard_map(share, mesh=mesh, out_specs=whole,
                    in_specs=(whole, split, split, jax.P("model"), jax.P("model"))),
      arrays["x"], arrays["attended"], arrays["act"], p["attn_out"], p["ff_out"])
  assert y.shape == arrays["x"].shape


def ask(chip, dim=4096, hidden=16384, heads=16, dim_head=256, dtype="bfloat16"):
  array = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)
  return mosaic_tpu.unsupported(
      array(8192, dim), dict(query=array(dim, heads, dim_head), gate=array(dim, hidden)), chip=chip)


def test_what_it_cannot_take_is_named():
  assert "bfloat16 or float32" in ask(None, dtype="float16")
  assert ask(None, dim=80) == "dim a multiple of 128; got 80"
  assert ask(None, hidden=1000) == "hidden width a multiple of 128; got 1000"
  assert ask(None, dim_head=96) == "dim_head 64, 128 or a multiple of 256; got 96"
  assert "one of the chips v4" in ask("v9")
  assert "within the 16 MiB of VMEM of a v4" in ask("v4", dim=65_536)
  for chip in tuning.VMEM:
    assert ask(chip) is None
    assert ask(chip, dim=512, hidden=1536, heads=1, dim_head=64) is None
    assert chip == "v4" or ask(chip, dim=18_432, hidden=73_728 // 12, heads=4) is None


def program(*, chip, tokens, dim, heads, dim_head, hidden, dtype):
  """(function, arguments): all four kernels."""
  array = lambda *sizes, dtype=dtype: jax.ShapeDtypeStruct(sizes, dtype)
  params = dict(norm=array(dim, dtype="float32"), query=array(dim, heads, dim_head),
                key=array(dim, dim_head), value=array(dim, dim_head), gate=array(dim, hidden),
                up=array(dim, hidden), attn_out=array(heads, dim_head, dim),
                ff_out=array(hidden, dim))
  table = array(tokens, dim_head // 2, dtype="float32")

  def function(x, params, rotation):
    query, key, value, act, gate, up = mosaic_tpu.in_projection(
        x, params, rotation, norm="layer", eps=1e-5, keep=True, chip=chip)
    y = mosaic_tpu.out_projection(x, query, act, params["attn_out"], params["ff_out"], chip=chip)
    dgate, dup, act = mosaic_tpu.swiglu_gradient(y, gate, up, params["ff_out"], chip=chip)
    return act, mosaic_tpu.input_gradient(query, key, value, dgate, dup, params, chip=chip)

  return function, (array(tokens, dim), params, (table, table))


def test_compiles_for_a_chip():
  pytest.importorskip("libtpu", reason="the compiler for TPUs is in libtpu")
  report = aot.report(
      "tests.kernels.parallel_block.test_mosaic_tpu:program", target="v5e", chip="v5e",
      tokens=1000, dim=384, heads=3, dim_head=64, hidden=640, dtype="bfloat16")
  assert len(report.kernels_named("block_")) == 4 and not report.problems


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("chip", tuning.VMEM)
@pytest.mark.parametrize("sizes", [
    (8192, 4096, 16, 256, 16_384, "bfloat16"), (2047, 2048, 16, 128, 8192, "bfloat16"),
    (8192, 1024, 16, 64, 4096, "bfloat16"), (33, 512, 8, 64, 2048, "bfloat16"),
    (4096, 8192, 8, 256, 8192, "bfloat16"), (3000, 1024, 4, 256, 5504, "float32")])
def test_compiles_within_the_vmem_that_is_counted(chip, sizes):
  names = ("tokens", "dim", "heads", "dim_head", "hidden", "dtype")
  aot.report("tests.kernels.parallel_block.test_mosaic_tpu:program", target=chip, chip=chip,
             **dict(zip(names, sizes, strict=True)))


@pytest.mark.slow
@pytest.mark.timeout(6 * 3600)
@settings(max_examples=300)
@given(case=cases(max_tokens=300), blocks=st.sampled_from(BLOCKS), stepped=st.booleans())
def test_right_on_many_drawn_cases(case, blocks, stepped):
  with pytest.MonkeyPatch.context() as patch:
    if stepped:
      patch.setattr(mosaic_tpu_plan, "depths_of", one_step)
    check(case, blocks)
