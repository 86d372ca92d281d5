import math

import numpy as np
import pytest

from palm_haiku.kernels import alibi_slopes


def test_powers_of_two_follow_the_paper():
  np.testing.assert_allclose(alibi_slopes(8), [2.0**-i for i in range(1, 9)], rtol=1e-7)
  np.testing.assert_allclose(alibi_slopes(16), [2.0 ** (-i / 2) for i in range(1, 17)], rtol=1e-6)
  np.testing.assert_allclose(alibi_slopes(1), [2.0**-8])


@pytest.mark.parametrize("heads", range(1, 40))
def test_all_head_counts_follow_the_recursion(heads):
  def slopes(n):
    if math.log2(n).is_integer():
      start = 2 ** (-(2 ** -(math.log2(n) - 3)))
      return [start ** (i + 1) for i in range(n)]
    below = 2 ** math.floor(math.log2(n))
    return slopes(below) + slopes(2 * below)[0::2][: n - below]

  np.testing.assert_allclose(alibi_slopes(heads), slopes(heads), rtol=1e-6)
  assert alibi_slopes(heads).dtype == np.float32


def test_no_heads():
  with pytest.raises(ValueError, match="heads must be positive"):
    alibi_slopes(0)
