"""The shape of the project: what may import what, and that every script explains itself."""
import ast
import sys

import pytest
from conftest import ROOT

MAY = {"mallowspo": set(), "model": {"data"}, "data": {"mallowspo"}, "bandit": {"mallowspo"},
       "train": {"mallowspo", "model", "data", "bandit"}}
AT_TOP = {**MAY, "model": set()}                                  # only its main() uses data, for the tokenizer
PACKAGES = {"torch", "tokenizers", "safetensors", "numpy"}
WHERE_USED = {"jinja2", "huggingface_hub", "matplotlib", "pyarrow"}          # never at the top of a file


def imports(nodes):
    return {name.split(".")[0] for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)
            for name in ([node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])}


@pytest.mark.parametrize("name", MAY)
def test_imports(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    found, at_top = imports(ast.walk(tree)), imports(tree.body)
    assert found & set(MAY) <= MAY[name] and at_top & set(MAY) <= AT_TOP[name]
    assert found - set(MAY) - set(sys.stdlib_module_names) <= PACKAGES | WHERE_USED
    assert not at_top & WHERE_USED
    assert ast.get_docstring(tree)


@pytest.mark.parametrize("name", MAY)
def test_help(run, name):
    if name != "mallowspo":
        done = run(f"{name}.py", "--help")
        assert done.returncode == 0 and "usage" in done.stdout and not done.stderr


def test_mallowspo_prints_its_table(run):
    done = run("mallowspo.py")
    assert done.returncode == 0 and "0.693" in done.stdout and not done.stderr
