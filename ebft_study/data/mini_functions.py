"""Miniature programming problems that a model of a million parameters partly learns.

A problem is a chain of one to three small operations on a number, a list or a string. Its docstring says the chain in
one of many wordings, its answer writes it in one of many styles, so a prompt has many right answers. Its *meaning* is
the chain with its constants; hidden tests tell it from the chains that leave an operation out or change a constant.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ebft_study.data.draws import MEANINGS_PERCENT, Draws
from ebft_study.data.examples import Example, split_of
from ebft_study.sandbox import Tests

PROBLEMS = {"train": 1000, "validation": 320, "heldout": 320}  # distinct meanings
TRAIN_EXAMPLES_PER_PROBLEM = 2  # in different words
N_TESTS = 6
LENGTHS = (1, 2, 2, 2, 3)
NAMES = ("f", "run", "get", "make")
JOINTS = (", ", ", then ", " and then ")


@dataclass(frozen=True)
class Operation:
    """A small operation: ways to say it, ways to write it, and what it does.

    `{k}` is its constant, from `constants`; `{v}` in an expression is the value so far.
    """

    wordings: tuple[str, ...]
    expressions: tuple[str, ...]
    apply: Callable[[Any, int], Any]
    constants: tuple[int, int] | None = None


@dataclass(frozen=True)
class Kind:
    """What the functions of one type of argument are made of; `last` operations end a chain."""

    operations: tuple[Operation, ...]
    last: tuple[Operation, ...]
    arguments: tuple[str, ...]
    draw_value: Callable[[Draws], Any]


Steps = tuple[tuple[Operation, int], ...]  # with their constants

# fmt: off
NUMBER = Kind(
    operations=(
        Operation(("add {k}", "increase it by {k}"), ("{v} + {k}", "{k} + {v}"), lambda v, k: v + k, (2, 9)),
        Operation(("subtract {k}", "take away {k}"), ("{v} - {k}", "-{k} + {v}"), lambda v, k: v - k, (2, 9)),
        Operation(("multiply by {k}", "scale it by {k}"), ("{v} * {k}", "{k} * {v}"), lambda v, k: v * k, (2, 9)),
        Operation(("divide by {k}", "count the times {k} fits"), ("{v} // {k}",), lambda v, k: v // k, (2, 9)),
        Operation(("take it modulo {k}", "leave the rest by {k}"), ("{v} % {k}",), lambda v, k: v % k, (2, 9)),
        Operation(("square it", "raise it to the power 2"), ("{v} ** 2", "pow({v}, 2)"), lambda v, k: v**2),
        Operation(("negate it", "flip the sign"), ("-{v}", "0 - {v}"), lambda v, k: -v),
        Operation(("drop the sign", "take its size"), ("abs({v})",), lambda v, k: abs(v)),
        Operation(("cap it at {k}", "make it at most {k}"),
                  ("min({v}, {k})", "min({k}, {v})"), lambda v, k: min(v, k), (2, 9)),
        Operation(("make it at least {k}", "set {k} as its minimum"),
                  ("max({v}, {k})", "max({k}, {v})"), lambda v, k: max(v, k), (2, 9)),
    ),
    last=(),
    arguments=("n", "x", "a", "value"),
    draw_value=lambda draws: draws.between(-20, 40),
)
LIST = Kind(
    operations=(
        Operation(("add {k} to each", "increase each item by {k}"),
                  ("[i + {k} for i in {v}]", "[{k} + i for i in {v}]"), lambda v, k: [i + k for i in v], (2, 9)),
        Operation(("multiply each by {k}", "scale each item by {k}"),
                  ("[i * {k} for i in {v}]", "[{k} * i for i in {v}]"), lambda v, k: [i * k for i in v], (2, 9)),
        Operation(("square each", "raise each item to the power 2"),
                  ("[i * i for i in {v}]", "[i ** 2 for i in {v}]"), lambda v, k: [i * i for i in v]),
        Operation(("keep those over {k}", "drop all up to {k}"),
                  ("[i for i in {v} if i > {k}]", "[i for i in {v} if {k} < i]"),
                  lambda v, k: [i for i in v if i > k], (2, 9)),
        Operation(("keep those under {k}", "drop all from {k}"),
                  ("[i for i in {v} if i < {k}]", "[i for i in {v} if {k} > i]"),
                  lambda v, k: [i for i in v if i < k], (2, 9)),
        Operation(("reverse the order", "read it backwards"),
                  ("{v}[::-1]", "list(reversed({v}))"), lambda v, k: v[::-1]),
        Operation(("sort it", "order it by size"), ("sorted({v})",), lambda v, k: sorted(v)),
        Operation(("take the first {k}", "keep {k} from the start"), ("{v}[:{k}]",), lambda v, k: v[:k], (2, 5)),
        Operation(("skip the first {k}", "remove {k} from the start"), ("{v}[{k}:]",), lambda v, k: v[k:], (2, 4)),
    ),
    last=(
        Operation(("sum it", "return the total"), ("sum({v})",), lambda v, k: sum(v)),
        Operation(("count the items", "return the length"), ("len({v})",), lambda v, k: len(v)),
    ),
    arguments=("items", "values", "data", "a"),
    draw_value=lambda draws: [draws.between(-9, 19) for _ in range(draws.between(4, 8))],
)
STRING = Kind(
    operations=(
        Operation(("change it to upper case", "make it upper case"), ("{v}.upper()",), lambda v, k: v.upper()),
        Operation(("reverse the order", "read it backwards"),
                  ("{v}[::-1]", "''.join(reversed({v}))"), lambda v, k: v[::-1]),
        Operation(("sort it", "order its characters"), ("''.join(sorted({v}))",), lambda v, k: "".join(sorted(v))),
        Operation(("take the first {k}", "keep {k} from the start"), ("{v}[:{k}]",), lambda v, k: v[:k], (2, 5)),
        Operation(("skip the first {k}", "remove {k} from the start"), ("{v}[{k}:]",), lambda v, k: v[k:], (2, 4)),
        Operation(("repeat it {k} times", "write {k} of it"), ("{v} * {k}", "{k} * {v}"), lambda v, k: v * k, (2, 9)),
        Operation(("add {k} stars", "append {k} stars"),
                  ("{v} + {k} * '*'", "{v} + '*' * {k}"), lambda v, k: v + k * "*", (2, 9)),
    ),
    last=(Operation(("count the characters", "return the length"), ("len({v})",), lambda v, k: len(v)),),
    arguments=("s", "text", "string"),
    draw_value=lambda draws: "".join(draws.pick("abcdefgz") for _ in range(draws.between(5, 10))),
)
# fmt: on
KINDS = {"number": NUMBER, "list": LIST, "string": STRING}
KINDS_DRAWN = ("number", "number", "list", "list", "string")


@dataclass(frozen=True)
class Problem:
    """A chain of operations with their constants, and argument values that tell it from its neighbours."""

    kind: str
    steps: Steps
    meaning: str
    values: tuple[Any, ...]

    def tests(self, name: str) -> Tests:
        """The hidden tests of a function called `name`."""
        return Tests(
            assertions=tuple(f"assert {name}({value!r}) == {_run(self.steps, value)!r}" for value in self.values),
            entry_points=(name,),
        )


@dataclass(frozen=True)
class Function:
    """A problem in words and code: the text of its docstring, and one of its right answers."""

    name: str
    argument: str
    documentation: str
    body: str

    @property
    def prompt(self) -> str:
        return f'def {self.name}({self.argument}):\n    """{self.documentation}"""\n'


def read_examples() -> list[Example]:
    """All examples, with origin "meaning::number"."""
    examples = []
    for split, count in PROBLEMS.items():
        for problem in problems(split, count):
            for number in range(TRAIN_EXAMPLES_PER_PROBLEM if split == "train" else 1):
                function = write(problem, Draws("mini_functions", problem.meaning, str(number)))
                origin = f"{problem.meaning}::{number}"
                examples.append(Example(function.prompt, function.body, origin, problem.tests(function.name)))
    return examples


def problems(split: str, count: int) -> Iterator[Problem]:
    """Yield the first `count` problems of a split, all of different meaning."""
    seen: set[str] = set()
    draws = Draws("mini_functions", split)
    while len(seen) < count:
        kind, steps = _draw_chain(draws)
        meaning = _meaning(kind, steps)
        values = (
            _distinguishing_values(kind, steps, meaning)
            if split_of(meaning, percent=MEANINGS_PERCENT) == split
            else None
        )
        if values and meaning not in seen:
            seen.add(meaning)
            yield Problem(kind, steps, meaning, values)


def write(problem: Problem, draws: Draws) -> Function:
    """Say and write a problem: names, words and style are drawn."""
    return _write(problem.kind, problem.steps, draws)


def write_plain(draws: Draws, lengths: Sequence[int]) -> Function:
    """A chain of the training split, said in the first wording of each operation."""
    while True:
        kind, steps = _draw_chain(draws, lengths)
        if split_of(_meaning(kind, steps), percent=MEANINGS_PERCENT) == "train":
            return _write(kind, steps, draws, n_wordings=1)


def _write(kind: str, steps: Steps, draws: Draws, n_wordings: int | None = None) -> Function:
    argument = draws.pick(KINDS[kind].arguments)
    words = [draws.pick(operation.wordings[:n_wordings]).format(k=k) for operation, k in steps]
    documentation = draws.pick(JOINTS).join(words) + "."
    expressions = [draws.pick(operation.expressions).replace("{k}", str(k)) for operation, k in steps]
    write_body = draws.pick((_one_expression, _statements, _statements))
    return Function(draws.pick(NAMES), argument, documentation, write_body(argument, expressions, draws))


def _meaning(kind: str, steps: Steps) -> str:
    return f"{kind}: " + ", ".join(operation.wordings[0].format(k=k) for operation, k in steps)


def _draw_chain(draws: Draws, lengths: Sequence[int] = LENGTHS) -> tuple[str, Steps]:
    name = draws.pick(KINDS_DRAWN)
    kind = KINDS[name]
    chain = draws.sample(kind.operations, draws.pick(lengths))
    if kind.last and draws.chance(0.3):
        chain = [*chain[:2], draws.pick(kind.last)]
    return name, tuple((operation, draws.between(*operation.constants or (0, 0))) for operation in chain)


def _distinguishing_values(kind: str, steps: Steps, meaning: str) -> tuple[Any, ...] | None:
    """Values on which all neighbours of the chain differ from it; None where none are found."""
    draws = Draws("values", meaning)
    for _ in range(3):
        values = tuple(KINDS[kind].draw_value(draws) for _ in range(N_TESTS))
        results = [_run(steps, value) for value in values]
        if all([_run(other, value) for value in values] != results for other in _neighbours(steps)):
            return values
    return None


def _neighbours(steps: Steps) -> Iterator[Steps]:
    """The empty chain, and the chains without one operation or with a constant one smaller or larger."""
    yield ()
    for index, (operation, k) in enumerate(steps):
        before, after = steps[:index], steps[index + 1 :]
        yield before + after
        if operation.constants:
            yield from ((*before, (operation, changed), *after) for changed in (k - 1, k + 1) if changed)


def _run(steps: Steps, value: Any) -> Any:
    for operation, k in steps:
        value = operation.apply(value, k)
    return value


def _one_expression(argument: str, expressions: list[str], draws: Draws) -> str:
    """One return statement, with parentheses where they are needed."""
    value = argument
    for expression in expressions:
        before, _, after = expression.partition("{v}")
        is_enclosed = before.endswith(("(", ", ", " in ")) and after.startswith((")", ",", "]", " if "))
        if not is_enclosed and isinstance(ast.parse(value, mode="eval").body, ast.BinOp | ast.UnaryOp):
            value = f"({value})"
        value = before + value + after
    return f"    return {value}\n"


def _statements(argument: str, expressions: list[str], draws: Draws) -> str:
    """One statement per operation; the last one may be part of the return statement."""
    target = draws.pick((argument, argument, "result", "out"))
    lines, value = [], argument
    for expression in expressions:
        lines.append(f"{target} = {expression.replace('{v}', value)}")
        value = target
    if draws.chance(0.5):
        lines[-1] = "return " + lines[-1].removeprefix(f"{target} = ")
    else:
        lines.append(f"return {target}")
    return "".join(f"    {line}\n" for line in lines)
