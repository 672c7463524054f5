"""CTC tokenizer: token ids to text and back, with frame offsets.

Three steps make text of the ids of a CTC path, one id per frame:

    group    runs of the same token become one             _ H H _ I | |   →  _ H _ I |
    blank    the pad token, CTC's blank, is dropped                        →  H I |
    join     the word delimiter becomes a space, the ends are stripped     →  "HI"

Everything follows transformers' ``Wav2Vec2CTCTokenizer`` (5.23), oddities included, for labels and transcripts must
not depend on which of the two made them; where ours differs, the comment says so. ``vocab.json`` gives the ids and
``tokenizer_config.json`` the rest.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# The roles that have a default token. The order is that in which missing tokens get ids behind the vocabulary.
DEFAULT_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
TOKEN_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
DELIMITER_ROLE = "word_delimiter_token"

# What ``clean_up_tokenization_spaces`` mends, in this order.
CLEAN_UP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


class Run(NamedTuple):
    """A value that a sequence repeats from position ``start`` up to, not including, ``end``."""

    value: Any
    start: int
    end: int


def runs(values: Iterable[Any]) -> list[Run]:
    """Maximal runs of equal values, in order."""
    found: list[Run] = []
    for value, group in itertools.groupby(values):
        start = found[-1].end if found else 0
        found.append(Run(value, start, start + sum(1 for _ in group)))
    return found


@dataclasses.dataclass(frozen=True)
class Span:
    """A character, or a word with its characters as ``parts``, on the frames from ``start`` up to ``end``."""

    text: str
    start: int
    end: int
    parts: tuple[Span, ...] = ()


@dataclasses.dataclass(frozen=True)
class DecodedText:
    """What ``decode`` returns when offsets are asked for; ``batch_decode`` has a list per sequence in each field.

    text: the transcript. char_offsets: ``{"char", "start_offset", "end_offset"}`` per character; word_offsets:
    ``{"word", "start_offset", "end_offset"}`` per word; in frames, the end not included; None where not asked for.
    Fields can also be read as ``decoded["text"]``.
    """

    text: Any
    char_offsets: Any = None
    word_offsets: Any = None

    def __getitem__(self, field: str) -> Any:
        if field not in self.keys():
            raise KeyError(field)
        return getattr(self, field)

    def keys(self) -> tuple[str, ...]:
        """Fields that are there."""
        return tuple(f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None)


class _Unsplit(NamedTuple):
    """A token that ``encode`` finds in text as a whole, and whether it swallows the white space on either side."""

    token: str
    lstrip: bool
    rstrip: bool


class CTCTokenizer:
    """Maps between token ids and text.

    vocab: token → id, as in ``vocab.json``; with ``target_lang`` in the configuration, language → (token → id).
    config: the contents of ``tokenizer_config.json``; ``{}`` means the defaults. What is read from it: the special
        tokens (``bos_token`` … ``word_delimiter_token``; a string, null, or ``{"content": …}``), further ones in
        ``extra_special_tokens`` / ``additional_special_tokens``, ``added_tokens_decoder``, ``do_lower_case``,
        ``replace_word_delimiter_char``, ``clean_up_tokenization_spaces``, ``target_lang``. Other keys are kept for
        ``to_config``.

    The word delimiter of the configuration counts. (transformers' ``from_pretrained`` mislays one that is not "|"
    and written as a string; its constructor does as we do.)

    Raises ``ValueError`` naming the field for a vocabulary or configuration that cannot be used.
    """

    def __init__(self, vocab: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        self.vocab = dict(vocab)  # as in vocab.json
        self.config = dict(config)
        self.do_lower_case: bool = _flag(config, "do_lower_case")
        self.clean_up_tokenization_spaces: bool = _flag(config, "clean_up_tokenization_spaces")
        self.replace_word_delimiter_char = str(config.get("replace_word_delimiter_char", " "))
        self.target_lang: str | None = config.get("target_lang")
        self.encoder = _active_vocabulary(vocab, self.target_lang)
        self.decoder = {index: token for token, index in self.encoder.items()}

        named = _special_tokens(config)
        self.pad_token, self.unk_token = named.get("pad_token"), named.get("unk_token")
        self.bos_token, self.eos_token = named.get("bos_token"), named.get("eos_token")
        self.word_delimiter_token = named.get(DELIMITER_ROLE)
        extra = [_content(token, "extra_special_tokens") for token in _extra_tokens(config)]
        self.all_special_tokens = tuple(dict.fromkeys([*named.values(), *extra]))

        self._unsplit = _unsplit_tokens(self.encoder, self.all_special_tokens, config.get("added_tokens_decoder") or {})
        self._ids = {entry.token: index for index, entry in self._unsplit.items()}
        # The longest alternative first: of "<s" and "<s>" the text "<s>" holds the second.
        alternatives = sorted(filter(None, self._ids), key=len, reverse=True)
        self._splitter = re.compile("(" + "|".join(map(re.escape, alternatives)) + ")") if alternatives else None

    @property
    def pad_token_id(self) -> int | None:
        """Id of the CTC blank."""
        return None if self.pad_token is None else self._id(self.pad_token)

    def __len__(self) -> int:
        """Number of tokens, those added behind the vocabulary included."""
        return len(self.encoder.keys() | self._ids.keys())

    # ---- ids to text ----

    def decode(
        self,
        ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        output_char_offsets: bool = False,
        output_word_offsets: bool = False,
        group_tokens: bool = True,
        spaces_between_special_tokens: bool = False,
    ) -> Any:
        """Text of one sequence of ids (s,): ``str``, or ``DecodedText`` where offsets are asked for.

        skip_special_tokens: drop special tokens *before* grouping. The blank is one of them, so double letters
            collapse ("HELLO" becomes "HELO"): as in transformers, right for labels and wrong for CTC paths.
        clean_up_tokenization_spaces: no space before punctuation and English contractions; None: as configured.
        group_tokens: merge runs; False for labels, which are one id per character already.
        spaces_between_special_tokens: join the characters with spaces.

        Ids outside the vocabulary read as the unknown token. Offsets keep the vocabulary's case.

        Raises ``ValueError`` for ids that are not whole numbers, for more than one dimension, and for an id outside the
        vocabulary where there is no unknown token.
        """
        tokens = self.tokens(ids)
        if skip_special_tokens:
            hidden = set(self.all_special_tokens) - {self.word_delimiter_token}
            tokens = [token for token in tokens if token not in hidden]
        characters = self.character_spans(tokens, group_tokens)
        joiner = " " if spaces_between_special_tokens else ""
        text = self.cased(joiner.join(span.text for span in characters).strip())
        if self.clean_up_tokenization_spaces if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces:
            text = clean_up(text)
        if not (output_char_offsets or output_word_offsets):
            return text
        return DecodedText(
            text,
            _offsets("char", characters) if output_char_offsets else None,
            _offsets("word", self.word_spans(characters)) if output_word_offsets else None,
        )

    def batch_decode(
        self,
        sequences: Iterable[Any],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        output_char_offsets: bool = False,
        output_word_offsets: bool = False,
        group_tokens: bool = True,
        spaces_between_special_tokens: bool = False,
    ) -> Any:
        """``decode`` for every sequence: a list of ``str``, or one ``DecodedText`` of lists."""
        options = (skip_special_tokens, clean_up_tokenization_spaces, output_char_offsets, output_word_offsets)
        decoded = [self.decode(ids, *options, group_tokens, spaces_between_special_tokens) for ids in sequences]
        if not (output_char_offsets or output_word_offsets):
            return decoded
        return DecodedText(
            [item.text for item in decoded],
            [item.char_offsets for item in decoded] if output_char_offsets else None,
            [item.word_offsets for item in decoded] if output_word_offsets else None,
        )

    def tokens(self, ids: Any) -> list[str]:
        """Token of every id, (s,) → s tokens; errors as for ``decode``."""
        array = np.asarray(ids)
        if array.ndim > 1:
            raise ValueError(f"The ids have shape {array.shape}, expected one sequence (frames,); use batch_decode.")
        if array.size and array.dtype.kind not in "iu":
            raise ValueError(f"The ids are of type {array.dtype}, expected whole numbers; pass logits.argmax(axis=-1).")
        return [self._token(index) for index in array.ravel().tolist()]

    def character_spans(self, tokens: Sequence[str], group: bool = True) -> list[Span]:
        """Characters of a path of tokens with the frames of each, blanks left out, delimiters as spaces."""
        steps = runs(tokens) if group else [Run(token, i, i + 1) for i, token in enumerate(tokens)]
        return [
            Span(self.replace_word_delimiter_char if token == self.word_delimiter_token else token, start, end)
            for token, start, end in steps
            if token != self.pad_token
        ]

    def word_spans(self, characters: Iterable[Span]) -> list[Span]:
        """Words: characters between delimiters, from the first frame of the first to the last frame of the last."""
        found = []
        space = self.replace_word_delimiter_char
        for is_space, group in itertools.groupby(characters, lambda span: span.text == space):
            if not is_space:
                parts = tuple(group)
                found.append(Span("".join(part.text for part in parts), parts[0].start, parts[-1].end, parts))
        return found

    def cased(self, text: str) -> str:
        """Text as a transcript shows it: in lower case if the tokenizer says so."""
        return text.lower() if self.do_lower_case else text

    # ---- text to ids ----

    def encode(self, text: str) -> list[int]:
        """Ids of a text, one per character: CTC labels.

        Special tokens and tokens of several characters, written out in the text, are found as a whole; the latter
        swallow the white space around them. Spaces are word delimiters. With ``do_lower_case`` the rest is put in
        upper case first. Characters outside the vocabulary become the unknown token.

        Raises ``ValueError`` for such a character where the vocabulary has no unknown token, ``TypeError`` for what is
        no string.
        """
        if not isinstance(text, str):
            raise TypeError(f"text is {text!r}; it must be a string.")
        pieces = [piece for piece in self._splitter.split(text) if piece] if self._splitter else [text]
        for i, piece in enumerate(pieces):
            if piece in self._ids:
                entry = self._unsplit[self._ids[piece]]
                if entry.lstrip and i > 0:
                    pieces[i - 1] = pieces[i - 1].rstrip()
                if entry.rstrip and i + 1 < len(pieces):
                    pieces[i + 1] = pieces[i + 1].lstrip()
        ids: list[int] = []
        for piece in filter(None, pieces):
            ids += [self._ids[piece]] if piece in self._ids else map(self._id, self._characters(piece))
        return ids

    def _characters(self, text: str) -> str:
        """Plain text in the characters of the vocabulary."""
        if self.do_lower_case:
            text = text.upper()
        # Without a delimiter spaces stay spaces; transformers writes the word "None" in their place.
        return text if self.word_delimiter_token is None else text.replace(" ", self.word_delimiter_token)

    def _id(self, token: str) -> int:
        if token in self._ids:
            return self._ids[token]
        index = self.encoder.get(token)
        if index is None and self.unk_token is not None:
            index = self.encoder.get(self.unk_token)
        if index is None:
            raise ValueError(
                f"{token!r} is not in the vocabulary, and neither is an unknown token ({self.unk_token!r}); "
                "remove it from the text or set unk_token."
            )
        return index

    def _token(self, index: int) -> str:
        if index in self.decoder:
            return self.decoder[index]
        if index in self._unsplit:
            return self._unsplit[index].token
        if self.unk_token is None:
            raise ValueError(f"Token id {index} is not in the vocabulary of {len(self)}, and there is no unk_token.")
        return self.unk_token

    # ---- files ----

    def to_config(self) -> dict[str, Any]:
        """The contents of ``tokenizer_config.json`` from which this class and transformers make an equal tokenizer."""
        config = copy.deepcopy(self.config)
        config.update({role: token for role, token in _special_tokens(self.config).items() if role in DEFAULT_TOKENS})
        config.update(
            do_lower_case=self.do_lower_case,
            clean_up_tokenization_spaces=self.clean_up_tokenization_spaces,
            replace_word_delimiter_char=self.replace_word_delimiter_char,
            target_lang=self.target_lang,
            tokenizer_class="Wav2Vec2CTCTokenizer",
        )
        config[DELIMITER_ROLE] = self.word_delimiter_token
        if self.word_delimiter_token not in (None, "|"):
            # transformers 5.23 does not hand a delimiter that is a plain string to its own constructor.
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
            config[DELIMITER_ROLE] = {"__type": "AddedToken", "content": self.word_delimiter_token, **flags}
        return config


def clean_up(text: str) -> str:
    """Text without the space before punctuation and English contractions (transformers' clean_up_tokenization)."""
    for found, replacement in CLEAN_UP:
        text = text.replace(found, replacement)
    return text


def _offsets(kind: str, spans: Iterable[Span]) -> list[dict[str, Any]]:
    return [{kind: span.text, "start_offset": span.start, "end_offset": span.end} for span in spans]


def _flag(config: Mapping[str, Any], field: str) -> bool:
    value = config.get(field, False)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{field} in tokenizer_config.json is {value!r}, expected true or false.")
    return bool(value)


def _content(token: Any, field: str) -> str:
    """The string of a token, which a file may give as such or as an object with flags."""
    content = token.get("content") if isinstance(token, Mapping) else token
    if not isinstance(content, str):
        raise ValueError(f'{field} in tokenizer_config.json is {token!r}, expected a string or {{"content": string}}.')
    return content


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Role → token, in the order in which missing ones get their ids; a role set to null has none."""
    tokens = {**DEFAULT_TOKENS, DELIMITER_ROLE: "|", **config}
    others = [field for field in config if field.endswith("_token") and isinstance(config[field], str | Mapping)]
    roles = dict.fromkeys([*TOKEN_ROLES, DELIMITER_ROLE, *others])
    return {role: _content(tokens[role], role) for role in roles if tokens.get(role) is not None}


def _extra_tokens(config: Mapping[str, Any]) -> list[Any]:
    """Special tokens beyond the named ones: a list, or an object of name → token."""
    for field in ("extra_special_tokens", "additional_special_tokens"):
        extra = config.get(field) or []
        if not isinstance(extra, list | tuple | Mapping):
            raise ValueError(f"{field} in tokenizer_config.json is {extra!r}, expected a list or an object of tokens.")
        if extra:
            return list(extra.values()) if isinstance(extra, Mapping) else list(extra)
    return []


def _active_vocabulary(vocab: Mapping[str, Any], language: str | None) -> dict[str, int]:
    """Token → id, checked; of one language where the vocabulary holds several."""
    active: Any = vocab
    nested = bool(vocab) and all(isinstance(value, Mapping) for value in vocab.values())
    if nested or language is not None:
        if not nested or language is None or language not in vocab:
            have = f"the languages {', '.join(vocab)}" if nested else "one language, without a name"
            raise ValueError(f"target_lang in tokenizer_config.json is {language!r}, and vocab.json has {have}.")
        active = vocab[language]
    if not active:
        raise ValueError("The vocabulary (vocab.json) is empty; expected an object of token and id.")
    for token, index in active.items():
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise ValueError(f"The vocabulary (vocab.json) gives {token!r} the id {index!r}, expected a number from 0.")
    return dict(active)


def _unsplit_tokens(
    encoder: Mapping[str, int], special: Iterable[str], declared: Mapping[Any, Any]
) -> dict[int, _Unsplit]:
    """Id → token for all that ``encode`` must find in text as a whole.

    These are the tokens declared in ``added_tokens_decoder``, the special tokens, which get the next free number
    where the vocabulary lacks them, and the vocabulary's tokens of more than one character.
    """
    unsplit: dict[int, _Unsplit] = {}
    if not isinstance(declared, Mapping) or not all(str(index).isdecimal() for index in declared):
        raise ValueError(
            f"added_tokens_decoder in tokenizer_config.json is {declared!r}, expected an object of id (a number from "
            "0) and token."
        )
    for index, token in declared.items():
        if not isinstance(token, Mapping) or token.get("single_word"):
            raise ValueError(
                f"added_tokens_decoder in tokenizer_config.json gives id {index} as {token!r}; expected an object with "
                "content and without single_word."
            )
        content = _content(token, "added_tokens_decoder")
        unsplit[int(index)] = _Unsplit(content, bool(token.get("lstrip")), bool(token.get("rstrip")))

    def numbered() -> dict[str, int]:
        return {**encoder, **{entry.token: index for index, entry in sorted(unsplit.items())}}

    known, ids = {entry.token for entry in unsplit.values()}, numbered()
    for token in special:
        if token and token not in known:
            unsplit[ids.setdefault(token, len(ids))] = _Unsplit(token, False, False)
    ids = numbered()
    for token in encoder:
        if len(token) > 1:
            unsplit[ids[token]] = _Unsplit(token, True, True)
    return unsplit
