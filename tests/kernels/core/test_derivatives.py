"""Kernels chosen by `auto` have their own gradient, and plain JAX's other derivatives."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palm_haiku import kernels
from palm_haiku.kernels import attention, cross_entropy, parallel_block
from palm_haiku.kernels.core import dispatch
from palm_haiku.kernels.core.derivatives import Rules, differentiable
from tests.kernels.attention import test_fused as attention_tests
from tests.kernels.cross_entropy import test_fused as loss_tests
from tests.kernels.parallel_block import test_fused as block_tests

full = functools.partial(pytest.param, marks=pytest.mark.full)
X, W = jnp.linspace(-1.0, 2, 6).reshape(2, 3), jnp.arange(1.0, 4)


def formula(x, weights, numbers):
  return dict(y=jnp.sin(x * weights["w"] + numbers), z=x.sum(-1))


@pytest.fixture
def rules():
  """Of a kernel whose calls are recorded; 7 is added to its gradient of w, to tell it by."""
  calls = []

  def forward(x, weights, numbers):
    calls.append("forward")
    return formula(x, weights, numbers), (jnp.cos(x * weights["w"] + numbers),)

  def backward(arrays, residuals, cotangents):
    calls.append("backward")
    x, weights, _ = arrays
    dy, dz = cotangents["y"] * residuals[0], cotangents["z"]
    return dy * weights["w"] + dz[:, None], dict(w=(dy * x).sum(0) + 7), None

  def kernel(*arrays):
    calls.append("kernel")
    return formula(*arrays)

  return Rules("op", kernel, forward, backward, formula, 2), calls


def total(function):
  def f(x, w):
    out = function(x, dict(w=w), jnp.int32(1))
    return (out["y"] ** 2).sum() + jnp.cos(out["z"]).sum()
  return f


def every_derivative(f):
  """Those that the backward kernel has no part in; a row is x of one row."""
  rows = X[:, None]
  return dict(
      jvp=jax.jvp(f, (X, W), (X, W)), one=jax.jacfwd(f, 1)(X, W),
      linear=jax.linearize(f, X, W)[1](X, W), hessian=jax.hessian(f)(X, W),
      twice=jax.grad(lambda x: jnp.sin(jax.grad(f)(x, W)).sum())(X),
      mixed=jax.jacrev(jax.jacfwd(f), 1)(X, W),
      pushed=jax.vmap(lambda x: jax.jvp(f, (x, W), (x, W))[1])(rows),
      # Of x alone, to which the kernel adds nothing.
      rows=jax.vmap(jax.grad(f), (0, None))(rows, W),
      all_rows=jax.grad(lambda x: jax.vmap(f, (0, None))(x, W).sum())(rows))


def test_forward_mode_and_second_derivatives_are_the_formulas(rules):
  def some(f):
    return jax.jvp(f, (X, W), (X, W)), jax.grad(lambda x: jnp.sin(jax.grad(f)(x, W)).sum())(X)

  ours = total(differentiable(rules[0]))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
               *(jax.jit(some, static_argnums=0)(f) for f in (ours, total(formula))))
  assert {"forward", "backward"} <= set(rules[1])


@pytest.mark.full
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["", "jit", "remat"])
def test_each_derivative_is_of_the_one_that_has_it(rules, wrap):
  rules, calls = rules
  ours = wrap(total(differentiable(rules)))
  plain = total(formula)
  close = lambda a, b: jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), a, b)
  close(jax.jit(ours)(X, W), plain(X, W))
  assert set(calls) == {"kernel"}
  (dx, dw), alone = jax.jit(lambda: (jax.grad(ours, (0, 1))(X, W), jax.grad(ours, 1)(X, W)))()
  want = jax.grad(plain, (0, 1))(X, W)
  close((dx, dw - 7, alone - 7), (*want, want[1]))
  assert {"forward", "backward"} <= set(calls)
  close(*(jax.jit(every_derivative, static_argnums=0)(f) for f in (ours, plain)))


@pytest.mark.parametrize("derivative, message", [
    (lambda f: jax.jvp(f, (X, W), (X, W)), "no forward-mode derivative"),
    (lambda f: jax.grad(lambda w: jax.grad(f)(X, w).sum())(W), "no second derivative"),
    full(lambda f: jax.jacfwd(f)(X, W), "no forward-mode derivative"),
    full(lambda f: jax.jit(jax.vmap(lambda x: jax.jvp(f, (x, W), (x, W))[1]))(X[:, None]),
         "no forward-mode derivative"),
    full(lambda f: jax.hessian(f)(X, W), "no (second|forward-mode) derivative")])
def test_a_kernel_that_is_named_refuses_the_rest(rules, derivative, message):
  rules = dataclasses.replace(rules[0], plain=None)
  f = total(differentiable(rules))
  assert jnp.isfinite(jax.grad(lambda x: jax.vmap(f, (0, None))(x, W).sum())(X[:, None])).all()
  with pytest.raises(ValueError, match=f"op: the fused kernels have {message}.*'xla'"):
    derivative(f)


def test_no_array_is_kept_twice(rules):
  """Reverse mode's residuals are the arguments themselves and what the kernel adds."""
  f = total(differentiable(rules[0]))
  pull = jax.vjp(lambda x, w: f(x, w), X, W)[1]
  shapes = sorted(x.shape for x in jax.tree.leaves(pull) if jnp.issubdtype(x.dtype, jnp.floating))
  assert shapes.count(W.shape) == 1 and shapes.count(X.shape) <= 3  # x, cos, y for its square


