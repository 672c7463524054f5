"""The training scripts' own pieces: alignment, cutting, augmentation, and a shortcut that must not change a result."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import signal
from transformers import SEWDForCTC, SEWDForSequenceClassification

from tests.reference import SMALL, build

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import fast_twin as twin
import hearing
import muon
import pronounce
import train_bundled as script
import train_keywords as keywords
import training_data as data

RNG = np.random.default_rng


def spiky(labels: list[int | None], vocabulary: int = 32) -> np.ndarray:
    """Log-probabilities that favour one label a frame, None the blank."""
    scores = np.full((len(labels), vocabulary), -8.0)
    for frame, label in enumerate(labels):
        scores[frame, 0 if label is None else label] = -0.01
    return scores


def test_text_survives_encoding() -> None:
    text = "ENTER SIX TWO"
    ids = hearing.encode(text)
    frames = [i for label in ids for i in (label, label, 0)]
    assert hearing.decode(np.array(frames)) == text
    assert hearing.decode(np.zeros(9, int)) == ""


def test_alignment_finds_the_frames_that_fire() -> None:
    t, w, o, bar, s, i, x = hearing.encode("TWO SIX")
    path = [None, t, w, o, o, None, bar, None, s, i, i, x, None, None]
    assert data.align(spiky(path), hearing.encode("TWO SIX"), "TWO SIX") == [
        pytest.approx((1 * 0.02, 5 * 0.02)),
        pytest.approx((8 * 0.02, 12 * 0.02)),
    ]


def test_alignment_keeps_a_doubled_letter_apart() -> None:
    """Two of the same letter need a blank between them, however the scores are."""
    labels = hearing.encode("LL")
    (span,) = data.align(spiky([labels[0]] * 3), labels, "LL")
    assert span == pytest.approx((0, 0.06))


def test_words_are_cut_where_it_is_quiet() -> None:
    wave = RNG(0).standard_normal(16_000).astype(np.float32)
    wave[7000:8500] = 0
    pieces = data.cut_words(wave, "TWO SIX", [(0.1, 0.3), (0.7, 0.9)])
    assert [word for word, _ in pieces] == ["TWO", "SIX"]
    assert 7000 <= len(pieces[0][1]) <= 8500
    np.testing.assert_array_equal(np.concatenate([wave for _, wave in pieces]), wave)


def test_recombined_words_say_what_the_text_says() -> None:
    words = [(name, np.full(1000 + 500 * i, 0.1 * (i + 1), np.float32)) for i, name in enumerate(["A", "B", "C"])]
    for seed in range(20):
        clip = data.recombine(words, RNG(seed))
        said = clip.text.split()
        assert 1 <= len(said) <= 8
        assert len(clip.samples) == sum(len(dict(words)[word]) for word in said)
    assert len({data.recombine(words, RNG(seed)).text for seed in range(20)}) > 10


def test_names_are_spelled_as_far_as_a_speakers_letters_go() -> None:
    words = [(letter, np.full(1000 + i, 0.1, np.float32)) for i, letter in enumerate("ANERTOLI")]
    names = {name for name in data.NAMES if set(name) <= set("ANERTOLI")}
    said = {data.recombine(words, RNG(seed), spelled=1.0).text.replace(" ", "") for seed in range(60)}
    assert len(said) > 10 and said <= names
    assert all(name.isalpha() and name.isupper() for name in data.NAMES)
    only_z = [("Z", np.full(1000, 0.1, np.float32))]  # no name can be spelled: words in any order
    assert set(data.recombine(only_z, RNG(0), spelled=1.0).text.split()) == {"Z"}


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt), data.whole(path) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "before"
    with data.whole(path) as part:
        part.write_text("after")
    assert path.read_text() == "after" and [file.name for file in tmp_path.iterdir()] == ["a.pt"]


def test_noise_has_the_ratio_asked_for() -> None:
    wave = np.sin(np.arange(16_000) / 7).astype(np.float32)
    noise = data.coloured_noise(5000, 1.0, RNG(0))
    added = data.add_noise(wave, noise, 15.0) - wave
    assert 10 * np.log10(np.mean(wave**2) / np.mean(added**2)) == pytest.approx(15, abs=0.01)


@pytest.mark.parametrize("factor", [0.8, 0.93, 1.0, 1.2])
def test_tempo_changes_without_the_pitch(factor: float) -> None:
    """Two halves, 200 and 500 Hz: each is as high and as loud as before, and the change comes at its due time."""
    seconds = np.arange(16_000) / 16_000
    wave = np.concatenate([0.3 * np.sin(2 * np.pi * hertz * seconds) for hertz in (200, 500)]).astype(np.float32)
    heard = data.change_tempo(wave, factor)
    assert heard.dtype == np.float32 and len(heard) == int(32_000 / factor)
    middle = len(heard) // 2
    for part, hertz in ((heard[600 : middle - 600], 200), (heard[middle + 600 : -600], 500)):
        crossings = np.diff(np.signbit(part).astype(int)) != 0
        assert abs(crossings.sum() / 2 * 16_000 / len(part) - hertz) < 2
        assert np.std(part) == pytest.approx(0.3 / np.sqrt(2), rel=0.01)


def test_the_same_tempo_changes_nothing() -> None:
    wave = RNG(0).standard_normal(9_000).astype(np.float32)
    np.testing.assert_allclose(data.change_tempo(wave, 1.0)[240:], wave[240:], atol=1e-5)


def test_tempo_of_hardly_any_sound() -> None:
    for samples in (0, 1, 240, 481):
        assert len(data.change_tempo(np.zeros(samples, np.float32), 1.1)) == int(samples / 1.1)


def resonating(hertz: float, samples: int = 16_000) -> np.ndarray:
    """A voice of 125 Hz with a little breath, through one formant."""
    pulses = 0.02 * RNG(0).standard_normal(samples)
    pulses[::128] += 1
    radius, angle = np.exp(-np.pi * 150 / 16_000), 2 * np.pi * hertz / 16_000
    wave = np.asarray(signal.lfilter([1], [1, -2 * radius * np.cos(angle), radius**2], pulses), np.float32)
    return wave / np.abs(wave).max() / 2


@pytest.mark.parametrize("factor", [0.85, 1.15])
def test_formants_move_and_the_pitch_stays(factor: float) -> None:
    """The loudest harmonic lies beside 1,500 x factor instead of at 1,500 Hz; little is between harmonics."""
    heard = data.change_formants(resonating(1500.0), factor)
    assert heard.dtype == np.float32 and len(heard) == 16_000
    power = np.abs(np.fft.rfft(heard)) ** 2
    assert abs(power.argmax() - 1500 * factor) < 125
    assert power[125::125].sum() > 0.9 * power.sum()


def test_formants_that_stay_change_nothing() -> None:
    for samples in (0, 1, 127, 9000):
        wave = RNG(0).standard_normal(samples).astype(np.float32)
        np.testing.assert_allclose(data.change_formants(wave, 1.0), wave, atol=1e-5)


@pytest.mark.parametrize("strength", [0.1, 0.5, 1.0])
def test_augmented_sound_is_sound(strength: float) -> None:
    wave = RNG(1).standard_normal(8000).astype(np.float32) * 0.1
    changed = 0
    for seed in range(40):
        heard = data.augment(wave, lambda: wave, RNG(seed), strength)
        assert heard.dtype == np.float32 and np.isfinite(heard).all()
        quickest = (1 + 0.21 * strength) * (1 + 0.26 * strength)  # speed and tempo
        slowest = (1 - 0.17 * strength) * (1 - 0.21 * strength)
        assert 8000 / quickest <= len(heard) <= 8000 / slowest + 2 * data.RATE / 3
        changed += len(heard) != len(wave) or not np.allclose(heard, wave)
    assert changed > 20


def test_random_text_stays_in_the_vocabulary() -> None:
    texts = [data.random_text(RNG(seed)) for seed in range(300)]
    assert all(hearing.TOKEN["<unk>"] not in hearing.encode(text) for text in texts)
    assert len(set(texts)) > 250


def test_everything_that_an4_says_is_known_to_be_so() -> None:
    said = {word for seed in range(300) for word in data.random_text(RNG(seed)).split()}
    assert said <= data.SPOKEN_WORDS and len(said) > 80


def test_bands_are_missing_from_some_clips_and_nothing_is_added() -> None:
    """White noise through every room and line: its spectrum keeps its size but for curve, edges and bands."""
    wave = RNG(0).standard_normal(16_000).astype(np.float32)
    holes = 0
    for seed in range(60):
        heard = data.room_and_line(wave, RNG(seed))
        assert heard.dtype == np.float32 and len(heard) == len(wave)
        power = np.log10(np.abs(np.fft.rfft(heard))[300:3300].reshape(50, 60) ** 2).mean(1)  # 300 to 3,300 Hz
        assert power.max() < 6
        holes += power.min() < power.max() - 2.5  # more than the curve's 16 dB
    assert 15 < holes < 45


def test_pronunciations_are_numbered_phonemes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A letter A is pronounced as one, the article as an article; 0 is left to CTC's blank."""
    known = {"A": "eɪ", "B": "bi", "CAT": "kæt", "SIX": "sɪks"}
    monkeypatch.setattr(pronounce, "espeak_phonemes", lambda words: {word: known[word] for word in words})
    spoken = pronounce.Pronunciations(["B A SIX", "A CAT"])
    assert spoken.phonemes == sorted(set("eɪbikætsə"))

    def said(text: str) -> str:
        return "".join(spoken.phonemes[label - 1] for label in spoken.labels(text))

    assert said("B A SIX A") == "bieɪsɪkseɪ" and said("A CAT") == "əkæt" and said("") == ""
    assert min(spoken.labels("B A SIX")) >= 1


