"""The Triton kernels of the parallel block: pure device code, called by `triton.py` beside it.

All but the norm are one matrix product with something before or after it. A program makes one
tile of the result, BLOCK_M tokens by BLOCK_N columns, from weights as they lie in memory: IN of
them is the contraction if they project into the layer, its columns if they lead out of it.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# Constants of a `triton.jit` function are passed as plain values, static_range is compiled, and
# Pyright takes kernels/triton for the package.
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def normalize_kernel(x_ptr, gain_ptr, M, h_ptr, D: tl.constexpr, EPS: tl.constexpr,
                     CENTRED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
  """h [M, D]: whole rows of x at a time, read once, less their mean if CENTRED, over their size."""
  row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
  column = tl.arange(0, BLOCK_D)
  at = row.to(tl.int64)[:, None] * D + column[None, :]
  inside = (row < M)[:, None] & (column < D)[None, :]
  x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
  if CENTRED:  # mutant: mean
    # mutant: row's end
    x = tl.where((column < D)[None, :], x - (tl.sum(x, 1) / D)[:, None], 0.0)
  x *= tl.rsqrt(tl.sum(x * x, 1) / D + EPS)[:, None]  # mutant: size
  gain = tl.load(gain_ptr + column, mask=column < D, other=0.0)
  tl.store(h_ptr + at, (x * gain[None, :]).to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _place(M, columns, BLOCK_M: tl.constexpr, TOGETHER: tl.constexpr):
  """(first token, tile of columns) of this program.

  TOGETHER tiles of tokens go through all columns before the next ones do.
  """
  index = tl.program_id(0)
  group = index // (TOGETHER * columns)
  index -= group * (TOGETHER * columns)
  size = tl.minimum(tl.cdiv(M, BLOCK_M) - group * TOGETHER, TOGETHER)
  return (group * TOGETHER + index % size) * BLOCK_M, index // size  # mutant: group


@triton.jit
def _rows(row, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
  """Offsets of BLOCK_N rows, from `row` on, and BLOCK_K columns of an array [N, K].

  Rows past the end repeat the last.
  """
  rows = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - row)
  return tl.cast(row, tl.int64) * K + (rows[:, None] * K + tl.arange(0, BLOCK_K)[None, :])


@triton.jit
def _sum_of_products(xs, ws, KS, token, M, column, N: tl.constexpr, TRANSPOSED: tl.constexpr,
                     BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                     PRECISION: tl.constexpr):
  """The sum of x @ w over the x [M, K] and the w [K, N], or [N, K] if TRANSPOSED.

  One loop goes through all of them: its loads need not begin anew with each.
  """
  k = tl.arange(0, BLOCK_K)
  # Columns past the end are those of the beginning, so that loads of whole vectors need no mask.
  columns = (column + tl.arange(0, BLOCK_N)) % N
  acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # mutant: accumulator
  total = KS[0]
  for i in tl.static_range(1, len(xs)):
    total += KS[i]
  for step in range(0, total // BLOCK_K):  # mutant: contraction
    x_ptr, w_ptr, K, start = xs[0], ws[0], KS[0], step * BLOCK_K
    for i in tl.static_range(1, len(xs)):
      past = start >= K  # mutant: end of a product
      start = tl.where(past, start - K, start)  # mutant: next product
      x_ptr, w_ptr = tl.where(past, xs[i], x_ptr), tl.where(past, ws[i], w_ptr)
      K = tl.where(past, KS[i], K)
    x = tl.load(x_ptr + start + _rows(token, M, K, BLOCK_M, BLOCK_K))
    if TRANSPOSED:
      w = tl.trans(tl.load(w_ptr + start + _rows(column, N, K, BLOCK_N, BLOCK_K)))
    else:
      w = tl.load(w_ptr + tl.cast(start, tl.int64) * N + (k[:, None] * N + columns[None, :]))
    acc = tl.dot(x, w, acc, input_precision=PRECISION)
  return acc


@triton.jit
def _halves(x):
  """The left and the right columns of a tile."""
  return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def _quarters(x):
  """A tile's columns in four parts: an epilogue that takes them in turn has registers enough."""
  left, right = _halves(x)
  first, second = _halves(left)
  third, fourth = _halves(right)
  return first, second, third, fourth


