"""Finds a piece of a program by its shape, and puts another piece in its place.

A pattern is Python, in which some things stand for others:

    A … Z   any expression, the same one wherever the letter stands again; `_` any expression, told apart each time
    ...     any further arguments, elements or statements

    replace(source, "Sampler.draw", "A - B", "B - A")               swaps the operands of the one difference in `draw`
    replace(source, "step", "zero_grad(...)", "pass")               leaves a call out
    replace(source, "step", "if _: ...", "if False: ...")           never takes the branch
    replace(source, "step", "clip(A, ..., scale=_)", "clip(A, ..., scale=1.0)")

So neither a new name of a local variable nor another layout of the lines changes what a pattern finds.
"""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

ANY, LETTER = "_", re.compile("[A-Z]")
UNSEEN = ("ctx", "kind", "type_comment", "type_params")  # fields that a reader of the program does not see
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
SCOPES = (*FUNCTIONS, ast.ClassDef)


class CannotPlant(Exception):
    """The program no longer has the place that a bug names."""


@dataclass
class Found:
    """What stands for the letters and, in their order, for each `...` of a pattern."""

    letters: dict[str, ast.AST] = field(default_factory=dict)
    rests: list[list[ast.AST]] = field(default_factory=list)

    def take(self, other: Found) -> bool:
        self.letters, self.rests = other.letters, other.rests
        return True

    def copy(self) -> Found:
        return Found(dict(self.letters), list(self.rests))


# --- finding --------------------------------------------------------------------------------------------------------


def is_rest(node: Any) -> bool:
    node = node.value if isinstance(node, ast.Expr) else node
    return isinstance(node, ast.Constant) and node.value is ...


def same(one: ast.AST, other: ast.AST) -> bool:
    return match(one, other, None)


def match(pattern: Any, node: Any, found: Found | None) -> bool:
    """Whether `node` has the shape of `pattern`; `found` learns what stands for what (None: letters are plain names)."""
    if isinstance(pattern, list):
        return isinstance(node, list) and match_all(pattern, node, found)
    if not isinstance(pattern, ast.AST):
        return type(pattern) is type(node) and pattern == node
    if found is not None and isinstance(pattern, ast.Name) and isinstance(node, ast.expr):
        if pattern.id == ANY:
            return True
        if LETTER.fullmatch(pattern.id):
            return same(found.letters.setdefault(pattern.id, node), node)
    if type(pattern) is not type(node):
        return False
    if found is not None and isinstance(pattern, ast.Call) and isinstance(node, ast.Call):
        return match_call(pattern, node, found)
    return all(
        match(value, getattr(node, name, None), found) for name, value in ast.iter_fields(pattern) if name not in UNSEEN
    )


def match_all(patterns: Sequence[Any], nodes: Sequence[Any], found: Found | None) -> bool:
    if not patterns:
        return not nodes
    if found is None or not is_rest(patterns[0]):
        return bool(nodes) and match(patterns[0], nodes[0], found) and match_all(patterns[1:], nodes[1:], found)
    for count in range(len(nodes) + 1):
        trial = found.copy()
        trial.rests.append(list(nodes[:count]))
        if match_all(patterns[1:], nodes[count:], trial):
            return found.take(trial)
    return False


def match_call(pattern: ast.Call, node: ast.Call, found: Found) -> bool:
    """Keywords come in any order, and `...` stands for those that are not named too."""
    if not match(pattern.func, node.func, found) or not match_all(pattern.args, node.args, found):
        return False
    left = list(node.keywords)
    for wanted in pattern.keywords:
        given = next((keyword for keyword in left if keyword.arg == wanted.arg), None)
        if given is None or not match(wanted.value, given.value, found):
            return False
        left.remove(given)
    if any(map(is_rest, pattern.args)):
        found.rests[-1] = [*found.rests[-1], *left]
        return True
    return not left


def slots(node: ast.AST) -> Iterator[tuple[Any, Any]]:
    """(holder, key) of all that lies below a node, but for the inside of the functions of a module or class."""
    for name, value in ast.iter_fields(node):
        holder: Any = value if isinstance(value, list) else vars(node)
        keys = range(len(value)) if isinstance(value, list) else (name,)
        for key in keys:
            if isinstance(child := holder[key], ast.AST):
                yield holder, key
                if not (isinstance(node, ast.Module | ast.ClassDef) and isinstance(child, SCOPES)):
                    yield from slots(child)


