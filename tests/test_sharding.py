import dataclasses
import functools
import re

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from palm_haiku import PaLM, PaLMConfig, distributed, sharding, train_step
from palm_haiku.kernels import interpret
from palm_haiku.recipe import TrainConfig

ARCHITECTURES = {
    "palm": {}, "palm-lite": dict(position="alibi", norm="rms", shared_kv=True),
    "grouped": dict(kv_heads=2, qk_norm="layer", window=7, global_every=2, dim_ff=96),
    "biases": dict(norm_bias=True, activation="gelu")}
TOKENS = np.random.default_rng(0).integers(0, 130, (8, 33)).astype(np.int32)

# 130 tokens, so that no axis of 4 divides the vocabulary.
MESHES = [("fsdp-tensor", True, "palm"), ("data=2,fsdp=2,model=2", False, "palm-lite"),
          ("data=2,seq=2,model=2", True, "palm-lite"), ("data=2,fsdp=2,model=2", True, "grouped"),
          ("fsdp=2,model=4", False, "biases")]
MORE_MESHES = [("data=8", False), ("fsdp", False), ("fsdp-tensor", True), ("fsdp=4,model=2", False),
               ("data=2,fsdp=2,model=2", False), ("data=2,fsdp=2,model=2", True),
               ("data=2,seq=2,model=2", True), ("fsdp=2,seq=4", False)]


def config(architecture, **changes):
  model = PaLMConfig(130, 32, 3, 4, 8, **ARCHITECTURES[architecture])
  return TrainConfig(model=model, batch_size=8, seq_len=32, **changes)


def losses_and_params(config, steps=3, tokens=TOKENS, devices=None, start=None):
  mesh = sharding.make_mesh(config.mesh, devices) if config.mesh else None
  with sharding.in_context(mesh):
    program = train_step.program(config, mesh)
    state = program.init() if start is None else jax.tree.map(
        lambda x, like: jax.device_put(x, like.sharding), start, program.state)
    rows = []
    batch = {"tokens": distributed.place(tokens, program.batch_sharding)}
    for _ in range(steps):
      state, metrics = program.step(state, batch)
      rows.append([float(metrics[name]) for name in sorted(metrics)])
  return np.array(rows), jax.device_get(state.params)


@functools.cache
def one_device(architecture, **changes):
  return losses_and_params(config(architecture, **changes))


def assert_trains_as_one_device(architecture, mesh, shard_residual, **changes):
  got, params = losses_and_params(
      config(architecture, mesh=mesh, shard_residual=shard_residual, **changes))
  want, expected = one_device(architecture, **changes)
  np.testing.assert_allclose(got, want, rtol=2e-6)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), params, expected)


@pytest.mark.full
@pytest.mark.parametrize("mesh, shard_residual, architecture", MESHES)
def test_training_on_a_mesh_is_training_on_one_device(mesh, shard_residual, architecture):
  assert_trains_as_one_device(architecture, mesh, shard_residual)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("mesh, shard_residual", MORE_MESHES)
def test_more_meshes(architecture, mesh, shard_residual):
  assert_trains_as_one_device(architecture, mesh, shard_residual)


@pytest.mark.slow
def test_parts_of_a_batch_on_a_mesh():
  assert_trains_as_one_device("palm-lite", "fsdp=4,model=2", True, accumulate=2, remat="full")


@pytest.mark.full
def test_no_device_ever_holds_all_parameters():
  """Neither between steps nor while they are made; nor is an optimizer's state whole anywhere."""
  mesh = sharding.make_mesh("fsdp-tensor")
  for optimizer in ("adamw", "palm"):
    c = TrainConfig(model=PaLMConfig(4096, 128, 2, 4, 32), batch_size=8, optimizer=optimizer,
                    mesh="fsdp-tensor")
    with sharding.in_context(mesh):
      program = train_step.program(c, mesh)
      memory = program.init.lower().compile().memory_analysis()
      whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.state))
      params = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.state.params))
      state = program.init()
    assert memory.output_size_in_bytes < whole / 8 * 1.2
    assert memory.temp_size_in_bytes < params / 2
    on_one = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    assert on_one < whole / 8 * 1.2


def lowered(config):
  mesh = sharding.make_mesh(config.mesh)
  with sharding.in_context(mesh):
    program = train_step.program(config, mesh)
    shape = config.batch_size, config.seq_len + 1
    batch = {"tokens": jax.ShapeDtypeStruct(shape, "int32", sharding=program.batch_sharding)}
    return program.step.lower(program.state, batch)


