"""Keeps the house of docs/design.md: who imports whom, how long things are, and what no text may name.

Every rule is a function from a file's name and text to complaints, so that it can be shown a planted bad file.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

from tests.conftest import LONGEST_FIRST

ROOT = Path(__file__).parent.parent
OURS = ("rlhf", "stages", "launch", "reward_data", "configs", "benchmarks")

LAYERS = (  # a package imports its own layer and the ones before it
    {"rlhf.errors", "rlhf.config", "rlhf.hub", "rlhf.user_code", "rlhf.algorithms", "reward_data", "configs"},
    {"rlhf.chat", "rlhf.kernels", "rlhf.planning", "rlhf.profiling"},
    {"rlhf.data"},
    {"rlhf.distributed"},
    {"rlhf.models"},
    {"rlhf.generation", "rlhf.tracking", "rlhf.runs"},
    {"rlhf.rewards", "rlhf.evaluation", "rlhf.serving"},
    {"rlhf.api"},
    {"rlhf.ppo"},
    {"rlhf"},  # rlhf/__init__.py, the public names
    {"stages"},
    {"launch"},
    {"benchmarks"},
)
ALONE = ("reward_data", "rlhf.algorithms")  # rooms that import nothing of ours
OWNERS = {  # the one room that may speak to a library
    "ray": "launch/",
    "deepspeed": "rlhf/distributed/",
    "mlflow": "rlhf/tracking/",
    "vllm": "rlhf/generation/vllm",
}
WITHOUT_TORCH = ("rlhf.errors", "rlhf.config", "rlhf.hub", "rlhf.planning", "reward_data")
TORCH = {"torch", "transformers", "trl", "peft", "deepspeed"}
HEAVY = TORCH | {"datasets", "ray", "mlflow"}
LONGEST_FUNCTION, LONGEST_FILE, MOST_ARGUMENTS = 50, 400, 7

FOREIGN = (
    (re.compile(r"(?<![\w.:~$}>-])/(?:root|home|work|opt|mnt|Users)/\w"), "an absolute path of one machine"),
    (re.compile(r"(?:index-url|find-links)[= ]+\S*://|/whl/(?:cpu|cu\d)"), "a package index by address"),
)


parse = lru_cache(maxsize=None)(ast.parse)  # every rule reads every file


def imports(name: str, tree: ast.Module) -> list[tuple[int, str]]:
    """(line, dotted name) of everything a file imports; `from a import b` counts as a.b."""
    package = name.removesuffix(".py").split("/")[:-1]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            found += [(node.lineno, ".".join([*base, alias.name])) for alias in node.names]
    return found


def room(dotted: str) -> str:
    """rlhf.algorithms.masked.whiten → rlhf.algorithms, stages.ppo.main → stages."""
    parts = dotted.split(".")
    return ".".join(parts[:2]) if parts[0] == "rlhf" else parts[0]


def room_of_file(name: str) -> str:
    return room(name.removesuffix(".py").removesuffix("/__init__").replace("/", "."))


def layer(of: str) -> int | None:
    return next((number for number, rooms in enumerate(LAYERS) if of in rooms), None)


def wrong_directions(name: str, text: str) -> list[str]:
    here = room_of_file(name)
    height = layer(here)
    if height is None:
        return [f"{name}: {here} has no layer: give it one in LAYERS"]
    complaints = []
    for line, target in imports(name, parse(text)):
        there = room(target)
        if there == here or target.split(".")[0] not in OURS:
            continue
        if here in ALONE or (layer(there) or 0) > height:
            complaints.append(f"{name}:{line}: {here} imports {there}")
    return complaints


def borrowed_libraries(name: str, text: str) -> list[str]:
    found = imports(name, parse(text))
    complaints = [
        f"{name}:{line}: {target} belongs in {OWNERS[top]}"
        for line, target in found
        if (top := target.split(".")[0]) in OWNERS and not name.startswith(OWNERS[top])
    ]
    if (here := room_of_file(name)) in WITHOUT_TORCH:
        complaints += [
            f"{name}:{line}: {here} does without torch" for line, target in found if target.split(".")[0] in TORCH
        ]
    return complaints


def functions(text: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def too_long(name: str, text: str) -> list[str]:
    lines = text.count("\n")
    complaints = [f"{name}: {lines} lines"] if lines > LONGEST_FILE else []
    for node in functions(text):
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if length > LONGEST_FUNCTION:
            complaints.append(f"{name}:{node.lineno}: {node.name} has {length} lines")
    return complaints


def too_many_arguments(name: str, text: str) -> list[str]:
    """`self`, `cls` and the `ctx` of autograd do not count."""
    complaints = []
    for node in functions(text):
        own = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        count = len([argument for argument in own if argument.arg not in ("self", "cls", "ctx")])
        count += (node.args.vararg is not None) + (node.args.kwarg is not None)
        if count > MOST_ARGUMENTS:
            complaints.append(f"{name}:{node.lineno}: {node.name} takes {count} arguments")
    return complaints


def foreign_text(name: str, text: str) -> list[str]:
    return [
        f"{name}:{number}: {what}"
        for number, line in enumerate(text.splitlines(), 1)
        for pattern, what in FOREIGN
        if pattern.search(line)
    ]


def asserts_nothing(name: str, text: str) -> list[str]:
    """A test that neither asserts, nor expects an error, nor calls a helper that does."""
    return [
        f"{name}:{node.lineno}: {node.name} asserts nothing"
        for node in ast.walk(parse(text))
        if isinstance(node, ast.FunctionDef)
        and node.name.startswith("test_")
        and not re.search(r"Assert\(|'raises'|'(?:assert_|check|expect)\w*'", ast.dump(node))
    ]


def trusts_code(name: str, text: str) -> list[str]:
    """The code that a model brings is never run."""
    return [
        f"{name}:{node.value.lineno}: trust_remote_code must be False"
        for node in ast.walk(parse(text))
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code"
        if not (isinstance(node.value, ast.Constant) and node.value.value is False)
    ]


def tracked_files() -> list[str]:
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    if listing.returncode:
        return [p.relative_to(ROOT).as_posix() for top in (*OURS, "tests") for p in (ROOT / top).rglob("*.py")]
    return [name for name in listing.stdout.splitlines() if (ROOT / name).is_file()]


def read(name: str) -> str | None:
    try:
        return (ROOT / name).read_text(encoding="utf-8")
    except UnicodeDecodeError:  # a picture, a compressed file
        return None


FILES = tracked_files()
TEXTS = {name: text for name in FILES if (text := read(name)) is not None}
LIBRARY = {name: text for name, text in TEXTS.items() if name.endswith(".py") and name.startswith(OURS)}
TESTS = {name: text for name, text in TEXTS.items() if name.endswith(".py") and name.startswith("tests/")}

RULES = {
    "directions": (wrong_directions, LIBRARY),
    "libraries": (borrowed_libraries, LIBRARY),
    "lengths": (too_long, LIBRARY | TESTS),
    "arguments": (too_many_arguments, LIBRARY),
    "foreign text": (foreign_text, TEXTS),
    "tests assert": (asserts_nothing, TESTS),
    "no code of models": (trusts_code, LIBRARY | TESTS),
}


@pytest.mark.parametrize("rule", RULES)
def test_the_tree_keeps_the_rule(rule: str) -> None:
    check, files = RULES[rule]
    assert files
    complaints = [complaint for name, text in files.items() for complaint in check(name, text)]
    assert not complaints, "\n".join(complaints)


LONG_FUNCTION = "def f():\n" + "    pass\n" * LONGEST_FUNCTION


@pytest.mark.parametrize(
    ("check", "name", "text"),
    [
        (wrong_directions, "rlhf/chat/llama2.py", "import stages.ppo"),
        (wrong_directions, "rlhf/models/tiny.py", "from rlhf.generation import Sampler"),
        (wrong_directions, "rlhf/data/loading.py", "def f():\n    from rlhf.distributed.engine import Engine"),
        (wrong_directions, "stages/ppo.py", "from launch import worker_group"),
        (wrong_directions, "reward_data/load.py", "from rlhf.errors import UserError"),
        (wrong_directions, "rlhf/algorithms/kl.py", "import rlhf.config"),
        (wrong_directions, "rlhf/new_room.py", ""),
        (borrowed_libraries, "stages/ppo.py", "import ray.train"),
        (borrowed_libraries, "rlhf/models/lora.py", "from deepspeed import zero"),
        (borrowed_libraries, "launch/pipeline.py", "import mlflow"),
        (borrowed_libraries, "rlhf/config/run.py", "import torch"),
        (borrowed_libraries, "reward_data/load.py", "def f():\n    from transformers import AutoModel"),
        (too_long, "rlhf/chat/llama2.py", LONG_FUNCTION),
        (too_long, "rlhf/chat/llama2.py", "#\n" * (LONGEST_FILE + 1)),
        (too_many_arguments, "rlhf/chat/llama2.py", "def f(a, b, c, d, e, f, *, g, h): pass"),
        (too_many_arguments, "rlhf/chat/llama2.py", "class A:\n    def f(self, a, b, c, d, e, f, g, **h): pass"),
        (foreign_text, "README.md", "see " + "/ho" + "me/me/models"),
        (foreign_text, "Makefile", "pip install --index-url " + "https:" + "//example.org"),
        (asserts_nothing, "tests/test_x.py", "def test_x():\n    f()"),
        (trusts_code, "rlhf/models/tiny.py", "AutoModel.from_pretrained(folder, trust_remote_code=trusted)"),
    ],
)
def test_a_planted_fault_is_found(check, name: str, text: str) -> None:
    assert len(check(name, text)) == 1


@pytest.mark.parametrize(
    ("check", "name", "text"),
    [
        (wrong_directions, "stages/ppo.py", "from rlhf import engine\nimport rlhf.config, torch, stages.sft"),
        (wrong_directions, "rlhf/algorithms/losses.py", "from rlhf.algorithms.masked import masked_sum"),
        (borrowed_libraries, "launch/worker_group.py", "import ray"),
        (too_long, "rlhf/chat/llama2.py", LONG_FUNCTION.replace("    pass\n", "", 1)),
        (too_many_arguments, "rlhf/chat/llama2.py", "class A:\n    def f(self, a, b, c, d, *, e, f, g): pass"),
        (foreign_text, "docs/a.md", "~/work/x and /usr/bin and runs/home/x and $HOME/work/x"),
        (trusts_code, "rlhf/models/tiny.py", "AutoModel.from_pretrained(folder, trust_remote_code=False)"),
        (asserts_nothing, "tests/test_x.py", "def test_x():\n    with pytest.raises(ValueError):\n        f()"),
    ],
)
def test_what_is_allowed_passes(check, name: str, text: str) -> None:
    assert check(name, text) == []


def imported_modules(text_of: dict[str, str]) -> dict[str, set[str]]:
    """Module → modules of ours that it imports when it is itself imported (imports inside functions left out)."""
    modules = {name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): name for name in text_of}
    graph = {}
    for module, name in modules.items():
        tree = ast.parse(text_of[name])
        tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        targets = {target for _, target in imports(name, tree)}
        graph[module] = {m for t in targets for m in (t, t.rpartition(".")[0]) if m in modules and m != module}
    return graph


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that are left when every module without imports is taken away again and again: none, or a knot."""
    left = {module: set(targets) for module, targets in graph.items()}
    while free := {module for module, targets in left.items() if not targets & left.keys()}:
        left = {module: targets for module, targets in left.items() if module not in free}
    return sorted(left)


def test_no_modules_import_each_other_in_a_circle() -> None:
    packages = {name for name in LIBRARY if name.endswith("__init__.py")}  # a package gathers the names of its files
    assert cycle(imported_modules({n: t for n, t in LIBRARY.items() if n not in packages})) == []


def test_a_planted_circle_is_found() -> None:
    texts = {"rlhf/a.py": "import rlhf.b", "rlhf/b.py": "from rlhf.c import x", "rlhf/c.py": "from rlhf import a"}
    assert cycle(imported_modules(texts)) == ["rlhf.a", "rlhf.b", "rlhf.c"]


def test_the_command_line_imports_nothing_heavy() -> None:
    code = f"import sys, launch.cli; print([name for name in {sorted(HEAVY)} if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, text=True)
    assert (shown.stdout.strip(), shown.returncode) == ("[]", 0), shown.stderr


def test_the_files_that_are_started_first_exist() -> None:
    assert [name for name in LONGEST_FIRST if not (ROOT / "tests" / name).is_file()] == []
