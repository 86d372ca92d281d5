"""Shapes as they are written on the command line, and what the arithmetic on them costs."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Attention:
  """Causal self-attention of `heads` query heads over `kv_heads` key heads."""

  batch: int = 1
  length: int = 2048
  heads: int = 16
  kv_heads: int = 1
  dim_head: int = 128

  @classmethod
  def parse(cls, text: str) -> "Attention":
    """From "1x2048x16x1x128": batch, length, query heads, key heads, dim_head."""
    sizes = [int(size) for size in text.split("x")] if text.replace("x", "").isdigit() else []
    if len(sizes) != 5 or min(sizes) < 1 or sizes[2] % sizes[3]:
      raise ValueError("an attention's shape is BATCHxLENGTHxHEADSxKV_HEADSxDIM_HEAD, with "
                       f"heads a multiple of kv_heads; got {text!r}")
    return cls(*sizes)

  def __str__(self):
    return "x".join(str(size) for size in dataclasses.astuple(self))

  def flops(self, backward: bool, causal: bool = True) -> float:
    """Of the products that are needed: 2 forward, 5 backward (the scores once more).

    Causal: of the pairs that are visible. Else of all T x T, as the PaLM paper counts
    (arXiv:2204.02311, appendix B).
    """
    pairs = self.length * (self.length + 1) / 2 if causal else self.length**2
    return (2 + 5 * backward) * 2 * self.batch * self.heads * self.dim_head * pairs

  def bytes(self, backward: bool, itemsize: int) -> float:
    """What has to be read and written once: inputs, output, and for the backward pass the
    cotangent and the gradients, the output again, and a float32 for each row."""
    rows = self.batch * self.length * self.heads * self.dim_head * itemsize
    keys = self.batch * self.length * self.kv_heads * self.dim_head * itemsize
    forward = 2 * rows + 2 * keys
    if not backward:
      return forward
    statistics = self.batch * self.length * self.heads * 4
    return forward + statistics * 2 + 4 * rows + 4 * keys