@pytest.fixture
def on_a_gpu(monkeypatch):
  """`auto` takes kernels, which are plain JAX."""
  for module, tests in ((attention, attention_tests), (cross_entropy, loss_tests),
                        (parallel_block, block_tests)):
    backend = tests.PlainBackend()
    monkeypatch.setitem(module.OP.backends, "mosaic_gpu", lambda backend=backend: backend)
  monkeypatch.setattr("palm_haiku.kernels.core.guards._PLATFORMS", {"mosaic_gpu": ("cpu",)})
  monkeypatch.setattr(dispatch, "target", lambda *_: dispatch.Target("gpu", "h200"))
  monkeypatch.setattr(dispatch, "undecided", lambda *_: False)
  monkeypatch.setattr(dispatch, "_unasked", lambda *_: None)


def random(*shape):
  return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32) / 2


def attend(implementation):
  return lambda q, k, v: jnp.sin(kernels.flash_attention(
      q, k, v, alibi_slopes=jnp.array([0.5, 0.25]), implementation=implementation)).sum()


def lose(implementation):
  return lambda x, e: jnp.sin(kernels.linear_cross_entropy(
      x, e, jnp.array([0, 4, 2]), z_loss=0.1, weights=jnp.array([1.0, 0, 2]),
      implementation=implementation)[0]).sum()


def block(implementation):
  shapes = dict(query=(6, 2, 4), key=(6, 4), value=(6, 4), gate=(6, 8), up=(6, 8),
                attn_out=(2, 4, 6), ff_out=(8, 6))
  params = {name: random(*shape) for name, shape in shapes.items()} | dict(norm=jnp.ones(6))
  return lambda x, ff_out, gate: jnp.sin(kernels.parallel_attention_ffn(
      x, params | dict(ff_out=ff_out, gate=gate), implementation=implementation)).sum()


@pytest.mark.full
@pytest.mark.parametrize("make, arrays", [
    (attend, (random(1, 5, 2, 4), random(1, 5, 1, 4), random(1, 5, 1, 4) + 1)),
    (lose, (random(3, 4), random(5, 4))),
    (block, (random(1, 3, 6), random(8, 6), random(6, 8)))], ids=["attention", "loss", "block"])
def test_auto_takes_plain_jax_where_kernels_have_no_derivative(on_a_gpu, make, arrays):
  def derivatives(implementation):
    f = make(implementation)
    every = tuple(range(len(arrays)))
    twice = lambda *arrays: sum(
        jnp.sin(g).sum() for g in jax.tree.leaves(jax.grad(f, every)(*arrays)))
    return jax.jit(lambda *arrays: (
        jax.grad(f, every)(*arrays), jax.jvp(f, arrays, arrays), jax.grad(twice, every)(*arrays),
        jax.hessian(f)(*arrays)))(*arrays)

  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4),
               derivatives("auto"), derivatives("xla"))
