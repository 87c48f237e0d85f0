"""The house: eight flat files, imports that run one way, and sizes that a reader can hold."""

import ast
import re
import sys

import pytest

from conftest import ROOT

HOUSE = {  # what each of the eight files may import of ours
    "envs": "",
    "rewards": "envs",
    "lora": "",
    "policy": "lora",
    "ppo": "lora policy",
    "runs": "lora",
    "train": "envs rewards lora policy ppo runs",
    "evaluate": "envs rewards lora policy ppo runs",
}
OUTSIDE = {".": "", "experiments": "matplotlib datasets peft trl", "tiny": "tokenizers"}


def sources(folder):
    """Name -> text of the Python files in a folder."""
    return {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / folder).glob("*.py")}


def imports(text):
    """The modules that a source imports, wherever it does."""
    nodes = list(ast.walk(ast.parse(text)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


def test_imports_run_one_way():
    listed = re.findall(r"^\w+", (ROOT / "requirements.txt").read_text(), re.M)
    assert sources(".").keys() == HOUSE.keys()
    for folder, outside in OUTSIDE.items():
        near = {*sources(folder)} if folder != "." else set()
        far = {"tiny": {"envs", "policy", "rewards"}, "experiments": {*HOUSE}}.get(folder, set())
        for name, text in sources(folder).items():
            known = near | far | {*HOUSE.get(name, "").split(), *outside.split(), *listed}
            assert imports(text) <= known | sys.stdlib_module_names, name


@pytest.mark.parametrize("folder, most", [(".", 2600), ("experiments", 1500), ("tests", 3600)])
def test_sizes(folder, most):
    lines = {name: text.count("\n") for name, text in sources(folder).items()}
    assert sum(lines.values()) <= most
    for name in HOUSE if folder == "." else ():
        assert lines[name] <= (470 if name == "evaluate" else 390), name


def test_bad_input_is_one_place():
    library = "".join(sources(".")[name] for name in "envs rewards lora policy ppo".split())
    assert len(re.findall(r"^ *raise\b", library, re.M)) <= 25
    assert len(re.findall(r"^ *try:", library, re.M)) <= 3
    assert not any("user_error" in text for text in sources(".").values())
