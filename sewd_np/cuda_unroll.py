"""Loops written out in the source before Numba compiles it.

A kernel keeps its running results in an array that should live in registers. Registers have no addresses: every index
has to be known when the kernel is compiled. LLVM unrolls a loop when it thinks the loop small enough; where it thinks
otherwise, the array moves to memory and the kernel is many times slower. ``static_range`` leaves nothing to judgement:

    for a in static_range(2):          x[0] += y[0]
        x[a] += y[a]           →       x[1] += y[1]

An ``if`` that asks only about constants of the kernel's factory is decided here too: the branch not taken is never
compiled, nor are its types inferred, so a kernel without a table can be called with anything in the table's place.
"""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

static_range = range  # what it is outside a kernel


class _NotConstant(Exception):
    """The expression depends on something that is only known when the kernel runs."""


class _Replace(ast.NodeTransformer):
    """A loop's variable by its number."""

    def __init__(self, name: str, number: int) -> None:
        self.name, self.number = name, number

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id != self.name:
            return node
        if not isinstance(node.ctx, ast.Load):
            raise SyntaxError(f"line {node.lineno}: {node.id} belongs to static_range and cannot be assigned.")
        return ast.copy_location(ast.Constant(self.number), node)


class _Unroll(ast.NodeTransformer):
    """Write out every ``static_range`` and decide every ``if`` that asks only about ``constants``."""

    def __init__(self, constants: dict[str, Any]) -> None:
        self.constants = constants

    def value(self, node: ast.expr) -> Any:
        names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
        if names - self.constants.keys() or any(isinstance(part, ast.Call | ast.Subscript) for part in ast.walk(node)):
            raise _NotConstant
        return eval(compile(ast.Expression(copy.deepcopy(node)), "<constant>", "eval"), {}, self.constants)

    def body(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        out: list[ast.stmt] = []
        for statement in statements:
            result = self.visit(statement)
            out.extend(result if isinstance(result, list) else [result])
        return out

    def visit_For(self, node: ast.For) -> Any:
        call = node.iter
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "static_range"):
            return self.generic_visit(node)
        if any(isinstance(part, ast.Break | ast.Continue) for part in ast.walk(node)):
            raise SyntaxError(f"line {node.lineno}: static_range has no loop left to break or continue.")
        assert isinstance(node.target, ast.Name)
        out: list[ast.stmt] = []
        for number in range(*(self.value(argument) for argument in call.args)):
            replace = _Replace(node.target.id, number)
            out.extend(self.body([replace.visit(copy.deepcopy(statement)) for statement in node.body]))
        return out or ast.copy_location(ast.Pass(), node)

    def visit_If(self, node: ast.If) -> Any:
        try:
            taken = node.body if self.value(node.test) else node.orelse
        except _NotConstant:
            return self.generic_visit(node)
        return self.body(taken) or ast.copy_location(ast.Pass(), node)


def unrolled(function: Callable) -> Callable:
    """The same function with its ``static_range`` loops written out. Goes below the compiling decorator.

    Constants are the plain numbers and flags among the function's closure and globals. The result keeps the file name
    and line numbers of the source, so that errors and Numba's cache on disk find it.
    Raises ``SyntaxError`` for what cannot be written out.
    """
    lines, first = inspect.getsourcelines(function)
    tree = ast.parse(textwrap.dedent("".join(lines)))
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list = []
    ast.increment_lineno(tree, first - 1)

    cells = function.__closure__ or ()
    closure = {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, cells, strict=True)}
    seen = {**function.__globals__, **closure}
    constants = {name: value for name, value in seen.items() if isinstance(value, int)}
    for name in function.__code__.co_varnames:  # a local variable hides a global one
        constants.pop(name, None)
    body = _Unroll(constants).visit(definition)

    # def outer(constants of the factory): def kernel(...): ...; return kernel
    arguments = ast.arguments([], [ast.arg(name) for name in closure], None, [], [], None, [])
    outer = ast.FunctionDef("outer", arguments, [body, ast.Return(ast.Name(definition.name, ast.Load()))], [])
    module = ast.fix_missing_locations(ast.Module([outer], []))
    made: dict[str, Any] = {}
    # The module's own dictionary, not a copy: the simulator exchanges `cuda` in it while a kernel runs.
    exec(compile(module, function.__code__.co_filename, "exec"), function.__globals__, made)
    result = made["outer"](**closure)
    result.__qualname__, result.__module__, result.__doc__ = (
        function.__qualname__,
        function.__module__,
        function.__doc__,
    )
    return result
