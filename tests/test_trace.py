"""How two runs are compared, by hand: the yardstick of the other tests must not be wrong itself."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sewd_np.trace import Row, Trace, compare, error_between, report

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    "a, b, error",
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([0.1, 0.2], [0.1, 0.5], 0.3),  # absolute below one
        ([90.0, 2.0], [100.0, 1.0], 0.1),  # by the largest of b, wherever it stands
        ([100.0], [80.0], 0.25),  # of b, not of a
        ([-4.0, 0.0], [-5.0, 0.0], 0.2),
        ([NAN, 1.0, INF, -INF], [NAN, 1.0, INF, -INF], 0.0),  # the same everywhere
        ([NAN, INF], [NAN, INF], 0.0),
        ([NAN, 1.0], [1.0, 1.0], NAN),
        ([1.0, 1.0], [1.0, NAN], NAN),
        ([INF, 1.0], [1.0, 1.0], NAN),
        ([INF, 1.0], [-INF, 1.0], NAN),
        ([NAN], [INF], NAN),
        ([], [], 0.0),
    ],
)
def test_error_is_the_largest_by_the_largest_number_of_the_second(a: list[float], b: list[float], error: float) -> None:
    assert error_between(np.array(a), np.array(b)) == pytest.approx(error, abs=1e-15, nan_ok=True)


def test_shapes_that_differ_are_not_stretched() -> None:
    with pytest.raises(ValueError, match=r"shapes \(3, 3\) and \(3,\) were given; they must have one shape"):
        error_between(np.ones((3, 3)), np.ones(3))


A = {"one": np.array([1.0, 2.0]), "two": np.zeros((2, 2)), "three": np.zeros(3), "four": np.zeros(1)}
B = {"five": np.ones(5), "four": np.full(1, NAN), "three": np.full(3, 2e-3), "two": np.zeros(4), "one": A["one"]}
ROWS = [
    Row("one", "OK", 0.0, (2,), (2,)),
    Row("two", "SHAPE", NAN, (2, 2), (4,)),
    Row("three", "DIFF", 2e-3, (3,), (3,)),
    Row("four", "DIFF", NAN, (1,), (1,)),
    Row("five", "ONLY B", NAN, None, (5,)),
]


def test_every_way_that_a_point_can_fare() -> None:
    for rows, expected in (
        (compare(A, B, 1e-3), ROWS),
        (compare(A, {}), [Row(name, "ONLY A", NAN, value.shape, None) for name, value in A.items()]),
        (compare({}, {}), []),
    ):
        assert [row[:2] + row[3:] for row in rows] == [row[:2] + row[3:] for row in expected]
        np.testing.assert_array_equal([row.error for row in rows], [row.error for row in expected])
    assert [row.status for row in compare(A, B, 2e-3)][2] == "OK"  # up to the tolerance


def test_a_report_is_a_line_for_each_point_and_where_to_look_first() -> None:
    lines: list[str] = []
    rows = report(A, B, 1e-3, lines.append)
    assert [row.name for row in rows] == [row.name for row in ROWS]
    assert [line.split() for line in lines] == [
        ["point", "status", "error", "shape"],
        ["one", "OK", "0.0e+00", "(2,)"],
        ["two", "SHAPE", "(2,", "2)", "against", "(4,)"],
        ["three", "DIFF", "2.0e-03", "(3,)"],
        ["four", "DIFF", "nan", "(1,)"],
        ["five", "ONLY", "B", "(5,)"],
        "1 of 5 points agree within 0.001; the first that does not: two (SHAPE)".split(),
    ]
    lines.clear()
    report(A, A, write=lines.append)
    assert lines[-1] == "4 of 4 points agree within 0.0001"


def test_what_is_no_trace_is_refused() -> None:
    with pytest.raises(TypeError, match="ndarray is no trace; pass two Trace objects or mappings"):
        compare(np.ones(3), {})
    with pytest.raises(KeyError, match="encoder was not recorded; this trace holds 0 points"):
        Trace("encoder")["encoder"]
