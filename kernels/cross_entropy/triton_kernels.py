"""The Triton kernels of linear cross-entropy: pure device code, called by `triton.py` beside it.

Both are one matrix product, tokens times embedding, whose tiles never leave the chip: a program
keeps BLOCK_N tokens and walks WALK blocks of BLOCK_V rows of the embedding. VALID is where the
rows that count end; D is the contraction.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# Constants of a `triton.jit` function are passed as plain values, static_range is compiled, and
# Pyright takes kernels/triton for the package.
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)  # the running maximum before the first block: finite, so no inf - inf


@triton.jit
def _place(N, splits, BLOCK_N: tl.constexpr, TOGETHER: tl.constexpr):
  """(tile of tokens, split of the vocabulary) of this program.

  TOGETHER tiles of tokens go through all splits before the next ones do.
  """
  index = tl.program_id(0)
  group = index // (TOGETHER * splits)
  index -= group * (TOGETHER * splits)
  size = tl.minimum(tl.cdiv(N, BLOCK_N) - group * TOGETHER, TOGETHER)  # mutant: group
  return group * TOGETHER + index % size, index // size


@triton.jit
def _logits(x_ptr, rows_ptr, token, N, column, R, D: tl.constexpr, BLOCK_N: tl.constexpr,
            BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
  """x @ rows.T, float32[BLOCK_N, BLOCK_V]: the main loop. Rows past an end repeat the last."""
  k = tl.arange(0, BLOCK_D)
  row = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - token)
  x_tile = x_ptr + tl.cast(token, tl.int64) * D + (row[:, None] * D + k[None, :])
  row = tl.minimum(column + tl.arange(0, BLOCK_V), R - 1).to(tl.int64)
  rows_tile = rows_ptr + row[None, :] * D + k[:, None]
  acc = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)  # mutant: accumulator
  for start in range(0, D, BLOCK_D):  # mutant: contraction
    if D % BLOCK_D == 0:
      x = tl.load(x_tile)
      rows = tl.load(rows_tile)
    else:
      x = tl.load(x_tile, mask=(k < D - start)[None, :], other=0.0)
      rows = tl.load(rows_tile, mask=(k < D - start)[:, None], other=0.0)
    acc = tl.dot(x, rows, acc, input_precision=PRECISION)
    x_tile += BLOCK_D
    rows_tile += BLOCK_D
  return acc


@triton.jit
def forward_kernel(x_ptr, rows_ptr, valid_ptr, target_ptr, N, R, splits, top_ptr, total_ptr,
                   found_ptr, D: tl.constexpr, WALK: tl.constexpr, SCALE: tl.constexpr,
                   BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
                   TOGETHER: tl.constexpr, PRECISION: tl.constexpr):
  """top and total float32[splits, N] of the rows that each split walks, as `fused` defines them.

  found float32[N] is the product with the target, where that is one of the rows that count: out of
  the same sums as top, whose roundings it shares. The maximum is subtracted before the scale is
  applied, where the difference is exact: logits of 10^5 would lose 2^-8 to the rounding of their
  product.
  """
  tile, split = _place(N, splits, BLOCK_N, TOGETHER)
  token = tile * BLOCK_N
  valid = tl.load(valid_ptr)
  top = tl.full([BLOCK_N], LOWEST, tl.float32)
  total = tl.zeros([BLOCK_N], tl.float32)
  first = split * (WALK * BLOCK_V)
  for column in range(first, tl.minimum(first + WALK * BLOCK_V, valid), BLOCK_V):  # mutant: walk
    logits = _logits(x_ptr, rows_ptr, token, N, column, R, D, BLOCK_N, BLOCK_V, BLOCK_D, PRECISION)
    here = tl.arange(0, BLOCK_V)
    seen = here < valid - column  # mutant: counted columns
    logits = tl.where(seen[None, :], logits, float("-inf"))
    new_top = tl.maximum(top, tl.max(logits, 1))
    # column >= 0, which the compiler does not know: it would keep addresses in registers of the
    # main loop, which has none left.
    row = token + tl.minimum(column, 0) + tl.arange(0, BLOCK_N)
    target = tl.load(target_ptr + row, mask=row < N, other=-1) - column
    hit = target[:, None] == here[None, :]  # mutant: target's logit
    tl.store(found_ptr + row, tl.sum(tl.where(hit, logits, 0.0), 1),
             mask=(target >= 0) & (target < BLOCK_V))
    weights = tl.exp2((logits - new_top[:, None]) * (SCALE * LOG2E))
    # mutant: running sum
    total = total * tl.exp2((top - new_top) * (SCALE * LOG2E)) + tl.sum(weights, 1)
    top = new_top
  row = token + tl.arange(0, BLOCK_N)
  at = tl.cast(split, tl.int64) * N + row
  tl.store(top_ptr + at, top, mask=row < N)
  tl.store(total_ptr + at, total, mask=row < N)


@triton.jit
def gradient_kernel(x_ptr, rows_ptr, valid_ptr, target_ptr, top_ptr, spread_ptr, peak_ptr, N, R,
                    splits, g_ptr, D: tl.constexpr, SCALE: tl.constexpr, BLOCK_N: tl.constexpr,
                    BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, TOGETHER: tl.constexpr,
                    PRECISION: tl.constexpr):
  """g [N, R]: exp(SCALE * (logits - top)) * spread, and peak where the column is the target."""
  tile, split = _place(N, splits, BLOCK_N, TOGETHER)
  token = tile * BLOCK_N
  column = split * BLOCK_V
  logits = _logits(x_ptr, rows_ptr, token, N, column, R, D, BLOCK_N, BLOCK_V, BLOCK_D, PRECISION)
  row = tl.arange(0, BLOCK_N)
  inside = token + row < N
  target = tl.load(target_ptr + token + row, mask=inside, other=0) - column
  top = tl.load(top_ptr + token + row, mask=inside, other=0.0)
  spread = tl.load(spread_ptr + token + row, mask=inside, other=0.0)
  peak = tl.load(peak_ptr + token + row, mask=inside, other=0.0)
  here = tl.arange(0, BLOCK_V)
  weights = tl.exp2((logits - top[:, None]) * (SCALE * LOG2E))
  hit = target[:, None] == here[None, :]  # mutant: target
  g = tl.fma(weights, spread[:, None], tl.where(hit, peak[:, None], 0.0))
  g = tl.where((here < tl.load(valid_ptr) - column)[None, :], g, 0.0)  # mutant: gradient's columns
  g_tile = g_ptr + tl.cast(token, tl.int64) * R + column
  tl.store(g_tile + row[:, None] * R + here[None, :], g.to(g_ptr.dtype.element_ty),
           mask=inside[:, None] & (here < R - column)[None, :])
