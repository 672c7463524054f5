"""transformers' SEW-D once more, for training on a CPU: the same modules and weights, called in a cheaper way.

``lower`` and ``upper`` together are ``SEWDForCTC.forward``; between them is what ``train_bundled.py`` keeps for several
steps. Against the reference's own forward and backward pass on clips of a few seconds: no convolution is run whose
weights are fixed, positions are projected once a batch and are not gathered, dropout draws no random numbers, GELU is
one kernel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from training_data import Array, normalize
from transformers.models.sew_d.modeling_sew_d import make_log_bucket_position


def has_bfloat16(device: str) -> bool:
    """Whether products of bfloat16 are quick: a processor without instructions for them is ten times slower at them."""
    return device != "cpu" or bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


def lower(model: Any, wave: Array, frozen: int) -> Any:
    """What the first ``frozen`` convolutions give for one recording: (s, c) bfloat16.

    Alone, and so with the group norm's statistics that it has when it is recognised.
    """
    return onward(model, torch.from_numpy(normalize(wave))[:, None], 0, frozen)


def onward(model: Any, x_sc: Any, first: int, last: int) -> Any:
    """What convolutions ``first`` to ``last`` - 1 make of ``x_sc``: (s', c') bfloat16."""
    with torch.no_grad():
        x = x_sc.T[None].float().to(next(model.parameters()).device)
        for layer in model.sew_d.feature_extractor.conv_layers[first:last]:
            x = layer(x)
        return x[0].T.to(torch.bfloat16).contiguous().cpu()


def skew(x: Any) -> Any:
    """(n, t, 2t - 1) by distance to (n, t, t) by place: row i, column j is x[:, i, t - 1 - i + j]. Views, no gather."""
    n, t, _ = x.shape
    return x.reshape(n, -1)[:, t - 1 : t - 1 + t * (2 * t - 2)].view(n, t, 2 * t - 2)[:, :, :t]


def attend(attention: Any, x: Any, table: Any, mask: Any) -> Any:
    """Disentangled attention of one layer, as transformers computes it but for the order of the sums.

    ``table`` has a row for each distance i - j from t - 1 down to 1 - t, where the reference projects all 512 rows of
    the position table in every layer, repeats them for every clip and gathers twice.
    """
    b, t, d = x.shape
    h = attention.num_attention_heads
    rows = torch.cat([x.reshape(b * t, d), table.to(x.dtype)])

    def heads(y: Any) -> Any:
        return y.view(-1, h, d // h).transpose(0, 1)

    def clips(y: Any) -> Any:
        return y.reshape(h * b, t, -1)

    query, key = heads(attention.query_proj(rows) / (3 * d / h) ** 0.5), heads(attention.key_proj(rows))
    value = heads(attention.value_proj(rows[: b * t]))
    to_place = torch.bmm(query[:, : b * t], key[:, b * t :].transpose(1, 2))
    from_place = torch.bmm(key[:, : b * t], query[:, b * t :].flip(1).transpose(1, 2))
    scores = torch.bmm(clips(query[:, : b * t]), clips(key[:, : b * t]).transpose(1, 2))
    scores = scores + skew(clips(to_place)) + skew(clips(from_place)).transpose(1, 2)
    weights = torch.softmax(scores.view(h, b, t, t) + mask, -1).view(h * b, t, t)
    mixed = torch.bmm(weights.to(value.dtype), clips(value))
    return mixed.view(h, b * t, -1).transpose(0, 1).reshape(b, t, d)


def position_rows(model: Any, t: int) -> Any:
    """The normalised rows of the position table for the distances t - 1 down to 1 - t: (2t - 1, d)."""
    encoder, config = model.sew_d.encoder.encoder, model.config
    distance = torch.arange(t - 1, -t, -1, device=encoder.rel_embeddings.weight.device)
    reach = config.max_position_embeddings
    bucket = make_log_bucket_position(distance, config.position_buckets, reach).long()  # type: ignore[no-untyped-call]
    return encoder.get_rel_embedding()[(bucket + config.position_buckets).clamp(0, 2 * config.position_buckets - 1)]


def block(layer: Any, x: Any, table: Any, mask: Any, dropped: Any) -> Any:
    """One transformer layer: (b, t, d) to (b, t, d). ``dropped`` is dropout, or leaves what it is given."""
    output = layer.attention.output
    x = output.LayerNorm(x + dropped(output.dense(attend(layer.attention.self, x, table, mask))))
    return layer.output.LayerNorm(x + dropped(layer.output.dense(F.gelu(layer.intermediate.dense(x)))))


def upper(
    model: Any,
    x: Any,
    frames: Any,
    frozen: int,
    pool: Any = None,
    views: int = 1,
    middle: Any = None,
    above: Any = None,
) -> tuple[Any, Any]:
    """Logits (b, s, v) at the top and from the middle layer, of what ``lower`` gave, padded to (b, s, c).

    frames (b,): each clip's own length in frames of logits. ``middle``: the middle layer's head, if not the top's.
    ``pool``: a long random mask to take dropout from, which is much quicker than drawing it; with it SpecAugment is on
    too. Without, the result is the reference's. ``views``: the whole batch so many times, one after the other, each
    time masked and dropped in other places. ``above`` (b,): which clips go on above the middle layer, all if not said;
    the top's logits are of these alone.
    """

    def dropped(y: Any) -> Any:
        if pool is None:
            return y
        start = int(torch.randint(len(pool) - y.numel(), ()))
        return y * pool[start : start + y.numel()].view(y.shape).to(y.dtype)

    def spans(rows: int, length: int, chance: float, width: int) -> Any:
        """Stretches of ``width`` (odd) that begin anywhere with ``chance``: (rows, length), true inside."""
        begun = (torch.rand(rows, 1, length, device=x.device) < chance).float()
        return F.max_pool1d(begun, width, 1, width // 2)[:, 0] > 0

    sew, encoder = model.sew_d, model.sew_d.encoder
    x = x.transpose(1, 2)
    for layer in sew.feature_extractor.conv_layers[frozen:]:
        x = layer(x)
    x = sew.feature_projection(sew.layer_norm(x.transpose(1, 2))).repeat(views, 1, 1)
    frames = frames.repeat(views)
    if pool is not None:
        b, s, d = x.shape
        x = torch.where(spans(b, s, 0.03, 5)[..., None], sew.masked_spec_embed.to(x.dtype), dropped(x))
        x = x.masked_fill(spans(b, d, 0.006, 13)[:, None], 0)
    inside = torch.arange(x.shape[1], device=x.device) < frames[:, None]
    x = (x * inside[..., None]).transpose(1, 2)
    pooled = encoder.pool(x)
    x = (pooled + encoder.pos_conv_embed(x)[..., : pooled.shape[-1]]).transpose(1, 2)
    t = x.shape[1]
    mask = torch.where(inside[:, : 2 * t].view(len(x), 1, t, 2).all(-1), 0.0, -1e4).to(x.dtype)
    table = position_rows(model, t)
    heads = {
        model.config.num_hidden_layers // 2: middle or model.lm_head,
        model.config.num_hidden_layers: model.lm_head,
    }
    logits = []
    for number, layer in enumerate(encoder.encoder.layer, 1):
        x = block(layer, x, table, mask, dropped) if len(x) else x
        if number in heads:
            logits.append(heads[number](encoder.upsample(x)))
            if above is not None and len(logits) == 1:
                x, mask = x[above.repeat(views)], mask[above.repeat(views)]
    return logits[1], logits[0]
