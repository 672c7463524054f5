"""The training scripts' own pieces: a shortcut that must not change a result, losses, the store, the last choice."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import bundle
import fast_twin as twin
import measure
import muon
import numpy as np
import pronounce
import pytest
import sources
import torch
import train_bundled as script
import train_keywords as keywords
import training_data as data
from safetensors.torch import save_file
from transformers import SEWDForCTC, SEWDForSequenceClassification

import sewd_np
from tests.reference import SMALL, build

RNG = np.random.default_rng


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


def test_dropout_and_masks_come_with_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    hf = build(SMALL, "ctc", torch.float32)
    assert isinstance(hf, SEWDForCTC)
    x, frames = torch.randn(2, 60, 24, generator=torch.Generator().manual_seed(0)), torch.tensor([30, 30])
    everything, pool = torch.ones(1 << 16), script.dropout_pool(1 << 16)
    torch.manual_seed(0)
    with torch.no_grad():
        plain, _ = twin.upper(hf, x, frames, 11)
        masked, _ = twin.upper(hf, x, frames, 11, everything)  # SpecAugment alone
        monkeypatch.setattr(torch, "rand", torch.ones)  # now no stretch begins anywhere
        neither, _ = twin.upper(hf, x, frames, 11, everything)
        dropped, _ = twin.upper(hf, x, frames, 11, pool)
    assert plain.shape == masked.shape and not torch.allclose(plain, masked)
    torch.testing.assert_close(neither, plain)
    assert dropped.shape == plain.shape and not torch.allclose(dropped, plain)


def test_dropout_keeps_the_mean() -> None:
    torch.manual_seed(0)
    pool = script.dropout_pool(1 << 16)
    assert float(pool.mean()) == pytest.approx(1, abs=0.01)
    assert float((pool == 0).float().mean()) == pytest.approx(script.DROPOUT, abs=0.01)
    assert len(pool.unique()) == 2


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


@pytest.mark.parametrize("above", [[True, False, True], [False, False, True], [False, False, False]])
def test_clips_that_end_at_the_middle_layer_leave_the_others_as_they_are(above: list[bool]) -> None:
    hf = build(SMALL, "ctc", torch.float32)
    assert isinstance(hf, SEWDForCTC)
    x = torch.randn(3, 60, 24, generator=torch.Generator().manual_seed(0))
    frames, goes = torch.tensor([30, 22, 26]), torch.tensor(above)
    with torch.no_grad():
        top, middle = twin.upper(hf, x, frames, 11, views=2)
        some, same = twin.upper(hf, x, frames, 11, views=2, above=goes)
    torch.testing.assert_close(same, middle)
    torch.testing.assert_close(some, top[goes.repeat(2)], rtol=1e-5, atol=1e-5)


def test_other_words_than_an4s_teach_only_the_lower_layers() -> None:
    """Alone they give the layers above no gradient; beside AN4's they change nothing of the loss at the top."""
    hf = build({**SMALL, "vocab_size": 32}, "ctc", torch.float32)
    assert isinstance(hf, SEWDForCTC)
    x = torch.randn(60, 24, generator=torch.Generator().manual_seed(0))
    pool, letters = torch.ones(1 << 16), pronounce.Pronunciations([])
    layers = hf.sew_d.encoder.encoder.layer
    loss, shown = script.train_step(hf, [(x, "A MAN OF THE HOUSE", 30)], 11, pool, letters)
    loss.backward()
    assert np.isnan(shown)
    assert all(p.grad is None for p in layers[-1].parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in layers[0].parameters())
    beside = []
    for other in ("TWO SICKS", "ZEBRA"):
        torch.manual_seed(0)
        beside.append(script.train_step(hf, [(x, "TWO SIX", 30), (x, other, 30)], 11, pool, letters)[1])
    assert beside[0] == beside[1] > 0


