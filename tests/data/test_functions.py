"""Extraction of functions from source by `ebft_study.data.functions`."""

from __future__ import annotations

import ast
import inspect
import textwrap

import pytest

from ebft_study.data import functions
from ebft_study.data.functions import function_pairs, normalize

SOURCE = '''
import os

class Shape:
    """A shape."""

    @property
    def area(
        self, scale: float = 1.0
    ) -> float:
        """Area of the shape.

        Second paragraph that prompts leave out.
        """
        # The factor is squared: it scales lengths.
        return self.side ** 2 * scale ** 2  # trailing


async def fetch(url):
    """Fetch
    a page."""
    text = """
    literal
    """
    return text
'''


def test_a_method_is_dedented_and_continues_after_its_first_paragraph():
    pairs = {name: (prompt, answer) for name, prompt, answer in function_pairs(SOURCE)}
    prompt, answer = pairs["Shape.area"]
    assert prompt == 'def area(\n    self, scale: float = 1.0\n) -> float:\n    """Area of the shape."""\n'
    assert (
        answer
        == "    # The factor is squared: it scales lengths.\n    return self.side ** 2 * scale ** 2  # trailing\n"
    )


def test_async_functions_and_multi_line_paragraphs_are_kept():
    pairs = {name: prompt for name, prompt, _ in function_pairs(SOURCE)}
    assert pairs["fetch"] == 'async def fetch(url):\n    """Fetch\n    a page."""\n'


# The bodies of functions that nobody has written yet are the input here.
@pytest.mark.parametrize(
    "body",
    ["", "    pass\n", "    ...\n", "    raise NotImplementedError\n", "    raise NotImplementedError('later')\n"],
)
def test_bodies_that_do_nothing_are_left_out(body):
    assert list(function_pairs(f'def f():\n    """Do it."""\n{body}')) == []


@pytest.mark.parametrize(
    "source",
    [
        "def f():\n    return 1\n",  # no docstring
        'def f(): """Do it."""; return 1\n',  # not on lines of its own
        'def f():\n    """A \\\\ backslash."""\n    return 1\n',  # would need escaping
        'class A:\n\tdef f(self):\n\t\t"""Tabs."""\n\t\treturn 1\n',  # dedented by columns, a tab is not one
        'class A:\n    def f(self):\n        """Text."""\n        return """\n  """\n',  # a string left of the body
        'def f(:\n    """Broken."""\n',
        'x = "\0"\n"""doc"""',
    ],
)
def test_what_cannot_be_cut_cleanly_is_left_out(source):
    assert list(function_pairs(source)) == []


def test_a_function_indented_with_a_tab_stays_so():
    (pair,) = function_pairs('def f():\n\t"""Sum."""\n\treturn (1 +\n2)\n')
    assert pair == ("f", 'def f():\n\t"""Sum."""\n', "\treturn (1 +\n2)\n")


def test_invalid_escapes_in_other_peoples_strings_raise_no_warning():
    pairs = list(function_pairs('def f():\n    """Do it."""\n    return "\\d"\n'))
    assert len(pairs) == 1


def test_pairs_of_real_modules_are_valid_python_with_the_original_body():
    """The pair parses, and its body is the original function's body without the docstring."""
    for module in (textwrap, inspect, ast, functions):
        source = inspect.getsource(module)
        originals = {}
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                originals.setdefault(node.name, []).append([ast.dump(statement) for statement in node.body[1:]])
        pairs = list(function_pairs(source))
        assert pairs
        for name, prompt, answer in pairs:
            (parsed,) = ast.parse(prompt + answer).body
            assert [ast.dump(statement) for statement in parsed.body[1:]] in originals[name.split(".")[-1]]
            assert prompt.endswith('"""\n')
            assert ast.get_docstring(parsed)


def test_normalized_bodies_are_equal_when_only_comments_spacing_and_literals_differ():
    first = "    x = compute(1, 'a')  # one\n    return x\n"
    second = '    # two\n    x = compute( 20,\n        "bb")\n    return x\n'
    assert normalize(first) == normalize(second)
    assert normalize(first) != normalize(first.replace("compute", "other"))
