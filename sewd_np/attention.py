"""Disentangled self-attention in plain NumPy: relative positions, log buckets, three kinds of score, softmax, context.

An ordinary attention score asks one question: does the content of frame i want the content of frame j? Disentangled
attention (DeBERTa, arXiv 2006.03654, section 3.1) keeps *what* and *where* apart and asks three:

    score[i, j] = ( q_i · k_j             content to content    c2c
                  + q_i · pk[r(i−j)]      content to position   c2p
                  + k_j · pq[r(i−j)] )    position to content   p2c        all divided by sqrt(3e)

pk and pq are one learnt table with a row for each relative-position bucket, projected like keys and like queries.
The paper writes r(j−i) in the third; the reference, with which the checkpoints were trained, reads r(i−j) there too.

Shapes: q, k, v (b, t, d) with d = h·e; scores and probabilities (b, h, i, j), query frame i, key frame j; tables
(h, p, e) with p = 2·S buckets; ``index`` (i, j) holds r, the bucket of each pair of frames.
"""

from __future__ import annotations

import numpy as np

from sewd_np.layers import is_valid

Array = np.ndarray


# ---------------------------------------------------------------- relative positions


def log_bucket(distance: Array, buckets: int, max_distance: int) -> Array:
    """Bucket of a signed distance: exact up to ±mid = buckets/2, logarithmic beyond. Odd and non-decreasing.

        |δ| ≤ mid:  δ
        else:       sign(δ) · ( ceil( log(|δ|/mid) / log((max_distance−1)/mid) · (mid−1) ) + mid )

    Near frames are told apart one by one; far ones share buckets, the wider the farther, so 512 rows serve a recording
    of any length. distance: whole numbers, any shape → int64 of that shape, not yet clamped. In float32 like the
    reference (``make_log_bucket_position``): in float64 the ceil falls elsewhere for some small tables.

    Where the formula is within rounding of a whole number the reference's bucket depends on the processor, as PyTorch's
    log does; ours is that of the correctly rounded log. For the published table (256, 512) they agree at all distances
    tried.
    """
    distance = np.asarray(distance, np.int64)
    mid = buckets // 2
    far = np.abs(distance) > mid
    magnitude = np.where(far, np.abs(distance), mid)  # log(1) = 0 where the formula is not used
    steps = _log_float32(magnitude / mid) / _log_float32((max_distance - 1) / mid)
    bucket = np.ceil(steps * np.float32(mid - 1)) + np.float32(mid)
    return np.where(far, np.sign(distance) * bucket.astype(np.int64), distance)


def _log_float32(x: Array | float) -> Array:
    """The float32 nearest to log of the float32 nearest to x: NumPy's own float32 log depends on the processor."""
    return np.log(np.asarray(x, np.float32).astype(np.float64)).astype(np.float32)


def relative_index(frames: int, buckets: int, max_distance: int, span: int) -> Array:
    """Row of the relative-position table for each pair: clamp(bucket(i − j) + S, 0, 2S − 1). (i, j) int64.

    ``buckets`` ≤ 0 means one bucket per distance. Row S is distance 0; rows above it look back in time (j before i).
    """
    difference = np.arange(1 - frames, frames)
    bucket = log_bucket(difference, buckets, max_distance) if buckets > 0 else difference
    rows = np.clip(bucket + span, 0, 2 * span - 1)
    i = np.arange(frames)
    return rows[i[:, None] - i[None, :] + frames - 1]


# ----------------------------------------------------------------------- the stages


