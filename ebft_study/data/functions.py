"""Extracts functions from Python source as pairs: signature and docstring, and the body."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef

_LITERAL = re.compile(r"'[^'\n]*'|\"[^\"\n]*\"|\b\d[\w.]*")
_COMMENT = re.compile(r"#.*")


def function_pairs(source: str) -> Iterator[tuple[str, str, str]]:
    """Yield (qualified name, prompt, answer) of each function with a docstring and a real body, in source order.

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
        pair = _extract(node, lines)
        if pair is not None:
            yield name, *pair


def normalize(body: str) -> str:
    """Remove comments, spacing and values of literals: copies that differ only in these become equal."""
    return "".join(_LITERAL.sub("0", _COMMENT.sub("", body)).split())


def _functions(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, FunctionNode]]:
    """Functions of modules and classes; nested ones are part of their parent's body."""
    for node in body:
        if isinstance(node, FunctionNode):
            yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node.body, f"{prefix}{node.name}.")


def _extract(node: FunctionNode, lines: list[str]) -> tuple[str, str] | None:
    """Prompt and answer of a function; None where it cannot be cut cleanly at line boundaries."""
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
    """Remove the first `width` spaces of each line; None where a line does not start with them."""
    if any(line[:width].strip(" ") for line in lines):
        return None
    return "\n".join(line[width:].rstrip() for line in lines)


def _does_something(body: list[ast.stmt]) -> bool:
    """Whether a body is more than `pass`, `...`, or raising NotImplementedError."""
    match body:
        case [] | [ast.Pass()] | [ast.Expr(value=ast.Constant())]:
            return False
        case [ast.Raise() as statement]:
            return "NotImplemented" not in ast.dump(statement)
    return True
