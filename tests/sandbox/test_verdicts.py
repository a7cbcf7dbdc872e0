"""Verdicts on programs that are not hostile: each reason, each kind of tests, and the same as plain execution."""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator

import pytest

from ebft_study.sandbox import Limits, Program, Sandbox, Tests, Verdict

LIMITS = Limits(cpu_seconds=0.5, wall_seconds=120.0, memory_bytes=256 << 20)
"""Wall time is loose: what these verdicts depend on is not how busy the machine is."""


@pytest.fixture(scope="module")
def sandbox(level: str) -> Iterator[Sandbox]:
    with Sandbox(level=level, limits=LIMITS) as sandbox:
        yield sandbox


def judge(sandbox: Sandbox, code: str, *assertions: str, setup: str = "", names: tuple[str, ...] = ("f",)) -> Verdict:
    tests = Tests(assertions=assertions, entry_points=names, setup=setup)
    return sandbox.judge([Program(code, tests)])[0]


def run(sandbox: Sandbox, code: str, *pairs: tuple[str, str]) -> Verdict:
    return sandbox.judge([Program(code, Tests(stdin_stdout=pairs))])[0]


def test_all_tests_run_and_the_first_failure_is_the_reason(sandbox: Sandbox) -> None:
    code = "def f(n):\n    if n == 4: raise ValueError('four')\n    return n if n != 2 else -1"
    verdict = judge(sandbox, code, *(f"assert f({n}) == {n}" for n in range(6)))
    assert (verdict.reason, verdict.tests_passed, verdict.tests) == ("failed: test 3", 4, 6)
    assert judge(sandbox, code, "assert f(1) == 1", "assert f(3) == 3").reason == "passed"


REASONS = {
    "passed": "def f(n): return n",
    "failed: test 1": "def f(n): return -n",
    "error: f is not defined": "g = 1",
    "error: SyntaxError: '(' was never closed (<program>, line 1)": "def f(n:",
    "error: ZeroDivisionError: division by zero": "1 / 0\ndef f(n): return n",
    "error: ModuleNotFoundError: No module named 'numpy'": "import numpy\ndef f(n): return n",
    "error: SystemExit: 0": "raise SystemExit",
    "error: the program ended (exit status 7)": "import os\ndef f(n): os._exit(7)",
    "error: the program ended (SIGSEGV)": "import ctypes\ndef f(n): ctypes.string_at(0)",
    "timeout": "def f(n):\n while True: pass",
    "memory": "def f(n): return bytearray(1 << 30)",
    "refused: the program has NUL bytes": "def f(n): return n\0",
    "refused: the program is no valid Unicode": "def f(n): return '\udc80'",
    "refused: the program has more than 1048576 bytes": "def f(n): return n\n" + "#" * (1 << 20),
}


@pytest.mark.parametrize("reason", REASONS)
def test_the_reason_of_a_verdict(reason: str, sandbox: Sandbox) -> None:
    verdict = judge(sandbox, REASONS[reason], "assert f(1) == 1")
    assert verdict.reason == reason
    assert verdict.is_judged
    assert verdict.passed == (reason == "passed")
    assert verdict.tests_passed == int(verdict.passed)


def test_what_was_passed_before_the_time_was_up_counts(sandbox: Sandbox) -> None:
    code = "def f(n):\n    while n == 2: pass\n    return n"
    verdict = judge(sandbox, code, *(f"assert f({n}) == {n}" for n in range(5)))
    assert (verdict.reason, verdict.tests_passed, verdict.tests) == ("timeout", 2, 5)


def test_cpu_time_decides_where_wall_time_is_loose(level: str) -> None:
    loop = "def f(n):\n import time\n while time.process_time() < n: pass\n return 1"
    tests = Tests(assertions=("assert f(0.5) == 1",), entry_points=("f",))
    for cpu_seconds, reason in ((0.2, "timeout"), (20.0, "passed")):
        with Sandbox(level=level, limits=Limits(cpu_seconds=cpu_seconds, wall_seconds=300.0)) as sandbox:
            (verdict,) = sandbox.judge([Program(loop, tests)])
        assert verdict.reason == reason
        assert verdict.cpu_seconds >= min(cpu_seconds, 0.5)


