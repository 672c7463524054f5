"""A kernel's PTX as a C function, so that a machine without a GPU can run what was compiled for one.

PTX is what Numba's compiler makes of a kernel; the toolkit's assembler turns it into the instructions of one GPU. It is
a small language: registers of fixed types, one operation a line, jumps. Each line becomes a line of C here. A thread
has to stop where it waits for others, so its registers lie in a struct and the function is one large ``switch``: a
barrier returns, and the next call goes on behind it (``pretended_gpu.c`` calls and exchanges).

Only what our kernels' PTX holds is known; the rest raises ``NotImplementedError``. One freedom of the assembler is not
taken: it may round a product and a sum of it once, where PTX says ``mul`` and ``add``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

C_TYPES = {
    "pred": "uint8_t",
    "f32": "float",
    **{
        f"{kind}{bits}": f"{name}{bits}_t"
        for kind, name in (("b", "uint"), ("u", "uint"), ("s", "int"))
        for bits in (32, 64)
    },
}
# Of two numbers a and b; {t} is the type, {u} the same width without a sign, in which sums wrap around.
BINARY = {
    "add": "({u})a + ({u})b",
    "sub": "({u})a - ({u})b",
    "mul.lo": "({u})a * ({u})b",
    "and": "a & b",
    "or": "a | b",
    "xor": "a ^ b",
    "div": "a / b",
    "rem": "a % b",
    "min": "a < b ? a : b",
    "max": "a > b ? a : b",
}
FLOAT = {
    "add": "a + b",
    "add.rz": "add_to_zero(a, b)",
    "sub": "a - b",
    "mul": "a * b",
    "div.rn": "a / b",
    "min": "min_f32(a, b)",
    "max": "max_f32(a, b)",
    "neg": "-a",
    "abs": "fabsf(a)",
    "copysign": "copysignf(b, a)",
    "rcp.rn": "1 / a",
    "rcp.approx.ftz": "flushed(1 / flushed(a))",
    "sqrt.rn": "sqrtf(a)",
    "ex2.approx.ftz": "exp2_approximate(a)",
    "fma.rn": "fmaf(a, b, c)",
    "fma.rm": "fma_down(a, b, c)",
}
COMPARED = {"eq": "a == b", "ne": "a != b", "lt": "a < b", "le": "a <= b", "gt": "a > b", "ge": "a >= b"}
# Of two floats, of which one may be no number: then ne is false and what ends in u is true.
COMPARED_FLOATS = {
    **COMPARED,
    "ne": "a < b || a > b",
    "equ": "!(a < b || a > b)",
    "neu": "a != b",
    "ltu": "!(a >= b)",
    "leu": "!(a > b)",
    "gtu": "!(a <= b)",
    "geu": "!(a < b)",
}
SPECIAL = {
    f"%{name}.{axis}": f"t->{name}[{i}]" for name in ("tid", "ctaid", "ntid", "nctaid") for i, axis in enumerate("xyz")
}

ENTRY = re.compile(r"\.entry\s+\w+\s*\(.*?\)[^{]*\{(.*)\}", re.DOTALL)
SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+(\w+)\[(\d+)\]")
REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+%(\w+)<(\d+)>;")
STATEMENT = re.compile(r"(?:@(!?)%(\w+)\s+)?([\w.:]+)\s*(.*?);")
REGISTER = re.compile(r"%([a-z]+)(\d+)")


@dataclass(frozen=True)
class Program:
    """A kernel in C: the function ``program`` and the size of what it needs."""

    source: str
    shared: int  # bytes a block


class Translation:
    """One kernel on its way from PTX to C."""

    def __init__(self, ptx: str) -> None:
        found = ENTRY.search(ptx)
        if found is None:
            raise ValueError("no kernel is in this PTX")
        self.body = found[1]
        self.shared: dict[str, int] = {}  # where each array lies in shared memory
        self.shared_bytes = 0
        for align, name, size in SHARED.findall(ptx):
            self.shared[name] = -(-self.shared_bytes // int(align)) * int(align)
            self.shared_bytes = self.shared[name] + int(size)
        self.classes = {name: kind for kind, name, _ in REGISTERS.findall(self.body)}
        self.stops = 0

    def program(self) -> Program:
        fields = [f"{C_TYPES[kind]} {name}[{count}];" for kind, name, count in REGISTERS.findall(self.body)]
        lines = [line for raw in self.body.splitlines() if (line := self.line(raw.split("//")[0].strip()))]
        entries = [f"case {stop}: goto stop_{stop};" for stop in range(1, self.stops + 1)]
        source = [
            '#include "pretended_gpu.h"',
            f"typedef struct {{ {' '.join(fields)} }} Registers;",
            "const uint64_t registers = sizeof(Registers);",
            "int program(Thread *restrict t, void *restrict given)",
            "{",
            "Registers *restrict x = given;",
            f"switch (t->at) {{ {' '.join(entries)} }}",
            *lines,
            "return ENDED;",
            "}",
        ]
        return Program("\n".join(source) + "\n", self.shared_bytes)

    def line(self, line: str) -> str:
        if not line or line.startswith((".reg", ".pragma", ".loc", ".shared", "{", "}")):
            return ""
        if label := re.fullmatch(r"\$(\w+):", line):
            return f"{label[1]}:;"
        statement = STATEMENT.fullmatch(line)
        if statement is None:
            raise NotImplementedError(f"PTX: {line}")
        negated, guard, operation, rest = statement.groups()
        operands = re.findall(r"\{[^}]*\}|[^,\s]+", rest)
        try:
            done = self.statement(operation, operands)
        except (KeyError, ValueError) as error:
            raise NotImplementedError(f"PTX: {line}") from error
        return f"if ({negated}{self.register('%' + guard)}) {{ {done} }}" if guard else done

    # ------------------------------------------------------------------------------ operands

    def parts(self, operand: str) -> tuple[str, str]:
        """The class and the number of a register."""
        found = REGISTER.fullmatch(operand)
        if found is None:
            raise ValueError(operand)
        return found[1], found[2]

    def register(self, operand: str) -> str:
        kind, number = self.parts(operand)
        return f"x->{kind}[{number}]"

    def type_of(self, operand: str) -> str:
        return self.classes[self.parts(operand)[0]]

    def value(self, operand: str, kind: str) -> str:
        """An operand as a C expression of a type of PTX."""
        if operand in SPECIAL:
            return f"({C_TYPES[kind]}){SPECIAL[operand]}"
        if operand in self.shared:
            return f"{self.shared[operand]}"
        if operand.startswith("%"):
            held, name = self.type_of(operand), self.register(operand)
            if (held == "f32") != (kind == "f32"):
                return f"f32_of({name})" if kind == "f32" else f"b32_of({name})"
            return name if kind in ("f32", "pred") else f"({C_TYPES[kind]}){name}"
        if operand.startswith("0f"):
            bits = int(operand[2:], 16)
            return f"f32_of({bits}u)" if kind == "f32" else f"{bits}u"
        return f"({C_TYPES[kind]}){int(operand) % 2**64}ULL"

    def assign(self, target: str, expression: str, kind: str) -> str:
        """Into a register, which may be wider than the type: then the sign fills it."""
        held = self.type_of(target)
        if (held == "f32") != (kind == "f32"):
            expression = f"f32_of({expression})" if held == "f32" else f"b32_of({expression})"
        return f"{self.register(target)} = {expression};"

    def address(self, operand: str) -> str:
        """[register + bytes], [array + bytes]"""
        base, _, offset = operand.strip("[]").partition("+")
        return f"{self.value(base, 'u64')} + {int(offset or 0)}"

    # ---------------------------------------------------------------------------- operations

    def statement(self, operation: str, operands: list[str]) -> str:
        name, *parts = operation.split(".")
        kind = parts[-1] if parts else ""
        match name:
            case "ret":
                return "return ENDED;"
            case "bra":
                return f"goto {operands[0].lstrip('$')};"
            case "bar" | "shfl":
                return self.wait(operation, operands)
            case "ld" | "st":
                return self.memory(name, parts, operands)
            case "mov" | "cvta":
                return self.assign(operands[0], self.value(operands[1], kind), kind)
            case "cvt":
                return self.convert(parts, operands)
            case "selp":
                one, other, chosen = (self.value(operands[i], of) for i, of in ((1, kind), (2, kind), (3, "pred")))
                return self.assign(operands[0], f"{chosen} ? {one} : {other}", kind)
            case "setp":
                table = COMPARED_FLOATS if kind == "f32" else COMPARED
                return self.compute("pred", table[parts[0]], kind, operands)
        return self.compute(kind, self.formula(".".join([name, *parts[:-1]]), kind), kind, operands)

    def formula(self, name: str, kind: str) -> str:
        """What an operation without memory or jumps computes of a, b, c and d."""
        if kind == "f32":
            return FLOAT[name]
        bits = "64" if kind.endswith("64") else "32"
        if kind == "pred":
            return "!a" if name == "not" else BINARY[name]
        match name:
            case "neg":
                return "-({u})a".format(u=C_TYPES["u" + bits])
            case "not":
                return "~a"
            case "mul.wide":
                return f"({'int64_t' if kind == 's32' else 'uint64_t'})a * b"
            case "mul.hi":
                return f"({'' if kind[0] == 's' else 'unsigned '}__int128)a * b >> {bits}"
            case "mad.lo":
                return "({u})a * ({u})b + ({u})c".format(u=C_TYPES["u" + bits])
            case "bfi":
                return f"insert_{bits}(a, b, c, d)"
            case "shl":
                return f"left_{bits}(a, b)"
            case "shr":
                return f"right_{kind}(a, b)"
        return BINARY[name].format(u=C_TYPES["u" + bits])

    def compute(self, result: str, formula: str, kind: str, operands: list[str]) -> str:
        target, *sources = operands
        shift = formula.startswith(("left_", "right_"))
        given = dict(zip("abcd", sources, strict=False))

        def put(found: re.Match) -> str:
            letter = found[0]
            return f"({self.value(given[letter], 'u32' if shift and letter == 'b' else kind)})"

        expression = re.sub(r"\b[abcd]\b", put, formula)
        return self.assign(target, expression, result)

    def convert(self, parts: list[str], operands: list[str]) -> str:
        *how, into, of = parts
        value = self.value(operands[1], of)
        if (how, into, of) == (["sat"], "f32", "f32"):
            value = f"saturate({value})"
        elif (into == "f32" and how == ["rn"]) or (not how and "f32" not in (into, of)):
            value = f"({C_TYPES[into]}){value}"
        else:
            raise ValueError(parts)
        return self.assign(operands[0], value, into)

    def memory(self, name: str, parts: list[str], operands: list[str]) -> str:
        space, *count, kind = parts
        if space == "param":
            number = re.fullmatch(r"\[\w+_param_(\d+)\]", operands[1])
            if number is None:
                raise ValueError(operands[1])
            value = f"(uint{kind[1:]}_t)t->parameters[{number[1]}]"
            return self.assign(operands[0], f"f32_of({value})" if kind == "f32" else value, kind)
        several, place = operands if name == "ld" else operands[::-1]
        registers = several.strip("{}").replace(",", " ").split()
        if space not in ("global", "shared") or len(registers) != {(): 1, ("v2",): 2, ("v4",): 4}[tuple(count)]:
            raise ValueError(parts)
        width = len(registers) * int(kind[1:]) // 8
        lines = [f"{C_TYPES[kind]} v[{len(registers)}];"]
        where = f"{space}_at(t, {self.address(place)}, {width})"
        if name == "ld":
            lines += [f"memcpy(v, {where}, {width});"]
            lines += [self.assign(register, f"v[{i}]", kind) for i, register in enumerate(registers)]
        else:
            lines += [f"v[{i}] = {self.value(register, kind)};" for i, register in enumerate(registers)]
            lines += [f"memcpy({where}, v, {width});"]
        return "{ " + " ".join(lines) + " }"

    def wait(self, operation: str, operands: list[str]) -> str:
        self.stops += 1
        stop = f"t->at = {self.stops}; return {{}}; stop_{self.stops}:;"
        if operation == "bar.sync" and operands == ["0"]:
            return stop.format("BLOCK")
        lanes = "t->members = {}; t->bounds = {}; "
        if operation == "bar.warp.sync":
            return lanes.format(self.value(operands[0], "u32"), 31) + "t->apart = 0; " + stop.format("WARP")
        if operation != "shfl.sync.bfly.b32":
            raise ValueError(operation)
        target, source, apart, bounds, members = operands
        target, _, valid = target.partition("|")
        given = f"t->given = {self.value(source, 'b32')}; t->apart = {self.value(apart, 'u32')}; "
        taken = self.assign(target, "t->taken", "b32") + (f" {self.register(valid)} = 1;" if valid else "")
        return (
            lanes.format(self.value(members, "u32"), self.value(bounds, "u32"))
            + given
            + stop.format("EXCHANGE")
            + taken
        )


def translate(ptx: str) -> Program:
    """The one kernel of some PTX, in C. Raises ``NotImplementedError`` with the line that is not known."""
    return Translation(ptx).program()
