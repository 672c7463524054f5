"""The operations on a GPU: the same names, arguments and meaning as in ``layers`` and ``attention``, launched in order.

Samples enter once and logits leave once (``cuda_queue``); everything between is a ``DeviceArray``. Beside these only
valid lengths, SpecAugment's marks and the rows of the position table are copied to the device, and lengths and rows are
kept there. A method takes memory from the pool, starts kernels and returns; it never waits for the GPU.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np

from sewd_np import attention, cuda_attention, cuda_conv, cuda_gemm, cuda_kernels, cuda_norm, cuda_scores
from sewd_np.config import SEWDConfig
from sewd_np.cuda_cublas import WORKSPACE, Cublas, find_library, version
from sewd_np.cuda_device import allocate, describe, free_bytes, require_gpu
from sewd_np.cuda_graph import Capture, capture_graph
from sewd_np.cuda_intrinsics import SIMULATED, cuda
from sewd_np.cuda_memory import DeviceArray
from sewd_np.cuda_queue import Queue
from sewd_np.params import Conv, Linear, Norm, Params, Weights, prepare

Array = np.ndarray
Positions = tuple[DeviceArray | None, DeviceArray | None]

SHORTEST_ROWS = 1024  # frames that a table of relative rows is made for at least
KEPT_LENGTHS = 64  # batches whose valid lengths stay on the device


def open_device() -> Device:
    """The first GPU, with cuBLAS where the machine has it. In Numba's simulator: without cuBLAS and graphs.

    Raises ``ValueError`` where there is no GPU that can be used.
    """
    if SIMULATED:
        return Device()
    require_gpu(cuda)
    return Device(find_library(), capture_graph)


def raw(value: Any) -> Any:
    """Numba's device arrays in place of ``DeviceArray``s, also inside tuples and named tuples."""
    if isinstance(value, DeviceArray):
        return value.data
    if isinstance(value, tuple):
        parts = map(raw, value)
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


