"""The Triton kernels compiled ahead of time for GPUs that are not here, and run on one that is."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palm_haiku.kernels import alibi_slopes, flash_attention, triton_call, tuning
from palm_haiku.kernels.attention import triton
from tests.kernels.attention import contract

aot = pytest.importorskip("palm_haiku.kernels.aot")
if trouble := triton_call.problem():
  pytest.skip(f"needs {trouble}", allow_module_level=True)

HEADS = 16
TENSOR_CORES = {"a100": "HMMA", "h200": "HGMMA", "b200": "UTCMMA"}


def attend(query, key, value):
  return flash_attention(query, key, value, alibi_slopes=alibi_slopes(query.shape[-2]),
                         implementation="triton")


def attend_each(query, key, value):
  """`attend` under vmap of the batch, and in a scan over two layers."""
  def layer(query, _):
    return jax.vmap(attend)(query, key, value), None

  return jax.lax.scan(jax.checkpoint(layer), query, length=2)[0]


def shapes(length, dim_head, heads=HEADS, batch=1):
  array = lambda heads: jax.ShapeDtypeStruct((batch, length, heads, dim_head), jnp.bfloat16)
  return array(heads), array(1), array(1)


def check_kernels(report, dim_head):
  kernels = {k.name: k for k in report.kernels if k.source == "triton"}
  assert {"forward_kernel", "dq_kernel", "dkv_kernel"} == set(kernels)
  for kernel in (k for k in report.kernels if k.source == "triton"):
    spills = max(kernel.resources.spill_stores, kernel.resources.spill_loads)
    assert spills <= (64 if dim_head == 256 else 0), kernel
    assert kernel.shared_memory <= triton_call.CHIPS[report.target][1]
    assert not kernel.resources.serialized
    assert kernel.code.main_loop.mix.get(TENSOR_CORES[report.target]), kernel


@pytest.mark.parametrize("chip, dim_head", [("a100", 64), ("h200", 128)])
def test_forward_and_backward_use_the_tensor_cores_and_do_not_spill(chip, dim_head):
  report = aot.report(attend, *shapes(2048, dim_head), target=chip, backward=True)
  check_kernels(report, dim_head)


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["a100", "h200", "b200"])
@pytest.mark.parametrize("dim_head", [64, 128, 256])
def test_every_entry_of_the_table(chip, dim_head):
  report = aot.report(attend, *shapes(2048, dim_head), target=chip, backward=True, timeout=1200)
  check_kernels(report, dim_head)


def test_vmap_scan_remat_and_long_sequences_compile_in_little_memory():
  length, dim_head, batch = 65_536, 64, 2
  report = aot.report(attend_each, *shapes(length, dim_head, batch=batch), target="h200",
                      backward=True, square=(length, length))
  check_kernels(report, dim_head)
  # Of one layer; the scan keeps its carry of each layer beside it.
  carries = 2 * 2 * batch * length * HEADS * dim_head
  assert report.memory["temp"] < 2 * (16 * batch * length * HEADS * (dim_head + 8)) + carries
  assert not report.square


def test_temporaries_of_one_layer_at_65536():
  length, dim_head = 65_536, 128
  report = aot.report(attend, *shapes(length, dim_head), target="b200", backward=True)
  assert report.memory["temp"] < 16 * length * HEADS * (dim_head + 8)


def test_tiles_fit_the_shared_memory_of_every_chip():
  """Operands of the loop, once per stage, are less than what a block may have."""
  for chip, table in tuning.ATTENTION_TRITON.items():
    for dim_head, kernels in table.items():
      for blocks in kernels:
        assert 2 * dim_head * (blocks.rows + 2 * blocks.keys) <= triton_call.CHIPS[chip][1]
        assert blocks.rows % 16 == 0 and blocks.keys % 16 == 0


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="runs the kernels on a GPU")
class TestOnAGpu:

  @pytest.mark.parametrize("dim_head", [64, 128, 256])
  @pytest.mark.parametrize("options", [
      {}, dict(window=(100, 0)), dict(segments="packed"), dict(is_causal=False, num_keys=517),
      dict(shared_kv=True), dict(dtype="float32"), dict(kv_heads=2, heads=6)],
      ids=lambda o: ",".join(o) or "causal")
  def test_results_are_as_near_to_float64_as_the_xla_path(self, dim_head, options):
    case = contract.Case(**dict(num_queries=700, num_keys=700, heads=16, dim_head=dim_head)
                         | options)
    arrays = contract.inputs(case)
    q, k, v, dout = (arrays[name] for name in ("query", "key", "value", "dout"))
    options = dict(arrays["options"], chip=None)
    out, lse = triton.forward(q, k, v, **options)
    gradients = triton.backward(q, k, v, out, lse, dout, **options)
    contract.check(case, arrays, dict(zip(("out", "lse", "dquery", "dkey", "dvalue"),
                                          (out, lse, *gradients))))

  def test_two_runs_give_the_same_bits(self):
    q, k, v = (jax.random.normal(jax.random.key(i), s.shape, s.dtype)
               for i, s in enumerate(shapes(4096, 128)))
    run = jax.jit(jax.value_and_grad(lambda *x: attend(*x).astype(jnp.float32).sum(), (0, 1, 2)))
    jax.tree.map(np.testing.assert_array_equal, run(q, k, v), run(q, k, v))
