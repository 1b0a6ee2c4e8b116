"""Triton kernels: LoRA's first product under dropout, and the rotation of the vision tower's queries and keys.

LoRA's is one pass over x forward and one backward, with a mask nobody stores.

Which of x's elements stay is computed where it is needed, from the element's place and a seed (Philox with 7 rounds:
Salmon and others, "Parallel random numbers: as easy as 1, 2, 3", 2011). So x is read once in each direction, and of
dropout nothing is written: PyTorch's own reads and writes x twice more, and keeps a byte an element.
"""

import torch
import triton
import triton.language as tl

ROWS, COLUMNS = 64, 64  # of x at once; with 8 warps no register is spilled on sm_90, up to rank 256
PROGRAMS = 4 * 132  # backward: about four for each multiprocessor of an H100


@triton.jit
def _stays(seed, rows, first, inputs, threshold, COLUMNS: tl.constexpr):
    """Which elements of x stay, [rows, COLUMNS] from column `first` on; four neighbours share a call of Philox."""
    quads = rows[:, None] * tl.cdiv(inputs, 4) + first // 4 + tl.arange(0, COLUMNS // 4)[None, :]
    a, b, c, d = tl.randint4x(seed, quads, 7)
    drawn = tl.join(tl.join(a, c), tl.join(b, d)).to(tl.uint32, bitcast=True)  # [..., 0, 1] is b: its place is 1
    return tl.reshape(drawn >= threshold.to(tl.uint32), (rows.shape[0], COLUMNS))


