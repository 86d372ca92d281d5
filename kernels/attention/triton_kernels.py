"""The Triton kernels of flash attention: pure device code, called by `triton.py` beside it.

The query heads of one key/value head are rows of one matrix: row `r` of a tile is head `r % GROUP`
of the group at sequence index `r // GROUP`. So multi-query attention reads a key once for all its
heads, and one head per key (MHA) is the case GROUP = 1.

Scores stay in units of q.k until the exponent, where one multiplication by SCALE2 =
scale * log2(e) serves exp2. ALiBi is `slope / scale * (j - origin)` in those units, where the
origin is one position per tile: what is left, slope * (origin - position), is the same for a
whole row, so it leaves the softmax alone and only lse has to know. ALiBi is one FMA a score.

LEFT and RIGHT are the mask: a query at position p sees key j iff p - LEFT <= j <= p + RIGHT;
None is no bound, and causal is RIGHT = 0.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# Constants of a `triton.jit` function are passed as plain values, static_range is compiled, and
# Pyright takes kernels/triton for the package.
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
BLOCK_SCAN = tl.constexpr(128)  # blocks whose segment ranges are looked at in one step


@triton.jit
def _rows(first, T, GROUP: tl.constexpr, BLOCK: tl.constexpr, CLAMP: tl.constexpr):
  """Where a tile of rows starts in the sequence, and its rows' distance from there and heads.

  Under CLAMP, rows past the end of the sequence repeat its last element.
  """
  t_first = first // GROUP
  row = tl.arange(0, BLOCK)
  if BLOCK % GROUP != 0:  # Otherwise nothing here depends on the tile, so that it leaves the loop.
    row += first % GROUP
  t = row // GROUP
  if CLAMP:
    t = tl.minimum(t, T - 1 - t_first)
  return t_first, t, row % GROUP, first + tl.arange(0, BLOCK) < T * GROUP


@triton.jit
def _load(pointers, inside, MASKED: tl.constexpr):
  """A tile, under MASKED with zeros in the rows that are not inside."""
  if MASKED:
    tile = tl.load(pointers, mask=inside[:, None], other=0.0)
  else:
    tile = tl.load(pointers)
  return tile


@triton.jit
def _row_tile(T, S, num_groups, GROUP: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
              BLOCK_Q: tl.constexpr):
  """The program's rows and where they, their keys and their lse lie: the last rows start first."""
  pid = tl.program_id(0)
  group = pid % num_groups
  batch = group // KV_HEADS
  head = group % KV_HEADS
  first = (tl.num_programs(0) // num_groups - 1 - pid // num_groups) * BLOCK_Q  # they see the most
  t_first, t, g, inside = _rows(first, T, GROUP, BLOCK_Q, True)
  g += head * GROUP
  heads = KV_HEADS * GROUP
  tile = t[:, None] * (heads * DIM) + g[:, None] * DIM + tl.arange(0, DIM)[None, :]
  q_start = (tl.cast(batch, tl.int64) * T + t_first) * (heads * DIM)
  kv_start = tl.cast(batch, tl.int64) * S * (KV_HEADS * DIM) + head * DIM
  lse_row = (tl.cast(batch, tl.int64) * heads + g) * T + t_first + t
  return batch, first, t_first, t, g, inside, q_start + tile, kv_start, lse_row


@triton.jit
def _row_mask(batch, first, t_first, t, g, T, S, offset_ptr, slope_ptr, q_segment_ptr, k_range_ptr,
              HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_Q: tl.constexpr,
              BLOCK_K: tl.constexpr, SCALE: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
              ALIBI: tl.constexpr, SEGMENTS: tl.constexpr):
  """Slopes over scale, positions and segments of a tile of rows, and the keys that they see.

  The keys lie in [lo, hi); those of the blocks in [mid, end) are seen by every row.
  """
  offset = tl.load(offset_ptr + batch)
  origin = offset + t_first
  last = tl.minimum((first + BLOCK_Q - 1) // GROUP, T - 1)
  lo, mid, end, hi = _key_range(origin, offset + last, S, LEFT, RIGHT, BLOCK_K)
  slope = tl.zeros([BLOCK_Q], tl.float32)
  if ALIBI:
    slope = tl.load(slope_ptr + batch * HEADS + g) * (1 / SCALE)  # mutant: slopes
  q_segment = t
  if SEGMENTS:
    q_segment = tl.load(q_segment_ptr + tl.cast(batch, tl.int64) * T + t_first + t)
    blocks = tl.cdiv(S, BLOCK_K)
    lo, hi = _segment_hull(k_range_ptr + batch * 2 * blocks, blocks, tl.min(q_segment),
                           tl.max(q_segment), lo, tl.maximum(lo, hi), BLOCK_K)
    mid = lo
    end = lo
  return origin, origin + t, slope, q_segment, lo, mid, end, hi


@triton.jit
def _segment_hull(ranges, count, low, high, lo, hi, BLOCK: tl.constexpr):
  """[lo, hi) cut to the first and last block whose ids can meet the ids [low, high].

  ranges: int32[2, count], the smallest and largest id of each block.
  """
  first = hi
  last = lo
  for start in range(lo // BLOCK, (hi + BLOCK - 1) // BLOCK, BLOCK_SCAN):
    block = start + tl.arange(0, BLOCK_SCAN)
    smallest = tl.load(ranges + block, mask=block < count, other=2147483647)
    largest = tl.load(ranges + count + block, mask=block < count, other=-2147483648)
    meets = (smallest <= high) & (largest >= low) & (block * BLOCK < hi)
    first = tl.minimum(first, tl.min(tl.where(meets, block * BLOCK, hi)))
    # mutant: segment's end
    last = tl.maximum(last, tl.max(tl.where(meets, block * BLOCK + BLOCK, lo)))
  return tl.maximum(lo, first), tl.minimum(hi, last)


@triton.jit
def _key_range(p_first, p_last, S, LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK: tl.constexpr):
  """Keys that positions p_first..p_last see: some in [lo, hi), all in the blocks of [mid, end)."""
  lo = 0
  mid = 0
  hi = S
  end = S
  if LEFT is not None:
    lo = tl.maximum(p_first - LEFT, 0) // BLOCK * BLOCK  # mutant: first key
    mid = (tl.maximum(p_last - LEFT, 0) + BLOCK - 1) // BLOCK * BLOCK  # mutant: first whole block
  if RIGHT is not None:
    hi = tl.minimum(S, p_last + RIGHT + 1)  # mutant: last key
    end = tl.minimum(S, tl.maximum(p_first + RIGHT + 1, 0))  # mutant: last whole block
  mid = tl.maximum(lo, tl.minimum(mid, hi))
  end = tl.maximum(mid, end // BLOCK * BLOCK)
  return lo, mid, end, hi


@triton.jit
def _sees(p, j, q_segment, k_segment, LEFT: tl.constexpr, RIGHT: tl.constexpr,
          SEGMENTS: tl.constexpr):
  """Whether positions p may look at keys j; the operands broadcast against each other."""
  visible = (p == p) & (j == j)
  if RIGHT is not None:
    visible &= j <= p + RIGHT  # mutant: right edge
  if LEFT is not None:
    visible &= j >= p - LEFT  # mutant: left edge
  if SEGMENTS:
    visible &= q_segment == k_segment  # mutant: segments
  return visible


@triton.jit
def _sees_keys(p, j, q_segment, segment_ptr, S, LEFT: tl.constexpr, RIGHT: tl.constexpr,
               SEGMENTS: tl.constexpr):
  """[rows, keys]: what rows at positions p see of the keys j, of which those from S on are none."""
  k_segment = j
  if SEGMENTS:
    k_segment = tl.load(segment_ptr + j, mask=j < S, other=0)
  return _sees(p[:, None], j[None, :], q_segment[:, None], k_segment[None, :],
               LEFT, RIGHT, SEGMENTS) & (j < S)[None, :]  # mutant: end of the keys


@triton.jit
def _scores(q, k, slope, cols, distance, ALIBI: tl.constexpr, PRECISION: tl.constexpr):
  """q.k, with ALiBi for keys whose first one is `distance` behind the tile's origin."""
  scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
  if ALIBI:
    # Float columns leave the loop; converting the distance is one instruction a block, not one a
    # column. An FMA, since Triton would make a sum the initial accumulator of the product.
    from_origin = cols.to(tl.float32) + tl.cast(distance, tl.float32)
    scores = tl.fma(slope[:, None], from_origin[None, :], scores)
  return scores


@triton.jit
def _forward_blocks(acc, top, total, q, k_ptr, v_ptr, segment_ptr, slope, p, q_segment, origin, S,
                    lo, hi, KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_K: tl.constexpr,
                    SCALE2: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
                    ALIBI: tl.constexpr, SEGMENTS: tl.constexpr, SHARED: tl.constexpr,
                    PRECISION: tl.constexpr, MASKED: tl.constexpr):
  cols = tl.arange(0, BLOCK_K)
  tile = cols[:, None] * (KV_HEADS * DIM) + tl.arange(0, DIM)[None, :]
  for n in range(lo, hi, BLOCK_K):
    j = n + cols
    start = tl.cast(n, tl.int64) * (KV_HEADS * DIM)
    k = _load(k_ptr + start + tile, j < S, MASKED)
    scores = _scores(q, k, slope, cols, n - origin, ALIBI, PRECISION)
    if MASKED:
      visible = _sees_keys(p, j, q_segment, segment_ptr, S, LEFT, RIGHT, SEGMENTS)
      scores = tl.where(visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * SCALE2)
    shift = new_top
    if MASKED:
      shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen so far
    weights = tl.exp2(tl.fma(scores, SCALE2, -shift[:, None]))
    fade = tl.exp2(top - shift)
    total = total * fade + tl.sum(weights, 1)
    acc = acc * fade[:, None]
    v = k
    if not SHARED:
      v = _load(v_ptr + start + tile, j < S, MASKED)
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
    top = new_top
  return acc, top, total


@triton.jit
def forward_kernel(q_ptr, k_ptr, v_ptr, offset_ptr, slope_ptr, q_segment_ptr, k_segment_ptr,
                   k_range_ptr, T, S, num_groups, out_ptr, lse_ptr, GROUP: tl.constexpr,
                   KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_Q: tl.constexpr,
                   BLOCK_K: tl.constexpr, SCALE: tl.constexpr, LEFT: tl.constexpr,
                   RIGHT: tl.constexpr, ALIBI: tl.constexpr, SEGMENTS: tl.constexpr,
                   SHARED: tl.constexpr, PRECISION: tl.constexpr):
  """out, lse of BLOCK_Q rows of one key/value head; num_groups = batch * KV_HEADS."""
  batch, first, t_first, t, g, inside, tile, kv_start, lse_row = _row_tile(
      T, S, num_groups, GROUP, KV_HEADS, DIM, BLOCK_Q)
  q = tl.load(q_ptr + tile, mask=inside[:, None], other=0.0)
  origin, p, slope, q_segment, lo, mid, end, hi = _row_mask(
      batch, first, t_first, t, g, T, S, offset_ptr, slope_ptr, q_segment_ptr, k_range_ptr,
      KV_HEADS * GROUP, GROUP, BLOCK_Q, BLOCK_K, SCALE, LEFT, RIGHT, ALIBI, SEGMENTS)

  acc = tl.zeros([BLOCK_Q, DIM], tl.float32)
  top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
  total = tl.zeros([BLOCK_Q], tl.float32)
  k_segments = k_segment_ptr + tl.cast(batch, tl.int64) * S
  edges = (lo, mid, end, hi)
  for part in tl.static_range(2 if SEGMENTS else 1 if LEFT is None else 0, 3):
    acc, top, total = _forward_blocks(
        acc, top, total, q, k_ptr + kv_start, v_ptr + kv_start, k_segments, slope, p, q_segment,
        origin, S, edges[part], edges[part + 1], KV_HEADS, DIM, BLOCK_K, SCALE * LOG2E, LEFT, RIGHT,
        ALIBI, SEGMENTS, SHARED, PRECISION, part != 1)

  empty = total == 0
  out = acc / tl.where(empty, 1.0, total)[:, None]
  tl.store(out_ptr + tile, out.to(out_ptr.dtype.element_ty), mask=inside[:, None])
  lse = (top + tl.log2(tl.where(empty, 1.0, total))) * LN2
  if ALIBI:
    lse -= slope * SCALE * t.to(tl.float32)  # mutant: lse
  tl.store(lse_ptr + lse_row, tl.where(empty, float("-inf"), lse), mask=inside)


@triton.jit
def _dq_blocks(dq, moment, q, dout, lse2, delta, k_ptr, v_ptr, segment_ptr, slope, p, q_segment,
               origin, S, lo, hi, KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_K: tl.constexpr,
               SCALE2: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, ALIBI: tl.constexpr,
               SEGMENTS: tl.constexpr, SHARED: tl.constexpr, PRECISION: tl.constexpr,
               DSLOPES: tl.constexpr, MASKED: tl.constexpr):
  cols = tl.arange(0, BLOCK_K)
  tile = cols[:, None] * (KV_HEADS * DIM) + tl.arange(0, DIM)[None, :]
  for n in range(lo, hi, BLOCK_K):
    j = n + cols
    start = tl.cast(n, tl.int64) * (KV_HEADS * DIM)
    k = _load(k_ptr + start + tile, j < S, MASKED)
    v = k
    if not SHARED:
      v = _load(v_ptr + start + tile, j < S, MASKED)
    scores = _scores(q, k, slope, cols, n - origin, ALIBI, PRECISION)
    weights = tl.exp2(tl.fma(scores, SCALE2, -lse2[:, None]))
    if MASKED:
      visible = _sees_keys(p, j, q_segment, segment_ptr, S, LEFT, RIGHT, SEGMENTS)
      weights = tl.where(visible, weights, 0.0)
    dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    dscores = weights * (dweights - delta[:, None])
    if DSLOPES:
      # From the tile's origin, exactly; two-dimensional integers would take a conversion a score.
      key = cols.to(tl.float32) + tl.cast(n - origin, tl.float32)
      row = (p - origin).to(tl.float32)
      distance = key[None, :] - row[:, None]  # mutant: distance
      moment += tl.sum(dscores * distance, 1)  # mutant: moment
    dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
  return dq, moment


@triton.jit
def dq_kernel(q_ptr, k_ptr, v_ptr, out_ptr, lse2_ptr, dout_ptr, offset_ptr, slope_ptr,
              q_segment_ptr, k_segment_ptr, k_range_ptr, T, S, num_groups, dq_ptr, delta_ptr,
              GROUP: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
              BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SCALE: tl.constexpr,
              LEFT: tl.constexpr, RIGHT: tl.constexpr, ALIBI: tl.constexpr,
              SEGMENTS: tl.constexpr, SHARED: tl.constexpr, PRECISION: tl.constexpr,
              DSLOPES: tl.constexpr):
  """dq, and delta = sum(out * dout) for `dkv_kernel`; a program has the rows of the forward's.

  Under DSLOPES, delta_ptr is [2, batch, heads, T]: behind the deltas are the rows' shares of the
  gradient of the slopes, sum(dscores * distance).
  """
  batch, first, t_first, t, g, inside, tile, kv_start, lse_row = _row_tile(
      T, S, num_groups, GROUP, KV_HEADS, DIM, BLOCK_Q)
  q = tl.load(q_ptr + tile, mask=inside[:, None], other=0.0)
  dout = tl.load(dout_ptr + tile, mask=inside[:, None], other=0.0)
  out = tl.load(out_ptr + tile, mask=inside[:, None], other=0.0)
  delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
  tl.store(delta_ptr + lse_row, delta, mask=inside)
  lse2 = tl.load(lse2_ptr + lse_row)
  origin, p, slope, q_segment, lo, mid, end, hi = _row_mask(
      batch, first, t_first, t, g, T, S, offset_ptr, slope_ptr, q_segment_ptr, k_range_ptr,
      KV_HEADS * GROUP, GROUP, BLOCK_Q, BLOCK_K, SCALE, LEFT, RIGHT, ALIBI, SEGMENTS)
  if ALIBI:
    lse2 += slope * (SCALE * LOG2E) * t.to(tl.float32)

  dq = tl.zeros([BLOCK_Q, DIM], tl.float32)
  moment = tl.zeros([BLOCK_Q], tl.float32)
  k_segments = k_segment_ptr + tl.cast(batch, tl.int64) * S
  edges = (lo, mid, end, hi)
  for part in tl.static_range(2 if SEGMENTS else 1 if LEFT is None else 0, 3):
    dq, moment = _dq_blocks(
        dq, moment, q, dout, lse2, delta, k_ptr + kv_start, v_ptr + kv_start, k_segments, slope, p,
        q_segment, origin, S, edges[part], edges[part + 1], KV_HEADS, DIM, BLOCK_K, SCALE * LOG2E,
        LEFT, RIGHT, ALIBI, SEGMENTS, SHARED, PRECISION, DSLOPES, part != 1)
  if DSLOPES:
    behind = tl.cast(num_groups, tl.int64) * GROUP * T
    tl.store(delta_ptr + behind + lse_row, moment, mask=inside)
  tl.store(dq_ptr + tile, (dq * SCALE).to(dq_ptr.dtype.element_ty),
           mask=inside[:, None])


@triton.jit
def _dkv_blocks(dk, dv, k, v, q_ptr, dout_ptr, lse2_ptr, delta_ptr, slope_ptr, segment_ptr, j,
                k_segment, offset, T, n, lo, hi, split, GROUP: tl.constexpr, HEADS: tl.constexpr,
                DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
                SCALE: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, ALIBI: tl.constexpr,
                SEGMENTS: tl.constexpr, SHARED: tl.constexpr, PRECISION: tl.constexpr,
                SPLITS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, MASKED: tl.constexpr):
  jj = tl.arange(0, BLOCK_K).to(tl.float32)
  d = tl.arange(0, DIM)
  tile = lo // BLOCK_Q
  # mutant: split
  skip = (split - tile % SPLITS + SPLITS) % SPLITS  # tiles are dealt out to the splits in turn
  for first in range(lo + skip * BLOCK_Q, hi, BLOCK_Q * SPLITS):
    t_first, t, g, inside = _rows(first, T, GROUP, BLOCK_Q, MASKED)
    rows = t[:, None] * (HEADS * DIM) + g[:, None] * DIM + d[None, :]
    start = tl.cast(t_first, tl.int64) * (HEADS * DIM)
    q = _load(q_ptr + start + rows, inside, MASKED)
    dout = _load(dout_ptr + start + rows, inside, MASKED)
    lse2 = tl.load(lse2_ptr + t_first + g * T + t)
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [keys, rows]
    if ALIBI:
      slope2 = tl.load(slope_ptr + g) * LOG2E  # mutant: slopes of dkv
      lse2 = tl.fma(slope2, (offset + t_first - n + t).to(tl.float32), lse2)
      shift = tl.fma(jj[:, None], slope2[None, :], -lse2[None, :])
    else:
      shift = -lse2[None, :]
    weights = tl.exp2(tl.fma(scores, SCALE * LOG2E, shift))
    if MASKED:
      q_segment = t
      if SEGMENTS:
        q_segment = tl.load(segment_ptr + t_first + t)
      p = offset + t_first + t
      visible = _sees(p[None, :], j[:, None], q_segment[None, :], k_segment[:, None],
                      LEFT, RIGHT, SEGMENTS) & inside[None, :]  # mutant: end of the rows
      weights = tl.where(visible, weights, 0.0)
    if DV:
      dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision=PRECISION)
    if DK:
      delta = tl.load(delta_ptr + t_first + g * T + t)
      dweights = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
      dscores = weights * (dweights - delta[None, :])
      if SHARED and DV:  # one sum, since key and value are one array
        dv = tl.dot((dscores * SCALE).to(q.dtype), q, dv, input_precision=PRECISION)
      else:
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
  return dk, dv


@triton.jit
def dkv_kernel(q_ptr, k_ptr, v_ptr, dout_ptr, lse2_ptr, delta_ptr, offset_ptr, slope_ptr,
               q_segment_ptr, k_segment_ptr, q_range_ptr, T, S, num_groups, dk_ptr, dv_ptr,
               GROUP: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
               BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SCALE: tl.constexpr,
               LEFT: tl.constexpr, RIGHT: tl.constexpr, ALIBI: tl.constexpr,
               SEGMENTS: tl.constexpr, SHARED: tl.constexpr, PRECISION: tl.constexpr,
               SPLITS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr):
  """dk if DK, dv if DV, of BLOCK_K keys from every SPLITS-th tile of the rows that see them.

  dk_ptr, dv_ptr: [SPLITS, batch, S, KV_HEADS, DIM]; where key and value are one array and both are
  wanted, dv is their sum and dk is not written.
  """
  HEADS: tl.constexpr = KV_HEADS * GROUP
  pid = tl.program_id(0)
  group = pid % num_groups
  batch = group // KV_HEADS
  head = group % KV_HEADS
  split = pid // num_groups % SPLITS
  n = pid // num_groups // SPLITS * BLOCK_K  # the first keys are seen the most: they start first

  j = n + tl.arange(0, BLOCK_K)
  tile = tl.arange(0, BLOCK_K)[:, None] * (KV_HEADS * DIM) + tl.arange(0, DIM)[None, :]
  kv_start = (tl.cast(batch, tl.int64) * S + n) * (KV_HEADS * DIM) + head * DIM
  q_start = tl.cast(batch, tl.int64) * T * (HEADS * DIM) + head * (GROUP * DIM)
  stat_start = (tl.cast(batch, tl.int64) * HEADS + head * GROUP) * T
  inside = (j < S)[:, None]
  k = tl.load(k_ptr + kv_start + tile, mask=inside, other=0.0)
  v = k
  if DK and not SHARED:
    v = tl.load(v_ptr + kv_start + tile, mask=inside, other=0.0)

  # Rows that see some of these keys lie in [lo, hi); all of them in whole tiles of [mid, end).
  offset = tl.load(offset_ptr + batch)
  n_last = tl.minimum(n + BLOCK_K, S) - 1
  lo = 0
  mid = 0
  hi = T * GROUP
  end = T * GROUP
  if RIGHT is not None:
    # mutant: first row
    lo = tl.minimum(tl.maximum(n - RIGHT - offset, 0), T) * GROUP // BLOCK_Q * BLOCK_Q
    mid = tl.minimum(tl.maximum(n_last - RIGHT - offset, 0), T) * GROUP  # mutant: first whole tile
    mid = (mid + BLOCK_Q - 1) // BLOCK_Q * BLOCK_Q
  if LEFT is not None:
    hi = tl.minimum(tl.maximum(n_last + LEFT - offset + 1, 0), T) * GROUP  # mutant: last row
    end = tl.minimum(tl.maximum(n + LEFT - offset + 1, 0), T) * GROUP
  mid = tl.maximum(lo, tl.minimum(mid, hi + BLOCK_Q - 1) // BLOCK_Q * BLOCK_Q)
  end = tl.maximum(mid, end // BLOCK_Q * BLOCK_Q)
  k_segment = j
  if SEGMENTS:
    # Keys past the end repeat the last one's id, so that they widen nothing.
    k_segment = tl.load(k_segment_ptr + tl.cast(batch, tl.int64) * S + tl.minimum(j, S - 1))
    blocks = tl.cdiv(T * GROUP, BLOCK_Q)
    lo, hi = _segment_hull(q_range_ptr + batch * 2 * blocks, blocks, tl.min(k_segment),
                           tl.max(k_segment), lo, tl.maximum(lo, hi), BLOCK_Q)
    mid = lo
    end = lo

  dk = tl.zeros([BLOCK_K, DIM], tl.float32)
  dv = tl.zeros([BLOCK_K, DIM], tl.float32)
  slopes = slope_ptr + batch * HEADS + head * GROUP
  segments = q_segment_ptr + tl.cast(batch, tl.int64) * T
  starts, ends = (lo, mid, end), (tl.minimum(mid, hi), end, hi)
  for part in tl.static_range(2 if SEGMENTS else 1 if RIGHT is None else 0, 3):
    dk, dv = _dkv_blocks(dk, dv, k, v, q_ptr + q_start, dout_ptr + q_start, lse2_ptr + stat_start,
                         delta_ptr + stat_start, slopes, segments, j, k_segment, offset, T, n,
                         starts[part], ends[part], split, GROUP, HEADS, DIM, BLOCK_Q, BLOCK_K,
                         SCALE, LEFT, RIGHT, ALIBI, SEGMENTS, SHARED, PRECISION, SPLITS, DK, DV,
                         part != 1)

  start = tl.cast(split, tl.int64) * (num_groups // KV_HEADS) * S * (KV_HEADS * DIM)
  if DV:
    tl.store(dv_ptr + start + kv_start + tile, dv.to(dv_ptr.dtype.element_ty), mask=inside)
  if DK and not (SHARED and DV):
    tl.store(dk_ptr + start + kv_start + tile, (dk * SCALE).to(dk_ptr.dtype.element_ty),
             mask=inside)
