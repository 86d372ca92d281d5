"""The order in which the blocks of a grid take the tiles of a product, and how many each takes."""

# Tiles of tokens that go through all parts of the vocabulary before the next ones do. What is read
# at one time then fits in the L2 cache: for 128 x 256 tiles of 16 bits at dim 4096, 16 MiB of
# tokens, and 9 blocks of 2 MiB of the embedding on the 132 multiprocessors of a Hopper GPU.
TOGETHER = 16


def walk(tiles: int, blocks: int, depth: int, start: int, processors: int) -> int:
  """Blocks of the vocabulary that one block of the grid walks: such that the last wave is full.

  Args:
    tiles: of tokens.
    blocks: of the vocabulary.
    depth: steps of the main loop for one tile.
    start: steps' worth of time that a block of the grid takes to start.
    processors: streaming multiprocessors.
  """
  most = blocks
  if tiles > TOGETHER:  # No more tiles of tokens at one time than those.
    most = max(1, blocks // -(-processors // TOGETHER))

  def time(walk):
    waves = -(-tiles * -(-blocks // walk) // processors)
    return waves * (walk * depth + start)

  return min(range(1, min(most, 64) + 1), key=time)