@triton.jit
def _first_channel(pair, HEADS: tl.constexpr, HALF: tl.constexpr):
  """The channel of HEADS heads side by side that is the first of a pair."""
  if HEADS > 1:
    pair += pair // HALF * HALF  # mutant: head of a pair
  return pair


@triton.jit
def in_projection_kernel(h_ptr, query_ptr, key_ptr, value_ptr, gate_ptr, up_ptr, cos_ptr, sin_ptr,
                         M, query_out, key_out, value_out, act_out, gate_out, up_out,
                         D: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
                         DIM_HEAD: tl.constexpr, F: tl.constexpr, VALUE: tl.constexpr,
                         ROTATED: tl.constexpr, KEEP: tl.constexpr, BLOCK_M: tl.constexpr,
                         BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TOGETHER: tl.constexpr,
                         PRECISION: tl.constexpr):
  """All that is computed from h [M, D], in pairs of columns that meet in the epilogue.

  A pair is a column of gate with the same of up, or two channels of a head, half a head apart.
  Tiles are of queries first, then of keys and values, then of gate and up.
  """
  PAIRS: tl.constexpr = BLOCK_N // 2
  HALF: tl.constexpr = DIM_HEAD // 2
  OF_QUERY: tl.constexpr = HEADS * HALF
  KEYS: tl.constexpr = KV_HEADS * HALF
  OF_KEY: tl.constexpr = (2 if VALUE else 1) * KEYS
  QUERY_TILES: tl.constexpr = (OF_QUERY + PAIRS - 1) // PAIRS
  HEAD_TILES: tl.constexpr = QUERY_TILES + (OF_KEY + PAIRS - 1) // PAIRS
  TILES: tl.constexpr = HEAD_TILES + (F + PAIRS - 1) // PAIRS
  token, tile = _place(M, TILES, BLOCK_M, TOGETHER)
  at = tl.arange(0, BLOCK_N)
  pair, right = at % PAIRS, at >= PAIRS
  # That 32 columns lie together, as HALF, F and PAIRS are multiples of 32, Triton does not see
  # through the selections: it would load them one by one.
  if tile >= HEAD_TILES:
    pair = ((tile - HEAD_TILES) * PAIRS + pair) % F
    # mutant: gate and up
    column = tl.where(right, up_ptr + pair, gate_ptr + pair)
    column = tl.max_contiguous(tl.multiple_of(column, 64), 32)
    stride = F
  elif tile >= QUERY_TILES:
    pair = ((tile - QUERY_TILES) * PAIRS + pair) % OF_KEY
    # mutant: keys and values
    column = tl.where(pair < KEYS, key_ptr + _first_channel(pair, KV_HEADS, HALF),
                      value_ptr + _first_channel(pair - KEYS, KV_HEADS, HALF))
    column += tl.where(right, HALF, 0)
    column = tl.max_contiguous(tl.multiple_of(column, 64), 32)
    stride = KV_HEADS * DIM_HEAD
  else:
    pair = (tile * PAIRS + pair) % OF_QUERY
    # mutant: halves of a head
    column = query_ptr + (pair // HALF * DIM_HEAD + pair % HALF + tl.where(right, HALF, 0))
    column = tl.max_contiguous(tl.multiple_of(column, 64), 32)
    stride = HEADS * DIM_HEAD

  h_tile = h_ptr + _rows(token, M, D, BLOCK_M, BLOCK_K)
  w_tile = column[None, :] + tl.arange(0, BLOCK_K)[:, None] * stride
  acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
  for _ in range(0, D, BLOCK_K):
    acc = tl.dot(tl.load(h_tile), tl.load(w_tile), acc, input_precision=PRECISION)
    h_tile += BLOCK_K
    w_tile += BLOCK_K * stride

  parts = _quarters(acc)
  for part in tl.static_range(2):
    pair = part * (PAIRS // 2) + tl.arange(0, PAIRS // 2)
    first, second = parts[part], parts[part + 2]
    if tile >= HEAD_TILES:
      _store_hidden(first, second, token, M, (tile - HEAD_TILES) * PAIRS + pair, act_out, gate_out,
                    up_out, F, KEEP)
    elif tile >= QUERY_TILES:
      _store_heads(first, second, token, M, (tile - QUERY_TILES) * PAIRS + pair, cos_ptr, sin_ptr,
                   key_out, value_out, HALF, KV_HEADS, VALUE, ROTATED)
    else:
      _store_heads(first, second, token, M, tile * PAIRS + pair, cos_ptr, sin_ptr, query_out,
                   query_out, HALF, HEADS, False, ROTATED)


@triton.jit
def _store_hidden(gate, up, token, M, column, act_out, gate_out, up_out, F: tl.constexpr,
                  KEEP: tl.constexpr):
  """The SwiGLU of columns of gate and up; and them, if KEEP."""
  row = tl.arange(0, gate.shape[0])
  inside = (row < M - token)[:, None] & (column < F)[None, :]
  at = tl.cast(token, tl.int64) * F + (row[:, None] * F + column[None, :])
  dtype = act_out.dtype.element_ty
  tl.store(act_out + at, (gate / (1 + tl.exp2(gate * -LOG2E)) * up).to(dtype), mask=inside)
  if KEEP:
    tl.store(gate_out + at, gate.to(dtype), mask=inside)
    tl.store(up_out + at, up.to(dtype), mask=inside)


@triton.jit
def _store_heads(first, second, token, M, pair, cos_ptr, sin_ptr, out_ptr, value_out,
                 HALF: tl.constexpr, HEADS: tl.constexpr, VALUE: tl.constexpr,
                 ROTATED: tl.constexpr):
  """Pairs of channels of out [M, HEADS, 2 * HALF], rotated; then those of values, if any."""
  COUNT: tl.constexpr = HEADS * HALF
  row = tl.arange(0, first.shape[0])[:, None]
  token = tl.cast(token, tl.int64)
  inside = (row < M - token) & (pair < (2 * COUNT if VALUE else COUNT))[None, :]
  if ROTATED:
    turn = token * HALF + (row * HALF + (pair % HALF)[None, :])  # mutant: angles
    turns = inside & (pair < COUNT)[None, :]  # mutant: rotated columns
    cos = tl.load(cos_ptr + turn, mask=turns, other=1.0)
    sin = tl.load(sin_ptr + turn, mask=turns, other=0.0)
    # mutant: rotation
    first, second = first * cos - second * sin, second * cos + first * sin
  column = out_ptr + (pair // HALF * (2 * HALF) + pair % HALF)
  if VALUE:
    # mutant: value's place
    column = tl.where(pair < COUNT, column,
                      value_out + _first_channel(pair - COUNT, HEADS, HALF))
  at = token * (2 * COUNT) + (column[None, :] + row * (2 * COUNT))
  tl.store(at, first.to(out_ptr.dtype.element_ty), mask=inside)
  tl.store(at + HALF, second.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def out_projection_kernel(x_ptr, attended_ptr, act_ptr, attn_out_ptr, ff_out_ptr, M, y_ptr,
                          D: tl.constexpr, ATTENDED: tl.constexpr, F: tl.constexpr,
                          WITH_X: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                          BLOCK_K: tl.constexpr, TOGETHER: tl.constexpr, PRECISION: tl.constexpr):
  """y [M, D] = x + attended @ attn_out + act @ ff_out."""
  TILES: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
  token, tile = _place(M, TILES, BLOCK_M, TOGETHER)
  column = tile * BLOCK_N
  acc = _sum_of_products((attended_ptr, act_ptr), (attn_out_ptr, ff_out_ptr), (ATTENDED, F), token,
                         M, column, D, False, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
  row = tl.arange(0, BLOCK_M)
  parts = _quarters(acc)
  for part in tl.static_range(4):
    columns = column + part * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
    inside = (row < M - token)[:, None] & (columns < D)[None, :]
    at = tl.cast(token, tl.int64) * D + (row[:, None] * D + columns[None, :])
    y = parts[part]
    if WITH_X:  # mutant: residual
      y += tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_gradient_kernel(dy_ptr, gate_ptr, up_ptr, ff_out_ptr, M, dgate_out, dup_out, act_out,
                           D: tl.constexpr, F: tl.constexpr, BLOCK_M: tl.constexpr,
                           BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TOGETHER: tl.constexpr,
                           PRECISION: tl.constexpr):
  """The gradients of gate and up [M, F] where that of their SwiGLU is dy @ ff_out.T; and it."""
  TILES: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
  token, tile = _place(M, TILES, BLOCK_M, TOGETHER)
  column = tile * BLOCK_N
  dact = _sum_of_products((dy_ptr,), (ff_out_ptr,), (D,), token, M, column, F, True, BLOCK_M,
                          BLOCK_N, BLOCK_K, PRECISION)
  row = tl.arange(0, BLOCK_M)
  dtype = dgate_out.dtype.element_ty
  parts = _quarters(dact)
  for part in tl.static_range(4):
    columns = column + part * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)  # mutant: part
    inside = (row < M - token)[:, None] & (columns < F)[None, :]
    at = tl.cast(token, tl.int64) * F + (row[:, None] * F + columns[None, :])
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    s = 1 / (1 + tl.exp2(gate * -LOG2E))
    silu = gate * s
    tl.store(act_out + at, (silu * up).to(dtype), mask=inside)
    # mutant: up's gradient
    tl.store(dup_out + at, (parts[part] * silu).to(dtype), mask=inside)
    # mutant: gate's gradient
    tl.store(dgate_out + at, (parts[part] * up * (s + silu * (1 - s))).to(dtype), mask=inside)


@triton.jit
def input_gradient_kernel(dquery_ptr, dkey_ptr, dvalue_ptr, dgate_ptr, dup_ptr, query_ptr, key_ptr,
                          value_ptr, gate_ptr, up_ptr, M, dh_ptr, D: tl.constexpr,
                          QUERIES: tl.constexpr, KEYS: tl.constexpr, F: tl.constexpr,
                          VALUE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                          BLOCK_K: tl.constexpr, TOGETHER: tl.constexpr, PRECISION: tl.constexpr):
  """dh [M, D]: the sum over the weights w [D, K] of dw @ w.T."""
  TILES: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
  token, tile = _place(M, TILES, BLOCK_M, TOGETHER)
  column = tile * BLOCK_N
  if VALUE:
    acc = _sum_of_products(  # mutant: weights
        (dquery_ptr, dkey_ptr, dvalue_ptr, dgate_ptr, dup_ptr),
        (query_ptr, key_ptr, value_ptr, gate_ptr, up_ptr),
        (QUERIES, KEYS, KEYS, F, F), token, M, column, D, True, BLOCK_M, BLOCK_N,
        BLOCK_K, PRECISION)
  else:
    acc = _sum_of_products(
        (dquery_ptr, dkey_ptr, dgate_ptr, dup_ptr), (query_ptr, key_ptr, gate_ptr, up_ptr),
        (QUERIES, KEYS, F, F), token, M, column, D, True, BLOCK_M, BLOCK_N, BLOCK_K,
        PRECISION)
  row = tl.arange(0, BLOCK_M)
  columns = column + tl.arange(0, BLOCK_N)
  inside = (row < M - token)[:, None] & (columns < D)[None, :]
  at = tl.cast(token, tl.int64) * D + (row[:, None] * D + columns[None, :])
  tl.store(dh_ptr + at, acc.to(dh_ptr.dtype.element_ty), mask=inside)
