"""The fused attention kernel: one block of threads per tile of query frames and head, scores in registers.

``cuda_attention`` says what it computes and why it is cheap; this room holds how a tile is cut, where its parts lie in
shared memory, and the kernel.

One step of the walk along the keys, a tile of them at a time:

    copy V, and K (far tile) or chunk by chunk K and the bands of pk and pq (near tile), into shared memory
    scores  = q · k, plus both position terms                                in registers
    softmax = online: the new largest score scales down what has been summed
    context += weights · V                                                   in registers

With ``split`` a block walks one part of the keys only, block index z says which, and leaves what it found for
``cuda_attention.combine_kernel``.

A block waits for all its threads twice in a far tile (three times with p2c) and twice in each chunk of a near one. The
weights go through shared memory to the lanes of the same warp only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from sewd_np.cuda_intrinsics import (
    copy4,
    cuda,
    device,
    exp2,
    float32,
    group_max,
    group_sum,
    int32,
    kernel,
    load,
    load4,
    static_range,
    store,
    store4,
    zero4,
)
from sewd_np.cuda_tiles import add_band_products, add_products, add_weighted

ZERO, ONE = float32(0), float32(1)
MASKED = float32(-1e30)


@dataclass(frozen=True)
class Tile:
    """How the work of one block is cut. A block has side² threads and owns side·rows queries."""

    side: int  # R: 4, 8 or 16
    rows: int  # queries of one thread
    columns: int  # keys of one thread, of a tile of side·columns keys
    chunk: int  # numbers of each vector that a near tile brings into shared memory at a time: 4, 8 or 16
    resident: int  # blocks that should fit on a multiprocessor: as many as its shared memory holds on the newest GPU

    @property
    def threads(self) -> int:
        return self.side * self.side

    @property
    def queries(self) -> int:
        return self.side * self.rows

    @property
    def keys(self) -> int:
        return self.side * self.columns


def stride(width: int) -> int:
    """Numbers from one row to the next in shared memory: an odd multiple of 4.

    Eight rows read at the same place then lie in eight different groups of four memory banks, and none has to wait.
    """
    return width if width // 4 % 2 else width + 4


def chunk_stride(tile: Tile) -> int:
    """The same for rows of a chunk. With a side of 8 or more there is no gap, and ``turn`` keeps the banks apart."""
    return tile.chunk if tile.side % 8 == 0 else stride(tile.chunk)


@device
def turn(row, vectors, most):
    """By what to change (exclusive or) a place in a chunk's row of ``vectors`` fours, in numbers; ``most`` 0: nothing.

    A chunk of 8 is two vectors, and eight rows of it are read at once, at the same vector: turned by row // 4, these
    lie in eight groups of four banks, and so do the eight vectors end to end that copying writes. It is the same for
    rows that lie 8 or 16 apart, as those of one thread do.
    """
    return ((row * vectors >> 3) & most) * 4


@dataclass(frozen=True)
class Room:
    """Where the parts of a block's shared memory begin, in numbers."""

    keys: int  # K of a far tile; or a chunk of K, of pk's band and of pq's band
    pos_keys: int
    pos_queries: int
    values: int
    weights: int  # softmax weights of the tile
    row_terms: int  # q · pk for the first and the last bucket
    column_terms: int  # k · pq of a far tile
    size: int


