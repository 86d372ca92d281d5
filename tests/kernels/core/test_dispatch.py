import jax
import jax.numpy as jnp
import pytest

from palm_haiku import kernels
from palm_haiku.kernels import attention, cross_entropy
from palm_haiku.kernels.triton import call as triton_call


def test_auto_says_what_it_chose_and_why():
  choice = kernels.explain("flash_attention")
  assert choice.implementation == "xla"
  assert "no fused kernel" in choice.reason


@pytest.mark.parametrize("op, implementation, message", [
    ("flash_attention", "cuda", "implementation must be one of"),
    ("flash_attention", "pallas", "no Pallas kernel is for cpu"),
    ("matmul", "auto", "no op is called 'matmul'"),
])
def test_what_cannot_run_is_refused(op, implementation, message):
  with pytest.raises(ValueError, match=message):
    kernels.explain(op, implementation=implementation)


@pytest.mark.parametrize("params", [{"query": (4, 2, 8)}, (4, 8)])
def test_a_block_without_its_weights_is_refused(params):
  with pytest.raises(ValueError, match="by their names; they lack attn_out, ff_out, key"):
    kernels.explain("parallel_attention_ffn", (2, 4), params)


def test_a_kernel_that_an_op_does_not_have(monkeypatch):
  for name in ("mosaic_gpu", "mosaic_tpu"):
    monkeypatch.delitem(cross_entropy.OP.backends, name)
  with pytest.raises(ValueError, match="linear_cross_entropy has no mosaic_gpu kernel; it runs on "
                     "xla, triton"):
    kernels.explain("linear_cross_entropy", implementation="mosaic_gpu")


@pytest.mark.parametrize("op, shapes", [
    ("flash_attention", [(4, 2048, 8, 128), (4, 2048, 3, 128)]),
    ("decode_attention", [(4, 1, 8, 128), (4, 2048, 3, 128)]),
    ("parallel_attention_ffn", [(2048, 1024), dict(
        norm=(1024,), query=(1024, 8, 128), key=(1024, 3, 128), value=(1024, 3, 128),
        gate=(1024, 512), up=(1024, 512), attn_out=(8, 128, 1024), ff_out=(512, 1024))])])
@pytest.mark.parametrize("implementation", ["auto", "xla"])
def test_heads_that_do_not_fit_are_refused(op, shapes, implementation):
  with pytest.raises(ValueError, match=f"{op}: 3 key/value heads do not divide 8 query heads"):
    kernels.explain(op, *shapes, implementation=implementation, chip="v5e")


def on(platform, kind):
  device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
  return jax.sharding.use_abstract_mesh(
      jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device))


def test_the_chip_is_that_of_the_abstract_mesh():
  assert kernels.core.dispatch.target() == ("cpu", None)
  with on("tpu", "TPU v5 lite"):
    assert kernels.core.dispatch.target() == ("tpu", "v5e")
  with on("gpu", "NVIDIA H200"):
    assert kernels.core.dispatch.target() == ("gpu", "h200")
  with on("gpu", "NVIDIA GeForce GTX 1080"):
    assert kernels.core.dispatch.target() == ("gpu", None)


@pytest.mark.parametrize("platform, kind, implementation", [
    ("tpu", "TPU v5 lite", "mosaic_tpu"), ("tpu", "TPU v6 lite", "mosaic_tpu"),
    ("gpu", "NVIDIA H200", "mosaic_gpu"), ("cpu", "cpu", "xla"),
])
def test_auto_takes_the_kernel_of_the_chip_where_it_can(platform, kind, implementation):
  array = lambda length, heads, dim_head=128, dtype="bfloat16": jax.ShapeDtypeStruct(
      (2, length, heads, dim_head), dtype)
  with on(platform, kind):
    choose = lambda *arrays: kernels.explain("flash_attention", *arrays).implementation
    assert choose(array(2048, 8), array(2048, 1), array(2048, 1)) == implementation
    assert choose(array(1, 8), array(2048, 1), array(2048, 1)) == "xla"
    if implementation == "mosaic_gpu":
      assert choose(*(array(2048, n, 80) for n in (8, 1, 1))) == "xla"
      with pytest.raises(ValueError, match="mosaic_gpu needs dim_head in .*; got 80"):
        kernels.explain("flash_attention", *(array(2048, n, 80) for n in (8, 1, 1)),
                        implementation="pallas")


@pytest.mark.parametrize("platform, kind, implementation", [
    ("tpu", "TPU v6 lite", "mosaic_tpu"), ("gpu", "NVIDIA H200", "mosaic_gpu"),
    ("gpu", "NVIDIA B200", "triton"), ("cpu", "cpu", "xla")])
def test_auto_takes_the_kernel_of_the_loss(platform, kind, implementation):
  array = lambda *shape: jax.ShapeDtypeStruct(shape, "bfloat16")
  with on(platform, kind):
    choose = lambda *lead: kernels.explain(
        "linear_cross_entropy", array(*lead, 512), array(32_000, 512)).implementation
    assert choose(4, 1024) == implementation
    assert choose(4, 1) == "xla"


