"""Imports inside scclr point to a strictly lower layer, or stay inside their own package."""

import ast
from pathlib import Path

import pytest

import scclr

ROOT = Path(scclr.__file__).parent
LAYERS = [
    {"config"},
    {"datasets"},
    {"augment"},
    {"encoders", "model", "metrics", "checkpoint", "preemption", "loader"},
    {"losses"},
    {"optim", "distributed"},
    {"theory"},
    {"pretrain", "launch"},
    {"probe", "components"},
    {"tracking", "result", "sweep", "show"},
    {"stages"},
    {"train"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
ONLY = {"wandb": {"tracking"}, "hydra": {"config", "train", "cli"}, "omegaconf": {"config", "train", "cli"}}
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
            assert here in ONLY[package], f"{here} imports {package}"


def test_every_module_has_a_layer() -> None:
    assert {unit(path) for path in MODULES} == set(RANK)
