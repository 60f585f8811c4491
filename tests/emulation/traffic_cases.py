"""What the launches say they move, against what the interpreter sees them move; run by `runner`."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from resnet_fused import counting, engines, fuse
from resnet_fused.eager import Bottleneck, ResNet, StemConfig
from resnet_fused.kernels.launch import recording
from tests.emulation import interpreter

BATCH, IMAGE = 2, 11


def _network() -> nn.Module:
    """Stem with pool, a projection, a join, a stride: every kind of site, in 24 channels or fewer."""
    return ResNet(Bottleneck, (2, 1), 5, planes=(8, 16), out_channels=(16, 24), stem=StemConfig(16, 3, 1))


def _step(extent: str, device: str) -> counting.Step | tuple[list, list, int]:
    """One step on real tensors, seen by the launches' own count, the interpreter and autograd; or counted on meta."""
    if device == "meta":
        model = fuse(counting.on_meta(_network, torch.float32), engine="triton")
        return counting.count_step(model, counting.meta_images(BATCH, IMAGE, torch.float32), extent)
    torch.manual_seed(0)
    model = fuse(_network().to(memory_format=torch.channels_last), engine="triton")
    images = torch.randn(BATCH, 3, IMAGE, IMAGE).to(memory_format=torch.channels_last)
    kept: dict[int, int] = {}
    given = {t.data_ptr() for t in (*model.parameters(), *model.buffers(), images)}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with engines.emulated(), interpreter.checked() as launches, recording() as records:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out: Tensor = counting.forward_in(model.train(), images, extent)
        total = sum(kept.values())
        out.backward(torch.ones_like(out))
    return records, launches, total


def _hold(extent: str) -> None:
    counted = _step(extent, "meta")
    records, launches, kept = _step(extent, "cpu")
    assert sum(counted.kept.values()) == kept
    noted = [*counted.forward.launches, *counted.backward.launches]
    assert [(r.kernel, r.bytes) for r in noted] == [(r.kernel, r.bytes) for r in records]
    assert [r.kernel for r in records] == [launch.kernel for launch in launches]
    said, moved = Counter(), Counter()
    for record, launch in zip(records, launches):
        said[record.kernel] += sum(sum(sides) for sides in record.bytes.values())
        moved[record.kernel] += sum(t.read + t.written for t in launch.traffic.values())
    # A launch may name what it does not touch: the padding of an image packed for the stem, rows of the moments.
    # It may not keep quiet about what it does.
    assert all(said[name] >= moved[name] for name in moved), (said, moved)
    assert said.total() - moved.total() <= moved.total() // 50, (said, moved)


def case_trunk() -> None:
    _hold("trunk")


def case_block() -> None:
    _hold("block")
