"""What a model hears, and how wrong it is: the training scripts' losses and the words that they cut out."""

from __future__ import annotations

import itertools

import hearing
import numpy as np
import pytest
import torch
import training_data as data

from sewd_np.losses import ctc_negative_log_likelihood

RNG = np.random.default_rng


def edits(given: list[str], said: list[str]) -> int:
    if not given or not said:
        return len(given) + len(said)
    changed = edits(given[1:], said[1:]) + (given[0] != said[0])
    return min(changed, edits(given[1:], said) + 1, edits(given, said[1:]) + 1)


def test_the_expected_word_error_rate_is_that_of_all_that_may_be_said() -> None:
    """Against every path through the frames, of which the draws find all that matter; its gradient leads down."""
    rng = RNG(0)
    columns = [hearing.TOKEN[token] for token in ("<pad>", "|", "A", "B")]
    logits = np.full((3, 3, 32), -1e4)
    logits[..., columns] = rng.standard_normal((3, 3, 4))
    frames, texts = torch.tensor([3, 2, 3]), ["A B", "B", ""]
    wrong = 0.0
    for clip, (count, text) in enumerate(zip(frames.tolist(), texts, strict=True)):
        found: dict[str, float] = {}
        for path in itertools.product(columns, repeat=count):
            said = hearing.decode(np.array(path))
            if [i for i, _ in itertools.groupby(path) if i] == hearing.encode(said):  # no space at an end
                found[said] = found.get(said, 0.0) + np.exp(logits[clip, range(count), path].sum())
        wrong += sum(chance * edits(text.split(), said.split()) for said, chance in found.items()) / sum(found.values())
    torch.manual_seed(0)
    z = torch.from_numpy(logits).requires_grad_()
    value = hearing.expected_word_errors(z, frames, texts, draws=3000)
    assert value.item() == pytest.approx(wrong / 4, rel=1e-3)
    value.backward()
    after = (z - 5 * z.grad).detach()
    assert hearing.expected_word_errors(after, frames, texts, draws=3000) < 0.95 * value.item()
    certain = torch.where(z.detach() == z.detach().amax(-1, keepdim=True), 0.0, -1e4)
    heard = [hearing.decode(row[:count].argmax(-1).numpy()) for row, count in zip(certain, frames, strict=True)]
    assert hearing.expected_word_errors(certain, frames, heard).item() == 0


def test_loss_per_letter_is_ctc_by_the_letters_of_all_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.log_softmax(torch.from_numpy(RNG(0).standard_normal((12, 32))), -1).numpy()
    monkeypatch.setattr(hearing, "log_probs", lambda model, wave: scores[: len(wave)])
    clips = [data.Clip(np.ones(size, np.int16), text, "") for size, text in ((12, "A BB"), (7, "NO"))]
    want = sum(
        ctc_negative_log_likelihood(scores[: len(clip.samples)], np.array(hearing.encode(clip.text)), blank=0)
        for clip in clips
    )
    assert hearing.loss_per_letter(torch.nn.Identity(), clips) == pytest.approx(want / 6, rel=1e-6)


def test_words_are_cut_out_of_recordings_that_the_model_hears(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that hears A MAN AND A HALF in every recording, four frames a letter and one of blank after each."""
    text = "A MAN AND A HALF"
    scores = np.full((5 * len(text), 32), -9.0)
    for place, label in enumerate(hearing.encode(text)):
        scores[5 * place : 5 * place + 4, label] = scores[5 * place + 4, 0] = 0.0
    monkeypatch.setattr(hearing, "log_probs", lambda model, wave: scores)
    sound = RNG(0).integers(-9, 9, int(len(scores) * data.RATE * data.FRAME)).astype(np.int16)
    heard = [data.Clip(sound, text, speaker) for speaker in "x" * 11 + "y"]
    model = torch.nn.Identity()
    whole = hearing.words_by_speaker(model, heard)
    assert [len(pieces) for pieces in whole] == [55]  # y has said too little
    assert [said for said, _ in whole[0][:5]] == text.split()
    (some,) = hearing.words_by_speaker(model, heard, known=data.READ_WORDS)
    assert [said for said, _ in some[:4]] == ["AND", "HALF", "AND", "HALF"]
    np.testing.assert_array_equal(some[0][1], whole[0][2][1])
    more = hearing.words_by_speaker(model, heard[:11], neighbours=True)[0]
    assert [said for said, _ in more[:9]] == [*text.split(), "A MAN", "MAN AND", "AND A", "A HALF"]
    unsaid = [data.Clip(sound, "A MAN SIX A HALF", "x")] * 11  # SIX is a word, but not what is heard there
    (some,) = hearing.words_by_speaker(model, unsaid, known=data.READ_WORDS)
    assert {said for said, _ in some} == {"HALF"}
    other = [data.Clip(sound, "A MAN AND A DOG", "x")] * 11  # a quarter of its letters are not what is heard
    assert hearing.words_by_speaker(model, other, errors=0.4) and not hearing.words_by_speaker(model, other, errors=0.2)