def shared_room(tile: Tile, head_size: int) -> Room:
    """Lay out the shared memory of ``tiled_kernel``: queries first. Row counts are whole passes of all threads."""

    def rows_of(count: int, width: int) -> int:
        together = tile.threads // (width // 4)
        return -(-count // together) * together

    columns = -(-head_size // 4 // tile.side) * tile.side * 4
    keys = rows_of(tile.queries, head_size) * stride(head_size)
    chunk = chunk_stride(tile)
    pos_keys = keys + rows_of(tile.keys, tile.chunk) * chunk
    band = rows_of(tile.queries + tile.keys - 1, tile.chunk) * chunk
    pos_queries = pos_keys + band
    values = max(pos_queries + band, keys + rows_of(tile.keys, head_size) * stride(head_size))
    weights = values + rows_of(tile.keys, head_size) * columns
    row_terms = weights + tile.queries * (tile.keys + tile.side)
    column_terms = row_terms + 2 * tile.queries
    return Room(keys, pos_keys, pos_queries, values, weights, row_terms, column_terms, column_terms + tile.keys)


@cache
def tiled_kernel(
    tile: Tile, head_size: int, c2p: bool, p2c: bool, padded: bool, mask_queries: bool, split: bool = False
) -> Any:
    """v2: block (tile of queries, b·h, part of the keys). At most 255 registers.

    ``split``: each part has ``part_keys`` keys, a whole number of tiles. ``out`` then is one row: the parts' contexts,
    each (b, t, d), then for every query of (part, b, h, t) the largest score and the sum of the weights.
    """
    E, R, ROWS, COLUMNS, CHUNK, THREADS = head_size, tile.side, tile.rows, tile.columns, tile.chunk, tile.threads
    QUERIES, KEYS = tile.queries, tile.keys
    SIDE_BITS = R.bit_length() - 1
    room = shared_room(tile, head_size)
    K_AT, PK_AT, PQ_AT, V_AT = room.keys, room.pos_keys, room.pos_queries, room.values
    P_AT, ROW_TERMS, COLUMN_TERMS, SHARED = room.weights, room.row_terms, room.column_terms, room.size
    POSITIONS = c2p or p2c
    # Steps from row to row, and from one of a thread's rows to its next.
    WIDE, NARROW, P_STEP, V_STEP = stride(E), chunk_stride(tile), KEYS + R, -(-E // 4 // R) * R * 4
    WIDE_R, NARROW_R, P_R, V_GROUP = R * WIDE, R * NARROW, R * P_STEP, 4 * R
    GROUPS, WIDTH = V_STEP // V_GROUP, V_STEP // R  # a thread's part of the context: WIDTH columns in groups of four
    # All threads together copy whole rows, four numbers each: rows in a pass, passes of a tile.
    WIDE_4, NARROW_4 = E // 4, CHUNK // 4
    TURNS = NARROW_4 - 1 if NARROW == CHUNK else 0  # by how many vectors a row of a chunk is turned at most
    WIDE_PASS, NARROW_PASS = THREADS // WIDE_4, THREADS // NARROW_4
    QUERY_PASSES, KEY_PASSES = -(-QUERIES // WIDE_PASS), -(-KEYS // WIDE_PASS)
    CHUNK_PASSES, BAND_PASSES = -(-KEYS // NARROW_PASS), -(-(QUERIES + KEYS - 1) // NARROW_PASS)

    @kernel(threads=THREADS, blocks=tile.resident)
    def attention(qkv, pos_key, pos_query, rows, lengths, frames, heads, buckets, scale, part_keys, out):
        memory = cuda.shared.array(SHARED, float32, alignment=16)
        scores = cuda.local.array((ROWS, COLUMNS), float32)
        context = cuda.local.array((ROWS, WIDTH), float32)
        largest = cuda.local.array(ROWS, float32)
        total = cuda.local.array(ROWS, float32)
        places = cuda.local.array(BAND_PASSES, int32)  # of the band's rows in the tables: 2³¹ numbers would be 8 GB
        terms = cuda.local.array(4, float32)  # four sums, for one would wait for itself at every step

        # Neighbouring lanes differ in y, then in x: lanes in pairs ask for the same address of a's rows and, two apart,
        # of b's, which halves the number of passes that a 128-bit read of shared memory takes.
        t = cuda.threadIdx.x
        x = (t >> 1) & (R - 1)
        y = (t & 1) | ((t >> (SIDE_BITS + 1)) << 1)
        first = cuda.blockIdx.x * QUERIES
        b = cuda.blockIdx.y // heads
        h = cuda.blockIdx.y - b * heads
        d = heads * E
        valid = frames
        if padded:
            valid = min(lengths[b], frames)
        live = frames  # queries that attend to anything
        if mask_queries:
            live = valid
        begin = 0  # keys that this block walks
        walk = valid
        if first >= live:
            walk = 0
        page = b  # of ``out``
        if split:
            begin = cuda.blockIdx.z * part_keys
            walk = min(walk, begin + part_keys)
            page = cuda.blockIdx.z * (cuda.gridDim.y // heads) + b
        recording = b * frames * 3 * d + h * E  # where q of frame 0 begins; k and v lie d and 2d further on
        table = h * buckets * E

        wide_row = t // WIDE_4  # this thread's place in a pass over whole vectors ...
        wide_at = (t - wide_row * WIDE_4) * 4
        narrow_row = t // NARROW_4  # ... and over chunks
        narrow_at = (t - narrow_row * NARROW_4) * 4
        narrow_to = narrow_at ^ turn(narrow_row, NARROW_4, TURNS)
        k_turn = turn(x, NARROW_4, TURNS)
        band_row = y - x + R - 1
        band_turn = turn(band_row, NARROW_4, TURNS)

        # Frames beyond the end are read as the last one: no branch between one load and the next, and what comes of
        # them is masked or not written.
        if wide_row < WIDE_PASS:
            for w in range(QUERY_PASSES):
                i = wide_row + w * WIDE_PASS
                source = recording + min(first + i, frames - 1) * 3 * d
                copy4(memory, i * WIDE + wide_at, qkv, source + wide_at)
        for a in range(ROWS):
            largest[a] = MASKED
            total[a] = ZERO
            for c in range(WIDTH):
                context[a, c] = ZERO
        start = 0  # first and last bucket that occur
        end = 0
        if POSITIONS:
            start = load(rows, 0)
            end = load(rows, 2 * frames - 2)
        if c2p:
            cuda.syncthreads()
            for i in range(t, QUERIES, THREADS):
                at_start = ZERO
                at_end = ZERO
                for c in range(0, E, 4):
                    q = load4(memory, i * WIDE + c)
                    low = load4(pos_key, table + start * E + c)
                    high = load4(pos_key, table + end * E + c)
                    for z in static_range(4):
                        at_start += q[z] * low[z]
                        at_end += q[z] * high[z]
                store(memory, ROW_TERMS + i, at_start)
                store(memory, ROW_TERMS + QUERIES + i, at_end)

        for keys in range(begin, walk, KEYS):
            # The band: rows[lowest] is the tile's smallest difference. Ends are clamped like the frames.
            lowest = first - keys - (KEYS - 1) + frames - 1
            far = True
            bucket = start
            if POSITIONS:
                bucket = load(rows, max(lowest, 0))
                highest = load(rows, min(lowest + QUERIES + KEYS - 2, 2 * frames - 2))
                far = highest == start or bucket == end  # buckets do not fall: all are the first, or all the last
            for a in range(ROWS):
                for c in range(COLUMNS):
                    scores[a, c] = ZERO

            cuda.syncthreads()  # all have done with the last tile
            if wide_row < WIDE_PASS:
                for w in range(KEY_PASSES):
                    j = wide_row + w * WIDE_PASS
                    source = recording + min(keys + j, valid - 1) * 3 * d + 2 * d
                    copy4(memory, V_AT + j * V_STEP + wide_at, qkv, source + wide_at)
            if far:
                if wide_row < WIDE_PASS:
                    for w in range(KEY_PASSES):
                        j = wide_row + w * WIDE_PASS
                        source = recording + min(keys + j, valid - 1) * 3 * d + d
                        copy4(memory, K_AT + j * WIDE + wide_at, qkv, source + wide_at)
                cuda.syncthreads()
                if p2c:
                    for j in range(t, KEYS, THREADS):
                        for z in static_range(4):
                            terms[z] = ZERO
                        for c in range(0, E, 4):
                            k = load4(memory, K_AT + j * WIDE + c)
                            place = load4(pos_query, table + bucket * E + c)
                            for z in static_range(4):
                                terms[z] += k[z] * place[z]
                        store(memory, COLUMN_TERMS + j, terms[0] + terms[1] + (terms[2] + terms[3]))
                for c in range(0, E, 4):
                    add_products(scores, ROWS, COLUMNS, memory, y * WIDE + c, WIDE_R, K_AT + x * WIDE + c, WIDE_R)
                if p2c:
                    cuda.syncthreads()
                    for c in range(COLUMNS):
                        term = load(memory, COLUMN_TERMS + x + R * c)
                        for a in range(ROWS):
                            scores[a, c] += term
                if c2p:
                    side = ROW_TERMS if bucket == start else ROW_TERMS + QUERIES
                    for a in range(ROWS):
                        term = load(memory, side + y + R * a)
                        for c in range(COLUMNS):
                            scores[a, c] += term
            if POSITIONS and not far:
                for w in range(BAND_PASSES):
                    row = load(rows, min(max(lowest + narrow_row + w * NARROW_PASS, 0), 2 * frames - 2))
                    places[w] = int32(table + row * E + narrow_at)
                for part in range(0, E, CHUNK):
                    if part > 0:
                        cuda.syncthreads()
                    for w in range(CHUNK_PASSES):
                        j = narrow_row + w * NARROW_PASS
                        source = recording + min(keys + j, valid - 1) * 3 * d + d + part
                        copy4(memory, K_AT + j * NARROW + narrow_to, qkv, source + narrow_at)
                    for w in range(BAND_PASSES):
                        p = narrow_row + w * NARROW_PASS
                        place = places[w] + part
                        if c2p:
                            copy4(memory, PK_AT + p * NARROW + narrow_to, pos_key, place)
                        if p2c:
                            copy4(memory, PQ_AT + p * NARROW + narrow_to, pos_query, place)
                    cuda.syncthreads()
                    for c in range(0, CHUNK, 4):
                        q = y * WIDE + part + c
                        k = K_AT + x * NARROW + (c ^ k_turn)
                        band = band_row * NARROW + (c ^ band_turn)
                        add_products(scores, ROWS, COLUMNS, memory, q, WIDE_R, k, NARROW_R)
                        if c2p:
                            add_band_products(scores, ROWS, COLUMNS, memory, q, WIDE_R, PK_AT + band, NARROW_R, 1)
                        if p2c:
                            add_band_products(scores, ROWS, COLUMNS, memory, k, NARROW_R, PQ_AT + band, NARROW_R, 0)

            # Online softmax, in base 2: the scale contains log2(e).
            for a in range(ROWS):
                grown = largest[a]
                for c in range(COLUMNS):
                    score = scores[a, c] * scale
                    if keys + x + R * c >= valid:
                        score = MASKED
                    scores[a, c] = score
                    grown = max(grown, score)
                grown = group_max(grown, R, 2)
                keep = exp2(largest[a] - grown)
                largest[a] = grown
                added = ZERO
                for c in range(COLUMNS):
                    weight = exp2(scores[a, c] - grown)
                    added += weight
                    store(memory, P_AT + (y + R * a) * P_STEP + x + R * c, weight)
                total[a] = total[a] * keep + added
                for c in range(WIDTH):
                    context[a, c] *= keep
            cuda.syncwarp()  # a row of weights is written and read by lanes of one warp
            for j in range(0, KEYS, 4):
                p = P_AT + y * P_STEP + j
                add_weighted(context, ROWS, GROUPS, memory, p, P_R, V_AT + j * V_STEP + 4 * x, V_STEP, V_GROUP)

        for a in range(ROWS):
            whole = group_sum(total[a], R, 2)
            i = first + y + R * a
            if split and x == 0 and i < frames:
                pages = cuda.gridDim.z * (cuda.gridDim.y // heads)
                sums = pages * frames * d + ((page * heads + h) * frames + i) * 2
                store(out, sums, largest[a] if i < live else MASKED)
                store(out, sums + 1, whole if i < live else ZERO)
            for g in range(GROUPS):
                column = 4 * x + g * V_GROUP
                if i < frames and column < E:
                    target = (page * frames + i) * d + h * E + column
                    if walk > begin and i < live:
                        inverse = ONE / whole
                        store4(
                            out,
                            target,
                            context[a, 4 * g] * inverse,
                            context[a, 4 * g + 1] * inverse,
                            context[a, 4 * g + 2] * inverse,
                            context[a, 4 * g + 3] * inverse,
                        )
                    else:
                        zero4(out, target)

    return attention