def test_wall_time_ends_what_sleeps(level: str) -> None:
    with Sandbox(level=level) as sandbox:
        sandbox.limits = Limits(wall_seconds=0.5)
        verdict = judge(sandbox, "import time\ndef f(n): time.sleep(10**6)", "assert f(1) == 1")
    assert verdict.reason == "timeout"
    assert verdict.cpu_seconds < 1


def test_the_memory_limit_is_the_setting(level: str) -> None:
    code = "def f(n): return len(bytearray(n << 20)) >> 20"
    for memory, passed in ((1 << 30, True), (256 << 20, False)):
        with Sandbox(level=level, limits=Limits(memory_bytes=memory, wall_seconds=120.0)) as sandbox:
            assert judge(sandbox, code, "assert f(400) == 400").passed == passed


@pytest.mark.parametrize(
    ("setup", "assertion", "fault"),
    [
        ("def g(:", "assert f(1) == 1", "sandbox: tests do not compile"),
        ("", "assert f(1) ==", "sandbox: tests do not compile"),
        ("1 / 0", "assert f(1) == 1", "sandbox: setup of the tests fails: ZeroDivisionError"),
        ("import numpy", "assert f(1) == 1", "sandbox: setup of the tests fails: ModuleNotFoundError"),
        ("", "assert 1 == 1", "sandbox: no test calls the program"),
    ],
)
def test_faults_of_the_tests_are_no_judgement(setup: str, assertion: str, fault: str, sandbox: Sandbox) -> None:
    verdict = judge(sandbox, "def f(n): return n", assertion, setup=setup)
    assert verdict.reason.startswith(fault)
    assert not verdict.is_judged
    assert not sandbox.judge([Program("def f(n): return n", Tests())])[0].is_judged


def test_a_program_cannot_blame_the_tests(sandbox: Sandbox) -> None:
    """A setup that fails by what the program does or lacks is the program's failure."""
    for code in ("def f(n): return n", "def f(n): return n\ndef Node(v): raise ValueError(v)"):
        verdict = judge(sandbox, code, "assert f(1) == 1", setup="root = Node(4)")
        assert verdict.reason.startswith("error: setup of the tests: ")


HUMAN_EVAL = '''
def near(a: float, b: float) -> float:
    return abs(a - b) < 1e-6
def f(numbers):
    """The stub of the prompt."""
METADATA = {"author": "x"}
def check(candidate):
    assert near(candidate([1.0, 2.0]), 1.5)
    assert candidate([]) is None
    assert candidate(numbers=(3,)) == 3
'''


def test_tests_like_those_of_human_eval(sandbox: Sandbox) -> None:
    good = "def f(numbers): return sum(numbers) / len(numbers) if numbers else None"
    assert judge(sandbox, good, "check(f)", setup=HUMAN_EVAL).reason == "passed"
    bad = "def f(numbers): return sum(numbers) / (len(numbers) or 1)\ndef near(a, b): return True\ndef check(f): pass"
    assert judge(sandbox, bad, "check(f)", setup=HUMAN_EVAL).reason == "failed: test 1"


def test_names_of_the_tests_and_builtins_never_come_from_the_program(sandbox: Sandbox) -> None:
    code = "def f(n): return 0\ndef len(x): return 7\nabs = len\nclass math: inf = 0\ndef near(a, b): return True"
    for test in ("assert len([f(1)]) == 7", "assert abs(f(1)) == 7", "assert f(1) == math.inf", "assert near(f(1), 9)"):
        assert judge(sandbox, code, test, setup="def near(a, b): return a == b").reason == "failed: test 1"


