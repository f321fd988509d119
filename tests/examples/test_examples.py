"""The examples do what they say."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from rlhf.user_code import load_object

EXAMPLES = Path(__file__).parents[2] / "examples"
LONGEST = 60

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.py")), ids=lambda file: file.name)
def test_an_example_is_short_and_says_what_it_is_for(file):
    text = file.read_text()
    assert len(text.splitlines()) <= LONGEST and ast.get_docstring(ast.parse(text))


def test_a_function_compares_with_the_reference_answer():
    correct = load_object(f"{EXAMPLES}/my_reward.py:correct", "test")
    assert correct(["It is Paris.", "Rome", "?"], ["paris", "Paris", None]) == [1.0, 0.0, None]
    short = load_object(f"{EXAMPLES}/my_reward.py:short", "test")
    assert short(["a" * 50, "a"], [True, False]) == [-0.5, -10.0]


def test_grpo_trains_and_saves_a_model(tiny_model, tmp_path, capsys):
    main = load_object(f"{EXAMPLES}/grpo.py:main", "test")
    main(str(tiny_model), str(tmp_path / "out"), iterations=2)
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "llama"
    assert not (tmp_path / "out/critic").exists()
    assert capsys.readouterr().out.startswith("What is the capital of France?\n  ")


def test_the_notebook_runs(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("MODEL", str(tiny_model))
    monkeypatch.setenv("ITERATIONS", "2")
    notebook = nbformat.read(EXAMPLES / "ppo.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "clear the outputs before a commit"
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "  1  reward" in printed and "  2  reward" in printed
    assert (tmp_path / "my-policy/model.safetensors").exists()
