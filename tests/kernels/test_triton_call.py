"""Shared parts of the Triton kernels of all ops: what must be installed, and vmap."""

import importlib.metadata
import subprocess
import sys

import jax.numpy as jnp
import pytest

from palm_haiku.kernels import flash_attention
from palm_haiku.kernels.attention import triton
from palm_haiku.kernels.triton import call as triton_call

QUERY, KEY = jnp.zeros((1, 4, 4, 16)), jnp.zeros((1, 4, 1, 16))


@pytest.mark.parametrize("versions, message", [
    ({}, "jax-triton, which is not installed: pip install 'jax-triton"),
    ({"jax-triton": "0.4.1"}, "triton, which is not installed: pip install 'jax-triton"),
    ({"jax-triton": "0.4.1", "triton": "3.6.0"}, "triton 3.6, or jax-triton 0.4.1 .* pip install"),
    ({"jax-triton": "0.3.1", "triton": "3.9.0"}, "triton 3.6, or jax-triton 0.4.1 .* pip install"),
    ({"jax-triton": "0.2.0", "triton": "3.6.0"}, "jax-triton 0.2.0 with triton 3.6.0: pip install"),
])
def test_what_to_install_is_named(monkeypatch, versions, message):
  def version(name):
    if name not in versions:
      raise importlib.metadata.PackageNotFoundError(name)
    return versions[name]

  monkeypatch.setattr(importlib.metadata, "version", version)
  with pytest.raises(ValueError, match=f"flash_attention: triton needs .*{message}"):
    flash_attention(QUERY, KEY, KEY, implementation="triton")
  with pytest.raises(ImportError, match=message) as error:
    triton_call.call(None, QUERY, out_types=(QUERY,), grid=1, num_warps=4, num_stages=2,
                     chip="a100")
  assert "\n" not in str(error.value)
  with pytest.raises(ImportError, match=message):
    triton.forward(QUERY, KEY, KEY, segment_ids=None, alibi_slopes=None, query_offset=0,
                   is_causal=True, scale=1.0, window=None, chip=None)


def test_supported_pairs_of_versions_pass(monkeypatch):
  monkeypatch.setitem(sys.modules, "jax_triton", triton)  # anything that can be imported
  for pair in (("0.3.1", "3.6.0"), ("0.4.1", "3.9.0"), ("0.4.2", "3.7.0+gitabc")):
    versions = dict(zip(("jax-triton", "triton"), pair))
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
    assert triton_call.problem() is None
  monkeypatch.setitem(sys.modules, "jax_triton", None)
  assert "a jax-triton that can be imported" in triton_call.problem()


def test_the_package_needs_no_triton():
  program = ("import sys; sys.modules['triton'] = sys.modules['jax_triton'] = None; "
             "from palm_haiku import kernels; from palm_haiku.kernels.attention import triton; "
             "print(kernels.explain('flash_attention').implementation)")
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                        timeout=120)
  assert done.stdout.strip() == "xla", done.stderr
