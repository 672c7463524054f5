"""PyTorch's pickles read without PyTorch and without running anything in them.

A pickle is a program: Python's unpickler imports and calls whatever it names, so a hostile file runs code.
Here it is *interpreted* instead: a stack machine over ``pickletools.genops`` that builds dicts, lists,
tuples, numbers, strings and windows on stored numbers (tensors), and that has no instruction to import a
module, to call a function or to set an attribute.

A pickle asks for functions and classes by name ("globals"). For a name that tensors do not need there are two
rules: the file is refused (``pytorch_model.bin``), or the object becomes an inert ``Record`` (fairseq's
``.pt``, whose configuration may be any Python object).

Formats: Python's ``pickletools`` for the opcodes, ``torch/_utils.py`` (``_rebuild_tensor_v2``) for tensors.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_ELEMENTS = 2**32  # far above any SEW-D; stops a stride of 0 from claiming a tensor that no memory holds

# bfloat16 is the upper half of a float32, hence uint16 here and a shift when it is read.
STORAGE_DTYPES = {
    "FloatStorage": "f4",
    "DoubleStorage": "f8",
    "HalfStorage": "f2",
    "BFloat16Storage": "u2",
    "LongStorage": "i8",
    "IntStorage": "i4",
    "ShortStorage": "i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says what was found and what to do."""


@dataclass(frozen=True, slots=True)
class Global:
    """A function or class that a pickle asks for: its name, nothing more."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Record:
    """What stands in for an object of a class that is neither imported nor called.

    ``args`` are the arguments it would have been made with, ``state`` what would have been set on it,
    ``pairs`` and ``elements`` what would have been stored in it (by subclasses of dict and list).
    """

    def __init__(self, of: Global, args: tuple[Any, ...] = ()) -> None:
        self.of = of
        self.args = args
        self.state: Any = None
        self.pairs: dict[Any, Any] = {}
        self.elements: list[Any] = []

    def __repr__(self) -> str:
        return f"Record({self.of})"  # not the contents: they may contain this record


@dataclass(frozen=True, slots=True)
class Storage:
    """One run of ``count`` numbers in the zip, at ``data/key``; ``kind`` is a key of ``STORAGE_DTYPES``."""

    key: str
    kind: str
    count: int


@dataclass(frozen=True, slots=True)
class Window:
    """A tensor: element (i, j, ...) is number offset + i * stride[0] + j * stride[1] + ... of its storage."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def interpret(pickle: bytes, path: Path, keep_unknown: bool) -> Any:
    """What a pickle of ``torch.save`` describes; its tensors are ``Window``s whose bounds have been checked.

    ``path`` is for messages. Unknown globals become ``Record``s with ``keep_unknown``, else the file is
    refused. Raises ``CheckpointError``.
    """
    machine = _Machine(path, keep_unknown)
    try:
        for opcode, argument, _ in pickletools.genops(pickle):
            machine.step(opcode.name, argument)
        return machine.stack.pop()
    except CheckpointError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(
            f"{path}: data.pkl is damaged ({type(error).__name__}); download or copy the file again."
        ) from error


def describe(value: Any) -> str:
    """In a few words, what ``interpret`` made."""
    if isinstance(value, Record):
        return f"an object of {value.of}"
    return f"the global {value}" if isinstance(value, Global) else f"a {type(value).__name__}"


_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_SCALARS = (str, int, float, bytes, type(None))
_SEQUENCES = (tuple, list)
_ORDERED_DICT = Global("collections", "OrderedDict")
_SIZE = Global("torch", "Size")
_TENSOR = Global("torch._utils", "_rebuild_tensor_v2")
_PARAMETER = Global("torch._utils", "_rebuild_parameter")


