"""Numba twins of the NumPy operations: the same names, arguments and results, several times as fast.

The ladder (measured gains: docs/kernels.md)
--------------------------------------------
1. *Plain loops, compiled* (``cpu_gemm.product_v1``, ``cpu_rows.layer_norm_v1``): what the definition says, one number
   at a time. Free of Python, yet a product is still slower than NumPy's, which runs on a tuned library.
2. *Registers* (``cpu_gemm``): products in tiles that stay in vector registers; B packed once, on load.
3. *Vector mathematics* (``cpu_math``): erf and exp as polynomials that a loop can take 16 numbers at a time.
4. *Caches* (``cpu_conv``): a tile of time goes through all 13 convolutions before the next one starts; group norm
   folds into the first layer's weights.
5. *Less work* (``cpu_attention``): the position table is projected on load, only the band of buckets that occurs is
   multiplied, and the t × t scores of a head never exist at once.
6. *Along the grain* (``cpu_positions``, ``cpu_lines``): what lies on a table's diagonals is sheared into rows, whole
   lines of 16 numbers at a time (``add_by_key_v1`` beside ``add_by_key``).
7. *The matrix unit* (``cpu_amx``, ``cpu_split``), where the processor has one: a float32 as two bfloat16, three
   products for one.
8. *Cores*: every kernel divides its rows, heads, groups or tiles among ``threads`` workers, by hand, so that nothing
   in the process is left changed and a row's arithmetic is the same whoever computes it: results do not depend on the
   number of threads, to the last bit.

``Kernels`` gives the operations of one model: it knows the number of threads and owns the pool of scratch memory.
"""

from __future__ import annotations

import math

import numpy as np

from sewd_np import attention, layers
from sewd_np.config import SEWDConfig
from sewd_np.cpu_amx import DEPTH, SIDE, available, pack_split
from sewd_np.cpu_attention import QUERIES, attend, gather_keys, shape_of
from sewd_np.cpu_conv import (
    TILE_FRAMES,
    Encoder,
    Positional,
    encode_split_tiles,
    encode_tiles,
    fold_group_norm,
    pack_encoder,
    pack_positional,
    scratch_size,
    squeeze_groups,
)
from sewd_np.cpu_gemm import aligned, pack
from sewd_np.cpu_math import ACTIVATION_CODES
from sewd_np.cpu_positions import Distances, Positions, distances, index_by_pair, pack_positions
from sewd_np.cpu_rows import (
    ROW_BLOCK,
    feed_forward_rows,
    feed_forward_split_rows,
    linear_norm_rows,
    linear_rows,
    normalize_rows,
)
from sewd_np.cpu_team import Pool, Team, cores
from sewd_np.params import Layer, Linear, Norm, Params, Weights, prepare

Array = np.ndarray


def own(x: Array) -> Array:
    """``x`` as the kernels want it: float32, contiguous, writable (they write elsewhere, but are compiled once)."""
    return np.require(x, np.float32, ["C", "W"])


def fresh(*shape: int) -> Array:
    """A new array, uninitialised. It begins at a multiple of 64: the matrix unit stores its tiles faster there."""
    return aligned(math.prod(shape), np.float32).reshape(shape)


def start_of_count() -> Array:
    """0, to be counted up by ``cpu_team.claim``."""
    return np.zeros(1, np.int64)


