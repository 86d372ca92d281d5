"""The block around the kernels of all backends: their functions, derivative, mesh, `vmap`.

A layer is three steps: everything that is computed from norm(x), attention, and the sum of what
comes of both branches with x. Attention is `flash_attention`; a backend here makes the matrix
products of the other two and of their backward pass, on M tokens:

  unsupported(x, params, *, chip) -> the first requirement that is not met, or None
  in_projection(x, params, rotation, *, norm, eps, keep, chip)
      -> (query [M, H, Dh], key [M, K Dh], value [M, K Dh], act, gate, up [M, F])
  out_projection(x, attended, act, attn_out, ff_out, *, chip)
      -> x + attended @ attn_out + act @ ff_out
  swiglu_gradient(dy, gate, up, ff_out, *, chip) -> (dgate, dup, act)
  input_gradient(dquery, dkey, dvalue, dgate, dup, params, *, chip) -> the gradient of norm(x)

with x [M, D], all arrays in its dtype but the gain of the norm; params as the op's, but key and
value [D, K Dh], of K heads side by side, and F a multiple of the backend's HIDDEN; `value` None
where they have none; act = silu(gate) * up; gate and up None without `keep`; rotation None or the
cosines and sines of positions, float32[M, Dh / 2], that query and key are rotated by; x of
`out_projection` None where nothing is to be added. Each result is rounded once, from a sum in
float32, be it of as many products as it may.

The derivative of SwiGLU is in `swiglu_gradient`, so that the gradient of act is never written;
what it needs, gate and up, crosses from the first step's forward pass to the last one's backward
pass as an argument. The gradients of weights are XLA's products.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from .. import norms, rotary as rotations
from ..core import heads, op, partition
from ..core.compat import promoting
from ..core.derivatives import Rules, differentiable
from ..core.platforms import here_or
from ..core.vmap import folding_vmap
from . import configs, steps, xla

# The dimension of each weight that heads or columns of the feed-forward part make up.
_COLUMNS = {"query": 1, "gate": 1, "up": 1, "attn_out": 0, "ff_out": 0}
_KEYS = ("key", "value")
_OUT = ("attn_out", "ff_out")
_HIDDEN = {"gate": 1, "up": 1, "ff_out": 0}  # The dimension that is of the hidden width.


def _mosaic_gpu():
  from . import mosaic_gpu
  return mosaic_gpu


def _mosaic_tpu():
  from . import mosaic_tpu
  return mosaic_tpu


def _triton():
  from . import triton
  return triton


@dataclasses.dataclass(frozen=True)
class Options:
  """Static arguments of the op."""

  route: op.Route
  norm: str
  eps: float

  @property
  def backend(self) -> Any:
    return self.route.backend

  @property
  def chip(self) -> str | None:
    return self.route.chip

  def run(self, plain, kernel, *arrays):
    """The backend's kernel of (tokens, others), plain JAX where a platform has none."""
    kernel = folding_vmap(kernel)
    if self.route.undecided:
      kernel = here_or(promoting()(plain), [self.route.alternative(kernel)])
    return kernel(*arrays)


@dataclasses.dataclass(frozen=True)
class Division:
  """The mesh axes that sequences, positions, and heads together with columns are divided over."""

  sequences: tuple[str, ...] = ()
  positions: tuple[str, ...] = ()
  columns: tuple[str, ...] = ()
  keys: tuple[str, ...] = ()  # columns, where they divide several key heads

  def weight(self, name: str) -> P:
    if name in _KEYS and self.keys:
      return P(None, self.keys)
    return P(*[None] * _COLUMNS[name], self.columns or None) if name in _COLUMNS else P()

  def rows(self, *, of_columns: bool = False) -> P:
    """Of an activation [B, T, ...]; `of_columns`: its third dimension is heads or columns."""
    tokens = self.sequences or None, self.positions or None
    return P(*tokens, self.columns or None) if of_columns else P(*tokens)