@triton.jit(do_not_specialize=["seed", "count"])
def _down(x, a, low, seed, threshold, factor, count, inputs, rank, stride,
          ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, DROPS: tl.constexpr):
    """low [count, rank] = factor * (x, where it stays) A'; a program makes ROWS rows of it."""
    rows, ranks = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, RANK)
    total = tl.zeros((ROWS, RANK), tl.float32)
    for first in range(0, inputs, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        inside = columns < inputs
        part = tl.load(x + rows[:, None].to(tl.int64) * stride + columns[None, :],
                       (rows < count)[:, None] & inside[None, :], 0.0)
        if DROPS:
            part = tl.where(_stays(seed, rows, first, inputs, threshold, COLUMNS), part, 0.0)
        weights = tl.load(a + ranks[None, :] * inputs + columns[:, None],
                          (ranks < rank)[None, :] & inside[:, None], 0.0)
        total += tl.dot(part, weights, input_precision="ieee")
    tl.store(low + rows[:, None] * rank + ranks[None, :], (factor * total).to(low.dtype.element_ty),
             (rows < count)[:, None] & (ranks < rank)[None, :])


@triton.jit(do_not_specialize=["seed", "count", "share"])
def _up(x, a, up, of_x, of_a, seed, threshold, factor, count, inputs, rank, stride, share,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, DROPS: tl.constexpr, NEEDS_X: tl.constexpr):
    """of_x [count, inputs] = factor * up A, where x stays; of_a [shares, rank, inputs], to be summed over shares,
    = factor * up' (x, where it stays). A program makes COLUMNS columns of both, from `share` rows."""
    first, ranks = tl.program_id(0) * COLUMNS, tl.arange(0, RANK)
    columns = first + tl.arange(0, COLUMNS)
    inside, real = columns < inputs, ranks < rank
    weights = tl.load(a + ranks[:, None] * inputs + columns[None, :], real[:, None] & inside[None, :], 0.0)
    total = tl.zeros((RANK, COLUMNS), tl.float32)
    for start in range(tl.program_id(1) * share, tl.minimum((tl.program_id(1) + 1) * share, count), ROWS):
        rows = start + tl.arange(0, ROWS)
        here = (rows < count)[:, None] & inside[None, :]
        part = tl.load(x + rows[:, None].to(tl.int64) * stride + columns[None, :], here, 0.0)
        high = tl.load(up + rows[:, None] * rank + ranks[None, :], (rows < count)[:, None] & real[None, :], 0.0)
        if DROPS:
            stays = _stays(seed, rows, first, inputs, threshold, COLUMNS)
            part = tl.where(stays, part, 0.0)
        total += tl.dot(tl.trans(high), part, input_precision="ieee")
        if NEEDS_X:
            back = factor * tl.dot(high, weights, input_precision="ieee")
            if DROPS:
                back = tl.where(stays, back, 0.0)
            tl.store(of_x + rows[:, None].to(tl.int64) * inputs + columns[None, :],
                     back.to(of_x.dtype.element_ty), here)
    tl.store(of_a + (tl.program_id(1) * rank + ranks[:, None]) * inputs + columns[None, :], factor * total,
             real[:, None] & inside[None, :])


@triton.jit
def _turn(qkv, cos, sin, out, HEADS: tl.constexpr, SIZE: tl.constexpr, ALL: tl.constexpr, HALF: tl.constexpr):
    """One row of query, key and value: the halves of query's and key's heads are turned in fp32, value is copied."""
    row, half = tl.program_id(0).to(tl.int64), SIZE // 2
    heads, columns = tl.arange(0, ALL)[:, None], tl.arange(0, HALF)[None, :]
    inside = (heads < 3 * HEADS) & (columns < half)
    turns = inside & (heads < 2 * HEADS)
    at, angle = (row * 3 * HEADS + heads) * SIZE + columns, row * SIZE + columns + 0 * heads
    first = tl.load(qkv + at, inside, 0.0).to(tl.float32)
    second = tl.load(qkv + at + half, inside, 0.0).to(tl.float32)
    one = first * tl.load(cos + angle, turns, 1.0) - second * tl.load(sin + angle, turns, 0.0)
    two = second * tl.load(cos + angle + half, turns, 1.0) + first * tl.load(sin + angle + half, turns, 0.0)
    tl.store(out + at, one.to(out.dtype.element_ty), inside)
    tl.store(out + at + half, two.to(out.dtype.element_ty), inside)


def turned(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """qkv [rows, 3, heads, size] with query and key turned by the angles whose cos and sin are [rows, size]."""
    qkv = qkv.contiguous()
    rows, _, heads, size = qkv.shape
    out = torch.empty_like(qkv)
    _turn[rows,](qkv, cos.contiguous(), sin.contiguous(), out, heads, size, triton.next_power_of_2(3 * heads),
                 triton.next_power_of_2(size // 2))
    return out


def down(x: torch.Tensor, a: torch.Tensor, seed: int, p: float, scale: float) -> torch.Tensor:
    """scale * dropout(x) A', [rows, rank], for x [rows, inputs] and A [rank, inputs] of one dtype; rank up to 256."""
    (count, inputs), rank = x.shape, a.shape[0]
    low = x.new_empty(count, rank)
    _down[triton.cdiv(count, ROWS),](x, a, low, seed, _threshold(p), scale / (1 - p), count, inputs, rank, x.stride(0),
                                     ROWS, COLUMNS, _padded(rank), p > 0, num_warps=8,
                                     num_stages=_stages(x, rank))
    return low


def up(x: torch.Tensor, a: torch.Tensor, gradient: torch.Tensor, seed: int, p: float, scale: float, needs_x: bool
       ) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The gradients of x [rows, inputs] (None unless `needs_x`) and of A (fp32), from that of `down` [rows, rank]."""
    (count, inputs), rank = x.shape, a.shape[0]
    strips = triton.cdiv(inputs, COLUMNS)
    share = ROWS * triton.cdiv(count, ROWS * triton.cdiv(PROGRAMS, strips))
    shares = triton.cdiv(count, share)
    of_x = x.new_empty(count, inputs) if needs_x else x
    of_a = x.new_empty(shares, rank, inputs, dtype=torch.float32)
    _up[strips, shares](x, a, gradient, of_x, of_a, seed, _threshold(p), scale / (1 - p), count, inputs, rank,
                        x.stride(0), share, ROWS, COLUMNS, _padded(rank), p > 0, needs_x, num_warps=8,
                        num_stages=_stages(x, rank))
    return of_x if needs_x else None, of_a.sum(0)


def _threshold(p: float) -> int:
    """Of 2^32 numbers so many drop an element."""
    return min(round(p * 2**32), 2**32 - 1)


def _padded(rank: int) -> int:
    """The rank as Triton's blocks can have it."""
    return max(16, triton.next_power_of_2(rank))


def _stages(x: torch.Tensor, rank: int) -> int:
    """Blocks that are loaded ahead. Beyond rank 128 three of them take 152 KiB of shared memory: few GPUs have it."""
    roomy = _padded(rank) <= 128 or not x.is_cuda or torch.cuda.get_device_capability(x.device) in ((8, 0), (9, 0))
    return 3 if roomy else 1
