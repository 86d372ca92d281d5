"""The Triton kernels of `decode_attention`: pure device code, called by `triton.py` beside it.

The query heads of one key/value head, at the few positions of a sequence, are rows of one matrix:
row r is head r % GROUP of the group at query r // GROUP. A program reads its positions of the
cache once for all of them.

Scores stay in units of q.k until the exponent, where one multiplication by SCALE2 =
scale * log2(e) serves exp2. ALiBi is `slope / scale * (j - origin)` in those units, with the
sequence's last position as the origin for all rows and parts: what differs from a row's own
position is the same for the whole row.

An int8 cache is multiplied as it is, being exact in 16 bits. What its scales apply to are rows of
scores and weights, which are smaller than tiles of the cache.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# Constants of a `triton.jit` function are passed as plain values, static_range is compiled, and
# Pyright takes kernels/triton for the package.
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _blocks(acc, top, total, q, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, slope, p, origin, begin,
            end, lo, hi, KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
            SCALE2: tl.constexpr, ALIBI: tl.constexpr, LEFT: tl.constexpr, INT8: tl.constexpr,
            SHARED: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr):
  cols = tl.arange(0, BLOCK)
  tile = cols[:, None] * (KV_HEADS * DIM) + tl.arange(0, DIM)[None, :]
  for n in range(lo, hi, BLOCK):  # mutant: walk
    j = n + cols
    start = tl.cast(n, tl.int64) * (KV_HEADS * DIM)
    seen = j < end  # mutant: loads past the end
    if LEFT >= 0:
      seen &= j >= begin  # mutant: loads before a window
    if MASKED:
      k = tl.load(k_ptr + start + tile, mask=seen[:, None], other=0)
    else:
      k = tl.load(k_ptr + start + tile)
    k = k.to(q.dtype)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if INT8:
      k_scale = tl.load(k_scale_ptr + j * KV_HEADS, mask=seen, other=0.0)
      scores *= k_scale[None, :]  # mutant: key scales
    if ALIBI:
      distance = cols.to(tl.float32) + tl.cast(n - origin, tl.float32)
      scores = tl.fma(slope[:, None], distance[None, :], scores)
    if MASKED:
      # mutant: mask
      scores = tl.where((j[None, :] <= p[:, None]) & (j < end)[None, :], scores, float("-inf"))
      if LEFT >= 0:
        # mutant: window
        scores = tl.where(j[None, :] >= p[:, None] - LEFT, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * SCALE2)
    shift = new_top
    if MASKED:
      shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen so far
    weights = tl.exp2(tl.fma(scores, SCALE2, -shift[:, None]))
    fade = tl.exp2(top - shift)
    total = total * fade + tl.sum(weights, 1)  # mutant: sum
    acc = acc * fade[:, None]  # mutant: fade of the accumulator
    v = k
    if not SHARED:
      if MASKED:
        v = tl.load(v_ptr + start + tile, mask=seen[:, None], other=0)
      else:
        v = tl.load(v_ptr + start + tile)
      v = v.to(q.dtype)
    if INT8:
      v_scale = k_scale
      if not SHARED:
          v_scale = tl.load(v_scale_ptr + j * KV_HEADS, mask=seen, other=0.0)
      weights *= v_scale[None, :]  # mutant: value scales
    acc = tl.dot(weights.to(q.dtype), v, acc, input_precision=PRECISION)
    top = new_top
  return acc, top, total


@triton.jit
def attend_kernel(q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, slope_ptr, length_ptr, table_ptr,
                  T, S, out_ptr, lse2_ptr, GROUP: tl.constexpr, KV_HEADS: tl.constexpr,
                  DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
                  SCALE: tl.constexpr, ALIBI: tl.constexpr, LEFT: tl.constexpr,
                  INT8: tl.constexpr, SHARED: tl.constexpr, PARTS: tl.constexpr,
                  PRECISION: tl.constexpr):
  """ROWS rows of one key/value head and the positions of one slot.

  LEFT: how far before its own position a query sees; -1 for all.
  table_ptr: int32[slots, 3], as in `splits.Splits`.
  out_ptr, lse2_ptr: under PARTS [slots, T, heads, DIM] and [slots, T, heads], lse in base 2; else
    there is one slot a sequence, and out is the result; lse2 is not written.
  """
  HEADS: tl.constexpr = KV_HEADS * GROUP
  pid = tl.program_id(0)
  slot = pid // (KV_HEADS * TILES)
  head = pid // TILES % KV_HEADS
  first_row = pid % TILES * ROWS
  b = tl.load(table_ptr + 3 * slot)
  if b < 0:
    return
  lo = tl.load(table_ptr + 3 * slot + 1)
  end = tl.load(table_ptr + 3 * slot + 2)
  length = tl.load(length_ptr + b)

  row = first_row + tl.arange(0, ROWS)
  inside = row < T * GROUP
  t = row // GROUP
  head_row = t * HEADS + head * GROUP + row % GROUP  # mutant: rows
  tile = head_row[:, None] * DIM + tl.arange(0, DIM)[None, :]
  q = tl.load(q_ptr + tl.cast(b, tl.int64) * T * (HEADS * DIM) + tile, mask=inside[:, None],
              other=0.0)
  slope = tl.zeros([ROWS], tl.float32)
  if ALIBI:
    slope = tl.load(slope_ptr + head * GROUP + row % GROUP) * (1 / SCALE)  # mutant: slopes

  # Every row sees the positions up to that of the first query: these blocks need no mask.
  # mutant: first masked position
  mid = tl.minimum(end, tl.maximum(length - T + 1, 0)) // BLOCK * BLOCK
  mid = tl.maximum(lo, mid)  # mutant: masked part
  p = length - T + t
  acc = tl.zeros([ROWS, DIM], tl.float32)
  top = tl.full([ROWS], float("-inf"), tl.float32)
  total = tl.zeros([ROWS], tl.float32)
  position = tl.cast(b, tl.int64) * S * KV_HEADS + head
  begin, edges = 0, (lo, mid, end)
  if LEFT >= 0:
    begin = length - T - LEFT
    # Up to where the last query sees nothing of a block's beginning.
    plain = lo + tl.cdiv(tl.maximum(length - 1 - LEFT - lo, 0), BLOCK) * BLOCK
    plain = tl.minimum(plain, tl.cdiv(end, BLOCK) * BLOCK)  # mutant: blocks at a window's edge
    edges = (lo, plain, tl.maximum(plain, mid), end)
  for part in tl.static_range(len(edges) - 1):
    acc, top, total = _blocks(  # mutant: origin
        acc, top, total, q, k_ptr + position * DIM, v_ptr + position * DIM, k_scale_ptr + position,
        v_scale_ptr + position, slope, p, length - 1, begin, end, edges[part], edges[part + 1],
        KV_HEADS, DIM, BLOCK, SCALE * LOG2E, ALIBI, LEFT, INT8, SHARED, PRECISION,
        part != len(edges) - 3)

  empty = total == 0
  out = acc / tl.where(empty, 1.0, total)[:, None]  # mutant: empty rows
  to = b
  if PARTS:
    to = slot
    lse2 = tl.where(empty, float("-inf"), top + tl.log2(tl.where(empty, 1.0, total)))
    tl.store(lse2_ptr + tl.cast(to, tl.int64) * T * HEADS + head_row, lse2, mask=inside)
  tl.store(out_ptr + tl.cast(to, tl.int64) * T * (HEADS * DIM) + tile,
           out.to(out_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def merge_kernel(part_ptr, lse2_ptr, start_ptr, count, out_ptr, DIM: tl.constexpr,
                 BLOCK: tl.constexpr):
  """One row of the result from the parts of its sequence; `count` rows each have `count` parts.

  part_ptr, lse2_ptr: as `attend_kernel` leaves them, `count` = T * heads rows in a slot.
  """
  pid = tl.program_id(0)
  b = pid // count
  row = pid % count
  lo = tl.load(start_ptr + b)  # mutant: first part
  hi = tl.load(start_ptr + b + 1)  # mutant: last part
  acc = tl.zeros([DIM], tl.float32)
  top = tl.full([], float("-inf"), tl.float32)
  total = tl.zeros([], tl.float32)
  for first in range(lo, hi, BLOCK):
    slot = first + tl.arange(0, BLOCK)
    at = tl.cast(slot, tl.int64) * count + row
    lse2 = tl.load(lse2_ptr + at, mask=slot < hi, other=float("-inf"))
    part = tl.load(part_ptr + at[:, None] * DIM + tl.arange(0, DIM)[None, :],
                   mask=(slot < hi)[:, None], other=0.0).to(tl.float32)
    new_top = tl.maximum(top, tl.max(lse2, 0))
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(lse2 - shift)  # mutant: weights of parts
    fade = tl.exp2(top - shift)
    total = total * fade + tl.sum(weights, 0)
    acc = acc * fade + tl.sum(part * weights[:, None], 0)
    top = new_top
  out = acc / tl.where(total == 0, 1.0, total)
  tl.store(out_ptr + tl.cast(pid, tl.int64) * DIM + tl.arange(0, DIM),
           out.to(out_ptr.dtype.element_ty))