def test_tests_use_classes_and_several_functions_of_the_program(sandbox: Sandbox) -> None:
    code = """
from __future__ import annotations
import dataclasses, enum
class Color(enum.Enum):
    RED = 1
    BLUE = 2
class Empty:
    def __len__(self): return 0
class Node:
    def __init__(self, value): self.value, self.left = value, None
    def depth(self): return 1 + (self.left.depth() if self.left else 0)
@dataclasses.dataclass
class Pair:
    a: int
def f(node): return node.depth()
def g(n): return Pair(n)
def h(n): raise KeyError(n)
def color(n): return Color(n)
"""
    assertions = (
        "assert f(root) == 2",
        "assert root.left.value == 5",
        "assert g(3).a == 3 and g(3) != 3",
        "assert color(1) == Color.RED and color(1) != Color.BLUE and color(2) in {Color.BLUE}",
        "assert root and not Empty()",
        "try:\n    h(1)\n    assert False\nexcept KeyError:\n    pass",
    )
    verdict = judge(sandbox, code, *assertions, setup="root = Node(4)\nroot.left = Node(5)", names=("f", "g", "h"))
    assert verdict == Verdict("passed", 6, 6, verdict.cpu_seconds)


USEFUL = """
import asyncio, concurrent.futures, functools, hashlib, heapq, json, queue, random, re, select, sqlite3, threading, zlib
async def wait(n):
    await asyncio.sleep(0.001)
    return n
def f(n):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(int, "1234")) == 10
    assert asyncio.run(wait(n)) == n
    assert sqlite3.connect(":memory:").execute("select 1 + 1").fetchone() == (2,)
    assert zlib.decompress(zlib.compress(b"x")) == b"x" and len(hashlib.sha256(b"x").hexdigest()) == 64
    assert sys.getrecursionlimit() > 100 and random.random() < 1
    try: open("/tmp/file", "w")
    except OSError: return n
import sys
"""


def test_a_program_may_use_the_standard_library(level: str) -> None:
    with Sandbox(level=level, limits=Limits(cpu_seconds=30.0, wall_seconds=300.0)) as sandbox:
        assert judge(sandbox, USEFUL, "assert f(3) == 3").reason == "passed"


VALUES = [
    "0",
    "-1",
    "True",
    "None",
    "10**40",
    "-(2**60)",
    "1.5",
    "float('inf')",
    "-0.0",
    "1+2j",
    "'é\\n'",
    "b'\\x00a'",
    "bytearray(b'x')",
    "range(1,9,2)",
    "[]",
    "[[1],(2,)]",
    "(1,'a')",
    "{1,2}",
    "frozenset({3})",
    "{'a':{1:[None]}}",
    "{(1,2):3}",
    "int",
    "dict",
    "[str]",
    "Decimal('1.10')",
    "Fraction(1,3)",
    "deque([1,2])",
    "'\\ud800'",
]


def test_values_arrive_as_they_are(sandbox: Sandbox) -> None:
    setup = "from decimal import Decimal\nfrom fractions import Fraction\nfrom collections import deque"
    tests = [f"x = {value}\nassert f(x) == x and type(f(x)) is type(x)" for value in VALUES]
    verdict = judge(sandbox, "def f(x): return x", *tests, "assert [*f(iter([1, 2]))] == [1, 2]", setup=setup)
    assert verdict.reason == "passed"
    assert judge(sandbox, "def f(x): return float('nan')", "y = f(1)\nassert y != y").passed


SCRIPT = "import sys\nn = int(input())\nprint(sum(map(int, sys.stdin.read().split())) + n)\n"


def test_a_whole_program_is_judged_by_its_output(sandbox: Sandbox) -> None:
    assert run(sandbox, SCRIPT, ("1\n2 3\n", "6"), ("1\n", "1\n")).reason == "passed"
    verdict = run(sandbox, SCRIPT, ("1\n2 3\n", "6"), ("1\n2", "4"), ("0\n", "0"), ("x", "0"))
    assert (verdict.reason, verdict.tests_passed, verdict.tests) == ("failed: test 2", 2, 4)
    assert run(sandbox, "print('a  ')\nprint('b')", ("", "a\nb\n\n")).passed  # trailing whitespace is no difference
    assert run(sandbox, "if __name__ == '__main__': print(1); exit()", ("", "1")).passed
    late = "import atexit, threading, time\natexit.register(print, 2)\nthreading.stack_size(1 << 26)\n"
    late += "threading.Thread(target=lambda: time.sleep(0.05) or print(1)).start()"
    assert run(sandbox, late, ("", "1\n2")).passed


