"""Make the virtual environment that the Makefile runs in. Standard library only; run by any Python 3.10+."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import venv
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MOST_WORKERS = 8
# Module, and what is lost without it; torch and setuptools are not optional.
OPTIONAL = {
    "pytest": "make test cannot run",
    "torchvision": "Fashion-MNIST, image folders and comparisons with torchvision's models are off",
    "sklearn": "the digits data set is off",
    "matplotlib": "curves are not drawn",
    "rich": "progress is printed in plain lines",
}
# The same for what only the tests use: other projects whose habits and checkpoints are tried.
INTEROP = {
    "hypothesis": "the fuzzer",
    "xdist": "running the tests on two cores at once",
    "timm": "timm's nets and checkpoints",
    "transformers": "Hugging Face's nets and checkpoints",
    "onnxscript": "export to ONNX",
    "onnxruntime": "running what was exported",
    "lightning": "Lightning's trainer",
    "accelerate": "Accelerate's prepare",
    "torchsummary": "summaries",
}


def where() -> str:
    """The environment's folder for the running interpreter, relative to the project where it can be.

    ``.venv`` when the interpreter is that environment's or has no torch, else one layered over it.
    """
    if Path(sys.prefix).resolve() == (ROOT / ".venv").resolve() or importlib.util.find_spec("torch") is None:
        return ".venv"
    return f".venv/layered-{zlib.crc32(sys.prefix.encode()):08x}"


def say(line: str) -> None:
    """Print at once: pip's own output must come after it."""
    print(f"environment: {line}", flush=True)


def has(python: Path, module: str) -> bool:
    """Whether ``python`` finds ``module``."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", code], check=False).returncode == 0


def pip(python: Path, *arguments: str) -> bool:
    """Run pip for ``python``; False when it fails."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def create(folder: Path) -> None:
    """Create the environment; over an interpreter that has torch, let it see that one's packages."""
    try:
        venv.create(folder, with_pip=True)
    except subprocess.CalledProcessError:
        # Debian's python3 comes without ensurepip; a pip in the interpreter itself serves as well.
        if importlib.util.find_spec("pip") is None:
            sys.exit(
                "environment: this Python can make no virtual environment: install its venv package (python3-venv)"
            )
        venv.create(folder, with_pip=False, clear=False)
        layer(folder)
    if importlib.util.find_spec("torch") is not None:
        layer(folder)
        if importlib.util.find_spec("setuptools") is not None:
            # The one that comes with a new environment is old, and would hide the interpreter's own.
            pip(folder / "bin" / "python", "uninstall", "--quiet", "--yes", "setuptools")


def build_requirements() -> list[str]:
    """``requires`` of pyproject.toml's build system (Python 3.10 has no TOML reader)."""
    found = re.search(r"^requires\s*=\s*(\[.*?\])", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M | re.S)
    return list(ast.literal_eval(found[1])) if found else ["setuptools"]


def layer(folder: Path) -> None:
    """Append this interpreter's package folders to the environment's path, its .pth files included."""
    parents = [entry for entry in sys.path if entry.rstrip("/").endswith(("site-packages", "dist-packages"))]
    own = next((folder / "lib").glob("python3*")) / "site-packages"
    (own / "layer.pth").write_text(f"import site; list(map(site.addsitedir, {parents!r}))\n", encoding="utf-8")


def install(folder: Path, torch: str) -> None:
    """Bring ``folder`` up to date; what is importable already is not fetched, so it works offline."""
    python = folder / "bin" / "python"
    if not python.exists():
        say(f"creating {folder.relative_to(ROOT)}")
        create(folder)
    if not has(python, "torch"):
        say(f"this Python has no torch: installing {torch}")
        if not pip(python, "install", *torch.split()):
            sys.exit("environment: torch could not be installed; use PYTHON=... with an interpreter that has it")
    # Satisfied requirements are not looked up, so this needs no network where they are there.
    if not pip(python, "install", "--quiet", *build_requirements()):
        if not has(python, "setuptools"):
            sys.exit("environment: setuptools is not there and could not be installed")
        say(f"not all of {', '.join(build_requirements())} are there; the build says what is lost")
    if not pip(python, "install", "--quiet", "--no-build-isolation", "--no-deps", "--editable", "."):
        sys.exit("environment: the project could not be built; the reason is above")
    install_extras(python, ("test", "train"), OPTIONAL)


def install_extras(python: Path, extras: tuple[str, ...], lost: dict[str, str]) -> None:
    """Install extras beside the torch that is there where modules are missing; say what is lost where that fails."""
    missing = [name for name in lost if not has(python, name)]
    if not missing:
        return
    say(f"installing what is missing: {', '.join(missing)}")
    # The torch that is there is kept: its metadata's version, which is what pip compares, may differ from __version__.
    code = (
        "from importlib.metadata import requires, version; print('torch==' + version('torch')); "
        f"print(*(r.split(';')[0] for r in requires('resnet-fused') if r.rpartition('extra == ')[2][1:-1] in {extras}),"
        " sep='\\n')"
    )
    constraint, *wanted = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as constraints:
        constraints.write(f"{constraint}\n")
        constraints.flush()
        command = ("install", "--quiet", "--retries", "1", "--constraint", constraints.name)
        if wanted and not pip(python, *command, *wanted):
            for requirement in wanted:  # one that cannot be had must not cost the others
                pip(python, *command, requirement)
    for name in missing:
        if not has(python, name):
            say(f"{name} could not be installed: {lost[name]}")


def workers() -> str:
    """The flags that make pytest use every core, as far as memory allows; none where pytest-xdist is not there."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if importlib.util.find_spec("xdist") is None or cores < 2:
        return ""
    return f"-n {min(cores, MOST_WORKERS)} --dist worksteal"


def need(modules: list[str]) -> None:
    """Install ``modules`` into the running interpreter's environment where they are missing."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing and not pip(Path(sys.executable), "install", *missing):
        sys.exit(f"environment: {', '.join(missing)} not there and could not be installed")


def main() -> None:
    """Command line of the Makefile."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--where", action="store_true", help="print the environment's folder and do nothing")
    parser.add_argument("--venv", help="create or update this environment")
    parser.add_argument("--torch", default="torch", help="what pip installs where there is no torch")
    parser.add_argument("--interop", action="store_true", help="install what only the tests use where it can be had")
    parser.add_argument("--workers", action="store_true", help="print pytest's flags for this many cores")
    parser.add_argument("--need", nargs="+", default=[], help="modules to install where they are missing")
    args = parser.parse_args()
    os.environ.setdefault("PIP_DEFAULT_TIMEOUT", "20")
    if args.where:
        print(where())
    if args.venv:
        install(ROOT / args.venv, args.torch)
    if args.interop:
        lost = {name: f"tests of {what} are skipped" for name, what in INTEROP.items()}
        install_extras(Path(sys.executable), ("interop",), lost | {"xdist": "the tests run one after another"})
    if args.workers:
        print(workers())
    need(args.need)


if __name__ == "__main__":
    main()