def division(x, params, mesh) -> Division:
  """The division of the layer over the mesh.

  Args:
    x: [B, T, D], or its type.
    params: the weights, or their types.
  """
  if not partition.to_take_over(mesh):
    return Division()
  columns = partition.axes(params["query"], 1, (partition.HEAD_AXIS,), mesh)
  sequences = partition.axes(x, 0, partition.BATCH_AXES, mesh)
  positions = partition.axes(x, 1, (partition.SEQUENCE_AXIS,), mesh)
  if (params["up"].shape[1] % partition.devices(mesh, columns)
      or set(columns) & {*sequences, *positions}):
    columns = ()
  key = params["key"]
  divided = key.ndim == 3 and key.shape[1] % partition.devices(mesh, columns) == 0
  return Division(sequences, positions, columns, columns if divided else ())


def unfused(params) -> str | None:
  """The first part of a layer that no backend's products have, in words; None if they have all.

  Args:
    params: weights or their types.
  """
  if "gate" not in params:
    return "SwiGLU; got params without gate"
  if "norm_bias" in params:
    return "a norm without a bias; got params with norm_bias"
  return None


def on_one_device(x, params):
  """The types of what a device's kernel is given: [tokens, D], and its share of each weight.

  Args:
    x, params: whole arrays or their types, x [..., T, D].
  """
  mesh = partition.current(x)
  x = partition.with_one_batch(x, 2)
  by = division(x, params, mesh)
  tokens = x.shape[0] * x.shape[1] // partition.devices(mesh, by.sequences + by.positions)

  def share(name, weight):
    shape, devices = list(weight.shape), partition.devices(mesh, by.columns)
    if name in _COLUMNS:
      shape[_COLUMNS[name]] //= devices
    if name in _KEYS and weight.ndim == 3:
      shape[1] = heads.held(shape[1], devices)
    return jax.ShapeDtypeStruct(tuple(shape), x.dtype)

  return (jax.ShapeDtypeStruct((tokens, x.shape[-1]), x.dtype),
          {name: share(name, weight) for name, weight in params.items()})


class Layer(NamedTuple):
  """Static arguments of a layer; see the op of the same name."""

  norm: str
  norm_eps: float
  rotary: bool
  rope_theta: float
  xpos_scale_base: int | None
  is_causal: bool
  local_window_size: tuple[int, int] | None
  query_offset: int | None  # None where it is an array
  implementation: str

  def positions(self):
    """The keyword arguments of `steps.positioned`."""
    return dict(norm_eps=self.norm_eps, rotary=self.rotary, rope_theta=self.rope_theta,
                xpos_scale_base=self.xpos_scale_base)

  def attention(self, kv_cache, alibi_slopes, segment_ids, query_offset):
    """The keyword arguments of `steps.attention`."""
    return dict(
        rotary=self.rotary, kv_cache=kv_cache, alibi_slopes=alibi_slopes, segment_ids=segment_ids,
        query_offset=self.query_offset if query_offset is None else query_offset,
        is_causal=self.is_causal, local_window_size=self.local_window_size,
        implementation=self.implementation)


def _plain(route, layer, x, params, kv_cache, *others):
  def run(x, params, *others):
    return xla.parallel_attention_ffn(
        x, params, norm=layer.norm, **layer.positions() | layer.attention(*others))

  like = x if kv_cache is None else (x, kv_cache)
  return partition.partitioned(run, x, params, kv_cache, *others, like=like)


