"""The notebooks: for Colab, without outputs or code of their own, and they run from top to bottom."""

import ast
import os
import pathlib
import re

import jax
import nbformat
import pytest
from nbclient import NotebookClient
from programs import compiler_flags

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
BADGE = r"\[!\[Open In Colab\]\(https://colab\.research\.google\.com/assets/colab-badge\.svg\)\]\(https://colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)/blob/main/colab/%s\)"


def read(path):
    return nbformat.read(path, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def python(source):
    """A cell without the lines that are IPython's own; an indented one keeps its block whole."""
    return re.sub(r"(?m)^(\s*)[!%].*$", r"\1pass", source)


def test_there_are_two():
    assert [path.name for path in NOTEBOOKS] == ["uae_demo.ipynb", "unified_grpo_tiny.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_for_colab_and_has_nothing_of_its_own(path):
    notebook = read(path)
    nbformat.validate(notebook)
    first, install = notebook.cells[0], code(notebook)[0]
    badge = re.fullmatch(BADGE % re.escape(path.name), first.source)
    assert first.cell_type == "markdown" and badge
    assert (
        f"git clone -q https://github.com/{badge[1]} " in install.source
        and 'find_spec("uae_jax") is None' in install.source
    )
    assert notebook.metadata.accelerator == "GPU" and notebook.metadata.colab.gpuType
    assert notebook.metadata.kernelspec.name == "python3" and notebook.metadata.kernelspec.language == "python"
    imports = set()
    for cell in code(notebook):
        assert not cell.outputs and cell.execution_count is None
        for node in ast.walk(ast.parse(python(cell.source))):
            assert not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda)
            if isinstance(node, ast.Import | ast.ImportFrom):
                imports.add((node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0])
    assert "uae_jax" in imports


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem == "unified_grpo_tiny" else [])
        for path in NOTEBOOKS
    ],
)
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path):
    """Nothing is installed where the package can be imported; one step a stage is enough to see it work."""
    notebook = read(path)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "UAE_STEPS": "1",
        "UAE_IMAGES": "8",
        "TMPDIR": str(tmp_path),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": compiler_flags(),
        "PIP_NO_INDEX": "1",
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    client = NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}})
    client.execute(env=environment)
    assert code(notebook)[0].outputs == []
    pictures = [output for cell in code(notebook) for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= 8
    wrong = [
        output.text
        for cell in code(notebook)
        for output in cell.outputs
        if output.get("name") == "stderr" and re.search("Error|Warning", output.text)
    ]
    assert not wrong