class Kernels:
    """The operations of one model on ``threads`` threads; each method twins the NumPy function of its name.

    ``precision`` "high" multiplies on the matrix unit where this process may use one, and in float32 elsewhere;
    "highest" always in float32. A copy, or a pickle read in another process, starts threads and asks for the unit anew.
    """

    def __init__(self, threads: int | None = None, precision: str = "high") -> None:
        self.asked = (threads, precision)
        self.threads = cores() if threads is None else threads
        self.split = precision == "high" and available()
        self.team = Team(self.threads)
        self.pool = Pool()

    def __reduce__(self) -> tuple[type[Kernels], tuple[int | None, str]]:
        return Kernels, self.asked

    def describe(self) -> dict[str, str]:
        products = f"on the matrix unit (AMX, precision {self.asked[1]})" if self.split else "in float32"
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return {"kernels": f"Numba, on {threads} of the processor; products {products}"}

    def prepare(self, params: Params, config: SEWDConfig) -> Weights:
        """NumPy's prepared weights, with every product's matrix packed."""
        w = prepare(params, config)

        def packed(linear: Linear) -> Linear:
            fits = self.split and linear.weight.shape[0] % DEPTH == 0
            return Linear((pack_split if fits else pack)(linear.weight), own(linear.bias))

        split_heads = self.split and config.head_size % DEPTH == 0

        def layer(old: Layer) -> Layer:
            a = old.attention
            return old._replace(
                attention=a._replace(
                    qkv=packed(a.qkv),
                    positions=pack_positions(a.pos_key, a.pos_query, config.score_scale, split_heads),
                    output=packed(a.output),
                    norm=Norm(*map(own, a.norm)),
                ),
                intermediate=packed(old.intermediate),
                output=packed(old.output),
                norm=Norm(*map(own, old.norm)),
            )

        return w._replace(
            feature_encoder=pack_encoder(w.conv_layers, config.conv_stride, config.feat_extract_norm, self.split),
            layer_norm=Norm(*map(own, w.layer_norm)),
            feature_projection=None if w.feature_projection is None else packed(w.feature_projection),
            squeeze=pack_positional(w.pos_conv),
            layers=tuple(map(layer, w.layers)),
            upsample=packed(w.upsample),
            lm_head=None if w.lm_head is None else packed(w.lm_head),
            projector=None if w.projector is None else packed(w.projector),
            classifier=None if w.classifier is None else packed(w.classifier),
        )

    def feature_encoder(
        self,
        wave_bn: Array,
        conv_layers: Encoder,
        strides: tuple[int, ...],
        norm: str,
        eps: float,
        activation: str,
        lengths_b: Array | None = None,
    ) -> Array:
        wave_bn = own(wave_bn)
        samples = wave_bn.shape[1]
        plan = conv_layers.plan
        steps = [samples]
        for taps, stride in plan[:, :2]:
            steps.append((steps[-1] - int(taps)) // int(stride) + 1)
        frames, width = steps[-1], int(plan[-1, 3])
        out = fresh(len(wave_bn), frames, width)
        batch, tiles = len(wave_bn), -(-frames // TILE_FRAMES)
        if batch < self.threads:
            tiles = min(-(-tiles // self.threads) * self.threads, frames)
        size = scratch_size(plan, -(-frames // tiles))
        if norm == "group":
            counts = [steps[1]] * batch if lengths_b is None else list(map(int, lengths_b))
            folded = [
                fold_group_norm(*each, conv_layers.first, strides[0], eps) for each in zip(wave_bn, counts, strict=True)
            ]
            first_panels, first_bias = map(np.stack, zip(*folded, strict=True))
        else:
            first_panels = np.stack([conv_layers.first_panels] * batch)
            first_bias = np.stack([conv_layers.vectors[: int(plan[0, 3])]] * batch)
        in_pieces = conv_layers.panels.dtype == np.uint16 and norm == "group"
        with self.pool.take(self.threads * 2 * size) as scratch:
            self.team.run(
                encode_split_tiles if in_pieces else encode_tiles,
                wave_bn,
                plan,
                conv_layers.panels,
                conv_layers.vectors,
                first_panels,
                first_bias,
                ACTIVATION_CODES[activation],
                eps,
                out.reshape(batch, -1),
                tiles,
                scratch.reshape(self.threads, 2, size),
                start_of_count(),
            )
        return out

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float) -> Array:
        x = own(x)
        out = fresh(*x.shape)
        size = x.shape[-1]
        flat = (x.reshape(-1), x.size // size, size)
        self.team.run(normalize_rows, *flat, own(weight), own(bias), eps, out.reshape(-1))
        return out

    def add_norm(self, x: Array, residual: Array, weight: Array, bias: Array, eps: float) -> Array:
        return self.layer_norm(x + residual, weight, bias, eps)

    def linear_add_norm(self, x: Array, linear_weights: Linear, residual: Array, norm: Norm, eps: float) -> Array:
        x, residual = own(x), own(residual)
        out = fresh(*residual.shape)
        depth, size = x.shape[-1], residual.shape[-1]
        self.team.run(
            linear_norm_rows,
            x.reshape(-1),
            x.size // depth,
            depth,
            linear_weights.weight.reshape(-1),
            size,
            linear_weights.bias,
            residual.reshape(-1),
            norm.weight,
            norm.bias,
            eps,
            out.reshape(-1),
            start_of_count(),
        )
        return out

    def feed_forward(
        self,
        x_btd: Array,
        intermediate: Linear,
        output: Linear,
        norm: Norm,
        activation: str,
        eps: float,
    ) -> Array:
        x = own(x_btd)
        out = fresh(*x.shape)
        size, inner = x.shape[-1], len(intermediate.bias)
        weights = (
            x.reshape(-1),
            x.size // size,
            size,
            intermediate.weight.reshape(-1),
            inner,
            intermediate.bias,
            ACTIVATION_CODES[activation],
            output.weight.reshape(-1),
            output.bias,
            *norm,
            eps,
            out.reshape(-1),
        )
        if intermediate.weight.dtype == output.weight.dtype == np.uint16:
            self.team.run(feed_forward_split_rows, *weights, start_of_count())
            return out
        size = (ROW_BLOCK + SIDE) * inner
        with self.pool.take(self.threads * size) as scratch:
            self.team.run(feed_forward_rows, *weights, scratch.reshape(self.threads, size), start_of_count())
        return out

    def linear(self, x: Array, weight: Array, bias: Array, activation: str = "linear") -> Array:
        x = own(x)
        depth, outputs = x.shape[-1], len(bias)
        out = fresh(*x.shape[:-1], outputs)
        self.team.run(
            linear_rows,
            x.reshape(-1),
            x.size // depth,
            depth,
            weight.reshape(-1),
            outputs,
            own(bias),
            ACTIVATION_CODES[activation],
            out.reshape(-1),
            start_of_count(),
        )
        return out

    def conv1d(self, x_bnc: Array, weight_kgio: Array, bias_c: Array | None, stride: int, padding: int = 0) -> Array:
        """NumPy's, but for the product: how BLAS rounds a row depends on how many rows come with it.

        Windows are copied and the weights packed at every call: only traces call it, and DeBERTa's convolution beside
        the first layer, which no published model has.
        """
        kernel, groups, inputs, outputs = weight_kgio.shape
        padded = np.pad(x_bnc, ((0, 0), (padding, padding), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, kernel, axis=1)[:, ::stride]  # (b, m, c, k)
        bias_gc = np.zeros((groups, outputs), np.float32) if bias_c is None else bias_c.reshape(groups, outputs)
        parts = []
        for group, bias in enumerate(bias_gc):
            columns = windows[:, :, group * inputs : (group + 1) * inputs].swapaxes(2, 3)
            rows = columns.reshape(*columns.shape[:2], kernel * inputs)
            parts.append(self.linear(rows, pack(weight_kgio[:, group].reshape(-1, outputs)), bias))
        return np.concatenate(parts, axis=-1)

    def squeeze(self, x_bsd: Array, conv: Positional, factor: int, activation: str) -> Array:
        x_bsd = own(x_bsd)
        batch, frames, d = x_bsd.shape
        t = frames // factor
        out = fresh(batch, t, d)
        size = (frames + 2 * (conv.kernel // 2)) * (d // conv.groups)
        with self.pool.take(self.threads * 2 * size) as scratch:
            for x_sd, out_td in zip(x_bsd, out, strict=True):
                self.team.run(
                    squeeze_groups,
                    x_sd,
                    conv.panels,
                    conv.bias,
                    conv.kernel,
                    conv.groups,
                    factor,
                    ACTIVATION_CODES[activation],
                    out_td,
                    scratch.reshape(self.threads, 2, size),
                )
        return out

    def relative_index(self, frames: int, buckets: int, max_distance: int, span: int) -> Distances:
        return distances(frames, buckets, max_distance, span)

    def disentangled_attention(
        self,
        qkv: Array,
        heads: int,
        positions: Positions,
        index: Distances | None,
        scale: float,
        lengths_b: Array | None = None,
        mask_queries: bool = False,
    ) -> Array:
        qkv = own(qkv)
        batch, frames, width = qkv.shape
        d = width // 3
        out = fresh(batch, frames, d)
        shape = shape_of(batch, frames, heads, d // heads, positions.rows, index)
        lengths = np.full(batch, frames) if lengths_b is None else np.minimum(lengths_b, frames).astype(np.int64)
        _, *walk = Distances(0, np.empty(0, np.int32), 0, 0, 0, 0) if index is None else index
        zeros = np.zeros(max(shape.row, shape.columns, shape.size), np.float32)
        shared_size = batch * heads * shape.pair
        with self.pool.take(shared_size + self.threads * shape.block) as scratch:
            shared, blocks = scratch[:shared_size], scratch[shared_size:].reshape(self.threads, shape.block)
            self.team.run(gather_keys, qkv.reshape(-1), shape, positions.keys, lengths, shared)
            self.team.run(
                attend,
                qkv.reshape(-1),
                shape,
                positions.keys,
                positions.queries,
                *walk,
                np.float32(scale),
                zeros,
                lengths,
                mask_queries,
                out.reshape(-1),
                shared,
                blocks,
                start_of_count(),
            )
        return out

    def attention_bytes(self, batch: int, heads: int, frames: int, itemsize: int, explicit: bool) -> int:
        if explicit:
            return attention.attention_bytes(batch, heads, frames, itemsize, explicit)
        # A frame and head keep their key and value, below 512 numbers, and a frame its scores in each thread's block.
        return itemsize * frames * (batch * heads * 512 + self.threads * QUERIES)

    def content_to_position(self, q_btd: Array, pos_key_hpe: Array, index: Distances, scale: float) -> Array:
        pair_index = index_by_pair(index, pos_key_hpe.shape[1] // 2)
        return attention.content_to_position(q_btd, pos_key_hpe, pair_index, scale)

    def position_to_content(self, k_btd: Array, pos_query_hpe: Array, index: Distances, scale: float) -> Array:
        pair_index = index_by_pair(index, pos_query_hpe.shape[1] // 2)
        return attention.position_to_content(k_btd, pos_query_hpe, pair_index, scale)

    def upsample(
        self,
        x_btd: Array,
        weight: Array,
        bias: Array,
        factor: int,
        activation: str,
        frames: int,
        lengths_b: Array | None = None,
    ) -> Array:
        return layers.unsqueeze(self.linear(x_btd, weight, bias, activation), factor, frames, lengths_b)
