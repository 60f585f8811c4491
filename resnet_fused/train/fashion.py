"""Finding Fashion-MNIST: a folder of the user's, Debian's package, or torchvision's download."""

from __future__ import annotations

import contextlib
import gzip
import math
import os
import shutil
import socket
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError

PACKAGE = "dataset-fashion-mnist"
_DOWNLOAD_TIMEOUT = 10.0  # seconds without a byte


def cache_dir() -> Path:
    """Where data may be arranged: ``$XDG_CACHE_HOME/resnet_fused``, by default under ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "resnet_fused"


def package_dir() -> Path | None:
    """The folder that Debian's package put the files in, or None where it is not installed."""
    if shutil.which("dpkg") is None:
        return None
    listing = subprocess.run(["dpkg", "-L", PACKAGE], capture_output=True, text=True, check=False)
    for line in listing.stdout.splitlines():
        if line.endswith("train-images-idx3-ubyte.gz"):
            return Path(line).parent
    return None


def _is_idx(content: bytes) -> bool:
    """Whether this is a whole IDX file: two zeros, type, rank, big-endian sizes, and as many bytes."""
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        return False
    header = 4 + 4 * content[3]
    sizes = [int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4)]
    return len(content) == header + math.prod(sizes)


def _unpack(packed: Path, target: Path) -> None:
    # The published MD5 sums are of one gzip run; Debian packs the same contents anew, so the contents count.
    try:
        content = gzip.decompress(packed.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"train: --data fashion-mnist: cannot unpack {packed}: {error}") from error
    if not _is_idx(content):
        raise UserError(f"train: --data fashion-mnist: {packed} is not a whole IDX file")
    target.parent.mkdir(parents=True, exist_ok=True)
    whole = target.with_name(f"{target.name}.{os.getpid()}.new")
    whole.write_bytes(content)
    os.replace(whole, target)


def _arrange(source: Path, root: Path, names: list[str]) -> bool:
    """Unpack the files of ``source`` where torchvision looks below ``root``; False when any is missing."""
    packed = [source / f"{name}.gz" for name in names]
    if not all(file.is_file() for file in packed):
        return False
    for file in packed:
        _unpack(file, root / "FashionMNIST" / "raw" / file.stem)
    return True


def _complete(root: Path, names: list[str]) -> bool:
    return all((root / "FashionMNIST" / "raw" / name).is_file() for name in names)


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def find(data_root: str = "", download: bool = True) -> tuple[Path, str]:
    """A root that ``torchvision.datasets.FashionMNIST`` reads, and in words where the data came from.

    Looked for in this order: ``data_root`` (torchvision's layout, or a folder with the four .gz files),
    the cache, Debian's package, a download. Nothing but a download is ever written to ``data_root``.

    Raises:
        UserError: none of them has it.
    """
    try:
        from torchvision.datasets import FashionMNIST
    except ImportError as error:
        raise UserError(f"train: --data fashion-mnist needs torchvision: {error}") from error
    names = [name.removesuffix(".gz") for name, _ in FashionMNIST.resources]
    cache = cache_dir()
    if data_root:
        root = Path(data_root)
        if _complete(root, names):
            return root, f"{root}"
        for source in (root / "FashionMNIST" / "raw", root):
            if _arrange(source, cache, names):
                return cache, f"{source}"
    if _complete(cache, names):
        return cache, f"{cache}"
    package = package_dir()
    if package is not None and _arrange(package, cache, names):
        return cache, f"Debian package {PACKAGE} ({package})"
    target = Path(data_root) if data_root else cache
    reason = "download is off"
    if download:
        try:
            with _socket_timeout(_DOWNLOAD_TIMEOUT):
                FashionMNIST(str(target), train=True, download=True)
            return target, f"downloaded to {target}"
        except (OSError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[-1]
    raise UserError(
        f"train: --data fashion-mnist: not in --data-root, no Debian package {PACKAGE}, not in {cache}, "
        f"and it could not be downloaded ({reason})"
    )
