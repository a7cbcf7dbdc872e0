"""Cuts functions out of Python source: signature and docstring on one side, the body on the other."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef

_LITERAL = re.compile(r"'[^'\n]*'|\"[^\"\n]*\"|\b\d[\w.]*")
_COMMENT = re.compile(r"#.*")


def function_pairs(source: str) -> Iterator[tuple[str, str, str]]:
    """(qualified name, prompt, answer) of each function with a docstring and a real body, in source order.

    The prompt is the `def` and the docstring's first paragraph, dedented to column 0 and ending with a newline; the
    answer is the rest, indented to continue it: `prompt + answer` is valid Python. Source that does not parse yields
    nothing.
    """
    if '"""' not in source and "'''" not in source:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    lines = source.split("\n")
    for name, node in _functions(tree.body, ""):
        pair = _cut(node, lines)
        if pair is not None:
            yield name, *pair


def normalised(body: str) -> str:
    """A body without comments, spacing and the values of literals: equal for copies that differ only in those."""
    return "".join(_LITERAL.sub("0", _COMMENT.sub("", body)).split())


def _functions(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, FunctionNode]]:
    """Functions of modules and classes; nested ones are part of their parent's body."""
    for node in body:
        if isinstance(node, FunctionNode):
            yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node.body, f"{prefix}{node.name}.")


def _cut(node: FunctionNode, lines: list[str]) -> tuple[str, str] | None:
    documentation = ast.get_docstring(node, clean=True)
    rest = node.body[1:]
    if not documentation or not _does_something(rest):
        return None
    docstring = node.body[0]
    assert docstring.end_lineno is not None  # set by ast.parse
    assert node.end_lineno is not None
    own_lines = docstring.lineno > node.lineno and rest[0].lineno > docstring.end_lineno
    paragraph = documentation.split("\n\n")[0].strip()
    if not own_lines or '"""' in paragraph or "\\" in paragraph or not paragraph or paragraph[-1] == '"':
        return None
    signature = _dedent(lines[node.lineno - 1 : docstring.lineno - 1], node.col_offset)
    body = _dedent(lines[docstring.end_lineno : node.end_lineno], node.col_offset)
    if signature is None or body is None:
        return None
    indent = lines[docstring.lineno - 1][node.col_offset : docstring.col_offset]  # spaces, or a tab
    text = "\n".join(indent + line if line else "" for line in f'"""{paragraph}"""'.split("\n"))
    return f"{signature}\n{text}\n", body.strip("\n") + "\n"


def _dedent(lines: list[str], width: int) -> str | None:
    """Lines without their first `width` spaces; None where a line does not start with them."""
    if any(line[:width].strip(" ") for line in lines):
        return None
    return "\n".join(line[width:].rstrip() for line in lines)


def _does_something(body: list[ast.stmt]) -> bool:
    """Whether a body is more than `pass`, `...`, or raising NotImplementedError."""
    if not body:
        return False
    first = body[0]
    if len(body) > 1:
        return True
    if isinstance(first, ast.Raise):
        return "NotImplemented" not in ast.dump(first)
    return not isinstance(first, ast.Pass) and not (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    )