def scope(tree: ast.Module, name: str) -> ast.AST:
    """The function or class with this qualified name, the module for ""."""
    here: ast.AST = tree
    for part in filter(None, name.split(".")):
        below = [holder[key] for holder, key in slots(here)]
        found = [node for node in below if isinstance(node, SCOPES) and node.name == part]
        if len(found) != 1:
            raise CannotPlant(f"{len(found)} functions or classes, not one, are called {name}")
        here = found[0]
    return here


# --- putting in its place -------------------------------------------------------------------------------------------


class Filled(ast.NodeTransformer):
    """A replacement with what was found."""

    def __init__(self, found: Found) -> None:
        self.letters, self.rests = found.letters, iter(found.rests)

    def visit(self, node: ast.AST) -> Any:
        if is_rest(node):
            if (rest := next(self.rests, None)) is None:
                raise CannotPlant("the pattern has fewer `...` than the replacement")
            return copy.deepcopy(rest)
        if isinstance(node, ast.Name) and LETTER.fullmatch(node.id):
            if node.id not in self.letters:
                raise CannotPlant(f"the pattern does not say what {node.id} is")
            return copy.deepcopy(self.letters[node.id])
        self.generic_visit(node)
        if isinstance(node, ast.Call):  # a rest may have brought keywords
            node.keywords = [*(k for k in node.args if isinstance(k, ast.keyword)), *node.keywords]
            node.args = [argument for argument in node.args if not isinstance(argument, ast.keyword)]
        return node


def parsed(text: str) -> tuple[list[ast.stmt], bool]:
    """Its statements, and whether it is one expression."""
    try:
        body = ast.parse(text).body
    except SyntaxError as error:
        raise CannotPlant(f"{text!r} is no Python: {error}") from None
    return body, len(body) == 1 and isinstance(body[0], ast.Expr)


def pieces(root: ast.AST, wanted: list[Any], known: Found) -> Iterator[tuple[Any, Any, Found]]:
    """(holder, key or slice, what was found) of all that has this shape."""
    for holder, key in slots(root):
        place = slice(key, key + len(wanted)) if isinstance(holder, list) else key
        piece = holder[place] if isinstance(holder, list) else [holder[place]]
        if match_all(wanted, piece, found := known.copy()):
            yield holder, place, found


def replace(source: str, where: str, pattern: str, replacement: str, nth: int | None = None, given: str = "") -> str:
    """The program with the one piece of `where` that has the pattern's shape replaced, or with its nth (from 0).

    `given` is another pattern, found once in `where`, that tells what the letters in it stand for.
    """
    tree = ast.parse(source)
    root = scope(tree, where)
    (old, is_value), (new, by_value) = parsed(pattern), parsed(replacement)
    values = is_value and by_value
    known = Found()
    if given:
        found = list(pieces(root, values_of(parsed(given)[0]), known))
        if len(found) != 1:
            raise CannotPlant(f"{where or 'the module'} has {len(found)} pieces like `{given}`, not one")
        known = Found(found[0][2].letters)
    found = list(pieces(root, values_of(old) if values else old, known))
    if nth is None and len(found) != 1 or nth is not None and nth >= len(found):
        wanted = "one" if nth is None else f"{nth + 1} or more"
        raise CannotPlant(f"{where or 'the module'} has {len(found)} pieces like `{pattern}`, not {wanted}")
    holder, place, known = found[nth or 0]
    filled = Filled(known).visit(ast.Module(copy.deepcopy(new), [])).body
    filled = values_of(filled) if values else filled
    holder[place] = filled if isinstance(holder, list) else filled[0]
    if holder == []:
        holder.append(ast.Pass())
    planted = ast.unparse(ast.fix_missing_locations(tree))
    if same(ast.parse(planted), ast.parse(source)):
        raise CannotPlant(f"`{replacement}` changes nothing")
    return planted


def values_of(body: list[ast.stmt]) -> list[Any]:
    return [part.value if isinstance(part, ast.Expr) else part for part in body]
