"""Matrix products on the GPU, with what follows them fused in: bias, activation, and for the squeeze the pooled frames.

One kernel serves linear layers and convolutions alike, because of the layout: with time before channels, the window of
output step m is a row of numbers that begins stride · c_in after the window before it. So

    out[m, o] = activation(Σ_k x[m · row_step + k] · weight[k, o] + bias[o])

is a linear layer where rows lie end to end (row_step = k), and a convolution where they overlap. Nothing is copied out
into windows. With padding a row may begin before the recording or end after it: what lies outside counts as 0. With
groups of channels a row is in pieces, one for each tap, c_in apart. ``Product`` says all this in whole numbers.

The ladder of ``docs/kernels.md``, first and last rung:

* v1 (``simple_product``): one thread per output. Reads 8 bytes for every multiply-add: bound by memory.
* last (``tiled_product``): a block computes a tile of rows × outputs. It walks along the sum in steps of ``depth``
  numbers, copied into shared memory by 128-bit loads; each thread keeps up to 8 × 8 sums in registers, so 16 numbers
  read serve 64 multiply-adds. Shared memory holds two steps: the numbers of the next one are on their way from the
  device's memory while the sums of this one run. ``slices`` > 1 splits the sum among groups of threads of one block,
  added in fixed order at the end: that is for products with too few outputs to fill the GPU.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

from sewd_np.cuda_intrinsics import cuda, device, float32, int32, kernel, load, load4, static_range, store, store4
from sewd_np.cuda_math import activation_function
from sewd_np.cuda_tiles import add_outer

ZERO = float32(0)
SIMPLE_THREADS = 128


class Product(NamedTuple):
    """Where a product's numbers lie in x, weight and out, each seen as one row of numbers.

    ``items`` recordings of ``item_size`` numbers each give ``rows`` rows each. Row m begins ``lead`` numbers before
    place m · row_step of its recording and has ``taps`` pieces of ``inputs`` numbers, ``tap_step`` apart, one such row
    for each of ``groups`` groups, side by side. Each group has ``outputs`` outputs; weight is (taps, groups, inputs,
    outputs). ``factor``: frames pooled for each row, 0 for none; then ``tap_step`` is also the width of a frame.
    """

    items: int
    item_size: int
    rows: int
    row_step: int
    lead: int
    taps: int
    tap_step: int
    inputs: int
    groups: int
    outputs: int
    factor: int = 0

    @property
    def padded(self) -> bool:
        """Whether a row may reach outside its recording."""
        return self.lead > 0

    @property
    def vector(self) -> bool:
        """Whether four numbers in a row can be moved at once everywhere: every step is a multiple of 4."""
        steps = (self.item_size, self.row_step, self.lead, self.tap_step, self.inputs, self.outputs)
        return all(step % 4 == 0 for step in steps)


class Tile(NamedTuple):
    """What one block computes: ``rows`` × ``outputs``, ``depth`` numbers of the sum at a time.

    A thread holds ``own_rows`` × ``own_outputs`` sums, in pieces of 4 that lie apart, so that neighbouring threads read
    neighbouring numbers. ``rows`` and ``outputs`` are multiples of them, they and ``depth`` of 4.
    """

    rows: int
    outputs: int
    depth: int
    own_rows: int
    own_outputs: int
    slices: int
    resident: int = 0  # blocks that are to share a multiprocessor: it bounds the registers of a thread; 0 does not

    @property
    def slice_threads(self) -> int:
        return self.rows // self.own_rows * (self.outputs // self.own_outputs)

    @property
    def threads(self) -> int:
        return self.slice_threads * self.slices


# ------------------------------------------------------------------------------- v1


@cache
def simple_product(activation: str) -> Any:
    """v1: one thread per output of a ``Product``, in the order of the output. Any shape. At most 80 registers."""
    activate = activation_function(activation)

    @kernel(threads=SIMPLE_THREADS)
    def product(
        x, weight, bias, out, has_bias, items, item_size, rows, row_step, lead, taps, tap_step, inputs, groups, outputs,
        factor,
    ):  # fmt: skip
        place = cuda.grid(1)
        width = groups * outputs
        if place >= items * rows * width:
            return
        channel = place % width
        m = place // width % rows
        item = place // width // rows
        group = channel // outputs
        total = ZERO
        for tap in range(taps):
            for c in range(inputs):
                at = m * row_step - lead + tap * tap_step + group * inputs + c
                if at >= 0 and at < item_size:
                    row = (tap * groups + group) * inputs + c
                    total += load(x, item * item_size + at) * load(weight, row * outputs + channel - group * outputs)
        total = activate(total + load(bias, channel) if has_bias else total)
        if factor > 0:
            pooled = ZERO
            for r in range(factor):
                pooled += load(x, item * item_size + (m * factor + r) * tap_step + channel)
            total += pooled / float32(factor)
        store(out, place, total)

    return product


# ------------------------------------------------------------------------- last rung


@device
def load_between(x, at, low, high):
    """x[at], …, x[at + 3], and 0 for places outside low ≤ place < high."""
    a = load(x, at) if low <= at and at < high else ZERO
    b = load(x, at + 1) if low <= at + 1 and at + 1 < high else ZERO
    c = load(x, at + 2) if low <= at + 2 and at + 2 < high else ZERO
    d = load(x, at + 3) if low <= at + 3 and at + 3 < high else ZERO
    return a, b, c, d


@cache
def tiled_product(tile: Tile, activation: str, vector: bool, padded: bool, pooled: bool) -> Any:
    """The last rung: grid (tiles of rows × tiles of outputs, groups, items), ``tile.threads`` threads.

    ``vector``, ``padded``: as in ``Product``. ``pooled``: add the mean of ``factor`` frames. At most 128 registers, so
    that two blocks of 256 threads share a multiprocessor; 8 × 8 sums a thread need nearly all of them.
    """
    ROWS, OUTPUTS, DEPTH, OWN_ROWS, OWN_OUTPUTS, SLICES, _ = tile
    THREADS = tile.slice_threads
    ACROSS = OUTPUTS // OWN_OUTPUTS  # threads side by side
    # A warp is 4 threads down and 8 across where that goes, and neighbouring lanes differ in y, then in x: lanes in
    # pairs ask for the same address of the weight and, two apart, of x. That halves the passes of a 128-bit read.
    PAIRED = ACROSS % 8 == 0 and ROWS // OWN_ROWS % 4 == 0
    WARPS_ACROSS = ACROSS // 8
    ROW_PIECES, OUTPUT_PIECES = OWN_ROWS // 4, OWN_OUTPUTS // 4
    ROW_GAP, OUTPUT_GAP = ROWS // ROW_PIECES, OUTPUTS // OUTPUT_PIECES  # between a thread's pieces of 4
    # x lies in shared memory turned, (depth, rows + 4): a thread's 4 rows are then one load. 4 more keep it aligned
    # and halve the conflicts of the turned stores.
    PITCH = ROWS + 4
    X_SIZE, BUFFER = DEPTH * PITCH, DEPTH * (PITCH + OUTPUTS)
    SLICE_SIZE = 2 * BUFFER
    SUMS = OWN_ROWS * OWN_OUTPUTS
    # Steps of the sum written out, so that few instructions go to counting; 8 × 8 sums leave no register for a second.
    TOGETHER = min(DEPTH, 1 if SUMS > 32 else 256 // SUMS)
    SHARED = max(SLICES * SLICE_SIZE, (SLICES - 1) * THREADS * SUMS)
    # Who copies what: THREADS threads copy fours of numbers, X_FOURS to a row of x and W_FOURS to a row of the weight.
    X_FOURS, W_FOURS = DEPTH // 4, OUTPUTS // 4
    X_ROWS, W_ROWS = THREADS // X_FOURS, THREADS // W_FOURS
    X_LOADS, W_LOADS = -(-ROWS // X_ROWS), -(-DEPTH // W_ROWS)
    X_NUMBERS, W_NUMBERS = 4 * X_LOADS, 4 * W_LOADS
    X_EXACT, W_EXACT = X_LOADS * X_ROWS == ROWS, W_LOADS * W_ROWS == DEPTH
    assert THREADS % X_FOURS == 0 and THREADS % W_FOURS == 0
    activate = activation_function(activation)

    @kernel(threads=tile.threads, blocks=tile.resident)
    def product(
        x, weight, bias, out, has_bias, items, item_size, rows, row_step, lead, taps, tap_step, inputs, groups, outputs,
        factor,
    ):  # fmt: skip
        shared = cuda.shared.array(SHARED, float32, alignment=16)
        sums = cuda.local.array(SUMS, float32)
        four = cuda.local.array(4, float32)
        next_x = cuda.local.array(X_NUMBERS, float32)
        next_w = cuda.local.array(W_NUMBERS, float32)
        x_own = cuda.local.array(X_LOADS, int32)

        # Places in x and out need 64 bits: a batch of eight times ten minutes is 10⁹ numbers. All else is kept in 32 by
        # int32(…), for Numba widens every sum: registers are what limits this kernel.
        inputs, outputs, taps, tap_step = int32(inputs), int32(outputs), int32(taps), int32(tap_step)
        slice_ = int32(cuda.threadIdx.x // THREADS)
        thread = int32(cuda.threadIdx.x - slice_ * THREADS)
        if PAIRED:
            warp, lane = thread // 32, thread % 32
            warp_row = warp // WARPS_ACROSS
            ty = int32((warp_row * 4 + (lane & 1) + (lane >> 4) * 2) * 4)
            tx = int32(((warp - warp_row * WARPS_ACROSS) * 8 + (lane >> 1) % 8) * 4)
        else:
            ty = int32(thread // ACROSS * 4)
            tx = int32(thread * 4 - ty * ACROSS)
        group, item = cuda.blockIdx.y, cuda.blockIdx.z
        # Tiles of outputs run first: the blocks at work at one time share rows of x, and the weight is small.
        output_tiles = int32((outputs + OUTPUTS - 1) // OUTPUTS)
        row_tile = int32(cuda.blockIdx.x // output_tiles)
        m0 = row_tile * ROWS
        n0 = int32((cuda.blockIdx.x - row_tile * output_tiles) * OUTPUTS)
        item_start = item * item_size
        item_end = item_start + item_size

        per_tap = int32((inputs + DEPTH - 1) // DEPTH)
        span = int32(per_tap * DEPTH)
        steps = int32((taps * per_tap + SLICES - 1) // SLICES)
        tap = int32(slice_ // per_tap)  # of the next step, and c0 its first input of this tap
        c0 = int32((slice_ - tap * per_tap) * DEPTH)

        # What this thread copies: where it begins, up to which c0 there is something, and where it goes.
        copied_row = int32(thread // X_FOURS)
        x_lane = int32((thread - copied_row * X_FOURS) * 4)
        x_block = item_start + m0 * row_step - lead + group * inputs
        for i in static_range(X_LOADS):
            # A row beyond the last is computed like the last and not stored.
            x_own[i] = int32(min(copied_row + i * X_ROWS, rows - 1 - m0) * row_step + x_lane)
        x_step = int32(tap * tap_step + c0)
        x_limit = int32(inputs - x_lane)
        x_fill = int32(slice_ * SLICE_SIZE + x_lane * PITCH + copied_row)
        weight_row = int32(thread // W_FOURS)
        w_lane = int32((thread - weight_row * W_FOURS) * 4)
        w_at = int32(((tap * groups + group) * inputs + c0 + weight_row) * outputs + n0 + w_lane)
        w_count = int32(outputs - n0 - w_lane)  # outputs from this thread's first on
        w_limit = int32((inputs if w_count > 0 else 0) - weight_row)
        w_fill = int32(slice_ * SLICE_SIZE + X_SIZE + weight_row * OUTPUTS + w_lane)
        x_first_read = int32(slice_ * SLICE_SIZE + ty)
        w_first_read = int32(slice_ * SLICE_SIZE + X_SIZE + tx)

        for i in static_range(SUMS):
            sums[i] = ZERO
        half = int32(0)  # of shared memory, that the next step's numbers go to
        for step in range(int32(steps + 1)):
            # 1. Ask for the next numbers; the sums below run while they come. After the last step these are zeros.
            for i in static_range(X_LOADS):
                at = x_block + int32(x_own[i] + x_step)
                v = (ZERO, ZERO, ZERO, ZERO)
                if vector:
                    inside = not padded or (at >= item_start and at < item_end)
                    if tap < taps and c0 < x_limit and inside:
                        v = load4(x, at)
                elif tap < taps:
                    v = load_between(x, at, item_start, min(item_end, at + x_limit - c0))
                for q in static_range(4):
                    next_x[i * 4 + q] = v[q]
            for i in static_range(W_LOADS):
                w = (ZERO, ZERO, ZERO, ZERO)
                if tap < taps and c0 + i * W_ROWS < w_limit:
                    w_place = int32(w_at + i * W_ROWS * outputs)
                    if vector:
                        w = load4(weight, w_place)
                    else:
                        w = load_between(weight, w_place, w_place, w_place + w_count)
                for q in static_range(4):
                    next_w[i * 4 + q] = w[q]
            c0 = int32(c0 + SLICES * DEPTH)
            x_step = int32(x_step + SLICES * DEPTH)
            w_at = int32(w_at + SLICES * DEPTH * outputs)
            while c0 >= span:
                tap = int32(tap + 1)
                c0 = int32(c0 - span)
                x_step = int32(x_step + tap_step - span)
                w_at = int32(w_at + (groups * inputs - span) * outputs)

            # 2. Multiply and add what the step before put into the other half of shared memory.
            if step > 0:
                x_read = int32(x_first_read + BUFFER - half)
                w_read = int32(w_first_read + BUFFER - half)
                for _ in range(int32(DEPTH // TOGETHER)):
                    add_outer(sums, OWN_ROWS, OWN_OUTPUTS, shared, x_read, ROW_GAP, PITCH, w_read, OUTPUT_GAP, OUTPUTS,
                              TOGETHER)  # fmt: skip
                    x_read = int32(x_read + TOGETHER * PITCH)
                    w_read = int32(w_read + TOGETHER * OUTPUTS)

            # 3. Put the numbers that came where the next step reads.
            for i in static_range(X_LOADS):
                if X_EXACT or copied_row + i * X_ROWS < ROWS:
                    for q in static_range(4):
                        store(shared, x_fill + half + q * PITCH + i * X_ROWS, next_x[i * 4 + q])
            for i in static_range(W_LOADS):
                if W_EXACT or weight_row + i * W_ROWS < DEPTH:
                    store4(shared, w_fill + half + i * W_ROWS * OUTPUTS,
                           next_w[i * 4], next_w[i * 4 + 1], next_w[i * 4 + 2], next_w[i * 4 + 3])  # fmt: skip
            half = int32(BUFFER - half)
            cuda.syncthreads()

        if SLICES > 1:
            # Sum i of thread t of slice s lies at ((SLICES − 1) · i + s − 1) · THREADS + t: neighbours side by side.
            if slice_ > 0:
                for i in static_range(SUMS):
                    store(shared, (i * (SLICES - 1) + slice_ - 1) * THREADS + thread, sums[i])
            cuda.syncthreads()
            if slice_ > 0:
                return
            for s in range(SLICES - 1):
                for i in static_range(SUMS):
                    sums[i] += load(shared, (i * (SLICES - 1) + s) * THREADS + thread)

        for h in static_range(OUTPUT_PIECES):
            n = n0 + tx + h * OUTPUT_GAP
            channel = group * outputs + n
            v = (ZERO, ZERO, ZERO, ZERO)
            if has_bias and n < outputs:
                v = load_between(bias, channel, channel, channel + outputs - n)
            for a in static_range(OWN_ROWS):
                m = m0 + ty + a // 4 * ROW_GAP + a % 4
                if m < rows and n < outputs:
                    for q in static_range(4):
                        four[q] = activate(sums[a * OWN_OUTPUTS + h * 4 + q] + v[q])
                    if pooled:
                        for r in range(factor):
                            at = item_start + (m * factor + r) * tap_step + channel
                            if vector:
                                frame = load4(x, at)
                            else:
                                frame = load_between(x, at, at, at + outputs - n)
                            for q in static_range(4):
                                four[q] += frame[q] / float32(factor)
                    at = (item * rows + m) * (groups * outputs) + channel
                    if vector:
                        store4(out, at, four[0], four[1], four[2], four[3])
                    else:
                        for q in static_range(4):
                            if n + q < outputs:
                                store(out, at + q, four[q])

    return product


# --------------------------------------------------------------------------- launching


MULTIPROCESSORS = 132  # an H200's. It guides the choice of a tile and nothing else; another number is no error.
# Tiles, and an estimate of how fast each is once enough blocks run: the smaller, the fewer sums for a number read.
WIDE_TILES = (
    (Tile(128, 128, 16, 8, 8, slices=1, resident=2), 1.0),
    (Tile(128, 64, 16, 8, 4, slices=1, resident=2), 0.9),
    (Tile(64, 64, 16, 8, 4, slices=1, resident=4), 0.8),
    (Tile(32, 32, 16, 4, 4, slices=4, resident=2), 0.5),
)
NARROW = 48  # most outputs of a product that gets tiles of its own width, in the place of these tiles'
NARROW_TILES = (
    (Tile(128, NARROW, 16, 8, 4, slices=1, resident=2), 0.8),
    (Tile(32, NARROW, 16, 4, 4, slices=4, resident=1), 0.5),
)


def choose_tile(shape: Product) -> Tile:
    """The tile that is expected to take least time: the busiest multiprocessor's numbers, over the tile's speed."""
    tiles: tuple[tuple[Tile, float], ...] = WIDE_TILES
    if shape.outputs <= NARROW:
        width = -(-shape.outputs // 4) * 4
        # Half as deep a step where 16 would leave half of a tap's last step empty: 24 channels to a group.
        depth = 8 if shape.taps > 1 and 0 < shape.inputs % 16 <= 8 else 16
        tiles = tuple((tile._replace(outputs=width, depth=depth), speed) for tile, speed in NARROW_TILES)

    def expected_time(candidate: tuple[Tile, float]) -> float:
        tile, speed = candidate
        blocks = -(-shape.rows // tile.rows) * -(-shape.outputs // tile.outputs) * shape.groups * shape.items
        return -(-blocks // MULTIPROCESSORS) * tile.rows * tile.outputs / speed

    return min(tiles, key=expected_time)[0]


def launch(
    stream: Any, shape: Product, x: Any, weight: Any, bias: Any | None, activation: str, out: Any,
    tile: Tile | None = None,
) -> None:  # fmt: skip
    """Start the last rung for a product of this shape. ``tile`` instead of ``choose_tile``'s is for tests."""
    tile = tile or choose_tile(shape)
    run = tiled_product(tile, activation, shape.vector, shape.padded, shape.factor > 0)
    tiles = -(-shape.rows // tile.rows) * -(-shape.outputs // tile.outputs)
    grid = (tiles, shape.groups, shape.items)
    run[grid, tile.threads, stream](x, weight, weight if bias is None else bias, out, int(bias is not None), *shape)


def launch_simple(stream: Any, shape: Product, x: Any, weight: Any, bias: Any, activation: str, out: Any) -> None:
    """Start v1 for a product of this shape."""
    blocks = -(-shape.items * shape.rows * shape.groups * shape.outputs // SIMPLE_THREADS)
    run = simple_product(activation)
    run[blocks, SIMPLE_THREADS, stream](x, weight, weight if bias is None else bias, out, int(bias is not None), *shape)


def linear_shape(rows: int, inputs: int, outputs: int) -> Product:
    """The ``Product`` of a linear layer."""
    return Product(1, rows * inputs, rows, inputs, 0, 1, inputs, inputs, 1, outputs)


def linear(stream: Any, x: Any, weight: Any, bias: Any | None, activation: str, out: Any) -> None:
    """activation(x · weight + bias): x (…, in), weight (in, out), bias (out,) or None → out (…, out), another array."""
    inputs, outputs = weight.shape
    launch(stream, linear_shape(math.prod(x.shape[:-1]), inputs, outputs), x, weight, bias, activation, out)
