import dataclasses
import json

import numpy as np
import pytest

from palm_haiku import PaLMConfig, configs

SMALL = dict(num_tokens=10, dim=8, depth=2, heads=2, dim_head=4)


def test_survives_json():
  config = PaLMConfig(**SMALL, position="alibi", logits_scale=1.0)
  assert PaLMConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_sizes_may_be_numpys():
  config = PaLMConfig(**{name: np.int64(size) for name, size in SMALL.items()})
  assert config == PaLMConfig(**SMALL)
  assert json.loads(json.dumps(dataclasses.asdict(config)))["dim"] == 8


def test_flops_are_the_papers():
  # Table 4 and appendix B of the paper, TFLOPs per token at 2048 tokens.
  for name, tflops in (("palm-8b", 0.0550), ("palm-62b", 0.388), ("palm-540b", 3.28)):
    assert configs[name].train_flops_per_token(2048) / 1e12 == pytest.approx(tflops, rel=2e-3)


def test_flops_are_counted_exactly():
  """6N + 12 L H Q T (appendix B), and what remat computes again: 2 a weight, 4 H Q T of a layer."""
  for shared_kv in (False, True):
    config = PaLMConfig(10, 8, 3, 2, 6, 5, shared_kv=shared_kv, qk_norm=not shared_kv)
    into = 2 * 6 + (1 if shared_kv else 2) * 6 + 2 * 40  # columns: query, key, value, gate, up
    layer = 8 * (into + 2 * 6 + 40) + 8 + (0 if shared_kv else 2 * 6)
    assert config.num_params == 10 * 8 + 3 * layer + 8
    want = 6 * config.num_params + 12 * 3 * 2 * 6 * 7
    assert config.train_flops_per_token(7) == want
    assert config.train_flops_per_token(7, "attention") == want + 2 * 3 * 8 * into
    assert config.train_flops_per_token(7, "full") == want + 2 * 3 * 8 * into + 4 * 3 * 2 * 6 * 7


@pytest.mark.parametrize("change, message", [
    (dict(dim=0), "dim must be a positive integer"),
    (dict(heads=2.0), "heads must be a positive integer"),
    (dict(depth=-1), "depth must be a positive integer"),
    (dict(depth=True), "depth must be a positive integer; got True"),
    (dict(depth="2"), "depth must be a positive integer; got '2'"),
    (dict(dim_head=5), "even dim_head"),
    (dict(position="learned"), "position must be one of rotary, alibi"),
    (dict(norm="batch"), "norm must be one of layer, rms"),
    (dict(norm_eps=-1.0), "norm_eps must not be negative"),
    (dict(position="alibi", xpos_scale_base=512), "needs position='rotary'"),
])
def test_what_does_not_fit_is_named(change, message):
  with pytest.raises(ValueError, match=message):
    PaLMConfig(**(SMALL | change))


def test_alibi_takes_an_odd_dim_head():
  PaLMConfig(**(SMALL | dict(dim_head=5, position="alibi")))


def test_unknown_fields_are_named():
  with pytest.raises(ValueError, match="unknown config fields: width"):
    PaLMConfig.from_dict(SMALL | dict(width=3))