class Device:
    """The operations of one model on one GPU; each method twins the NumPy function of its name.

    ``library``: a loaded cuBLAS (``cuda_cublas.find_library``), or None to compute every product with our own kernel.
    ``capture``: what records a graph (``cuda_graph.capture_graph``), or None to record none.
    """

    def __init__(self, library: Any | None = None, capture: Capture | None = None) -> None:
        self.queue = Queue(capture)
        self.stream = self.queue.stream
        self.from_numpy, self.to_numpy, self.run = self.queue.from_numpy, self.queue.to_numpy, self.queue.run
        self.rows: dict[tuple[int, int, int], list[Any]] = {}
        self.lengths: OrderedDict[bytes, Any] = OrderedDict()
        self.products = "our own tiled kernel (no cuBLAS was found: pip install nvidia-cublas adds it)"
        self.cublas: Cublas | None = None
        if library is not None:
            workspace = allocate(cuda, WORKSPACE // 4)
            self.cublas = Cublas(library, self.stream, workspace)
            self.products = f"cuBLAS {version(library)}, float32, TF32 off"

    def _take(self, *shape: int) -> DeviceArray:
        """Room for a result. The queue's pool, asked anew each time: a recorded pass has one of its own."""
        return self.queue.pool.take(*shape)

    def prepare(self, params: Params, config: SEWDConfig) -> Weights:
        """NumPy's prepared weights on the device. Position tables that only a trace looks at and the shares of a layer
        sum, which Python reads, stay on the host."""
        w = prepare(params, config)
        uploaded: dict[int, DeviceArray] = {}

        def upload(value: Any) -> Any:
            if isinstance(value, np.ndarray):
                if id(value) not in uploaded:
                    uploaded[id(value)] = self.from_numpy(value)
                return uploaded[id(value)]
            if isinstance(value, tuple):
                parts = map(upload, value)
                return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
            return value

        self.queue.forget()
        on_device = upload(w._replace(rel_embeddings=None, rel_embeddings_normed=None, layer_weights=None))
        self.queue.wait()  # until then the host arrays are held
        return on_device._replace(
            rel_embeddings=w.rel_embeddings,
            rel_embeddings_normed=w.rel_embeddings_normed,
            layer_weights=w.layer_weights,
        )

    def own_memory(self) -> float:
        """Bytes that can still be taken on the device."""
        return free_bytes(cuda) + 4 * self.queue.pool.idle()

    def describe(self) -> dict[str, str]:
        """What ``sewd-np info`` says about this device."""
        return describe(cuda, self.products)

    def _lengths(self, lengths_b: Array | None, most: int) -> Any:
        """Valid lengths, at most ``most``, as int32 on the device."""
        if lengths_b is None:
            return None
        lengths = np.clip(lengths_b, 0, most).astype(np.int32)
        key = lengths.tobytes()
        if key not in self.lengths:
            self.lengths[key] = self.queue.upload(lengths)
            if len(self.lengths) > KEPT_LENGTHS:
                self.lengths.popitem(last=False)
        self.lengths.move_to_end(key)
        return self.lengths[key]

    # ------------------------------------------------------------------------ feature encoder

    def feature_encoder(
        self,
        wave_bn: DeviceArray,
        conv_layers: tuple[Conv, ...],
        strides: tuple[int, ...],
        norm: str,
        eps: float,
        activation: str,
        lengths_b: Array | None = None,
    ) -> DeviceArray:
        batch, samples = wave_bn.shape
        frames, steps = samples, []
        for layer, stride in zip(conv_layers, strides, strict=True):
            frames = (frames - layer.weight.shape[0]) // stride + 1
            steps.append(frames)
        out = self._take(batch, frames, conv_layers[-1].weight.shape[-1])
        layers = raw(tuple(conv_layers))
        scratch = self._take(cuda_conv.feature_encoder_scratch(batch, samples, layers, strides))
        cuda_conv.feature_encoder(
            self.stream,
            wave_bn.data,
            layers,
            strides,
            norm,
            eps,
            activation,
            self._lengths(lengths_b, steps[0]),
            cuda_kernels.layer_norm,
            scratch.data,
            out.data,
        )
        return out

    def conv1d(
        self, x_bnc: DeviceArray, weight_kgio: DeviceArray, bias_c: DeviceArray | None, stride: int, padding: int = 0
    ) -> DeviceArray:
        kernel, groups, _, outputs = weight_kgio.shape
        batch, steps, _ = x_bnc.shape
        out = self._take(batch, (steps + 2 * padding - kernel) // stride + 1, groups * outputs)
        cuda_conv.conv1d(self.stream, x_bnc.data, weight_kgio.data, raw(bias_c), stride, padding, "linear", out.data)
        return out

    def normalize(
        self,
        x: DeviceArray,
        norm: str,
        weight: DeviceArray | None,
        bias: DeviceArray | None,
        eps: float,
        lengths_b: Array | None = None,
    ) -> DeviceArray:
        if norm == "none":
            return x
        assert weight is not None and bias is not None
        if norm == "layer":
            return self.layer_norm(x, weight, bias, eps)
        out = self._take(*x.shape)
        scratch = self._take(cuda_norm.group_norm_scratch(*x.shape))
        lengths = self._lengths(lengths_b, x.shape[1])
        cuda_norm.group_norm(
            self.stream, x.data, weight.data, bias.data, eps, "linear", lengths, scratch.data, out.data
        )
        return out

    def activate(self, x: DeviceArray, activation: str) -> DeviceArray:
        out = self._take(*x.shape)
        cuda_kernels.activate(self.stream, x.data, None, activation, out.data)
        return out

    # --------------------------------------------------------------------- products and norms

    def _multiply(self, x: DeviceArray, weight: DeviceArray) -> DeviceArray:
        """x · weight, without the bias: for what adds it in a kernel that runs anyway."""
        out = self._take(*x.shape[:-1], weight.shape[-1])
        if self.cublas is None:
            cuda_gemm.linear(self.stream, x.data, weight.data, None, "linear", out.data)
        else:
            self.cublas.product(x.data, weight.data, out.data)
        return out

    def linear(self, x: DeviceArray, weight: DeviceArray, bias: DeviceArray, activation: str = "linear") -> DeviceArray:
        if self.cublas is not None:
            out = self._multiply(x, weight)
            cuda_kernels.activate(self.stream, out.data, bias.data, activation, out.data)
            return out
        out = self._take(*x.shape[:-1], weight.shape[-1])
        cuda_gemm.linear(self.stream, x.data, weight.data, bias.data, activation, out.data)
        return out

    def layer_norm(self, x: DeviceArray, weight: DeviceArray, bias: DeviceArray, eps: float) -> DeviceArray:
        out = self._take(*x.shape)
        cuda_kernels.layer_norm(self.stream, x.data, weight.data, bias.data, eps, "linear", out.data)
        return out

    def add_norm(
        self, x: DeviceArray, residual: DeviceArray, weight: DeviceArray, bias: DeviceArray, eps: float
    ) -> DeviceArray:
        out = self._take(*x.shape)
        cuda_kernels.add_norm(self.stream, x.data, None, residual.data, weight.data, bias.data, eps, out.data)
        return out

    def linear_add_norm(
        self, x: DeviceArray, linear_weights: Linear, residual: DeviceArray, norm: Norm, eps: float
    ) -> DeviceArray:
        out = self._multiply(x, linear_weights.weight)
        weight, shift = raw(norm)
        bias = raw(linear_weights.bias)
        cuda_kernels.add_norm(self.stream, out.data, bias, residual.data, weight, shift, eps, out.data)
        return out

    def feed_forward(
        self, x_btd: DeviceArray, intermediate: Linear, output: Linear, norm: Norm, activation: str, eps: float
    ) -> DeviceArray:
        return self.linear_add_norm(self.linear(x_btd, *intermediate, activation), output, x_btd, norm, eps)

    # ------------------------------------------------------------------- squeeze and upsample

    def spec_augment(self, x_bsd: DeviceArray, mask_bs: Array, embed_d: DeviceArray) -> DeviceArray:
        out = self._take(*x_bsd.shape)
        marks = self.queue.upload(np.ravel(mask_bs).astype(np.int32))
        cuda_kernels.spec_augment(self.stream, x_bsd.data, marks, embed_d.data, out.data)
        return out

    def zero_padding(self, x_bsd: DeviceArray, lengths_b: Array) -> DeviceArray:
        out = self._take(*x_bsd.shape)
        cuda_kernels.zero_padding(self.stream, x_bsd.data, self._lengths(lengths_b, x_bsd.shape[1]), out.data)
        return out

    def positional_conv(self, x_bsd: DeviceArray, weight: DeviceArray, bias: DeviceArray, factor: int) -> DeviceArray:
        return self.conv1d(x_bsd, weight, bias, factor, padding=weight.shape[0] // 2)

    def average_pool(self, x_bsd: DeviceArray, factor: int) -> DeviceArray:
        batch, frames, size = x_bsd.shape
        out = self._take(batch, frames // factor, size)
        cuda_kernels.average_pool(self.stream, x_bsd.data, factor, out.data)
        return out

    def trim_and_activate(self, position_brd: DeviceArray, kernel: int, activation: str) -> DeviceArray:
        batch, frames, size = position_brd.shape
        out = self._take(batch, frames - (kernel % 2 == 0), size)
        cuda_kernels.trim_and_activate(self.stream, position_brd.data, activation, out.data)
        return out

    def add_pooled(self, pooled_btd: DeviceArray, position_bqd: DeviceArray) -> DeviceArray:
        out = self._take(*pooled_btd.shape)
        cuda_kernels.add_pooled(self.stream, pooled_btd.data, position_bqd.data, out.data)
        return out

    def squeeze(self, x_bsd: DeviceArray, conv: Conv, factor: int, activation: str) -> DeviceArray:
        batch, frames, size = x_bsd.shape
        out = self._take(batch, frames // factor, size)
        cuda_conv.squeeze(self.stream, x_bsd.data, raw(conv.weight), raw(conv.bias), factor, activation, out.data)
        return out

    def unsqueeze(self, x: DeviceArray, factor: int, frames: int, lengths_b: Array | None = None) -> DeviceArray:
        return self._unfold(x, None, factor, "linear", frames, lengths_b)

    def upsample(
        self,
        x_btd: DeviceArray,
        weight: DeviceArray,
        bias: DeviceArray,
        factor: int,
        activation: str,
        frames: int,
        lengths_b: Array | None = None,
    ) -> DeviceArray:
        return self._unfold(self._multiply(x_btd, weight), bias, factor, activation, frames, lengths_b)

    def _unfold(
        self,
        x: DeviceArray,
        bias: DeviceArray | None,
        factor: int,
        activation: str,
        frames: int,
        lengths_b: Array | None,
    ) -> DeviceArray:
        out = self._take(x.shape[0], frames, x.shape[-1] // factor)
        lengths = self._lengths(lengths_b, frames)
        cuda_kernels.unsqueeze(self.stream, x.data, raw(bias), factor, activation, lengths, out.data)
        return out

    # ----------------------------------------------------------------------------- attention

    def relative_index(self, frames: int, buckets: int, max_distance: int, span: int) -> DeviceArray:
        """Rows of the position table by i − j, (2t − 1,) int32: the middle of a longer table that is kept."""
        key = (buckets, max_distance, span)
        tables = self.rows.setdefault(key, [])
        if not tables or 2 * frames > len(tables[-1]) + 1:
            # Shorter tables stay, as graphs may read them; all together are no longer than the longest.
            most = max(SHORTEST_ROWS, 1 << (frames - 1).bit_length())
            tables.append(self.queue.upload(cuda_attention.relative_rows(most, *key)))
        middle = len(tables[-1]) // 2
        return DeviceArray(tables[-1][middle - frames + 1 : middle + frames], None)

    def disentangled_attention(
        self,
        qkv: DeviceArray,
        heads: int,
        positions: Positions,
        index: DeviceArray | None,
        scale: float,
        lengths_b: Array | None = None,
        mask_queries: bool = False,
    ) -> DeviceArray:
        batch, frames, width = qkv.shape
        out = self._take(batch, frames, width // 3)
        pos_key, pos_query, rows = raw((*positions, index))
        lengths = self._lengths(lengths_b, frames)
        wanted = cuda_attention.attention_scratch(batch, frames, heads, width // 3 // heads)
        scratch = self._take(wanted) if wanted else None
        cuda_attention.disentangled_attention(
            self.stream, qkv.data, heads, pos_key, pos_query, rows, scale, lengths, mask_queries, out.data, raw(scratch)
        )
        return out

    def attention_bytes(self, batch: int, heads: int, frames: int, itemsize: int, explicit: bool) -> int:
        """Explicit forms keep their maps on the device, as NumPy's do; the fused one keeps nothing of that size."""
        return attention.attention_bytes(batch, heads, frames, itemsize, explicit) if explicit else 0

    def split_qkv(self, qkv: DeviceArray) -> tuple[DeviceArray, DeviceArray, DeviceArray]:
        batch, frames, width = qkv.shape
        q, k, v = (self._take(batch, frames, width // 3) for _ in range(3))
        cuda_scores.split_qkv(self.stream, qkv.data, q.data, k.data, v.data)
        return q, k, v

    def content_scores(self, q_btd: DeviceArray, k_btd: DeviceArray, heads: int, scale: float) -> DeviceArray:
        out = self._scores(q_btd, heads)
        cuda_scores.content_scores(self.stream, q_btd.data, k_btd.data, heads, scale, out.data)
        return out

    def _scores(self, x_btd: DeviceArray, heads: int) -> DeviceArray:
        batch, frames, _ = x_btd.shape
        return self._take(batch, heads, frames, frames)

    def content_to_position(
        self, q_btd: DeviceArray, pos_key_hpe: DeviceArray, index: DeviceArray, scale: float
    ) -> DeviceArray:
        out = self._scores(q_btd, pos_key_hpe.shape[0])
        cuda_scores.content_to_position(self.stream, q_btd.data, pos_key_hpe.data, index.data, scale, out.data)
        return out

    def position_to_content(
        self, k_btd: DeviceArray, pos_query_hpe: DeviceArray, index: DeviceArray, scale: float
    ) -> DeviceArray:
        out = self._scores(k_btd, pos_query_hpe.shape[0])
        cuda_scores.position_to_content(self.stream, k_btd.data, pos_query_hpe.data, index.data, scale, out.data)
        return out

    def add_scores(self, *terms_bhij: DeviceArray) -> DeviceArray:
        out = self._take(*terms_bhij[0].shape)
        cuda_scores.add_scores(self.stream, raw(terms_bhij), out.data)
        return out

    def masked_softmax(
        self, scores_bhij: DeviceArray, lengths_b: Array | None = None, mask_queries: bool = False
    ) -> DeviceArray:
        out = self._take(*scores_bhij.shape)
        lengths = self._lengths(lengths_b, scores_bhij.shape[-1])
        cuda_scores.masked_softmax(self.stream, scores_bhij.data, lengths, mask_queries, out.data)
        return out

    def context(self, probs_bhij: DeviceArray, v_btd: DeviceArray) -> DeviceArray:
        out = self._take(*v_btd.shape)
        cuda_scores.context(self.stream, probs_bhij.data, v_btd.data, out.data)
        return out

    # --------------------------------------------------------- convolution beside layer 0, pooling

    def activate_add_norm(
        self,
        out_btd: DeviceArray,
        residual_btd: DeviceArray,
        norm_weight: DeviceArray,
        norm_bias: DeviceArray,
        eps: float,
        activation: str,
        lengths_b: Array | None = None,
    ) -> DeviceArray:
        if lengths_b is not None:
            out_btd = self.zero_padding(out_btd, lengths_b)
        out = self.add_norm(self.activate(out_btd, activation), residual_btd, norm_weight, norm_bias, eps)
        return out if lengths_b is None else self.zero_padding(out, lengths_b)

    def weighted_layer_sum(self, hidden_states: tuple[DeviceArray, ...], weights_l: Array) -> DeviceArray:
        weights = self.to_numpy(weights_l)  # a dozen numbers, on the host already unless a test puts them elsewhere
        mix = np.exp(weights - weights.max())
        out = self._take(*hidden_states[0].shape)
        cuda_kernels.weighted_layer_sum(self.stream, raw(tuple(hidden_states)), list(mix / mix.sum()), out.data)
        return out

    def mean_over_time(self, x_bsd: DeviceArray, lengths_b: Array | None = None) -> DeviceArray:
        batch, frames, size = x_bsd.shape
        out = self._take(batch, size)
        cuda_kernels.mean_over_time(self.stream, x_bsd.data, self._lengths(lengths_b, frames), out.data)
        return out
