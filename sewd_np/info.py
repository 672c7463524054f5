"""What a model is made of, in numbers: parameters, rates, receptive field, multiply-adds. Counting only, no arrays.

A multiply-add is two FLOP. Dense products alone are counted; norms, activations, softmax, gathers and additions
are left out, as is usual: they cost time, but not by this measure. With s frames, 50/s in published models, t squeezed
frames, half as many, c channels of the last convolution, d hidden, f feed-forward, v vocabulary and p = 2·S rows of the
relative-position table, one recording costs:

    feature encoder       Σ_i  s_i · c_(i-1) · k_i · c_i              one term a convolution
    feature projection    s · c · d
    positional conv       ceil(s / squeeze) · (d / groups) · k · d    an even kernel: s + 1 for s
    attention, a layer    4 · t · d²  query, key, value, output
                          2 · t² · d  content scores, context
                          t · p · d   each of c2p and p2c, against the whole table
    feed-forward, a layer 2 · t · d · f
    upsample              t · d · (squeeze · d)
    head                  s · d · v, or s · d · projection + projection · labels

    position table        2 · p · d² a layer: it does not depend on the recording, so it is done once, on load
"""

from __future__ import annotations

import math

from sewd_np.config import SAMPLING_RATE, SEWDConfig
from sewd_np.params import expected_shapes

PARTS = {  # how a parameter's name begins -> the part it belongs to; the first match counts
    "masked_spec_embed": "masked frame",
    "feature_extractor.": "feature encoder",
    "layer_norm.": "feature projection",
    "feature_projection.": "feature projection",
    "encoder.pos_conv_embed.": "positional convolution",
    "encoder.encoder.rel_embeddings.": "position table",
    "encoder.encoder.LayerNorm.": "position table",
    "encoder.encoder.": "transformer layers",
    "encoder.upsample.": "upsample",
    "": "head",
}


LONGEST = 1e9  # seconds to count for: 30 years, and the square of their frames is still a number to print
HEAD_NAMES = {"model": "none", "ctc": "CTC", "classification": "sequence classification"}


def count_parameters(config: SEWDConfig, head: str) -> dict[str, int]:
    """Number of parameters of each part, in the order of the data's way; their sum is the model's total.

    ``head`` is "model", "ctc" or "classification". The norm before the feature projection is counted with it.
    """
    counts = dict.fromkeys(PARTS.values(), 0)
    for name, shape in expected_shapes(config, head).items():
        part = next(part for prefix, part in PARTS.items() if name.startswith(prefix))
        counts[part] += math.prod(shape)
    return {part: count for part, count in counts.items() if count}


