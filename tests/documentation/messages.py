"""The messages of errors, as the code has them."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "megatron_dion"
ANYTHING = "…"


# What makes a library's objection one of ours, with some words before it.
CONTEXT = "in_one_line"
# Whose names do not end with Error.
OTHER_ERRORS = ("NothingToLoad", CONTEXT, "refuse")


def raised_messages(names: tuple[str, ...] | None = None) -> set[str]:
    """The messages of all errors that the package makes, or of those with certain names.

    What a message is told at run time, such as a value, is an ellipsis in it.
    """
    return {
        _template(call.args[0]) + (f": {ANYTHING}" if name == CONTEXT else "")
        for path in sorted(PACKAGE.rglob("*.py"))
        for name, call in _errors(ast.parse(path.read_text(encoding="utf-8")), names)
    }


def _errors(tree: ast.AST, names: tuple[str, ...] | None) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id=name), args=[_, *_]):
                if name in names if names else name.endswith("Error") or name in OTHER_ERRORS:
                    yield name, node


def _template(message: ast.expr) -> str:
    match message:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(map(_template, values))
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _template(left) + _template(right)
        case _:
            return ANYTHING
