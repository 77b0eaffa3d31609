"""The messages of errors, as the code has them."""

import ast
from collections.abc import Iterator

from tests.project import ROOT

FOLDERS = ("megatron_dion", "tools")
ANYTHING = "…"
# What makes a library's objection one of ours, with some words before it.
CONTEXT = "in_one_line"
# Whose names do not end with Error.
OTHERS = ("NothingToLoad", "refuse", CONTEXT)


def raised_messages(names: tuple[str, ...] | None = None) -> set[str]:
    """Returns the messages of all errors that the code makes, or of those with certain names.

    What is put into a message at run time, such as a value, is an ellipsis in it.
    """
    return {
        _template(call.args[0]) + (f": {ANYTHING}" if name == CONTEXT else "")
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name, call in _errors(ast.parse(path.read_text(encoding="utf-8")), names)
    }


def _errors(tree: ast.AST, names: tuple[str, ...] | None) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id=name), args=[_, *_]):
                if name in names if names else name.endswith("Error") or name in OTHERS:
                    yield name, node


def _template(message: ast.expr) -> str:
    match message:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(map(_template, values))
        case _:
            return ANYTHING
