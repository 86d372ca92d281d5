"""The pipeline that all ops go through."""

import traceback
from pathlib import Path

import haiku as hk
import jax
import jax.numpy as jnp

from palm_haiku import PaLM, kernels
from palm_haiku.kernels.attention import mosaic_gpu

PACKAGE = Path(kernels.__file__).parents[1]


def test_the_way_to_a_kernel_is_short(monkeypatch):
  stacks = []

  def forward(query, key, value, **_):
    stacks.append(traceback.extract_stack())
    return query, jnp.zeros((query.shape[0], query.shape[2], query.shape[1]), jnp.float32)

  monkeypatch.setattr(mosaic_gpu, "forward", forward)
  model = hk.transform(lambda tokens: PaLM(
      256, 128, 2, 2, 64, dtype=jnp.bfloat16, implementation="mosaic_gpu")(tokens))
  jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 128), jnp.int32))
  frames = [frame for frame in stacks[0] if Path(frame.filename).is_relative_to(PACKAGE)]
  names = [frame.name for frame in frames]
  between = frames[names.index("__call__") + 1:]
  assert names[0] == "__call__" and frames[0].filename.endswith("model.py")
  assert len(between) <= 10, [f"{Path(f.filename).name}:{f.name}" for f in between]
  assert len({frame.filename for frame in between}) <= 6