def test_without_espeak_there_are_no_phonemes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pronounce.shutil, "which", lambda name: None)
    assert pronounce.Pronunciations(["B A SIX"]).phonemes == []


def test_espeak_pronounces_each_word_by_itself() -> None:
    if not pronounce.shutil.which("espeak-ng"):
        pytest.skip("espeak-ng is not installed")
    spoken = pronounce.espeak_phonemes(["A", "B", "SIX", "THAT'S", "W"])
    assert list(spoken) == ["A", "B", "SIX", "THAT'S", "W"] and all(spoken.values())
    assert (spoken["A"], spoken["B"], spoken["SIX"], spoken["W"]) == ("eɪ", "bi", "sɪks", "dʌbəlju")


def test_mel_frames_are_the_models_frames() -> None:
    for samples in (720, 8000, 16_001):
        mel = data.log_mel(RNG(0).standard_normal(samples).astype(np.float32))
        assert mel.shape == ((samples - 400) // 320 + 1, 64) and np.isfinite(mel).all()


def features_of(hf: SEWDForCTC, wave: np.ndarray, frozen: int) -> torch.Tensor:
    """What the first ``frozen`` convolutions give, (1, s, c), in the model's own precision."""
    x = torch.from_numpy(data.normalize(wave))[None, None]
    for layer in hf.sew_d.feature_extractor.conv_layers[:frozen]:
        x = layer(x)
    return x.transpose(1, 2)


@pytest.mark.parametrize("frozen", [0, 5, 11, 13])
@pytest.mark.parametrize("frames", [2, 3, 8, 9, 40])
def test_the_faster_forward_pass_gives_the_references_logits(frames: int, frozen: int) -> None:
    """Short clips, whose distances have a bucket each, and ones that share buckets; float32 sums in another order."""
    hf = build({**SMALL, "position_buckets": 16, "max_position_embeddings": 32}, "ctc", torch.float32)
    assert isinstance(hf, SEWDForCTC)
    wave = RNG(0).standard_normal(640 * frames + 400).astype(np.float32)
    with torch.no_grad():
        expected = hf(torch.from_numpy(data.normalize(wave))[None]).logits
        features = features_of(hf, wave, frozen)
        kept = twin.lower(hf, wave, frozen).float()
        given, middle = twin.upper(hf, features, torch.tensor([expected.shape[1]]), frozen)
    torch.testing.assert_close(kept, features[0], rtol=2**-8, atol=0)  # bfloat16 has eight bits
    torch.testing.assert_close(given, expected[:, : given.shape[1]], rtol=1e-4, atol=1e-4)
    assert middle.shape == given.shape and not torch.allclose(middle, given)


def test_a_clip_in_a_batch_is_heard_as_it_is_alone() -> None:
    hf = build(SMALL, "ctc", torch.float32)
    assert isinstance(hf, SEWDForCTC)
    with torch.no_grad():
        clips = [features_of(hf, RNG(n).standard_normal(n).astype(np.float32), 11)[0] for n in (6000, 9000, 12_000)]
        frames = torch.tensor([len(clip) // 2 for clip in clips])
        batch = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
        together, _ = twin.upper(hf, batch, frames, 11)
        for row, clip, count in zip(together, clips, frames.tolist(), strict=True):
            alone, _ = twin.upper(hf, clip[None], torch.tensor([count]), 11)
            even = count // 2 * 2
            torch.testing.assert_close(row[:even], alone[0, :even], rtol=1e-4, atol=1e-4)


def test_dropout_and_masks_come_with_the_pool() -> None:
    hf = build(SMALL, "ctc", torch.float32)
    assert isinstance(hf, SEWDForCTC)
    x = torch.randn(2, 60, 24, generator=torch.Generator().manual_seed(0))
    pool = torch.ones(1 << 16)  # keeps everything, so that SpecAugment alone is seen
    torch.manual_seed(0)
    with torch.no_grad():
        plain, _ = twin.upper(hf, x, torch.tensor([30, 30]), 11)
        masked, _ = twin.upper(hf, x, torch.tensor([30, 30]), 11, pool)
    assert plain.shape == masked.shape and not torch.allclose(plain, masked)


def test_two_views_are_the_batch_twice() -> None:
    hf = build(SMALL, "ctc", torch.float32)
    assert isinstance(hf, SEWDForCTC)
    x = torch.randn(2, 60, 24, generator=torch.Generator().manual_seed(0))
    frames = torch.tensor([30, 20])
    with torch.no_grad():
        once = twin.upper(hf, x, frames, 11)
        twice = twin.upper(hf, x, frames, 11, views=2)
    for logits, both in zip(once, twice, strict=True):
        torch.testing.assert_close(both, logits.repeat(2, 1, 1), rtol=1e-5, atol=1e-5)


def test_the_middle_layer_may_have_a_head_of_its_own() -> None:
    hf = build(SMALL, "ctc", torch.float32)
    assert isinstance(hf, SEWDForCTC)
    x = torch.randn(2, 60, 24, generator=torch.Generator().manual_seed(0))
    own = torch.nn.Linear(hf.config.hidden_size, 40)
    with torch.no_grad():
        top, _ = twin.upper(hf, x, torch.tensor([30, 30]), 11)
        same, middle = twin.upper(hf, x, torch.tensor([30, 30]), 11, middle=own)
    torch.testing.assert_close(same, top)
    assert middle.shape == (*top.shape[:2], 40)


def test_a_step_asks_the_middle_layer_for_phonemes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its head learns from the step, and the loss is another than with letters there."""
    monkeypatch.setattr(pronounce, "espeak_phonemes", lambda words: {word: word[::-1].lower() * 2 for word in words})
    hf = build({**SMALL, "vocab_size": 32}, "ctc", torch.float32)
    assert isinstance(hf, SEWDForCTC)
    x = torch.randn(60, 24, generator=torch.Generator().manual_seed(0))
    clips = [(x, "ONE", 30), (x[:40], "TWO SIX", 20)]
    pool = torch.ones(1 << 16)
    losses = []
    for texts in (["ONE", "TWO SIX"], []):
        spoken = pronounce.Pronunciations(texts)
        if spoken.phonemes:
            hf.phoneme_head = torch.nn.Linear(hf.config.hidden_size, len(spoken.phonemes) + 1)
        torch.manual_seed(0)
        loss, shown = script.train_step(hf, clips, 11, pool, spoken)
        losses.append((loss.item(), shown))
        hf.zero_grad()
        loss.backward()
        learned = hf.phoneme_head.weight.grad
        assert (learned is not None and bool(learned.abs().sum() > 0)) == bool(texts)
    assert losses[0][1] == pytest.approx(losses[1][1]) and losses[0][0] != pytest.approx(losses[1][0])


def test_an_empty_frame_learns_to_say_nothing() -> None:
    """Its loss is the bias's own cross-entropy, and one step down it makes the blank likelier."""
    bias = torch.linspace(-1, 1, 32, requires_grad=True)
    loss = script.empty_frame(bias)
    assert loss.item() == pytest.approx(float((torch.logsumexp(bias, 0) - bias[0]).detach()))
    loss.backward()
    assert bias.grad is not None
    after = torch.softmax((bias - bias.grad).detach(), 0)
    assert after[0] > torch.softmax(bias.detach(), 0)[0]


def test_views_disagree_by_what_lies_between_their_distributions() -> None:
    """Nothing for equal views, whatever stands beyond a clip's end; else the mean of both divergences per letter."""
    rng = RNG(0)
    one, other = (rng.standard_normal((2, 5, 7)) for _ in range(2))
    other[1, 3:] = one[1, 3:] + 4 * rng.standard_normal((2, 7))
    frames, letters = torch.tensor([5, 3]), 3
    p, q = (np.exp(z) / np.exp(z).sum(-1, keepdims=True) for z in (one, other))
    apart = ((p - q) * np.log(p / q)).sum(-1)  # Kullback-Leibler from p to q and from q to p
    expected = (apart[0].sum() + apart[1, :3].sum()) / 2 / letters

    def between(a: np.ndarray, b: np.ndarray) -> Any:
        return script.disagreement(torch.from_numpy(np.concatenate([a, b])).requires_grad_(), frames, letters)

    assert between(one, one).item() == pytest.approx(0, abs=1e-6)
    value = between(one, other)
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert value.requires_grad


def test_the_store_keeps_its_size_and_its_batches_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    hf = build(SMALL, "ctc", torch.float32)
    monkeypatch.setattr(script, "STORE_HOURS", 20 / 3600)
    monkeypatch.setattr(script, "BATCH_SECONDS", 4.0)
    rng = RNG(0)
    store = script.Store(11, rng)
    waves = [rng.standard_normal(int(rng.integers(8000, 32_000))).astype(np.float32) for _ in range(30)]
    store.add(hf, [(wave, str(number)) for number, wave in enumerate(waves)])
    assert 17 < store.seconds <= 20  # no clip is longer than two seconds
    assert [text for _, text, _ in store.clips] == [str(number) for number in range(30)][-len(store.clips) :]
    batches = store.batches()
    assert len(batches) == script.BATCHES
    for batch in batches:
        longest = max(frames for _, _, frames in batch)
        assert longest * len(batch) * data.FRAME <= 4.0
        for features, text, frames in batch:
            assert frames == (len(waves[int(text)]) - 400) // 320 + 1
            assert len(features) // 2 == frames


def test_what_is_kept_goes_through_newly_fixed_convolutions() -> None:
    hf = build(SMALL, "ctc", torch.float32)
    assert isinstance(hf, SEWDForCTC)
    wave = RNG(0).standard_normal(9000).astype(np.float32)
    store = script.Store(0, RNG(0))
    store.freeze(hf, 7)
    store.add(hf, [(wave, "A"), (wave[:7000], "B")])
    store.freeze(hf, 11)
    assert store.frozen == 11 and [text for _, text, _ in store.clips] == ["A", "B"]
    for (kept, _, frames), samples in zip(store.clips, (9000, 7000), strict=True):
        assert frames == (samples - 400) // 320 + 1 and kept.dtype == torch.bfloat16
        expected = twin.lower(hf, wave[:samples], 11).float()
        assert kept.shape == expected.shape
        # Rounded to eight bits on the way, once more than the other.
        assert (kept.float() - expected).abs().max() < 2**-6 * expected.abs().max()


def one_of_two(rank: int, meeting: str, results: Any) -> None:
    """A process of ``torchrun``'s: its gradients are all ``rank`` + 1, its step took 2 + 4 · ``rank`` seconds."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in [(2, 3), (4,)]]
    fixed = torch.nn.Parameter(torch.zeros(5), requires_grad=False)
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, rank + 1)
    seconds = script.shared_mean([*parameters, fixed], 2.0 + 4 * rank)
    results.put(
        (seconds, fixed.grad, [parameter.grad.numpy() for parameter in parameters if parameter.grad is not None])
    )
    torch.distributed.destroy_process_group()


def test_processes_share_their_gradients_and_their_clock(tmp_path: Path) -> None:
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path / "meeting"), results), nprocs=2)
    for _ in range(2):
        seconds, fixed, gradients = results.get()
        assert seconds == 4.0 and fixed is None
        assert [gradient.shape for gradient in gradients] == [(2, 3), (4,)]
        assert all((gradient == 1.5).all() for gradient in gradients)


def test_muon_is_pytorchs_but_for_the_rounding() -> None:
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in [(16, 16), (16, 16), (40, 16), (16, 24)]]
    ours, theirs = ([torch.nn.Parameter(matrix.clone()) for matrix in start] for _ in range(2))
    unused = torch.nn.Parameter(torch.ones(3, 3))
    optimizers = (
        muon.Muon([*ours, unused], 0.01, weight_decay=0.05, momentum=0.95, dtype=torch.float32),
        torch.optim.Muon(theirs, 0.01, weight_decay=0.05, ns_steps=muon.STEPS, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other, before in zip(ours, theirs, start, strict=True):
        assert (one - other).norm() < 0.02 * (other - before).norm()  # PyTorch's computes in bfloat16
    assert (unused == 1).all()


def test_a_pause_counts_as_ten_seconds() -> None:
    assert script.shared_mean([], 0.5) == 0.5
    assert script.shared_mean([], 3600.0) == 10.0


@pytest.mark.parametrize("samples", [720 + 640 * 13, 720 + 640 * 30])
def test_the_classifier_in_two_halves_is_the_whole_one(samples: int) -> None:
    hf = build({**SMALL, "num_labels": 5}, "classification", torch.float32)
    assert isinstance(hf, SEWDForSequenceClassification)
    waves = [RNG(seed).standard_normal(samples).astype(np.float32) for seed in range(3)]
    with torch.no_grad():
        expected = hf(torch.from_numpy(np.stack([data.normalize(wave) for wave in waves]))).logits
        given = keywords.above(hf, keywords.below(hf, waves))
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)


def test_a_keyword_backwards_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every word is drawn whole and with its own label; some of what is unknown is a keyword's sound in reverse."""
    monkeypatch.setattr(keywords, "augment", lambda wave, other, rng: wave)
    monkeypatch.setattr(keywords, "change_speed", lambda wave, factor: wave)
    ramps = [np.arange(1, 40, dtype=np.float32) + 100 * label for label in range(len(keywords.LABELS))]
    words = keywords.Words([[ramp] for ramp in ramps], [np.full(32_000, -1, np.float32)], RNG(0))
    reversed_ones = 0
    for _ in range(400):
        wave, label = words.draw(30_000)
        sound = wave[wave != 0]
        assert len(wave) == 30_000
        if label != keywords.UNKNOWN:
            np.testing.assert_array_equal(sound, ramps[label])
        elif len(sound) == 39 and sound[0] > sound[-1]:
            reversed_ones += 1
            np.testing.assert_array_equal(sound[::-1], ramps[int(sound[-1]) // 100])
    assert 3 < reversed_ones < 30


def test_one_finalist_lies_between_the_last_checkpoints_and_the_first() -> None:
    snapshots = [{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 2.0])}]
    best, first = {"w": torch.ones(2)}, {"w": torch.zeros(2)}
    assert list(script.finalists(best, [], first).values()) == [best]
    assert len(script.finalists(best, snapshots, None)) == 2
    kept, mean, mixed = script.finalists(best, snapshots, first).values()
    assert kept is best
    torch.testing.assert_close(mean["w"], torch.tensor([2.0, 2.0]))
    torch.testing.assert_close(mixed["w"], torch.full((2,), 2 * (1 - script.KEPT)))


def test_the_finalist_with_fewest_errors_in_all_conditions_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the one that is best on clean recordings. Its figures are those of the weights as they are exported."""
    model: Any = torch.nn.ModuleDict({"lm_head": torch.nn.Linear(1, 2)})
    seen = []

    def errors(model: Any, dev: Any, change: Any) -> float:
        seen.append(model["lm_head"].weight[:, 0].tolist())
        clean, worse = seen[-1]
        return float(clean if change is None else worse)

    monkeypatch.setattr(script, "word_error_rate", errors)
    bias = torch.zeros(2)
    found = {
        "one": {"lm_head.weight": torch.tensor([[0.1], [0.3]]), "lm_head.bias": bias},
        "other": {"lm_head.weight": torch.tensor([[0.2], [0.25]]), "lm_head.bias": bias},
    }
    name, figures = script.choose(model, found, [], 0)
    chosen = found["other"]["lm_head.weight"][:, 0].half().float().tolist()
    assert name == "other" and len(figures) == 7 and chosen in seen
    assert model["lm_head"].weight[:, 0].tolist() == chosen
    assert model["lm_head"].bias.tolist() == [-script.BLANK, 0] and bias.tolist() == [0, 0]
    assert figures["clean"] == chosen[0] and figures["at 8 kHz"] == chosen[1]


def test_learning_rate_rises_and_falls() -> None:
    rates = [script.rate_at(progress) for progress in np.linspace(0, 1, 101)]
    top = int(np.argmax(rates))
    assert 0 < top < 10 and rates[top] <= script.PEAK_RATE
    assert all(np.diff(rates[: top + 1]) > 0) and all(np.diff(rates[top:]) < 0)
    assert rates[-1] < 0.02 * script.PEAK_RATE