def parallel_attention_ffn(route, layer, x, params, *others):
  """See the op of the same name; it has a gradient and no other derivative.

  What the first step makes is named "block_query", "block_key", "block_value", "block_act",
  "block_gate" and "block_up" for `jax.checkpoint_policies`; attention has names of its own.
  """
  lead, mesh = x.shape[:-2], partition.current(x)
  with_batch = lambda a: a.reshape(math.prod(lead), *a.shape[len(lead):])
  without_batch = lambda a: a.reshape(*lead, *a.shape[1:])
  stream = with_batch(x)
  by = division(stream, params, mesh)
  options = Options(route, layer.norm, layer.norm_eps)
  attention = layer.attention(*others)
  positions = jnp.asarray(attention["query_offset"])[..., None] + jnp.arange(x.shape[-2])
  # In the kernel, unless something comes between or keys are needed as they were before.
  rotated = (layer.rotary and "value" in params and "key_scale" not in params
             and layer.xpos_scale_base is None)

  weights = {name: w if name == "norm" else w.astype(x.dtype) for name, w in params.items()
             if not name.endswith("_scale")}
  weights_out = {name: weights.pop(name) for name in _OUT}
  # The gradient of ff_out needs gate and up, which the first step makes only if it is
  # differentiated itself.
  weights["norm"], weights_out["ff_out"] = _differentiated_together(
      weights["norm"], weights_out["ff_out"])

  def side_by_side(weight):
    """The key heads of this device's query heads, [D, K Dh]."""
    if weight.ndim == 3 and by.columns and not by.keys:
      weight = heads.own(weight, 1, by.columns, mesh)
    return weight.reshape(len(weight), -1)

  def from_stream(x, positions, weights):
    x, positions, weights = partition.varying_together(x, positions, weights)
    dim_head = weights["query"].shape[2]
    rotation = (rotations.rotation_at(positions.reshape(-1), dim_head // 2, layer.rope_theta)
                if rotated else None)
    weights |= {name: side_by_side(weights[name]) for name in _KEYS if name in weights}
    made = project_in(options, x.reshape(-1, x.shape[-1]), weights, rotation)
    # Each device keeps the keys and values that it made, as the heads that its queries attend to:
    # nothing has to be told which are equal, and gradients are summed with those of x.
    made |= {name: by_head(made[name], dim_head) for name in _KEYS if name in made}
    return {name: out.reshape(*x.shape[:2], *out.shape[1:]) for name, out in made.items()}

  def to_stream(x, attended, hidden, weights):
    rows = lambda a: a.reshape(-1, *a.shape[2:])
    attended, hidden = jax.tree.map(rows, (attended, hidden))
    if not by.columns:
      arrays = partition.varying_together(rows(x), attended, hidden, weights)
      return project_out(options, *arrays).reshape(x.shape)
    share = project_out(options, None, *partition.varying_together(attended, hidden, weights))
    return x + jax.lax.psum(share.reshape(x.shape), by.columns)

  made = op.over_mesh(
      mesh, from_stream, (by.rows(), by.rows(), {name: by.weight(name) for name in weights}),
      {name: by.rows(of_columns=True) for name in ("query", "key", "value", "act", "gate", "up")
       if name != "value" or name in weights},
      stream, jnp.broadcast_to(positions, (*lead, x.shape[-2])).reshape(stream.shape[:2]), weights)
  made = {name: checkpoint_name(out, f"block_{name}") for name, out in made.items()}
  query, key = without_batch(made.pop("query")), without_batch(made.pop("key"))
  value = without_batch(made.pop("value")) if "value" in made else key
  if not rotated:
    query, key = steps.positioned(
        query, key, _with_repeated_scales(params, key), positions, **layer.positions())
  attend, cache = steps.attention(query, key, value, params, **attention)
  y = op.over_mesh(
      mesh, to_stream,
      (by.rows(), by.rows(of_columns=True), {name: by.rows(of_columns=True) for name in made},
       {name: by.weight(name) for name in weights_out}),
      by.rows(), stream, with_batch(attend()), made, weights_out)
  y = without_batch(y)
  return y if cache is None else (y, cache)


def by_head(x, dim_head):
  """[M, K Dh] as [M, K, Dh]."""
  return x.reshape(len(x), -1, dim_head)


def _with_repeated_scales(params, key):
  """The params, with scales for the key heads that stand in `key` several times."""
  scale = params.get("key_scale")
  if scale is None or scale.ndim == 1:
    return params
  return params | dict(key_scale=jnp.repeat(scale, key.shape[-2] // len(scale), axis=0))


OP = op.Op(
    "parallel_attention_ffn",  # of its products; attention is another op
    dict(mosaic_gpu=_mosaic_gpu, mosaic_tpu=_mosaic_tpu, triton=_triton), configs,
    ranks=(2, None), on_one_device=on_one_device, plain=_plain,
    fused=lambda *static: functools.partial(parallel_attention_ffn, *static),
    for_any_tpu=False)


def _differentiated_together(*arrays):
  """The arrays; where one of them has a tangent, all have."""
  identity = lambda *arrays: arrays
  return differentiable(Rules(
      OP.name, identity, lambda *arrays: (arrays, ()), lambda _, __, cotangents: cotangents,
      identity, len(arrays)))(*arrays)


def _differentiable(options, kernel, forward, backward, plain, by, arrays):
  bound = lambda function: functools.partial(function, options)
  return differentiable(Rules(
      OP.name, bound(kernel), bound(forward), bound(backward),
      bound(plain) if options.route.auto else None, by))(*arrays)


def project_in(options, *arrays):
  """`_project_in` of (x, weights, rotation), with its derivatives."""
  return _differentiable(options, _project_in, _project_in_forward, _project_in_backward,
                         _project_in_plainly, 2, arrays)


def project_out(options, *arrays):
  """`_project_out` of (x, attended, hidden, weights), with its derivatives."""
  return _differentiable(options, _project_out, _project_out_forward, _project_out_backward,
                         _project_out_plainly, 4, arrays)


def _project_in(options, x, weights, rotation):
  """The first step: {"query", "key", "value", "act", "gate", "up"} of x [M, D], as the kernels'.

  There is no value where there is no weight of it. The gradient of act is not used: that of gate
  and up comes from `project_out`.
  """
  made = _in_projection(options, x, weights, rotation, keep=False)
  # Nobody reads these: only the backward pass would.
  return made | dict(gate=made["act"], up=made["act"])


def _in_projection(options, x, weights, rotation, keep):
  def kernel(tokens, weights):
    return options.backend.in_projection(
        tokens[0], weights, tokens[1], norm=options.norm, eps=options.eps, keep=keep,
        chip=options.chip)

  def plain(tokens, weights):
    x, rotation = tokens
    *made, gate, up = _formula_in(options, x, rotation, weights)
    return *made, *((gate, up) if keep else (None, None))

  return _named(options.run(plain, kernel, (x, rotation), _widened(options, weights)))


def _formula_in(options, x, rotation, weights):
  h = norms.normalize(x, weights["norm"], kind=options.norm, eps=options.eps)
  made = {name: steps.project(h, w) for name, w in weights.items() if name != "norm"}
  query, key, gate, up = (made[name] for name in ("query", "key", "gate", "up"))
  if rotation is not None:
    query = rotations.rotate_by(query, rotation)
    key = _rotated(key, rotation, query.shape[2])
  return query, key, made.get("value"), steps.activate(gate, up), gate, up


def _named(made):
  made = zip(("query", "key", "value", "act", "gate", "up"), made)
  return {name: out for name, out in made if out is not None}


def _project_in_plainly(options, x, weights, rotation):
  return _named(_formula_in(options, x, rotation, _widened(options, weights)))


def _project_in_forward(options, x, weights, rotation):
  return _in_projection(options, x, weights, rotation, keep=True), ()


def _project_in_backward(options, arrays, _, d):
  x, weights, rotation = arrays
  if rotation is not None:
    back = rotation[0], -rotation[1]
    d = d | dict(query=rotations.rotate_by(d["query"], back),
                 key=_rotated(d["key"], back, weights["query"].shape[2]))
  d = {name: d.get(name) for name in ("query", "key", "value", "gate", "up")}

  def plain(tokens, weights):
    matrix = lambda a: a.reshape(len(a), -1)
    return sum(
        matrix(dy) @ matrix(weights[name]).T for name, dy in zip(d, tokens) if dy is not None)

  dh = options.run(plain, lambda tokens, weights: options.backend.input_gradient(
      *tokens, weights, chip=options.chip), tuple(d.values()), _widened(options, weights))
  h, back = jax.vjp(
      functools.partial(norms.normalize, kind=options.norm, eps=options.eps), x, weights["norm"])
  dx, dnorm = back(dh)
  dweights = {name: _narrowed(name, _weight_gradient(h, d[name]), weights)
              for name in weights if name != "norm"}
  return dx, dweights | dict(norm=dnorm), None


def _project_out(options, x, attended, hidden, weights):
  """The last step: x + attended @ attn_out + act @ ff_out; hidden is {"act", "gate", "up"}."""
  return options.run(_formula_out, lambda tokens, weights: options.backend.out_projection(
      *tokens, *weights, chip=options.chip),
      (x, attended, hidden["act"]), tuple(_widened(options, weights)[name] for name in _OUT))


def _formula_out(tokens, weights):
  x, attended, act = tokens
  y = steps.project(attended, weights[0], axes=2) + steps.project(act, weights[1])
  return y if x is None else x + y


def _project_out_plainly(options, x, attended, hidden, weights):
  # As in the backward pass, what act depends on is gate and up.
  act = steps.activate(hidden["gate"], hidden["up"])
  widened = _widened(options, weights)
  return _formula_out((x, attended, act), tuple(widened[name] for name in _OUT))


def _project_out_forward(options, *arrays):
  return _project_out(options, *arrays), ()


def _project_out_backward(options, arrays, _, dy):
  x, attended, hidden, weights = arrays
  gate, up = hidden["gate"], hidden["up"]

  def plain(tokens, ff_out):
    dy, gate, up = tokens
    act, back = jax.vjp(steps.activate, gate, up)
    return *back(dy @ ff_out.T), act

  dgate, dup, act = options.run(plain, lambda tokens, ff_out: options.backend.swiglu_gradient(
      *tokens, ff_out, chip=options.chip), (dy, gate, up), _widened(options, weights)["ff_out"])
  attn_out = weights["attn_out"]
  dattended = jnp.einsum("md,hed->mhe", dy, attn_out)
  dweights = dict(
      attn_out=_weight_gradient(attended.reshape(len(attended), -1), dy).reshape(attn_out.shape),
      ff_out=_narrowed("ff_out", _weight_gradient(act, dy), weights))
  # The gradient of act went through gate and up.
  return None if x is None else dy, dattended, dict(act=None, gate=dgate, up=dup), dweights


def _rotated(key, rotation, dim_head):
  return rotations.rotate_by(by_head(key, dim_head), rotation).reshape(key.shape)


def _widened(options, weights):
  """The weights, with zeros up to a hidden width that the kernels take.

  Where act, gate and up are written, they are as wide: they are never copied, the weights are
  when they are used.
  """
  def widened(name, weight):
    missing = -weight.shape[_HIDDEN[name]] % options.backend.HIDDEN if name in _HIDDEN else 0
    if not missing:
      return weight
    return jnp.pad(weight, [(0, missing if i == _HIDDEN[name] else 0) for i in range(weight.ndim)])

  return {name: widened(name, weight) for name, weight in weights.items()}


def _narrowed(name, gradient, weights):
  """The gradient of a widened weight, of those numbers that are the weight's."""
  if gradient.shape == weights[name].shape:
    return gradient
  return jax.lax.slice_in_dim(gradient, 0, weights[name].shape[_HIDDEN[name]], axis=_HIDDEN[name])


def _weight_gradient(x, dy):
  """x.T @ dy for x [M, D] and dy [M, ...]; one product of two matrices, as in `steps.project`."""
  return (x.T @ dy.reshape(len(dy), -1)).reshape(x.shape[1], *dy.shape[1:])
