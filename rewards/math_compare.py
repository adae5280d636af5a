"""Whether two parsed mathematical answers mean the same, in bounded time.

math-verify parses; its own comparison calls `simplify` and `solve`, which run for minutes on short inputs, and bounds
them with signals, which do not work in threads. Here an expression is refused if evaluating it could be long (`check`),
values are compared by evaluation, expressions with variables at fixed points, relations by the ratio of their sides'
differences, sets and matrices element by element; only what is small and none of these goes to math-verify.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import product
from typing import Any

import sympy
from latex2sympy2_extended.logic import And
from math_verify import verify
from math_verify.grader import get_pct_val
from sympy.core.relational import Relational

MAX_NODES = 300
_MAX_BITS = 20_000
"""Of any exact number that evaluation may build."""
_MAX_SYMBOL_POWER, _MAX_SUM_POWER = 1000, 60
_MAX_FACTORIAL_BITS = 11
_MAX_LIBRARY_NODES = 40
_MAX_SET = 24
_FLOAT_TOLERANCE = 1e-6
"""Absolute, where an answer is a decimal fraction: 0.333333 stands for 1/3, 0.333 does not."""
_EXACT_TOLERANCE = 1e-30
_PROBE_TOLERANCE = 1e-12
_PROBE_DIGITS = 25
_PROBES, _ENOUGH_PROBES = 6, 3
_UNEVALUATED = (sympy.Sum, sympy.Product, sympy.Integral, sympy.Limit, sympy.Derivative)
_LIBRARY_KINDS = (sympy.Set, Relational, And)
_FACTORIALS = (sympy.factorial, sympy.factorial2, sympy.gamma, sympy.binomial, sympy.RisingFactorial)
_FLIPPED = {
    sympy.Ge: sympy.Le,
    sympy.Le: sympy.Ge,
    sympy.Gt: sympy.Lt,
    sympy.Lt: sympy.Gt,
    sympy.Eq: sympy.Eq,
    sympy.Ne: sympy.Ne,
}


class TooComplex(ValueError):
    """Evaluating this expression could take long."""


def check(expression: Any) -> None:
    """Raises `TooComplex` for towers of powers, factorials of large numbers, unevaluated sums, integrals and limits,
    large powers of sums, and anything of more than 300 nodes."""
    for index, _ in enumerate(sympy.preorder_traversal(expression)):
        if index >= MAX_NODES:
            raise TooComplex(f"more than {MAX_NODES} terms")
    _bits(expression)


def _bits(node: Any) -> float:
    """A bound on the base-2 logarithm of the numbers that evaluating `node` builds."""
    if isinstance(node, sympy.Rational):
        return max(abs(int(node.p)).bit_length(), int(node.q).bit_length(), 1)
    if isinstance(node, _UNEVALUATED):
        raise TooComplex(f"an unevaluated {type(node).__name__}")
    arguments = [_bits(argument) for argument in getattr(node, "args", ())]
    if isinstance(node, sympy.MatrixBase):
        arguments = [_bits(argument) for argument in node.flat()]
    bits = _power_bits(node, *arguments) if isinstance(node, sympy.Pow) else float(sum(arguments)) + 1
    if isinstance(node, _FACTORIALS):
        if max(arguments) > _MAX_FACTORIAL_BITS:
            raise TooComplex("a factorial of a large number")
        bits = 2.0 ** max(arguments) * max(arguments)
    if bits > _MAX_BITS:
        raise TooComplex("a number of too many digits")
    return bits


def _power_bits(node: sympy.Pow, base_bits: float, exponent_bits: float) -> float:
    if node.exp.free_symbols:
        return base_bits + exponent_bits
    exponent = 2.0**exponent_bits if exponent_bits < 64 else float("inf")
    if isinstance(node.exp, sympy.Rational):
        exponent = abs(float(node.exp))
    if node.base.free_symbols and exponent > (_MAX_SYMBOL_POWER if node.base.is_Symbol else _MAX_SUM_POWER):
        raise TooComplex("a large power of an expression")
    return base_bits * max(exponent, 1.0)


def same(gold: Any, got: Any) -> bool:
    """Whether `got` is an answer as good as `gold`; both parsed by math-verify and passed by `check`."""
    gold, got = _without_name(gold, got)
    if isinstance(gold, sympy.MatrixBase) or isinstance(got, sympy.MatrixBase):
        return _same_matrix(gold, got)
    if isinstance(gold, Relational) and isinstance(got, Relational):
        return _same_relation(gold, got)
    for kind in (And, sympy.Union):
        if (
            isinstance(gold, kind)
            and isinstance(got, kind)
            and _same_elements([*gold.args], [*got.args], ordered=False)
        ):
            return True
    if isinstance(gold, sympy.Interval) and isinstance(got, sympy.Interval):
        ends = gold.left_open == got.left_open and gold.right_open == got.right_open
        return bool(ends) and same(gold.start, got.start) and same(gold.end, got.end)
    mine, theirs = _elements(gold), _elements(got)
    if mine is not None and theirs is not None:
        ordered = not (isinstance(gold, sympy.FiniteSet) and isinstance(got, sympy.FiniteSet))
        return _same_elements(mine, theirs, ordered=ordered)
    if isinstance(gold, sympy.Expr) and isinstance(got, sympy.Expr):
        return any(_same_value(a, b) for a, b in product(_readings(gold), _readings(got)))
    if isinstance(gold, sympy.FiniteSet) and len(gold) == 1 and isinstance(got, sympy.Expr):
        return same(gold.args[0], got)
    if isinstance(got, sympy.FiniteSet) and len(got) == 1 and isinstance(gold, sympy.Expr):
        return same(gold, got.args[0])
    return _library_says(gold, got)


def _without_name(gold: Any, got: Any) -> tuple[Any, Any]:
    """`x = 5` and `x \\in S` give their right side when the other answer is not a relation or names the same x."""
    named = [isinstance(side, sympy.Eq) and side.lhs.is_Symbol for side in (gold, got)]
    right: Any = got.rhs if named[1] else got
    if all(named) and str(gold.lhs) != str(got.lhs):
        return gold, got
    if named[0] and (named[1] or not isinstance(got, (Relational, And))):
        gold = gold.rhs
    return gold, got if isinstance(gold, (Relational, And)) else right


def _elements(value: Any) -> list[Any] | None:
    """The members of a finite set, a tuple, or of what could be either an open interval or a pair."""
    if isinstance(value, sympy.FiniteSet):
        return list(getattr(value, "_unsorted_args", value.args))
    if isinstance(value, sympy.Tuple):
        return list(value.args)
    if isinstance(value, sympy.Interval) and value.left_open and value.right_open:
        return [value.start, value.end]
    return None


def _same_elements(mine: list[Any], theirs: list[Any], *, ordered: bool) -> bool:
    if len(mine) != len(theirs) or len(mine) > _MAX_SET:
        return False
    if ordered:
        return all(same(a, b) for a, b in zip(mine, theirs, strict=True))
    left = list(theirs)
    for element in mine:
        match = next((index for index, other in enumerate(left) if same(element, other)), None)
        if match is None:
            return False
        del left[match]
    return True


def _same_matrix(gold: Any, got: Any) -> bool:
    if not (isinstance(gold, sympy.MatrixBase) and isinstance(got, sympy.MatrixBase)) or gold.shape != got.shape:
        return False
    return all(same(a, b) for a, b in zip(gold.flat(), got.flat(), strict=True))


def _same_relation(gold: Relational, got: Relational) -> bool:
    """Equal up to a constant factor, which must be positive for an inequality unless its sign is turned around."""
    sides: tuple[Any, ...] = (gold.lhs, gold.rhs, got.lhs, got.rhs)
    if not all(isinstance(side, sympy.Expr) for side in sides):
        return _library_says(gold, got)
    mine, theirs = sides[0] - sides[1], sides[2] - sides[3]
    if isinstance(gold, (sympy.Eq, sympy.Ne)):
        return type(gold) is type(got) and _constant_ratio(mine, theirs) is not None
    if _FLIPPED[type(gold)] is type(got):
        theirs = -theirs
    elif type(gold) is not type(got):
        return False
    ratio = _constant_ratio(mine, theirs)
    return ratio is not None and ratio > 0


def _constant_ratio(a: sympy.Expr, b: sympy.Expr) -> float | None:
    ratios = [x / y for x, y in _probe(a, b) if abs(y) > _PROBE_TOLERANCE]
    if len(ratios) < _ENOUGH_PROBES or any(abs(ratio - ratios[0]) > 1e-9 * abs(ratios[0]) for ratio in ratios):
        return None
    return float(ratios[0].real) if ratios[0] else None


def _readings(value: Any) -> list[Any]:
    """A percentage counts as the number before the sign, too."""
    number = get_pct_val(value)
    whole = value.replace(sympy.UnevaluatedExpr, lambda inner: inner)
    return [whole] if number is None else [whole, number]


def _same_value(a: Any, b: Any) -> bool:
    if a == b:
        return True
    if not a.free_symbols and not b.free_symbols:
        return _same_constant(a, b)
    tolerance = 1e-6 if a.has(sympy.Float) or b.has(sympy.Float) else _PROBE_TOLERANCE
    if {str(symbol) for symbol in a.free_symbols} != {str(symbol) for symbol in b.free_symbols}:
        return False
    pairs = _probe(a, b)
    return len(pairs) >= _ENOUGH_PROBES and all(abs(x - y) <= tolerance * max(1, abs(x), abs(y)) for x, y in pairs)


def _same_constant(a: sympy.Expr, b: sympy.Expr) -> bool:
    if a.is_infinite or b.is_infinite:
        return False
    try:
        difference = abs(complex((a - b).evalf(15, maxn=200)))
        size = abs(complex(b.evalf(15)))
    except (TypeError, ValueError, OverflowError):  # not a number
        return False
    if a.has(sympy.Float) or b.has(sympy.Float):
        return difference <= max(_FLOAT_TOLERANCE, _PROBE_TOLERANCE * size)
    return difference < _EXACT_TOLERANCE


def _probe(a: sympy.Expr, b: sympy.Expr) -> list[tuple[complex, complex]]:
    """Both expressions' values at fixed points, those left out where either has none. Variables go by name."""
    names = sorted({str(symbol) for symbol in a.free_symbols | b.free_symbols})
    pairs = []
    for probe in range(_PROBES):
        values = {name: _point(probe, index) for index, name in enumerate(names)}
        pair = _evaluate(a, values), _evaluate(b, values)
        if None not in pair:
            pairs.append(pair)
    return pairs


