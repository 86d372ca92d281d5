"""JAX's strict settings, and programs that are exported for any size."""

import jax
import jax.numpy as jnp
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from palm_haiku import kernels
from tests.kernels import draws

SLOPES = [0.5, 0.25, 0.1, 0.05]
DIM = 64


def array(*shape, dtype="float32"):
  return jax.ShapeDtypeStruct(shape, dtype)


def weights(dim, dtype):
  shapes = dict(norm=(dim,), query=(dim, 4, 64), key=(dim, 64), value=(dim, 64), gate=(dim, 128),
                up=(dim, 128), attn_out=(4, 64, dim), ff_out=(128, dim))
  return {name: array(*shape, dtype=dtype) for name, shape in shapes.items()}


def programs(batch, length, dtype="float32", **options):
  """(op, of arrays, their types) of each op, gradients where there are any."""
  def gradient(f):
    total = lambda *arrays: sum(x.astype(jnp.float32).sum() for x in jax.tree.leaves(f(*arrays)))
    return jax.grad(total)

  query = array(batch, length, 4, 64, dtype=dtype)
  key, ids = array(batch, length, 1, 64, dtype=dtype), array(batch, length, dtype="int32")
  x = array(batch, length, DIM, dtype=dtype)
  yield gradient(lambda q, k, v, ids: kernels.flash_attention(
      q, k, v, segment_ids=ids, alibi_slopes=SLOPES, local_window_size=9, **options)), (
          query, key, key, ids)
  yield gradient(lambda x, e, t: kernels.linear_cross_entropy(
      x, e, t, weights=jnp.ones(t.shape), z_loss=1e-4, **options)), (
          x, array(300, DIM, dtype="float32"), ids)
  yield lambda q, k, v, n: kernels.decode_attention(q, k, v, n, alibi_slopes=SLOPES, **options), (
      array(batch, 1, 4, 64, dtype=dtype), key, key, array(batch, dtype="int32"))
  yield gradient(lambda x, params: kernels.parallel_attention_ffn(x, params, **options)), (
      x, weights(DIM, dtype))
  if "implementation" not in options:
    yield lambda x, params, cache, offset: kernels.parallel_attention_ffn(
        x, params, kv_cache=(cache, cache + 1), query_offset=offset), (
            array(batch, 1, DIM), weights(DIM, dtype), array(batch, length, 64),
            array(batch, dtype="int32"))


@pytest.mark.parametrize("length", [16, 80])
def test_ops_where_promotion_is_strict(length):
  with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
    for dtype in ("float32", "bfloat16"):
      for f, types in programs(2, length, dtype):
        jax.eval_shape(f, *types)


@pytest.mark.full
@pytest.mark.parametrize("implementation, platform, kind", [
    ("mosaic_tpu", "tpu", "TPU v5 lite"), ("mosaic_gpu", "gpu", "NVIDIA H200")])
def test_kernels_where_promotion_is_strict(implementation, platform, kind):
  device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
  mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
  with (jax.sharding.use_abstract_mesh(mesh), jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict")):
    for f, types in programs(2, 128, "bfloat16", implementation=implementation):
      if DIM % 128 and implementation == "mosaic_tpu" and len(types) == 2:
        continue  # the block's kernels want whole lanes
      jax.eval_shape(f, *types)


@pytest.mark.full
def test_ops_are_exported_for_any_batch_and_length():
  batch, length = export.symbolic_shape("b, t")
  for f, types in programs(batch, length):
    export.export(jax.jit(f))(*types)


@pytest.mark.full
def test_any_other_dimension_is_exported():
  a, b, c = export.symbolic_shape("a, b, c")
  attend = lambda q, k: kernels.flash_attention(q, k, k, is_causal=False)
  export.export(jax.jit(attend))(array(a, 70, b, c), array(a, 20, 1, c))
  loss = lambda x, e, t: kernels.linear_cross_entropy(x, e, t)[0]
  program = export.export(jax.jit(loss))(array(a, c), array(b, c), array(a, dtype="int32"))
  arrays = [draws.normal(i, (n, 8)) for i, n in enumerate((5, 9))]
  targets = jnp.arange(5)
  assert jnp.allclose(program.call(*arrays, targets), loss(*arrays, targets), rtol=1e-5)


def test_a_kernel_asked_for_by_name_needs_known_dimensions():
  batch, = export.symbolic_shape("b")
  with pytest.raises(ValueError, match="mosaic_tpu needs dimensions that are known when it is "):
    kernels.explain("flash_attention", array(batch, 8, 4, 64), array(batch, 8, 1, 64),
                    implementation="mosaic_tpu")
  choice = kernels.explain("flash_attention", array(batch, 128, 4, 64), array(batch, 128, 1, 64),
                           chip="v5e")
  assert choice.implementation == "xla" and "dimensions that are known" in choice.reason


def test_slopes_in_a_list_and_a_traced_scale_on_a_mesh():
  query, key = jnp.ones((2, 8, 4, 16)), jnp.ones((2, 8, 1, 16))
  f = lambda q, k, s: kernels.flash_attention(q, k, k, alibi_slopes=SLOPES, scale=s)
  for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
      q = jax.device_put(query, NamedSharding(mesh, P("data", None, "model")))
      k = jax.device_put(key, NamedSharding(mesh, P("data")))
      jax.eval_shape(f, q, k, jnp.float32(0.1))
      x, e = (jax.device_put(jnp.ones(s), NamedSharding(mesh, P("data")))
              for s in ((2, 4, 8), (6, 8)))
      jax.eval_shape(lambda x, e, s: kernels.linear_cross_entropy(
          x, e, jnp.zeros((2, 4), int), scale=s), x, e, jnp.float32(0.1))


def test_eager_calls_move_nothing_unasked():
  query, cache = jnp.ones((1, 8, 4, 16)), jnp.ones((1, 16, 1, 16))
  lengths, offset, targets = jnp.array([9]), jnp.int32(3), jnp.arange(4)
  x, embedding, weight = jnp.ones((4, 16)), jnp.ones((9, 16)), jnp.ones(4)
  last = query[:, :1]
  with jax.transfer_guard("disallow"):
    kernels.flash_attention(query, cache, cache, alibi_slopes=SLOPES, query_offset=offset)
    kernels.linear_cross_entropy(x, embedding, targets, weights=weight, z_loss=1e-4)
    kernels.decode_attention(last, cache, cache, lengths, alibi_slopes=SLOPES)
