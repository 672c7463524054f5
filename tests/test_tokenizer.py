"""The tokenizer equals transformers' Wav2Vec2CTCTokenizer: any ids, any text, every setting, and across saved files."""

from __future__ import annotations

import functools
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Wav2Vec2CTCTokenizer

from sewd_np.tokenizer import CTCTokenizer, DecodedText, clean_up, runs

LETTERS = ["|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ"]
PUBLISHED = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *LETTERS])}
COMMUNITY = {token: i for i, token in enumerate([*"|abcdeéß'.,", "[UNK]", "[PAD]", "th", "the", "<spn>"])}
UNDERSCORE = {("_" if token == "|" else token): i for token, i in PUBLISHED.items()}

# Name → (vocab.json, tokenizer_config.json).
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "published": (PUBLISHED, {"unk_token": "<unk>", "pad_token": "<pad>", "word_delimiter_token": "|"}),
    "no file": (PUBLISHED, {}),
    "lower case": (PUBLISHED, {"do_lower_case": True, "clean_up_tokenization_spaces": True}),
    # Fine-tunes made from the tutorial: <s> and </s> are missing from the vocabulary and get ids behind it.
    "community": (COMMUNITY, {"unk_token": "[UNK]", "pad_token": "[PAD]", "clean_up_tokenization_spaces": True}),
    "replacement": (COMMUNITY, {"unk_token": "[UNK]", "pad_token": "[PAD]", "replace_word_delimiter_char": "#"}),
    "languages": ({"eng": PUBLISHED, "deu": COMMUNITY}, {"target_lang": "eng"}),
    "no pad": (PUBLISHED, {"pad_token": None}),
    "more": (PUBLISHED, {"mask_token": "<mask>", "extra_special_tokens": ["<noise>", "Z"], "speaker_token": "<sp>"}),
    "declared": (
        PUBLISHED,
        {
            "added_tokens_decoder": {
                "1": {"content": "<s>", "lstrip": True, "rstrip": True, "special": False},
                "40": {"content": "<um>", "lstrip": True, "rstrip": False, "special": False},
                "41": {"content": "<uh>", "lstrip": False, "rstrip": True, "special": True},
            }
        },
    ),
    "objects": (
        PUBLISHED,
        {
            "pad_token": {"__type": "AddedToken", "content": "<pad>", "lstrip": False, "rstrip": False},
            "word_delimiter_token": {"__type": "AddedToken", "content": "|", "lstrip": False, "rstrip": False},
        },
    ),
    # Nothing but letters: every special token gets an id behind them, in a fixed order.
    "bare": ({"A": 0, "B": 1}, {"mask_token": "<mask>", "sep_token": "<sep>", "speaker_token": "<sp>"}),
    "underscore": (UNDERSCORE, {"word_delimiter_token": "_"}),
}
names = st.sampled_from(sorted(SETTINGS))
paths = st.lists(st.integers(-3, 45), max_size=40) | st.lists(st.sampled_from([0, 4, 5, 12, 15]), max_size=40)
pieces = st.sampled_from(
    [
        *"EHLOabé'ß .,|_#\tQŉ",
        "  ",
        "<s>",
        "</s>",
        "<unk>",
        "<pad>",
        "[PAD]",
        "th",
        "the",
        "<spn>",
        "<um>",
        "<uh>",
        "<noise>",
    ]
)
texts = st.lists(pieces, max_size=12).map("".join)


@functools.cache
def ours(name: str) -> CTCTokenizer:
    return CTCTokenizer(*SETTINGS[name])