def _point(probe: int, index: int) -> sympy.Rational:
    """Spread over both signs and magnitudes below 4, never an integer."""
    value = Fraction((probe * 7919 + index * 104_729 + 4567) % 9973, 2503)
    return sympy.Rational(value.numerator, value.denominator) * (-1) ** (probe + index)


def _evaluate(expression: sympy.Expr, values: dict[str, sympy.Rational]) -> complex | None:
    substitution: dict[Any, Any] = {symbol: values[str(symbol)] for symbol in expression.free_symbols}
    try:
        value = complex(expression.evalf(_PROBE_DIGITS, subs=substitution))
    except (TypeError, ValueError, OverflowError, ZeroDivisionError, AttributeError):  # no value at this point
        return None
    return value if value == value and abs(value) < float("inf") else None


def _library_says(gold: Any, got: Any) -> bool:
    """math-verify's own comparison, for sets and systems of relations that are too small to keep it busy."""
    if gold == got:
        return True
    sides = (gold, got)
    nodes = [node for side in sides for node in sympy.preorder_traversal(side)]
    powers = (node.exp for node in nodes if isinstance(node, sympy.Pow))
    small = len(nodes) <= _MAX_LIBRARY_NODES and all(power.is_Rational and abs(power) <= 3 for power in powers)
    return small and all(isinstance(side, _LIBRARY_KINDS) for side in sides) and verify(*sides, timeout_seconds=None)
