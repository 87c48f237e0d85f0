"""The house: flat files, imports that run one way, and plain statements.

What ruff knows is in pyproject.toml (complexity, blind except, too many branches, statements); here
is the rest, as a short walk over the syntax trees.
"""

import ast
import re
import sys

import pytest

from conftest import ROOT

HOUSE = {  # what each of the flat files may import of ours
    "errors": "",
    "wordings": "",
    "envs": "errors wordings",
    "rewards": "envs",
    "nf4": "",
    "lora": "errors nf4",
    "trie": "errors",
    "policy": "errors nf4 lora trie",
    "ppo": "errors lora",
    "runs": "errors",
    "options": "errors wordings envs rewards runs",
    "groups": "errors envs options",
    "train": "errors envs rewards lora policy ppo runs options",
    "evaluate": "errors wordings envs rewards lora policy ppo runs groups options",
}
OUTSIDE = {
    ".": "huggingface_hub",  # it comes with transformers
    "experiments": "matplotlib datasets peft trl",
    "tiny": "tokenizers",
}
LONGEST_FILE = 500  # lines, with room for a fork
LONGEST_FUNCTION = 70
MOST_LOCALS = 25


def sources(folder):
    """Name -> text of the Python files in a folder."""
    return {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / folder).glob("*.py")}


def imports(text):
    """The modules that a source imports, wherever it does."""
    names = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            names.append(node.module)
    return {name.partition(".")[0] for name in names}


def test_imports_run_one_way():
    listed = re.findall(r"^\w+", (ROOT / "requirements.txt").read_text(), re.M)
    assert sources(".").keys() == HOUSE.keys()
    for folder, outside in OUTSIDE.items():
        for name, text in sources(folder).items():
            known = {*listed, *outside.split(), *sys.stdlib_module_names}
            if folder == ".":
                known |= {*HOUSE[name].split()}
            else:
                known |= {*HOUSE, *sources(folder), *sources("tiny")}
            assert imports(text) <= known, name


@pytest.mark.parametrize("folder", [".", "experiments"])
def test_what_a_reader_can_hold(folder):
    for name, text in sources(folder).items():
        assert text.count("\n") <= LONGEST_FILE, name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                size = node.end_lineno - node.lineno + 1
                assert size <= LONGEST_FUNCTION, (name, node.name, size)
                assert len(local_names(node)) <= MOST_LOCALS, (name, node.name)


def local_names(function):
    """The names that a function binds, its arguments and those of functions in it left out."""
    return {
        node.id
        for node in ast.walk(function)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }


def test_one_thought_a_line():
    """No two values in one assignment but a swap; no comprehension in another one."""
    nested = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    for folder in (".", "experiments"):
        for name, text in sources(folder).items():
            for node in ast.walk(ast.parse(text)):
                where = (name, getattr(node, "lineno", 0))
                if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
                    assert not isinstance(node.targets[0], ast.Tuple), where
                if isinstance(node, nested) and folder == ".":
                    inner = [n for n in ast.walk(node) if isinstance(n, nested)]
                    assert len(inner) == 1, where


def test_what_is_caught_is_named():
    """A wide `except` stands around one call of another's code, and says of whose."""
    for folder in (".", "experiments"):
        for name, text in sources(folder).items():
            lines = text.splitlines()
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.ExceptHandler):
                    assert node.type is not None, (name, node.lineno)
                    if ast.unparse(node.type) == "Exception":
                        assert "# of " in lines[node.lineno - 1], (name, node.lineno)
