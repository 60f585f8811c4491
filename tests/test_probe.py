"""The probe passes what is equal, names what is not, and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused.probe import probe
from resnet_fused.recognise import recognise
from resnet_fused.spec import ChainSpec, ShortcutSpec, SiteSpec

from .test_recognise import SITES, Block, projection

MakeFused = Callable[[nn.Module], nn.Module]


def _norm(bn: nn.BatchNorm2d, y: Tensor) -> Tensor:
    """Batch norm written out by hand."""
    if not bn.training:
        mean, var = bn.running_mean, bn.running_var
    else:
        var, mean = torch.var_mean(y, (0, 2, 3), unbiased=False)
        with torch.no_grad():
            bn.num_batches_tracked.add_(1)
            bn.running_mean.lerp_(mean, bn.momentum)
            bn.running_var.lerp_(var * (y[:, 0].numel() / (y[:, 0].numel() - 1)), bn.momentum)
    z = (y - mean[:, None, None]) * (var + bn.eps).rsqrt()[:, None, None]
    return z * bn.weight[:, None, None] + bn.bias[:, None, None]


class ByHand(Block):
    """`Block` in other words: an honest replacement."""

    def forward(self, x: Tensor) -> Tensor:
        a = _norm(self.bn1, self.conv1(x)).clamp(min=0)
        z = _norm(self.bn2, F.conv2d(a, self.conv2.weight, None, 1, 1))
        return (self.shortcut(x) + z).clamp(min=0)

    def shortcut(self, x: Tensor) -> Tensor:
        return self.skip(x)


def swap(cls: type[nn.Module]) -> MakeFused:
    def make_fused(copy: nn.Module) -> nn.Module:
        copy.__class__ = cls  # type: ignore[assignment]
        return copy

    return make_fused


def run(block: nn.Module, make_fused: MakeFused, spec: ChainSpec | None = None) -> str | None:
    found = recognise(block) if spec is None else spec
    assert isinstance(found, ChainSpec), found
    return probe(block, make_fused, found)


def test_equal_blocks_pass() -> None:
    assert run(Block(), swap(ByHand)) is None
    assert run(Block(4, 8, 2, skip=projection(bias=True)), swap(ByHand)) is None


def _changed(change: Callable[[Block], object]) -> MakeFused:
    def make_fused(copy: nn.Module) -> nn.Module:
        assert isinstance(copy, Block)
        change(copy)
        return copy

    return make_fused


class SkipsTheReLU(ByHand):
    def shortcut(self, x: Tensor) -> Tensor:
        return F.relu(x)


class CutsTheSkip(ByHand):
    def shortcut(self, x: Tensor) -> Tensor:
        return x.detach()


class ForgetsTheCounter(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.bn2.num_batches_tracked.fill_(3)
        return out


class WrongInEval(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 if self.training else 1.001)


class WrongInOneLayout(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.001 if x.is_contiguous() else 1)


class WrongWithChannelsLast(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 if x.is_contiguous() else 1.001)


class WritesToItsInput(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        x.data.mul_(2)
        return out


class Narrow(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, :2]


class Single(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


class NotANumber(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float("nan")


class Raises(Block):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("no such kernel\nand more")


def _refuse(copy: nn.Module) -> nn.Module:
    raise RuntimeError("cannot be made")


def _scale_gradient(block: Block) -> None:
    block.conv2.weight.register_hook(lambda g: g * 1.0001)


MISTAKES: dict[str, tuple[MakeFused, str]] = {
    "eps": (_changed(lambda b: setattr(b.bn2, "eps", 2e-5)), "in training mode with channels_last input, the output d"),
    "missing relu": (_changed(lambda b: setattr(b, "relu", nn.Identity())), "the output differs by"),
    "other residual": (swap(SkipsTheReLU), "the output differs by"),
    "cut skip": (swap(CutsTheSkip), "the input's gradient differs by"),
    "buffer not moved": (_changed(lambda b: setattr(b.bn1, "momentum", 0.0)), "buffer bn1.running_mean differs by"),
    "counter": (swap(ForgetsTheCounter), "buffer bn2.num_batches_tracked is 3, not 4"),
    "scaled gradient": (_changed(_scale_gradient), "the gradient of conv2.weight differs by"),
    "no gradient": (_changed(lambda b: b.bn1.bias.requires_grad_(False)), "the gradient of bn1.bias is missing"),
    "lost parameter": (_changed(lambda b: setattr(b.conv1, "bias", None)), "the gradient of conv1.bias is missing"),
    "eval only": (swap(WrongInEval), "in eval mode with contiguous input, the output differs by"),
    "contiguous only": (swap(WrongInOneLayout), "with contiguous input, the output differs by"),
    "channels_last only": (swap(WrongWithChannelsLast), "with channels_last input, the output differs by"),
    "writes": (swap(WritesToItsInput), "the input differs by"),
    "shape": (swap(Narrow), "the output is torch.float64 (3, 2, 3, 5), not torch.float64 (3, 4, 3, 5)"),
    "dtype": (swap(Single), "the output is torch.float32"),
    "nan": (swap(NotANumber), "the output differs by nan"),
    "raises": (swap(Raises), "the fused block raised KeyError: 'no such kernel"),
    "cannot be made": (_refuse, "fusing raised RuntimeError: cannot be made"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name: str) -> None:
    make_fused, text = MISTAKES[name]
    reason = run(Block(), make_fused)
    assert reason is not None and text in reason and "\n" not in reason


def test_large_blocks_are_proven_in_both_modes_and_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resnet_fused.probe._LARGE", 0)
    assert run(Block(), swap(ByHand)) is None
    for wrong in (WrongInEval, WrongInOneLayout, WrongWithChannelsLast):
        assert run(Block(), swap(wrong)) is not None


def test_a_block_that_fails_by_itself() -> None:
    unpadded = Block(conv1=nn.Conv2d(4, 4, 3))
    reason = run(unpadded, swap(ByHand), ChainSpec(SITES, ShortcutSpec("identity")))
    assert reason is not None and reason.startswith("the block itself raised RuntimeError: The size of tensor a")


def test_a_block_for_even_sizes_only() -> None:
    block = Block(4, 8, conv1=nn.Conv2d(4, 8, 2, 2), skip=projection())
    with pytest.raises(RuntimeError):
        block(torch.zeros(2, 4, 5, 5))
    assert run(block, swap(ByHand)) is None


def test_zero_initialised_and_frozen_blocks_still_prove_something() -> None:
    block = Block()
    nn.init.zeros_(block.bn2.weight)
    block.requires_grad_(False)
    assert run(block, swap(ByHand)) is None
    assert run(block, _changed(lambda b: setattr(b.bn1, "eps", 1e-3))) is not None
    assert "the gradient of conv2.weight differs by" in (run(block, _changed(_scale_gradient)) or "")


@pytest.mark.parametrize("where", [{"device": "meta"}, {"dtype": torch.bfloat16}], ids=str)
def test_any_device_and_dtype(where: dict[str, object]) -> None:
    block = Block().to(**where)  # type: ignore[arg-type]
    assert run(block, swap(ByHand)) is None
    assert run(block, swap(WrongInEval)) is not None


def test_synchronised_batch_norms_use_no_process_group() -> None:
    block = Block(bn1=nn.SyncBatchNorm(4, process_group=object()))
    seen: list[type] = []
    assert run(block, lambda copy: (seen.append(type(copy.bn1)), swap(ByHand)(copy))[1]) is None
    assert type(block.bn1) is nn.SyncBatchNorm and seen == [nn.BatchNorm2d]


def test_stems_grow_their_input_until_something_is_left() -> None:
    stem = nn.Sequential(nn.Conv2d(3, 4, 7, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(3, 2))
    seen: list[torch.Size] = []
    stem_run = run(stem, lambda copy: (copy.register_forward_hook(lambda m, i, out: seen.append(out.shape)), copy)[1])
    assert stem_run is None and min(seen[0][2:]) == 3


class LooksAtAutocast(ByHand):
    def forward(self, x: Tensor) -> Tensor:
        assert not torch.is_autocast_enabled("cpu")
        return super().forward(x)


def test_modes_around_do_not_matter() -> None:
    with torch.no_grad(), torch.autocast("cpu"):
        assert run(Block(), swap(LooksAtAutocast)) is None
    with torch.inference_mode():
        assert run(Block(), swap(ByHand)) is None


def test_nothing_is_touched() -> None:
    block = Block()
    block.bn1.eval()
    fired: list[object] = []
    block.register_forward_hook(lambda *args: fired.append(args))
    block.conv1.register_forward_pre_hook(lambda *args: fired.append(args))
    before = {name: (t.clone(), t._version) for name, t in block.state_dict().items()}
    flags = [(m, m.training, m.__class__, dict(m.__dict__)) for m in block.modules()]
    state = torch.random.get_rng_state()

    class Draws(ByHand):
        def forward(self, x: Tensor) -> Tensor:
            torch.rand(3)
            return super().forward(x)

    assert run(block, swap(Draws)) is None
    assert torch.equal(torch.random.get_rng_state(), state) and not fired
    assert flags == [(m, m.training, m.__class__, dict(m.__dict__)) for m in block.modules()]
    for name, tensor in block.state_dict().items():
        assert torch.equal(tensor, before[name][0]) and tensor._version == before[name][1]
    assert all(p.grad is None for p in block.parameters())


def test_global_hooks_are_not_fired() -> None:
    fired: list[object] = []
    handle = nn.modules.module.register_module_forward_hook(lambda *args: fired.append(args))
    try:
        assert run(Block(), swap(ByHand)) == "a global module hook is registered"
    finally:
        handle.remove()
    assert not fired


def test_cumulative_momentum_and_untracked_statistics() -> None:
    spec = ChainSpec((SiteSpec("0", "1", False),), relu=False)
    for bn in (nn.BatchNorm2d(4, momentum=None), nn.BatchNorm2d(4, track_running_stats=False, affine=False)):
        block = nn.Sequential(nn.Conv2d(3, 4, 3), bn)
        assert run(block, lambda copy: copy) is None and recognise(block) == spec
