"""Shapes as they are written on the command line, and what the arithmetic on them costs."""

import dataclasses


def sizes(text: str, what: str, names: str) -> list[int]:
  """Positive sizes as "1x2048x16" has them, as many as "BATCHxLENGTHxHEADS" names.

  Raises:
    ValueError: another form, or another number of them; `what` begins the message.
  """
  found = [int(size) for size in text.split("x")] if text.replace("x", "").isdecimal() else []
  if len(found) != names.count("x") + 1 or min(found) < 1:
    raise ValueError(f"{what} shape is {names}; got {text!r}")
  return found


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
    form = "BATCHxLENGTHxHEADSxKV_HEADSxDIM_HEAD, with heads a multiple of kv_heads"
    found = sizes(text, "an attention's", form)
    if found[2] % found[3]:
      raise ValueError(f"an attention's shape is {form}; got {text!r}")
    return cls(*found)

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
    """Bytes that must be read and written once: inputs, output, and for the backward pass the
    cotangent and the gradients, the output again, and a float32 for each row."""
    rows = self.batch * self.length * self.heads * self.dim_head * itemsize
    keys = self.batch * self.length * self.kv_heads * self.dim_head * itemsize
    forward = 2 * rows + 2 * keys
    if not backward:
      return forward
    statistics = self.batch * self.length * self.heads * 4
    return forward + statistics * 2 + 4 * rows + 4 * keys