class _Machine:
    """Interprets one pickle, opcode after opcode."""

    def __init__(self, path: Path, keep_unknown: bool) -> None:
        self.path = path
        self.keep_unknown = keep_unknown
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below each open mark
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self.memo[argument])
        elif name == "MARK":
            self.marked.append(stack)
            self.stack = []
        elif name == "POP_MARK":
            self._to_mark()
        elif name == "POP":
            if stack:
                stack.pop()
            else:
                self._to_mark()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name not in ("PROTO", "FRAME", "STOP") and not self._container(name):
            self._object(name, argument)

    def _container(self, name: str) -> bool:
        """Make or fill a dict, list, tuple or set; False where ``name`` does none of it."""
        stack = self.stack
        if name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_SET", "EMPTY_TUPLE"):
            # A set becomes a list: nothing here needs one, and its elements then need no hash.
            stack.append({} if name == "EMPTY_DICT" else () if name == "EMPTY_TUPLE" else [])
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[len(stack) - count :])]
        elif name in ("TUPLE", "FROZENSET", "LIST"):
            items = self._to_mark()
            self.stack.append(items if name == "LIST" else tuple(items))
        elif name == "DICT":
            items = self._to_mark()
            self.stack.append({})
            self._set_items(items)
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            items = [stack.pop()] if name == "APPEND" else self._to_mark()
            target = self.stack[-1]
            (target.elements if isinstance(target, Record) else _checked(target, list)).extend(items)
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            self._set_items([key, value])
        elif name == "SETITEMS":
            self._set_items(self._to_mark())
        else:
            return False
        return True

    def _object(self, name: str, argument: Any) -> None:
        """The instructions by which a pickle asks for globals, calls them and fills what they return."""
        if name == "GLOBAL":
            self.stack.append(self._global(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = self.stack.pop(), self.stack.pop()
            self.stack.append(self._global(module, attribute))
        elif name == "BINPERSID":
            self.stack.append(self._persistent(self.stack.pop()))
        elif name in ("REDUCE", "NEWOBJ"):
            args, function = self.stack.pop(), self.stack.pop()
            self.stack.append(self._make(function, _checked(args, tuple)))
        elif name == "NEWOBJ_EX":
            keywords, args, function = self.stack.pop(), self.stack.pop(), self.stack.pop()
            made = self._make(function, _checked(args, tuple))
            if isinstance(made, Record):
                made.pairs.update(_checked(keywords, dict))
            self.stack.append(made)
        elif name == "OBJ":
            function, *rest = self._to_mark()
            self.stack.append(self._make(function, tuple(rest)))
        elif name == "INST":
            args = tuple(self._to_mark())
            self.stack.append(self._make(self._global(*argument.split(" ", 1)), args))
        elif name == "BUILD":
            state, target = self.stack.pop(), self.stack[-1]
            if isinstance(target, Record):
                target.state = state
            else:
                _checked(target, dict)  # a state dict's _metadata (module versions): nothing to keep
        else:
            raise CheckpointError(
                f"{self.path}: data.pkl uses the instruction {name}, which torch.save never writes; "
                "the file is refused and nothing in it was run."
            )

    def _to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        pairs = target.pairs if isinstance(target, Record) else _checked(target, dict)
        _fill(pairs, zip(items[::2], items[1::2], strict=True))

    def _global(self, module: str, name: str) -> Global:
        found = Global(_checked(module, str), _checked(name, str))
        is_storage = found.module == "torch" and found.name in STORAGE_DTYPES
        if not (self.keep_unknown or is_storage or found in (_ORDERED_DICT, _SIZE, _TENSOR, _PARAMETER)):
            raise CheckpointError(
                f"{self.path}: the file asks for {found}, which no tensor needs; it is refused and nothing "
                "in it was run; if you trust it, load it in PyTorch and save its state_dict() as safetensors."
            )
        return found

    def _persistent(self, identifier: Any) -> Storage | Record:
        tag, kind, key, _location, count = _checked(identifier, tuple)
        kind = _checked(kind, Global)
        if kind.module != "torch" or kind.name not in STORAGE_DTYPES:
            return Record(kind, (key,))
        if tag != "storage" or type(key) is not str or type(count) is not int or count < 0:
            raise TypeError("wrong description of a storage")
        return Storage(key, kind.name, count)

    def _make(self, function: Any, args: tuple[Any, ...]) -> Any:
        """What calling ``function`` would give: dicts, sizes and tensors are made here, else a record."""
        if function == _ORDERED_DICT and len(args) <= 1:
            pairs: dict[Any, Any] = {}
            _fill(pairs, (_checked(pair, _SEQUENCES) for pair in _checked((*args, ())[0], _SEQUENCES)))
            return pairs
        if function == _SIZE:
            return tuple(_checked(args[0], _SEQUENCES))
        if function == _PARAMETER and isinstance(args[0], Window | Record):
            return args[0]
        if function == _TENSOR and isinstance(args[0], Storage):
            if len(args) > 6 and args[6]:  # a negation or conjugation that PyTorch has put off
                raise CheckpointError(
                    f"{self.path}: a tensor has operations put off ({args[6]!r}); save what resolve_neg() and "
                    "resolve_conj() make of it."
                )
            return self._window(args[0], *args[1:4])
        if isinstance(function, Global) and self.keep_unknown:
            return Record(function, args)
        if isinstance(function, Record):
            return Record(function.of, args)
        raise CheckpointError(
            f"{self.path}: data.pkl calls {describe(function)} in a way no tensor needs; it is refused and "
            "nothing in it was run."
        )

    def _window(self, storage: Storage, offset: Any, size: Any, stride: Any) -> Window:
        size, stride = tuple(_checked(size, _SEQUENCES)), tuple(_checked(stride, _SEQUENCES))
        numbers = (offset, *size, *stride)
        if len(size) != len(stride) or len(size) > 32 or not all(type(number) is int for number in numbers):
            raise TypeError("wrong description of a tensor")
        # Even a stride that no element is reached by has to be one that NumPy can hold.
        fits = min(numbers) >= 0 and max(numbers) <= MAX_ELEMENTS
        if fits and 0 not in size:
            last = offset + sum((extent - 1) * step for extent, step in zip(size, stride, strict=True))
            fits = last < storage.count and math.prod(size) <= MAX_ELEMENTS
        if not fits:
            raise CheckpointError(
                f"{self.path}: a tensor of size {size}, stride {stride} and offset {offset} reaches outside "
                f"its storage of {storage.count} numbers; the file is damaged or hostile and is refused."
            )
        return Window(storage, offset, size, stride)


def _checked(value: Any, kind: type | tuple[type, ...]) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{type(value).__name__} in the wrong place")
    return value


def _fill(target: dict[Any, Any], pairs: Iterable[Any]) -> None:
    for key, value in pairs:
        flat = type(key) is tuple and all(isinstance(part, _SCALARS) for part in key)
        # No nested tuples: hashing t = (t, t), fifty levels deep, would never end. Records hash by identity.
        if not (flat or isinstance(key, (*_SCALARS, Record))):
            raise TypeError(f"{type(key).__name__} as a dictionary key")
        target[key] = value
