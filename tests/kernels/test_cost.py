"""Cost that the TPU kernels of a layer tell XLA's scheduler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palm_haiku import kernels
from palm_haiku.kernels.attention import mosaic_tpu_mask

TOKENS, DIM, HEADS, DIM_HEAD, HIDDEN = 300, 256, 2, 128, 640


def estimates(jaxpr):
  """{name of a kernel: its cost estimate}."""
  found = {}
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "pallas_call":
      found[eqn.params["name"]] = eqn.params["cost_estimate"]
      continue
    for value in eqn.params.values():
      for sub in value if isinstance(value, (tuple, list)) else (value,):
        sub = getattr(sub, "jaxpr", sub)
        found |= estimates(sub) if hasattr(sub, "eqns") else {}
  return found


def test_no_kernel_of_a_layer_is_free():
  array = lambda *shape: jax.ShapeDtypeStruct(shape, "bfloat16")
  params = dict(norm=array(DIM), query=array(DIM, HEADS, DIM_HEAD), key=array(DIM, DIM_HEAD),
                value=array(DIM, DIM_HEAD), gate=array(DIM, HIDDEN), up=array(DIM, HIDDEN),
                attn_out=array(HEADS, DIM_HEAD, DIM), ff_out=array(HIDDEN, DIM))

  def layer(x, params):
    y = kernels.parallel_attention_ffn(x, params, implementation="mosaic_tpu")
    return y.astype(jnp.float32).sum()

  found = estimates(jax.make_jaxpr(jax.grad(layer, (0, 1)))(array(TOKENS, DIM), params).jaxpr)
  product = 2 * TOKENS * DIM
  pairs = HEADS * TOKENS * (TOKENS + 1) // 2
  assert {name: estimate.flops for name, estimate in found.items()} == {
      "block_in_projection": product * ((HEADS + 2) * DIM_HEAD + 2 * HIDDEN),
      "alibi_attention_forward": 2 * 2 * DIM_HEAD * pairs,
      "block_out_projection": product * (HEADS * DIM_HEAD + HIDDEN),
      "block_swiglu_gradient": product * HIDDEN,
      "alibi_attention_backward": 5 * 2 * DIM_HEAD * pairs,
      "block_input_gradient": product * ((HEADS + 2) * DIM_HEAD + 2 * HIDDEN)}
  moved = {  # x or y; what has heads; keys and values; each of gate, up and act
      "block_in_projection": TOKENS * (DIM + HEADS * DIM_HEAD + 2 * DIM_HEAD + 3 * HIDDEN)
                             + DIM * ((HEADS + 2) * DIM_HEAD + 2 * HIDDEN),
      "block_out_projection": TOKENS * (2 * DIM + HEADS * DIM_HEAD + HIDDEN)
                              + DIM * (HEADS * DIM_HEAD + HIDDEN)}
  for name, numbers in moved.items():
    # The gain of the norm and the rotation's tables are float32, and small.
    assert 2 * numbers <= found[name].bytes_accessed <= 2 * numbers * 1.2


def test_neither_the_loss_nor_decoding_is_free():
  array = lambda *shape: jax.ShapeDtypeStruct(shape, "bfloat16")
  vocabulary, length = 500, 512

  def loss(x, embedding):
    targets = jnp.zeros(TOKENS, jnp.int32)
    return kernels.linear_cross_entropy(
        x, embedding, targets, implementation="mosaic_tpu")[0].sum()

  found = estimates(jax.make_jaxpr(jax.grad(loss, (0, 1)))(
      array(TOKENS, DIM), array(vocabulary, DIM)).jaxpr)
  found |= estimates(jax.make_jaxpr(lambda query, cache, lengths: kernels.decode_attention(
      query, cache, cache, lengths, implementation="mosaic_tpu"))(
          array(3, 1, HEADS, DIM_HEAD), array(3, length, 1, DIM_HEAD),
          jax.ShapeDtypeStruct((3,), "int32")).jaxpr)
  product = 2 * TOKENS * DIM * vocabulary
  assert {name: estimate.flops for name, estimate in found.items()} == {
      "cross_entropy_forward": product, "cross_entropy_gradient": product,
      "decode_attention": 2 * 2 * DIM_HEAD * 3 * HEADS * length}
  moved = {"cross_entropy_forward": 2 * DIM * (TOKENS + vocabulary),
           "decode_attention": 2 * DIM_HEAD * 3 * (length + 2 * HEADS)}
  for name, least in moved.items():  # vectors of tokens, and what two cores hand over, are small
    assert least <= found[name].bytes_accessed <= 1.1 * least


@pytest.mark.parametrize("length, num_keys, query_offset", [(50, 50, 0), (20, 70, 50), (9, 30, 3)])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("window", [None, (7, 0), (5, 3)])
def test_pairs_are_those_of_the_mask(length, num_keys, query_offset, is_causal, window):
  distance = np.arange(num_keys) - (query_offset + np.arange(length))[:, None]
  mask = distance <= 0 if is_causal else distance < num_keys
  if window:
    mask &= (distance >= -window[0]) & (distance <= window[1])
  assert mask.sum() == mosaic_tpu_mask.pairs(
      length=length, num_keys=num_keys, query_offset=query_offset, is_causal=is_causal,
      window=window)