@pytest.mark.full
def test_compilation_does_not_grow_with_depth():
  def size(depth):
    c = config("palm", mesh="fsdp=4,model=2", shard_residual=True)
    c = dataclasses.replace(c, model=dataclasses.replace(c.model, depth=depth))
    return len(re.sub(r"\d+", "", lowered(c).as_text()))

  assert size(118) < 1.01 * size(8)


@pytest.mark.full
def test_a_part_of_a_batch_has_no_gradient_of_its_own():
  """Four parts, one after another, take the memory of one of them, and not even half a gradient."""
  def memory(batch_size, accumulate):
    c = TrainConfig(model=PaLMConfig(256, 128, 4, 4, 32), batch_size=batch_size, seq_len=8,
                    accumulate=accumulate, remat="full", mesh="fsdp=4,model=2")
    return lowered(c).compile().memory_analysis().temp_size_in_bytes

  gradient = PaLMConfig(256, 128, 4, 4, 32).num_params * 4 / 8
  assert memory(16, 4) < memory(4, 1) + gradient / 2


@pytest.mark.full
@pytest.mark.parametrize("shard_residual", [False, True])
def test_each_device_keeps_its_heads(shard_residual):
  """Weights and the residual stream travel inside a layer, not queries or scores."""
  c = config("palm-lite", mesh="fsdp=4,model=2", shard_residual=shard_residual, remat="full")
  gathered = re.findall(r"= f32\[([\d,]*)\]\S* (?:all-gather|all-to-all)\(",
                        lowered(c).compile().as_text())
  # [batch, T, heads, dim_head] of one of four parts of the batch, in any order
  assert gathered and not [x for x in gathered if sorted(x.split(",")) == ["2", "32", "4", "8"]]


@pytest.mark.parametrize("text, devices, sizes", [
    ("", 1, (1, 1, 1, 1)),
    ("fsdp", 8, (1, 8, 1, 1)),
    ("fsdp-tensor", 16, (1, 4, 1, 4)),
    ("paper", 6144, (2, 256, 1, 12)),
    ("model=2, data=-1,seq=2", 16, (4, 1, 2, 2)),
])
def test_meshes_in_words(text, devices, sizes):
  assert tuple(sharding.parse_mesh(text, devices).values()) == sizes


@pytest.mark.parametrize("text, devices, message", [
    ("data=2,mdl=4", 8, "written like data=2,fsdp=4,model=2.* got 'data=2,mdl=4'"),
    ("fdsp", 8, "one of one-chip, fsdp"),
    ("data=two", 8, "written like"),
    ("data=--1", 8, "written like"),
    ("data=2,data=4", 8, "each axis once; got data twice in 'data=2,data=4'"),
    ("data=0", 8, "positive"),
    ("data=-1,fsdp=-1", 8, "only one mesh axis"),
    ("data=3", 8, "'data=3' is for 3 devices; there are 8"),
    ("data=3,fsdp=-1", 8, "a multiple of 3 devices; there are 8"),
    ("paper", 8, "'paper' is for 6144 devices; there are 8"),
])
def test_a_mesh_that_cannot_be(text, devices, message):
  with pytest.raises(ValueError, match=message) as error:
    sharding.parse_mesh(text, devices)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("mesh, change, message", [
    ("fsdp=8", dict(batch_size=12), "batch_size must be a multiple .* fsdp 8; got 12"),
    ("model=8", {}, "heads must be a multiple .* model 8; got 4"),
    ("seq=8", dict(seq_len=30), "seq_len must be a multiple .* seq 8; got 30"),
    ("fsdp=8", dict(dim=12), "dim must be a multiple .* fsdp 8; got 12"),
    ("data=2,model=4", dict(dim=9, ff_mult=3, shard_residual=False),
     r"dim_ff must be a multiple .* model 4; got 27"),
    ("data=2,model=4", dict(dim=9, ff_mult=4), "dim must be a multiple .* model 4; got 9"),
])
def test_what_a_mesh_does_not_divide_is_refused(mesh, change, message):
  change = dict(change)
  model = {name: change.pop(name) for name in ("dim", "ff_mult") if name in change}
  c = dataclasses.replace(config("palm", shard_residual=True), **change)
  c = dataclasses.replace(c, model=dataclasses.replace(c.model, **model))
  with pytest.raises(ValueError, match=message):
    sharding.check(c.model, sharding.make_mesh(mesh), c.rules, batch_size=c.batch_size,
                   seq_len=c.seq_len)


