"""Imports go one way, from the building blocks up; the tree has no catch-all modules and no long files."""

import ast
import pathlib
import re

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "uae_jax"
CONFIGS = PACKAGE.parent / "configs"
# folder or module -> what it may import; everything may import itself
WORDS = {
    "__init__": "api",
    "trees": "",
    "settings": "",
    "config_file": "settings",
    "command_line": "settings",
    "files": "",
    "nn": "trees",
    "hf": "files trees",
    "data": "files trees",
    "sharding": "settings trees",
    "diffusion": "files trees",
    "rl": "trees",
    "models": "files nn hf trees diffusion",
    "rewards": "models rl settings trees",
    "rollouts": "models nn diffusion rl sharding trees",
    "training": "files settings sharding trees",
    "methods": "settings trees nn diffusion rl rewards rollouts models training sharding",
    "stages": "files settings trees nn hf data sharding diffusion models rewards rollouts training methods",
    "planning": "files settings trees nn hf data sharding models rewards rollouts training methods stages",
    "api": "files stages settings data trees models",
    "model_flags": "api stages",
    "main": "command_line config_file files settings stages training planning dry_run",
    "dry_run": "stages planning data settings sharding trees",
    "plan": "command_line config_file settings planning",
    "precompute": "command_line config_file files stages training",
    "infer": "command_line api data files model_flags",
    "convert": "command_line files settings stages",
    "demo": "command_line api data evaluation model_flags",
    "evaluation": "command_line settings files trees nn hf data sharding diffusion models rewards rollouts training "
    "stages api model_flags",
    "evaluate": "command_line evaluation",
    "fetch_emoji": "command_line data",
}
ALLOWED = {name: set(words.split()) for name, words in WORDS.items()}
FILES = sorted(PACKAGE.rglob("*.py"))


def part(path: pathlib.Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        if isinstance(node, ast.ImportFrom) and node.module == "uae_jax":
            names = [f"uae_jax.{alias.name}" for alias in node.names]
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("uae_jax.")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_up_only(path):
    wrong = imported(path) - ALLOWED[part(path)] - {part(path)}
    assert not wrong, f"{path.name} is in {part(path)}, which must not import {sorted(wrong)}"


def test_no_two_parts_import_each_other():
    edges = {(part(path), name) for path in FILES for name in imported(path) if name != part(path)}
    assert not {(a, b) for a, b in edges if (b, a) in edges}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_short_and_named_for_what_they_hold(path):
    assert len(path.read_text().splitlines()) <= 500
    assert path.stem not in ("utils", "util", "common", "helpers", "misc")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.name)
def test_a_configuration_imports_settings_alone(path):
    assert imported(path) <= {"settings", "stages"}
    modules = {node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)}
    own = {"uae_jax.settings", "uae_jax.stages.run_config", "uae_jax.stages.bootstrap.settings"}
    assert {name for name in modules if name.startswith("uae_jax")} <= own


# what a person names becomes a path by `files.paths.to_path`; in these files are paths of plans and of local folders
PLAIN_PATHS = {"files/paths.py", "config_file.py", "fetch_emoji.py", "plan.py", "hf/hub.py", "stages/folders/files.py"}
# of the package, of a text, of nothing, and what `os` has listed
PLAIN = r"(?<![\w.])(?:pathlib\.)?Path\((?!__file__|f?\"|\)|file\) for|path\).stem|record\[|os.environ)"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_names_become_paths_in_one_place(path):
    if path.relative_to(PACKAGE).as_posix() not in PLAIN_PATHS and part(path) != "planning":
        assert not re.findall(PLAIN, path.read_text()), "a URL would lose a slash: use files.paths.to_path"