@pytest.mark.parametrize("platform, kind, implementation", [
    ("tpu", "TPU v5p", "mosaic_tpu"), ("gpu", "NVIDIA H200", "xla"), ("cpu", "cpu", "xla")])
def test_auto_takes_the_blocks_products_where_a_figure_says_so(platform, kind, implementation):
  def choose(tokens, dim, dtype="bfloat16"):
    array = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)
    params = dict(norm=array(dim), query=array(dim, 8, 64), key=array(dim, 64),
                  value=array(dim, 64), gate=array(dim, 4 * dim), up=array(dim, 4 * dim),
                  attn_out=array(8, 64, dim), ff_out=array(4 * dim, dim))
    return kernels.explain("parallel_attention_ffn", array(tokens, dim), params)

  with on(platform, kind):
    assert choose(4096, 4096).implementation == implementation
    assert choose(16, 4096).implementation == choose(4096, 256).implementation == "xla"
    if platform != "cpu":
      assert "figures better than XLA's" in choose(4096, 256).reason
      assert choose(4096, 4096, "float32").implementation == "xla"


def on_mesh(kind, **sizes):
  device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform="tpu")
  return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh(
      tuple(sizes.values()), tuple(sizes), abstract_device=device,
      axis_types=(jax.sharding.AxisType.Auto,) * len(sizes)))


def test_what_counts_under_a_mesh_is_what_a_device_has():
  # PaLM-540B: 48 heads take more VMEM than a v4 has, the 4 of a device do not.
  query, key = (jax.ShapeDtypeStruct((2048, 2048, heads, 256), "bfloat16") for heads in (48, 1))
  choose = lambda *arrays: kernels.explain("flash_attention", *arrays)
  with on_mesh("TPU v4", data=2, fsdp=256):
    assert "VMEM of a v4" in choose(query, key, key).reason
  with on_mesh("TPU v4", data=2, fsdp=256, model=12):
    assert choose(query, key, key).implementation == "mosaic_tpu"
    # Each device has the key heads of its 4 query heads: one of 4, two of 24, two of 16 that
    # three devices share.
    for kv_heads, share in ((1, 1), (4, 1), (24, 2), (16, 4)):
      some = jax.ShapeDtypeStruct((2048, 2048, kv_heads, 256), "bfloat16")
      on_one_device = attention.OP.on_one_device(query, some, None)
      assert [x.shape for x in on_one_device[:2]] == [(4, 2048, 4, 256), (4, 2048, share, 256)]


def test_the_loss_counts_the_tokens_of_a_device():
  embedding = jax.ShapeDtypeStruct((32_000, 512), "bfloat16")
  choose = lambda *lead: kernels.explain(
      "linear_cross_entropy", jax.ShapeDtypeStruct((*lead, 512), "bfloat16"), embedding)
  with on_mesh("TPU v5 lite", fsdp=8, seq=2, model=4):
    assert choose(8, 256).implementation == "mosaic_tpu"
    assert "128 tokens or more to be chosen unasked; got 64" in choose(8, 128).reason
    assert choose(8 * 128).implementation == "mosaic_tpu"
    assert choose(8 * 64).implementation == "xla"


@pytest.mark.parametrize("op, arguments", [
    ("flash_attention", [(1, 300, 4, 64), (1, 300, 1, 64), (1, 300, 1, 64)]),
    ("parallel_attention_ffn", [(300, 128), dict(
        norm=(128,), query=(128, 4, 64), key=(128, 64), value=(128, 64), gate=(128, 512),
        up=(128, 512), attn_out=(4, 64, 128), ff_out=(512, 128))]),
    ("linear_cross_entropy", [(300, 128), (1000, 128)]),
    ("decode_attention", [(2, 1, 4, 64), (2, 304, 1, 64), (2, 304, 1, 64)])])
@pytest.mark.parametrize("implementation, platform, kind", [
    ("mosaic_tpu", "tpu", "TPU v5 lite"), ("mosaic_gpu", "gpu", "NVIDIA H200"),
    ("triton", "gpu", "NVIDIA A100")])
def test_kernels_are_built_where_numbers_have_64_bits(
    op, arguments, implementation, platform, kind):
  if implementation == "triton" and (trouble := triton_call.problem()):
    pytest.skip(f"needs {trouble}")
  arrays = jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16), arguments,
                        is_leaf=lambda x: isinstance(x, tuple))
  integers = {"linear_cross_entropy": (300,), "decode_attention": (2,)}

  def value(*arrays):
    ids = [jnp.zeros(integers[op], int)] if op in integers else []
    out = getattr(kernels, op)(*arrays, *ids, implementation=implementation)
    return sum(x.astype(jnp.float32).sum() for x in jax.tree.leaves(out))

  with jax.enable_x64(True), on(platform, kind):
    f = value if op == "decode_attention" else jax.grad(value, argnums=(0, 1))
    platform = dict(gpu="cuda").get(platform, platform)
    jax.jit(f).trace(*arrays).lower(lowering_platforms=(platform,))