def split_heads(x_btd: Array, heads: int) -> Array:
    """(b, t, h·e) → (b, h, t, e), a view."""
    batch, frames, size = x_btd.shape
    return x_btd.reshape(batch, frames, heads, size // heads).transpose(0, 2, 1, 3)


def merge_heads(x_bhte: Array) -> Array:
    """(b, h, t, e) → (b, t, h·e), contiguous."""
    batch, heads, frames, size = x_bhte.shape
    return x_bhte.transpose(0, 2, 1, 3).reshape(batch, frames, heads * size)


def split_qkv(qkv: Array) -> tuple[Array, Array, Array]:
    """The fused projection (b, t, 3d) as query, key and value, each (b, t, d)."""
    q, k, v = np.split(qkv, 3, axis=-1)
    return np.ascontiguousarray(q), np.ascontiguousarray(k), np.ascontiguousarray(v)


def content_scores(q_btd: Array, k_btd: Array, heads: int, scale: float) -> Array:
    """c2c[i, j] = q_i · k_j / scale. → (b, h, i, j)."""
    return split_heads(q_btd, heads) @ (split_heads(k_btd, heads) / scale).swapaxes(-1, -2)


def content_to_position(q_btd: Array, pos_key_hpe: Array, index: Array, scale: float) -> Array:
    """c2p[i, j] = q_i · pk[r(i−j)] / scale: what frame i wants from *a place*, whoever sits there. → (b, h, i, j).

    One product with the whole table gives every frame's answer for every bucket (b, h, i, p); the pair's own bucket is
    then picked from its row.
    """
    by_bucket = split_heads(q_btd, len(pos_key_hpe)) @ (pos_key_hpe / scale).swapaxes(-1, -2)
    return np.take_along_axis(by_bucket, index[None, None], axis=-1)


def position_to_content(k_btd: Array, pos_query_hpe: Array, index: Array, scale: float) -> Array:
    """p2c[i, j] = k_j · pq[r(i−j)] / scale: what *a place* wants from the content of frame j. → (b, h, i, j).

    The table is multiplied by the keys, so its rows belong to j: pick, then transpose. The reference picks at
    clamp(−rel[j, i] + S) before it transposes; rel is antisymmetric, so that is the same index as in c2p.
    """
    by_bucket = split_heads(k_btd, len(pos_query_hpe)) @ (pos_query_hpe / scale).swapaxes(-1, -2)  # (b, h, j, p)
    return np.take_along_axis(by_bucket, index.T[None, None], axis=-1).swapaxes(-1, -2)


def add_scores(*terms_bhij: Array) -> Array:
    """Sum of the score terms, in the reference's order: c2c + (c2p + p2c)."""
    content, *positions = terms_bhij
    return content + sum(positions[1:], start=positions[0]) if positions else content


def masked_softmax(scores_bhij: Array, lengths_b: Array | None = None, mask_queries: bool = False) -> Array:
    """Softmax over the valid keys j < ``lengths_b[b]``; masked entries are 0, a row without a valid key is all 0.

    ``mask_queries`` also clears the rows of padded queries, as the original code and older transformers do.
    Class XSoftmax of the reference.
    """
    valid = np.ones((1, 1, 1, 1), bool)
    if lengths_b is not None:
        keys = is_valid(scores_bhij.shape[-1], lengths_b)
        valid = keys[:, None, None, :] & (keys[:, None, :, None] | (not mask_queries))
    scores = np.where(valid, scores_bhij, np.finfo(scores_bhij.dtype).min)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.where(valid, weights, scores.dtype.type(0))


def context(probs_bhij: Array, v_btd: Array) -> Array:
    """Σ_j probs[i, j] · v_j, head by head, heads side by side again. → (b, i, d)."""
    return merge_heads(probs_bhij @ split_heads(v_btd, probs_bhij.shape[1]))


# --------------------------------------------------------------------- all in one


def disentangled_attention(
    qkv: Array,
    heads: int,
    positions: tuple[Array | None, Array | None],
    index: Array | None,
    scale: float,
    lengths_b: Array | None = None,
    mask_queries: bool = False,
) -> Array:
    """Context of disentangled self-attention, from the fused projection qkv (b, t, 3d) → (b, t, d).

    ``positions`` are the tables pk and pq (h, p, e); one that is None has no term. Works head by head, so one head's
    scores are in memory at a time (``attention_bytes``), never all of them. Class DisentangledSelfAttention of the
    reference.
    """
    batch, frames, width = qkv.shape
    size = width // 3 // heads
    pos_key_hpe, pos_query_hpe = positions
    out = np.empty((batch, frames, width // 3), qkv.dtype)
    for b in range(batch):
        for h in range(heads):
            q, k, v = (qkv[b : b + 1, :, (part * heads + h) * size :][:, :, :size] for part in range(3))
            scores = content_scores(q, k, 1, scale)
            if pos_key_hpe is not None and index is not None:
                scores += content_to_position(q, pos_key_hpe[h : h + 1], index, scale)
            if pos_query_hpe is not None and index is not None:
                scores += position_to_content(k, pos_query_hpe[h : h + 1], index, scale)
            length = None if lengths_b is None else lengths_b[b : b + 1]
            out[b, :, h * size : (h + 1) * size] = context(masked_softmax(scores, length, mask_queries), v)[0]
    return out


def attention_bytes(batch: int, heads: int, frames: int, itemsize: int, explicit: bool) -> int:
    """Most memory that the score matrices of one layer take at once, in bytes.

    Head by head four matrices are alive at the peak (scores, masked scores, weights, probabilities); ``explicit``
    keeps c2c, c2p, p2c, their sum and the softmax's own for every head and recording. The index is whole numbers of
    8 bytes.
    """
    matrix = frames * frames
    return 8 * matrix + itemsize * matrix * (8 * batch * heads if explicit else 4)