def loaded(vocab: dict[str, Any], config: dict[str, Any]) -> Any:
    """What transformers makes of the two files."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        return Wav2Vec2CTCTokenizer.from_pretrained(folder)


@functools.cache
def theirs(name: str, saved_by_us: bool = False) -> Any:
    if saved_by_us:
        return loaded(ours(name).vocab, ours(name).to_config())
    vocab, config = SETTINGS[name]
    if name != "underscore":
        return loaded(vocab, config)
    # from_pretrained mislays a delimiter other than "|"; the constructor does not.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.json"
        path.write_text(json.dumps(vocab), encoding="utf-8")
        return Wav2Vec2CTCTokenizer(path, **config)


@pytest.mark.parametrize("saved_by_us", [False, True])
@given(
    name=names,
    ids=paths,
    skip=st.booleans(),
    clean=st.none() | st.booleans(),
    group=st.booleans(),
    spaces=st.booleans(),
)
@settings(deadline=None, derandomize=True, max_examples=400)
def test_decode_equals_transformers(
    saved_by_us: bool, name: str, ids: list[int], skip: bool, clean: bool | None, group: bool, spaces: bool
) -> None:
    options: dict[str, Any] = {
        "skip_special_tokens": skip,
        "clean_up_tokenization_spaces": clean,
        "group_tokens": group,
        "spaces_between_special_tokens": spaces,
    }
    reference = theirs(name, saved_by_us)
    assert ours(name).decode(ids, **options) == reference.decode(ids, **options)
    both = ours(name).decode(ids, output_char_offsets=True, output_word_offsets=True, **options)
    expected = reference.decode(ids, output_char_offsets=True, output_word_offsets=True, **options)
    assert both.text == expected.text
    assert both.char_offsets == expected.char_offsets
    assert both.word_offsets == expected.word_offsets
    assert both["word_offsets"] == ours(name).decode(ids, output_word_offsets=True, **options).word_offsets


@given(name=names, text=texts, saved_by_us=st.booleans())
@settings(deadline=None, derandomize=True, max_examples=600)
def test_encode_equals_transformers(name: str, text: str, saved_by_us: bool) -> None:
    reference = theirs(name, saved_by_us)
    if None in reference.convert_tokens_to_ids(reference.tokenize(text)):
        # The reference has no id for a character that is missing beside its unknown token, and fails further on.
        with pytest.raises(ValueError, match="is not in the vocabulary"):
            ours(name).encode(text)
    else:
        assert ours(name).encode(text) == reference(text).input_ids


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_tokens_and_numbers_equal_transformers(name: str) -> None:
    for reference in (theirs(name), theirs(name, saved_by_us=True)):
        assert set(ours(name).all_special_tokens) == set(reference.all_special_tokens)
        assert len(ours(name)) == len(reference)
        ids = list(range(50))
        assert ours(name).tokens(ids) == reference.convert_ids_to_tokens(ids)
        if ours(name).pad_token is not None:
            assert ours(name).pad_token_id == reference.pad_token_id


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_file_of_transformers_is_read_back(name: str, tmp_path: Path) -> None:
    theirs(name).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    again = CTCTokenizer(vocab, config)
    for ids in (range(50), [11, 11, 0, 5, 15, 0, 15, 8, 4, 4, 18]):
        assert again.decode(ids) == ours(name).decode(ids)
    text = "AB <s>A" if name == "bare" else "AB <s>cdé the|E"
    assert again.encode(text) == ours(name).encode(text)


def test_configuration_survives_and_keeps_what_it_does_not_know() -> None:
    tokenizer = CTCTokenizer(PUBLISHED, {"processor_class": "Wav2Vec2Processor", "do_lower_case": True})
    config = json.loads(json.dumps(tokenizer.to_config()))
    assert config["processor_class"] == "Wav2Vec2Processor"
    assert config["tokenizer_class"] == "Wav2Vec2CTCTokenizer"
    assert CTCTokenizer(PUBLISHED, config).to_config() == config


def test_batch_decode() -> None:
    tokenizer = ours("published")
    ids_bs = np.array([[11, 5, 15, 0, 15, 8, 4, 4], [0, 11, 11, 10, 0, 0, 4, 0]])
    assert tokenizer.batch_decode(ids_bs) == ["HELLO", "HI"] == theirs("published").batch_decode(ids_bs)
    assert tokenizer.batch_decode(torch.from_numpy(ids_bs)) == ["HELLO", "HI"]
    assert tokenizer.batch_decode([]) == []
    decoded = tokenizer.batch_decode(ids_bs, output_word_offsets=True)
    expected = theirs("published").batch_decode(ids_bs, output_word_offsets=True)
    assert decoded.text == expected.text and decoded.word_offsets == expected.word_offsets
    assert decoded.char_offsets is None and decoded.keys() == ("text", "word_offsets")
    with pytest.raises(KeyError):
        decoded["char_offsets"]


def test_offsets_are_plain_integers() -> None:
    decoded = ours("published").decode(np.array([0, 11, 11, 10, 0, 4]), output_char_offsets=True)
    assert isinstance(decoded, DecodedText)
    assert json.loads(json.dumps(decoded.char_offsets)) == [
        {"char": "H", "start_offset": 1, "end_offset": 3},
        {"char": "I", "start_offset": 3, "end_offset": 4},
        {"char": " ", "start_offset": 5, "end_offset": 6},
    ]


def test_skipping_special_tokens_merges_double_letters_as_transformers_does() -> None:
    ids = [11, 5, 15, 0, 15, 8]
    assert ours("published").decode(ids) == "HELLO"
    assert ours("published").decode(ids, skip_special_tokens=True) == "HELO"


@given(text=st.lists(st.sampled_from(LETTERS[1:]), min_size=1, max_size=20).map("".join))
@settings(deadline=None, derandomize=True)
def test_labels_decode_to_their_text(text: str) -> None:
    sentence = " ".join(text[i : i + 4] for i in range(0, len(text), 4))
    assert ours("published").decode(ours("published").encode(sentence), group_tokens=False) == sentence


@given(text=st.text(alphabet=" .?!,'nmtsvera", max_size=20))
@settings(deadline=None, derandomize=True, max_examples=300)
def test_clean_up_equals_transformers(text: str) -> None:
    assert clean_up(text) == theirs("published").clean_up_tokenization(text)


@given(values=st.lists(st.integers(0, 2)))
@settings(deadline=None, derandomize=True)
def test_runs_tile_the_sequence(values: list[int]) -> None:
    found = runs(values)
    assert [value for value, start, end in found for _ in range(start, end)] == values
    assert all(a.value != b.value and a.end == b.start for a, b in itertools.pairwise(found))


def test_without_delimiter_spaces_stay_spaces() -> None:
    tokenizer = CTCTokenizer(PUBLISHED, {"word_delimiter_token": None})
    assert tokenizer.encode("A B") == [7, 3, 24]  # no space in this vocabulary
    assert tokenizer.decode([7, 4, 24]) == "A|B"


def test_ids_that_cannot_be_decoded() -> None:
    tokenizer = ours("published")
    with pytest.raises(ValueError, match=r"shape \(2, 3\).*use batch_decode"):
        tokenizer.decode(np.zeros((2, 3), int))
    with pytest.raises(ValueError, match=r"type float32, expected whole numbers; pass logits\.argmax"):
        tokenizer.decode(np.zeros(3, np.float32))
    assert tokenizer.decode([]) == "" and tokenizer.decode(7) == "A"
    with pytest.raises(ValueError, match=r"Token id 99 is not in the vocabulary of 32, and there is no unk_token"):
        CTCTokenizer(PUBLISHED, {"unk_token": None}).decode([99])


def test_character_without_unknown_token() -> None:
    with pytest.raises(ValueError, match=r"'é' is not in the vocabulary, and neither is an unknown token \('<UNK>'\)"):
        CTCTokenizer(PUBLISHED, {"unk_token": "<UNK>"}).encode("CAFé")


@pytest.mark.parametrize(
    ("vocab", "config", "message"),
    [
        ({}, {}, r"vocab\.json\) is empty"),
        ({"a": "0"}, {}, r"gives 'a' the id '0', expected a number"),
        ({"a": -1}, {}, r"gives 'a' the id -1"),
        ({"eng": PUBLISHED, "deu": COMMUNITY}, {}, r"target_lang .* is None.* the languages eng, deu"),
        ({"eng": PUBLISHED}, {"target_lang": "fra"}, r"target_lang .* is 'fra'.* the languages eng"),
        (PUBLISHED, {"target_lang": "eng"}, r"target_lang .* is 'eng', and vocab\.json has one language"),
        (PUBLISHED, {"pad_token": 0}, r"pad_token in tokenizer_config\.json is 0, expected a string"),
        (
            PUBLISHED,
            {"do_lower_case": "yes"},
            r"do_lower_case in tokenizer_config\.json is 'yes', expected true or false",
        ),
        (PUBLISHED, {"added_tokens_decoder": {"5": {"content": "x", "single_word": True}}}, r"without single_word"),
        (PUBLISHED, {"added_tokens_decoder": [1, 2]}, r"added_tokens_decoder .* is \[1, 2\], expected an object of id"),
        (
            PUBLISHED,
            {"added_tokens_decoder": {"x": {"content": "x"}}},
            r"added_tokens_decoder .* expected an object of id",
        ),
        (PUBLISHED, {"additional_special_tokens": 5}, r"additional_special_tokens .* is 5, expected a list"),
    ],
)
def test_bad_files(vocab: dict[str, Any], config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CTCTokenizer(vocab, config)