def count_multiply_adds(config: SEWDConfig, head: str, samples: int) -> dict[str, int]:
    """Multiply-adds of each part of a forward pass over one recording; formulas in the module's text.

    Raises ``ValueError`` where the recording is shorter than the model's minimum, and for an unknown head.
    """
    if head not in HEAD_NAMES:
        raise ValueError(f"head is {head!r}; it must be one of {', '.join(HEAD_NAMES)}.")
    if samples < config.minimum_samples:
        raise ValueError(
            f"{samples} samples are too short for this model; it needs at least {config.minimum_samples} samples."
        )
    d, layers = config.hidden_size, config.num_hidden_layers
    lengths, channels = config.conv_lengths(samples), (1, *config.conv_dim)
    s = lengths[-1]
    t = config.squeezed(s)
    kernel = config.num_conv_pos_embeddings
    pos_conv_frames = (s + 2 * (kernel // 2) - kernel) // config.squeeze_factor + 1
    position_terms = config.uses_c2p + config.uses_p2c
    counts = {
        "feature encoder": sum(
            length * channels[i] * config.conv_kernel[i] * channels[i + 1] for i, length in enumerate(lengths)
        ),
        "feature projection": s * channels[-1] * d * config.has_feature_projection,
        "positional convolution": pos_conv_frames * (d // config.num_conv_pos_embedding_groups) * kernel * d,
        "attention": layers * (4 * t * d * d + 2 * t * t * d + position_terms * t * 2 * config.position_span * d),
        "feed-forward": layers * 2 * t * d * config.intermediate_size,
        "convolution beside layer 0": t * (d // config.conv_groups) * config.conv_kernel_size * d,
        "upsample": t * d * config.squeeze_factor * d,
    }
    if head == "ctc":
        counts["head"] = s * d * config.vocab_size
    elif head == "classification":
        # A weighted layer sum pools hidden states, which come at the squeezed rate.
        frames, size = t if config.use_weighted_layer_sum else s, config.classifier_proj_size
        counts["head"] = frames * d * size + size * config.num_labels
    return {part: count for part, count in counts.items() if count}


def position_table_multiply_adds(config: SEWDConfig) -> int:
    """Multiply-adds that project the relative-position table for every layer: once on load."""
    terms = config.uses_c2p + config.uses_p2c
    return config.num_hidden_layers * terms * 2 * config.position_span * config.hidden_size**2


def describe(config: SEWDConfig, head: str, seconds: float, sampling_rate: int = SAMPLING_RATE) -> str:
    """A page about a model: rates, parameters per part, multiply-adds for so many seconds, config.

    sampling_rate: samples per second, of the model's feature extractor. Raises ``ValueError`` where ``seconds`` is not
    a length that the model can hear, or beyond ``LONGEST``, and for an unknown head or a rate that is none.
    """
    if not 0 < sampling_rate < math.inf:
        raise ValueError(f"sampling_rate is {sampling_rate!r}; it must be a number above 0, in samples per second.")
    if not 0 < seconds <= LONGEST:  # so is NaN refused
        raise ValueError(f"seconds is {seconds:g}; it must be a number above 0, and {LONGEST:g} at most.")
    samples = round(seconds * sampling_rate)
    if samples < config.minimum_samples:
        shortest = config.minimum_samples / sampling_rate
        raise ValueError(f"seconds is {seconds:g}, too short for this model; it needs at least {shortest:g}.")
    work, table_work = count_multiply_adds(config, head, samples), position_table_multiply_adds(config)
    frames = config.frames(samples)
    rate = sampling_rate / config.inputs_to_logits_ratio
    lines = [
        f"head                {HEAD_NAMES[head]}",
        f"sampling rate       {sampling_rate} Hz",
        f"frame rate          {rate:g}/s, {rate / config.squeeze_factor:g}/s inside the transformer",
        f"receptive field     {_duration(config.receptive_field, sampling_rate)} a frame; attention and norms see all",
        f"shortest recording  {_duration(config.minimum_samples, sampling_rate)}",
        "",
        "Parameters",
        *_rows({part: f"{count:,}" for part, count in _with_total(count_parameters(config, head)).items()}),
        "",
        f"Multiply-adds, in millions, for {seconds:g} s: {samples:,} samples, {frames:,} frames, "
        f"{config.squeezed(frames):,} squeezed",
        *_rows({part: f"{count / 1e6:,.1f}" for part, count in _with_total(work).items()}),
        "",
        f"Once, on load, in millions: {table_work / 1e6:,.1f} to project the position table",
        "",
        "Config",
        *(f"  {name}: {value}" for name, value in config.to_dict().items()),
    ]
    return "\n".join(lines)


def _with_total(counts: dict[str, int]) -> dict[str, int]:
    return {**counts, "total": sum(counts.values())}


def _rows(cells: dict[str, str]) -> list[str]:
    """Names to the left, numbers to the right."""
    width, digits = max(map(len, cells)), max(map(len, cells.values()))
    return [f"  {name:<{width}}  {number:>{digits}}" for name, number in cells.items()]


def _duration(samples: int, sampling_rate: int) -> str:
    return f"{samples} samples ({1000 * samples / sampling_rate:g} ms)"
