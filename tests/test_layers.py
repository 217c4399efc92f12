"""Imports inside scclr point to a strictly lower layer, or stay inside their own package."""

import ast
from pathlib import Path

import pytest

import scclr

ROOT = Path(scclr.__file__).parent
LAYERS = [
    {"config"},
    {"augment"},
    {"losses"},
    {"run"},
    {"encoders"},
    {"datasets"},
    {"evaluate"},
    {"pretrain"},
    {"theory"},
    {"components"},
    {"train"},
    {"api"},
    {"report"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
COMMANDS = ("train.py", "cli/training.py")
# Only these import the library: a package, or one module of it.
ONLY = {
    "wandb": {"run/wandb_run.py"},
    "hydra": {"config/compose.py", *COMMANDS},
    "omegaconf": {*(f"config/{stem}.py" for stem in ("schema", "build", "resolve", "compose")), *COMMANDS},
}
MODULES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def unit(path: Path) -> str:
    """The package or module directly below scclr that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {
                f"{node.module}.{alias.name}" if node.module == "scclr" else str(node.module) for alias in node.names
            }
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    here = unit(path)
    for name in imported(path):
        package, *rest = name.split(".")
        if package == "scclr" and rest and rest[0] in RANK:
            there = rest[0]
            assert there == here or RANK[there] < RANK[here], f"{here} imports {there}"
        if package in ONLY:
            assert str(path.relative_to(ROOT)) in ONLY[package], f"{path} imports {package}"


def test_every_module_has_a_layer_and_there_are_few() -> None:
    assert {unit(path) for path in MODULES} == set(RANK)
    assert len(RANK) + 1 <= 16  # and __init__.py


def test_files_functions_and_signatures_are_short() -> None:
    for path in MODULES:
        text = path.read_text()
        assert text.count("\n") <= 300, f"{path}: over 300 lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.name != "__init__":
                parameters = len(node.args.args) + len(node.args.kwonlyargs)
                assert parameters <= 10, f"{path}: {node.name} has {parameters} parameters"