def test_a_step_asks_the_middle_layer_for_phonemes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its head learns from the step, and the loss is another than with letters there."""
    monkeypatch.setattr(pronounce, "espeak_ipa", lambda words: {word: word[::-1].lower() * 2 for word in words})
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


def test_a_step_counts_words_when_it_is_to() -> None:
    """The loss is then another, what the curve shows is not; noise, in which nothing is said, may be in the batch."""
    hf = build({**SMALL, "vocab_size": 32}, "ctc", torch.float32)
    assert isinstance(hf, SEWDForCTC)
    x = torch.randn(60, 24, generator=torch.Generator().manual_seed(0))
    pool, letters, clips = torch.ones(1 << 16), pronounce.Pronunciations([]), [(x, "TWO SIX", 30), (x, "", 30)]
    given = []
    for words_count in (False, True):
        torch.manual_seed(0)
        loss, shown = script.train_step(hf, clips, 11, pool, letters, words_count)
        given.append((loss.item(), shown))
    assert given[0][1] == given[1][1] and given[0][0] + 0.1 < given[1][0]


def test_the_store_keeps_its_size_and_its_batches_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    hf = build(SMALL, "ctc", torch.float32)
    monkeypatch.setattr(sources, "STORE_HOURS", 20 / 3600)
    monkeypatch.setattr(sources, "BATCH_SECONDS", 4.0)
    rng = RNG(0)
    store = sources.Store(11, rng)
    waves = [rng.standard_normal(int(rng.integers(8000, 32_000))).astype(np.float32) for _ in range(30)]
    store.add(hf, [(wave, str(number)) for number, wave in enumerate(waves)])
    assert 17 < store.seconds <= 20  # no clip is longer than two seconds
    assert [text for _, text, _ in store.clips] == [str(number) for number in range(30)][-len(store.clips) :]
    batches = store.batches()
    assert len(batches) == sources.BATCHES
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
    store = sources.Store(0, RNG(0))
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
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in [(2, 3), (4,), (5,)]]
    fixed = torch.nn.Parameter(torch.zeros(5), requires_grad=False)
    for parameter in parameters[rank:]:  # the second process's batch did not come to the first parameter
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
        assert [gradient.shape for gradient in gradients] == [(2, 3), (4,), (5,)]
        assert [set(gradient.ravel().tolist()) for gradient in gradients] == [{0.5}, {1.5}, {1.5}]


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


def test_a_keyword_backwards_and_several_at_once_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every word is drawn whole and with its own label; some of what is unknown is keywords in reverse or in a row."""
    monkeypatch.setattr(keywords, "augment", lambda wave, other, rng: wave)
    monkeypatch.setattr(keywords, "change_speed", lambda wave, factor: wave)
    ramps = [np.arange(1, 40, dtype=np.float32) + 100 * label for label in range(len(keywords.LABELS))]
    words = keywords.Words([[ramp] for ramp in ramps], [np.full(32_000, -1, np.float32)], RNG(0))
    reversed_ones = rows = 0
    for _ in range(400):
        wave, label = words.draw(30_000)
        sound = wave[wave != 0]
        assert len(wave) == 30_000
        if label != keywords.UNKNOWN:
            np.testing.assert_array_equal(sound, ramps[label])
        elif len(sound) == 39 and sound[0] > sound[-1]:
            reversed_ones += 1
            np.testing.assert_array_equal(sound[::-1], ramps[int(sound[-1]) // 100])
        elif len(sound) in (78, 117, 156) and sound[0] > 0:
            rows += 1
            for one in np.split(sound, len(sound) // 39):
                np.testing.assert_array_equal(one, ramps[int(one[0]) // 100])
                assert one[0] < 100 * keywords.UNKNOWN
    assert 3 < reversed_ones < 30 and 3 < rows < 40


def test_at_least_two_keywords_of_a_row_fit() -> None:
    words = keywords.Words([[np.ones(900, np.float32), np.ones(100, np.float32)]] * len(keywords.LABELS), [], RNG(0))
    assert {len(words.keyword(500)) for _ in range(50)} == {100, 500}
    assert {len(words.keyword()) for _ in range(50)} == {100, 900}


def test_one_finalist_lies_between_the_last_checkpoints_and_the_first() -> None:
    snapshots = [{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 2.0])}]
    best, first = {"w": torch.ones(2)}, {"w": torch.zeros(2)}
    assert list(bundle.finalists(best, [], first).values()) == [best]
    assert len(bundle.finalists(best, snapshots, None)) == 2
    kept, mean, mixed = bundle.finalists(best, snapshots, first).values()
    assert kept is best
    torch.testing.assert_close(mean["w"], torch.tensor([2.0, 2.0]))
    torch.testing.assert_close(mixed["w"], torch.full((2,), 2 * (1 - bundle.KEPT)))


def test_the_finalist_with_the_lowest_loss_in_all_conditions_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the one that is best on clean recordings. Its figures are those of the weights as they are exported."""
    model: Any = torch.nn.ModuleDict({"lm_head": torch.nn.Linear(1, 2)})

    def weight_of_condition(model: Any, dev: Any, change: Any) -> float:
        clean, worse = model["lm_head"].weight[:, 0].tolist()
        return float(clean if change is None else worse)

    monkeypatch.setattr(bundle, "loss_per_letter", weight_of_condition)
    monkeypatch.setattr(bundle, "word_error_rate", weight_of_condition)
    bias = torch.zeros(2)
    found = {
        "one": {"lm_head.weight": torch.tensor([[0.1], [0.3]]), "lm_head.bias": bias},
        "other": {"lm_head.weight": torch.tensor([[0.2], [0.25]]), "lm_head.bias": bias},
    }
    name, figures = bundle.choose(model, found, [], 0)
    chosen = found["other"]["lm_head.weight"][:, 0].half().float().tolist()
    assert name == "other" and len(figures) == 7
    assert model["lm_head"].weight[:, 0].tolist() == chosen
    assert model["lm_head"].bias.tolist() == [-bundle.BLANK, 0] and bias.tolist() == [0, 0]
    assert figures["clean"] == chosen[0] and figures["at 8 kHz"] == chosen[1]


def test_an_exported_file_says_by_how_much_the_blank_is_lower(tmp_path: Path) -> None:
    assert bundle.lowered(tmp_path) == 0  # a checkpoint of another kind
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert bundle.lowered(tmp_path) == 0
    assert bundle.lowered(Path(sewd_np.__file__).parent / "assets" / "an4") == bundle.BLANK


def test_sentences_are_cut_once_and_only_where_they_say_more_than_and(monkeypatch: pytest.MonkeyPatch) -> None:
    clips = {
        "an4": [data.Clip(np.zeros(9, np.int16), "TWO", "a")],
        "librispeech": [data.Clip(np.zeros(9, np.int16), text, "b") for text in ("I AND A X", "THE FIRST MAN")],
        "kokoro": [data.Clip(np.zeros(9, np.int16), "TEN Z", "c")],
    }
    asked: list[str] = []

    def by_speaker(model: Any, clips: list[data.Clip], known: Any = (), **options: Any) -> Any:
        asked.extend(clip.text for clip in clips)
        return [[(word, np.ones(400, np.float32)) for clip in clips for word in clip.text.split()]]

    monkeypatch.setattr(sources, "words_by_speaker", by_speaker)
    drawn = sources.Sources(clips, RNG(0), 1.0)
    drawn.cut(None)
    drawn.cut(None)
    assert asked == ["TWO", "THE FIRST MAN", "TEN Z", "TWO"]
    assert set(drawn.clip("an4 words").text.split()) == {"TWO"}
    assert set(drawn.clip("librispeech words").text.split()) <= {"THE", "FIRST", "MAN"}
    assert sum(len(wave) for wave, _ in drawn.draw(2.0)) >= 2 * data.RATE


def test_learning_rate_rises_and_falls() -> None:
    rates = [script.rate_at(progress) for progress in np.linspace(0, 1, 101)]
    top = int(np.argmax(rates))
    assert 0 < top < 10 and rates[top] <= script.PEAK_RATE
    assert all(np.diff(rates[: top + 1]) > 0) and all(np.diff(rates[top:]) < 0)
    assert rates[-1] < 0.02 * script.PEAK_RATE


def test_what_the_cards_say_can_be_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a corpus of the bundled clips, of which one has another text than is said."""
    corpus = tmp_path / "an4"
    corpus.mkdir()
    rows = ["path\ttext\tspeaker\tpart"]
    for name, text in (("enter-six-two-four", "ENTER SIX TEN FOUR"), ("yes", "YES"), ("seven", "SEVEN")):
        shutil.copy(sewd_np.clip(name), corpus)
        rows.append(f"{name}.flac\t{text}\t{name[0]}\tdev")
    (corpus / "transcripts.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    words = [("OH", np.zeros(8000, np.float32)), ("YES", data.read_corpus(corpus, "dev")[1].wave())]
    monkeypatch.setattr(keywords, "words_by_speaker", lambda twin, dev: [words])
    monkeypatch.setattr("sys.argv", ["measure.py", "--speech", str(tmp_path)])
    measure.main()
    said = capsys.readouterr().out
    assert "| an4, 3 recordings | WER |" in said and "| clean | 16.7 % |" in said  # one word of six
    for name in bundle.conditions(RNG(0)):
        assert f"| {name} | " in said
    assert "| keywords, cut from sentences | 100.0 % | 1 |" in said
    assert "| other words, cut from sentences | 0.0 % | 0 |" in said
    assert "| words recorded alone | 100.0 % | 2 |" in said
