"""The layering: imports go down, and importing the package touches neither a GPU nor a compiler."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import resnet_fused

ROOT = Path(resnet_fused.__file__).parent
# A module may import those to its left and none to its right.
LAYERS = (
    ("numerics", "checkpoints", "spec", "reference", "calls", "reference_projection", "limits", "statistics"),
    ("winners",),
    ("kernels", "plan"),
    ("engines",),
    ("projection",),
    ("projected", "synchronise"),
    ("site",),
    ("nodes",),
    ("recompute", "closed", "postnorm"),
    ("links",),
    ("folded",),
    ("infer", "structure"),
    ("chain",),
    ("running",),
    ("deferred",),
    ("modules", "eager_blocks", "functional"),
    ("nets",),
    ("eager", "tracing", "ambient", "steps", "matching", "register", "recognise", "runs", "probe", "graphs"),
    ("fuse", "blocks", "freeze"),
    ("analysis", "evaluation", "fold"),
    ("counting", "devices", "passes", "siteplan"),
    ("costs",),
    ("remarks", "explain", "resnet", "architectures"),
    ("checking", "traffic", "compiling", "tuning"),
    ("train",),
    ("benching",),
    ("cli", "__main__"),
)
RANK = {name: i for i, names in enumerate(LAYERS) for name in names}


def _unit(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def _imports(path: Path) -> set[str]:
    """The units of this package that a file imports."""
    package = ("resnet_fused", *path.relative_to(ROOT).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            full = base + (node.module.split(".") if node.module else [])
            names = [[*full, alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        else:
            continue
        found |= {name[1] for name in names if name[0] == "resnet_fused" and len(name) > 1}
    return {name for name in found if (ROOT / f"{name}.py").exists() or (ROOT / name).is_dir()}


FILES = [p for p in sorted(ROOT.rglob("*.py")) if p.name != "__init__.py" or p.parent != ROOT]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    unit = _unit(path)
    assert unit in RANK, f"{unit} has no layer"
    up = {name for name in _imports(path) if name != unit and RANK[name] > RANK[unit]}
    assert not up, f"{unit} imports {sorted(up)}, which stand above it"


def test_import_is_light() -> None:
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import resnet_fused\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "assert not new & {'torchvision', 'triton', 'sklearn', 'matplotlib', 'rich', 'numpy'}, new\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