SCRIPT_REASONS = {
    "error: ValueError: no": "raise ValueError('no')",
    "error: SystemExit: 3": "print(1); import sys; sys.exit(3)",
    "error: the program ended (exit status 3)": "import os; os._exit(3)",
    "error: the program ended (SIGSEGV)": "import ctypes; ctypes.string_at(0)",
    "failed: test 1": "print(1); print(2)",
    "timeout": "while True: pass",
    "memory": "x = bytearray(1 << 30)",
    "error: OSError: [Errno 27] File too large": "while True: print('x' * 10**5)",
}


@pytest.mark.parametrize("reason", SCRIPT_REASONS)
def test_the_reason_of_a_whole_programs_verdict(reason: str, sandbox: Sandbox) -> None:
    assert run(sandbox, SCRIPT_REASONS[reason], ("", "1")).reason == reason


def test_a_whole_program_does_not_see_what_it_must_write(sandbox: Sandbox) -> None:
    # The hostile program's own text: it tries every way in, and ignores those that fail.
    code = """
import gc, os, re
for fd in range(64):
    try: print(os.pread(fd, 10**6, 0).decode())
    except OSError: pass
for thing in gc.get_objects():
    try: print(*re.findall(r'9182\\d{5}', str(thing)[:10**5]))
    except Exception: pass
"""
    verdict = run(
        sandbox,
        f"import sys\nsys.stdout.write = (lambda w: lambda s: w(s.strip()))(sys.stdout.write)\n{code}",
        ("", "918273645"),
    )
    assert verdict.reason == "failed: test 1"


def mutated(source: str, random_source: random.Random) -> str:
    """The program with one operator, comparison or constant replaced."""
    tree = ast.parse(source)
    spots = [node for node in ast.walk(tree) if isinstance(node, (ast.BinOp, ast.Compare)) or _is_number(node)]
    node = random_source.choice(spots)
    if isinstance(node, ast.BinOp):
        node.op = random_source.choice([ast.Add(), ast.Sub(), ast.Mult(), ast.FloorDiv(), ast.Mod()])
    elif isinstance(node, ast.Compare):
        node.ops = [random_source.choice([ast.Lt(), ast.LtE(), ast.Eq(), ast.NotEq(), ast.Gt()])]
    elif isinstance(node, ast.Constant):
        node.value = random_source.choice([0, 1, 2, 3, -1])
    return ast.unparse(ast.fix_missing_locations(tree))


def _is_number(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) is int


TASKS = {
    "def f(n):\n a, b = 0, 1\n for _ in range(n): a, b = b, a + b\n return a": "assert [f(0), f(8)] == [0, 21]",
    "def f(x):\n return [v * 2 for v in x if v % 2 == 0]": "assert f([1, 2, 3, 4]) == [4, 8] and f([]) == []",
    "def f(s):\n d = {}\n for c in s: d[c] = d.get(c, 0) + 1\n return d": "assert f('aba') == {'a': 2, 'b': 1}",
    "def f(n):\n return {i * i for i in range(1, n + 1) if i > 2}": "assert f(5) == {9, 16, 25} and f(2) == set()",
    "def f(a, b):\n return (a + b) / 2 if a != b else a": "assert f(1, 2) == 1.5 and f(3, 3) == 3",
}


def test_verdicts_are_those_of_plain_execution(sandbox: Sandbox) -> None:
    random_source = random.Random(7)
    cases = [(mutated(source, random_source), test) for source, test in TASKS.items() for _ in range(12)]
    verdicts = sandbox.judge([Program(code, Tests(assertions=(test,), entry_points=("f",))) for code, test in cases])
    plain = []
    for code, test in cases:
        space: dict = {}
        try:
            exec(code, space)
            exec(test, space)
            plain.append("passed")
        except Exception:
            plain.append("failed: test 1")
    assert [verdict.reason for verdict in verdicts] == plain
    assert 5 < plain.count("passed") < len(plain) - 5
