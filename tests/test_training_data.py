"""What the training scripts learn from: text, alignment, cutting, augmentation, pronunciations."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import hearing
import numpy as np
import pronounce
import pytest
import soundfile
import training_data as data
import word_pieces
from scipy import signal
from spelled_names import name_lists, random_name

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
    assert word_pieces.align(spiky(path), hearing.encode("TWO SIX"), "TWO SIX") == [
        pytest.approx((1 * 0.02, 5 * 0.02)),
        pytest.approx((8 * 0.02, 12 * 0.02)),
    ]


def test_alignment_keeps_a_doubled_letter_apart() -> None:
    """Two of the same letter need a blank between them, however the scores are."""
    labels = hearing.encode("LL")
    (span,) = word_pieces.align(spiky([labels[0]] * 3), labels, "LL")
    assert span == pytest.approx((0, 0.06))


def test_words_are_cut_where_it_is_quiet() -> None:
    wave = RNG(0).standard_normal(16_000).astype(np.float32)
    wave[7000:8500] = 0
    pieces = word_pieces.cut_words(wave, ["TWO", "SIX"], [(0.1, 0.3), (0.7, 0.9)])
    assert [word for word, _ in pieces] == ["TWO", "SIX"]
    assert 7000 <= len(pieces[0][1]) <= 8500
    np.testing.assert_array_equal(np.concatenate([wave for _, wave in pieces]), wave)


def test_clips_say_what_their_texts_say() -> None:
    """Three tones in place of words: they are heard in the order of the text. C is never said but before B."""
    hertz = {"A": 320, "B": 704, "C B": 1536}
    tones = {said: np.sin(np.arange(4000) * h * 2 * np.pi / 16_000).astype(np.float32) / 2 for said, h in hertz.items()}
    words = word_pieces.CutWords([list(tones.items())])
    said = {words.clip(RNG(seed)).text for seed in range(150)}
    assert len(said) > 10 and {len(text.split()) for text in said} >= {*range(1, 9)}
    for seed in range(30):
        clip = words.clip(RNG(seed))
        frames = clip.wave()[: len(clip.samples) // 500 * 500].reshape(-1, 500)
        heard = [16_000 / 500 * int(peak) for peak in np.abs(np.fft.rfft(frames)).argmax(1)]
        names = {h: name.replace(" ", "") for name, h in hertz.items()}
        order = [name for name, _ in itertools.groupby(names[h] for h in heard if h in names)]
        assert order == [name for name, _ in itertools.groupby(clip.text.replace("C B", "CB").split())]


def test_a_space_need_not_be_a_pause() -> None:
    """Half a second of sound between half seconds of next to nothing: at some joints it goes, at the ends it stays."""
    sound = RNG(0).standard_normal(8000).astype(np.float32) / 9
    hush = RNG(1).standard_normal(8000).astype(np.float32) / 9000
    piece = np.concatenate([hush, sound, hush])
    assert word_pieces.quiet_edges(piece, 1 / 9000**2) == pytest.approx((7680, 7680), abs=160)
    assert word_pieces.quiet_edges(hush, 1.0) == (0, 0)
    words = word_pieces.CutWords([[("A", piece)]])
    longest = shortest = 0
    for seed in range(60):
        clip = words.clip(RNG(seed))
        count = len(clip.text.split())
        wave = clip.wave()
        assert np.abs(wave[:7000]).max() < 0.01 and np.abs(wave[-7000:]).max() < 0.01
        tight = count * 8000 + 2 * 8000 + (count - 1) * 320  # 20 ms left on both sides and 20 ms of overlap
        assert tight - 500 * count <= len(wave) <= 24_000 * count
        longest += count > 1 and len(wave) == 24_000 * count
        shortest += count > 1 and len(wave) < tight + 500
    assert longest and shortest


def test_waves_are_joined_where_they_should_be() -> None:
    ones = [np.ones(size, np.float32) for size in (1000, 500, 700)]
    out = word_pieces.joined(ones, [0, 160])
    assert len(out) == 2040
    np.testing.assert_array_equal(out[200:800], 1)
    assert out[999] == out[1000] == 0 and out[0] == 0 and out[-1] == 0
    np.testing.assert_allclose(out[1340:1500], 1, atol=1e-6)  # one fades as the other comes


def test_names_are_spelled_as_far_as_a_speakers_letters_go() -> None:
    pieces = [(letter, np.full(1000 + i, 0.1, np.float32)) for i, letter in enumerate("ANERTOLISDMC")]
    words = word_pieces.CutWords([pieces])
    said = {words.clip(RNG(seed), spelled=1.0).text.replace(" ", "") for seed in range(60)}
    assert len(said) > 20 and said <= set(itertools.chain(*(listed for listed, _ in name_lists())))
    only_z = word_pieces.CutWords([[("Z", np.full(1000, 0.1, np.float32))]])  # spells no name: words in any order
    assert set(only_z.clip(RNG(0), spelled=1.0).text.split()) == {"Z"}


def test_known_words_of_a_sentence_stay_together_as_they_were_said() -> None:
    text = "FIVE HUNDRED MEN AND A HALF"
    pieces = [(word, np.full(100, i, np.float32)) for i, word in enumerate(text.split())]
    kept = word_pieces.runs(pieces, data.READ_WORDS)
    assert [said for said, _ in kept] == ["FIVE HUNDRED", "AND", "HALF"]  # A is an article here
    np.testing.assert_array_equal(kept[0][1], np.repeat(np.float32([0, 1]), 100))
    np.testing.assert_array_equal(kept[2][1], np.full(100, 5, np.float32))
    assert word_pieces.runs(pieces, {"WOMEN"}) == []
    two = word_pieces.pairs(pieces[:3])
    assert [said for said, _ in two] == ["FIVE HUNDRED", "HUNDRED MEN"]
    np.testing.assert_array_equal(two[1][1], np.repeat(np.float32([1, 2]), 100))


def test_rare_words_are_drawn_more_often_than_they_are_said() -> None:
    """Nine takes of AND, one each of FIRST and of AND FIRST: chances of 1 / √10, 1 / √2, 1 / √2 a take."""
    piece = np.ones(400, np.float32)
    speakers = [[*[("AND", piece)] * 9, ("FIRST", piece)], [("AND FIRST", piece)]]
    words = word_pieces.CutWords(speakers)
    expected = np.array([*[10**-0.5] * 9, 2**-0.5])
    np.testing.assert_allclose(words.chances[0], expected / expected.sum())
    np.testing.assert_allclose(words.chances[1], [1])
    rng, alone = RNG(0), word_pieces.CutWords(speakers[:1])  # here 1 / √9, nine times, and 1
    said = [word for _ in range(1000) for word in alone.clip(rng).text.split()]
    assert said.count("FIRST") / len(said) == pytest.approx(1 / 4, abs=0.02)
    both = [words.clip(rng).text for _ in range(1000)]
    assert sum(set(text.split()) == {"AND", "FIRST"} for text in both) > 500  # one speaker is as likely as the other


def test_names_are_drawn_from_all_lists_the_common_ones_more_often() -> None:
    rng = RNG(0)
    drawn = [random_name(rng) for _ in range(3000)]
    assert all(name.isascii() and name.isalpha() and name.isupper() and 2 <= len(name) <= 14 for name in drawn)
    assert len(set(drawn)) > 2000
    for listed, ends in name_lists():
        assert np.mean([name in set(listed) for name in drawn]) > 0.25
        assert np.all(np.diff(ends) > 0) and ends[-1] == pytest.approx(1)
    assert drawn.count("MARY") > 5 and {"PITTSBURGH", "NEWYORK"} <= set(name_lists()[2][0])


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


def test_clips_are_kept_in_a_file(tmp_path: Path) -> None:
    clips = [data.Clip(RNG(n).integers(-99, 99, 50 + n).astype(np.int16), f"TEXT {n}", f"voice {n}") for n in range(3)]
    data.save_clips(clips, tmp_path / "clips.npz")
    found = data.load_clips(tmp_path / "clips.npz")
    for clip, again in zip(clips, found, strict=True):
        np.testing.assert_array_equal(clip.samples, again.samples)
        assert (clip.text, clip.speaker) == (again.text, again.speaker)


@pytest.mark.parametrize("program", ["flite", "espeak-ng"])
def test_programs_are_told_how_to_read(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A is a letter wherever it stands, and RUBOUT is "rub out"."""
    told: list[list[str]] = []

    def run(command: list[str], **options: Any) -> None:
        told.append(command)
        soundfile.write(tmp_path / "spoken.wav", np.zeros(8000), 8000)

    monkeypatch.setattr(data.subprocess, "run", run)
    clip = data._speak([program], "RUBOUT A L", tmp_path / "spoken.wav", RNG(0))
    assert clip.text == "RUBOUT A L" and clip.seconds == 1
    said = next(part for part in told[0] if "rub out" in part.lower()).replace(",", "")
    assert said == {"flite": "rub out ay L", "espeak-ng": "RUB OUT [['eI]] L"}[program]


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
    known = {"A": "ˈeɪ", "B": "bˈiː", "CAT": "kˈæt", "SIX": "sˈɪks"}
    monkeypatch.setattr(pronounce, "espeak_ipa", lambda words: {word: known[word] for word in words})
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
    words = ["A", "B", "RUBOUT", "SIX", "THAT'S", "W"]
    spoken = pronounce.espeak_ipa(words)
    assert list(spoken) == words and all(spoken.values())
    assert [spoken[word] for word in words[:4]] == ["ˈeɪ", "bˈiː", "ɹˈʌb ˈaʊt", "sˈɪks"]
    assert pronounce.Pronunciations(words).by_word["W"] == "dʌbəlju"


def test_mel_frames_are_the_models_frames() -> None:
    for samples in (720, 8000, 16_001):
        mel = data.log_mel(RNG(0).standard_normal(samples).astype(np.float32))
        assert mel.shape == ((samples - 400) // 320 + 1, 64) and np.isfinite(mel).all()