def test_kernels_inside_a_sharded_step():
  """The TPU kernels, interpreted, train like the XLA path on one device."""
  c = TrainConfig(model=PaLMConfig(128, 128, 1, 2, 64, **ARCHITECTURES["palm-lite"]), batch_size=2,
                  seq_len=16, implementation="mosaic_tpu", mesh="data=2,model=2")
  tokens = TOKENS[:2, :17] % 128
  alone = dataclasses.replace(c, mesh="", implementation="xla")
  want, _ = losses_and_params(alone, steps=1, tokens=tokens)
  # Interpreted kernels have effects: they would run as parameters are made.
  start = jax.device_get(train_step.program(alone).init())
  with interpret():
    got, _ = losses_and_params(c, steps=1, tokens=tokens, devices=jax.devices()[:4], start=start)
  np.testing.assert_allclose(got, want, rtol=1e-5)

SPECS = {
    "palm": {"embedding": P("model", "fsdp"), "norm": P(None)},
    "palm/layers/parallel_block": {
        "norm": P(None, None), "query": P(None, "fsdp", "model", None),
        "key": P(None, "fsdp", None), "value": P(None, "fsdp", None),
        "gate": P(None, "fsdp", "model"), "up": P(None, "fsdp", "model"),
        "attn_out": P(None, "model", None, "fsdp"), "ff_out": P(None, "model", "fsdp"),
        "query_scale": P(None, None), "key_scale": P(None, None)},
}


@pytest.mark.parametrize("optimizer", ["adamw", "palm"])
def test_where_each_parameter_lies(optimizer):
  """Weights over fsdp along the width, over model along heads, hidden units and vocabulary."""
  mesh = sharding.make_mesh("data=2,fsdp=2,model=2")
  c = dataclasses.replace(config("palm"), optimizer=optimizer)
  c = dataclasses.replace(c, model=dataclasses.replace(c.model, qk_norm=True))
  with sharding.in_context(mesh):
    program = train_step.program(c, mesh)

  def assert_spec(x, spec):
    assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim), (x, spec)

  jax.tree.map(assert_spec, program.state.params, SPECS)
  shapes = lambda tree: jax.tree.map(jnp.shape, tree)
  like_params = 0
  for tree in jax.tree.leaves(program.state.opt_state, is_leaf=lambda x: isinstance(x, dict)):
    if isinstance(tree, dict) and shapes(tree) == shapes(program.state.params):
      jax.tree.map(assert_spec, tree, SPECS)
      like_params += 1
  assert like_params == 2
  assert program.batch_sharding.is_equivalent_to(
      NamedSharding(mesh, P(("data", "fsdp"), None)), 2)
  # 131 tokens are not divisible.
  whole = sharding.params_shardings({"palm": {"embedding": jnp.zeros((131, 32))}}, mesh)
  assert whole["palm"]["embedding"].is_equivalent_to(NamedSharding(mesh, P(None, "fsdp")), 2)


@pytest.mark.parametrize("rules, residual", [
    (sharding.Rules(), None), (sharding.SHARDED_RESIDUAL, "model")])
def test_where_activations_lie(rules, residual):
  mesh = sharding.make_mesh("data=2,seq=2,model=2")
  model = hk.without_apply_rng(hk.transform(
      lambda tokens: PaLM.from_config(config("palm").model, rules=rules)(tokens)))

  def constraints(jaxpr):
    for equation in jaxpr.eqns:
      if equation.primitive.name == "sharding_constraint":
        yield equation.params["sharding"], equation.invars[0].aval.ndim
      for inner in equation.params.values():
        if hasattr(inner, "jaxpr"):
          yield from constraints(inner.jaxpr)

  with jax.set_mesh(mesh):
    for lead, first in (((4,), ["data"]), ((3, 4), [None, "data"])):
      tokens = jax.ShapeDtypeStruct((*lead, 32), jnp.int32)
      params = jax.eval_shape(model.init, jax.random.key(0), tokens)
      where = list(constraints(jax.make_jaxpr(model.apply)(params, tokens).jaxpr))
      specs = [P(*first, "seq")] + [P(*first, "seq", residual)] * 2
      assert len(where) == 3
      for (got, ndim), spec in zip(where, specs):
        assert got.is_equivalent_to(NamedSharding(got.mesh, spec), ndim), (got, spec)


def test_axes_are_ordered_by_the_speed_of_their_links():
  """The model axis is last: its neighbours are neighbours in the machine."""
  devices = jax.devices()
  mesh = sharding.make_mesh("data=2,fsdp=2,model=2", devices)
  assert mesh.axis_names == ("data", "fsdp", "seq", "model")
  assert mesh.devices.ravel().tolist() == devices and mesh.devices.shape == (2, 2, 1, 2)
