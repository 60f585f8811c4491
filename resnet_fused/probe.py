"""Proof by numbers that a fused block equals the block it replaces.

Structure is `recognise`'s business; here two copies of the block, one fused, run in float64 on the CPU
with random weights, statistics and inputs, in training and in eval mode, in both memory formats, and
everything a training step can see is compared. The user's model and the random generators stay as
they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from .matching import chain_size
from .spec import ChainSpec
from .tracing import leaf_kind, replicate

# Two float64 evaluations of a block that differ in the order of summation were measured to differ by up
# to 5e-15 of the largest value (blocks of 64 to 2048 channels); the smallest mistake worth a name (one
# eps of batch norm for another, a running variance without Bessel's correction) is above 1e-7. The
# bound stands between, nearer to rounding. Gradients that are zero in exact arithmetic, such as a
# bias's in front of a batch norm, are rounding noise in stock: a tensor is never taken for smaller than 1.
PROBE_TOLERANCE = 1e-9

_BATCH = 3
_SMALLEST_OUTPUT = 3
_LARGEST_INPUT = 513
_SEED = 20151210  # the paper's date; any other would do
# The first two see every mode and every memory format; a block with very many parameters, whose float64
# convolutions take seconds on a CPU, stops there.
_ROUNDS = ((True, "channels_last"), (False, "contiguous_format"), (True, "contiguous_format"), (False, "channels_last"))
_LARGE = 2_000_000  # parameters

MakeFused = Callable[[nn.Module], nn.Module]


def probe(block: nn.Module, make_fused: MakeFused, spec: ChainSpec) -> str | None:
    """Compare a block with its fused replacement; None if they are equal, else the reason in words.

    Output, the input's gradient, every parameter's gradient and every buffer are compared after
    training and eval steps, with contiguous and channels_last input. Synchronised batch norms
    take part as plain ones: no process group is used.

    Args:
        block: the stock block, on any device, the meta device included; not touched.
        make_fused: turns a copy of ``block`` into its replacement; may change the copy.
        spec: what ``block`` was recognised as.
    """
    if nn.modules.module._has_any_global_hook():
        return "a global module hook is registered"
    weights = torch.Generator("cpu").manual_seed(_SEED)
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with (
        torch.random.fork_rng(devices),
        torch.inference_mode(False),  # turns gradients on, too
        torch.autocast("cpu", enabled=False),
    ):
        stock = _random_copy(block, weights)
        twin = replicate(stock, Tensor.clone)
        try:
            fused = make_fused(twin)
        except Exception as error:
            return _raised("fusing", error)
        return _compare_runs(stock, fused, spec)


def _raised(who: str, error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{who} raised {type(error).__name__}: {lines[0]}"[:300]


def _random_copy(block: nn.Module, generator: torch.Generator) -> nn.Module:
    """A float64 CPU copy whose convolutions and batch norms have random weights and statistics.

    The user's own values would prove less: zeros (``zero_init_residual``) hide what they multiply.
    """

    def wide(t: Tensor) -> Tensor:
        dtype = torch.float64 if t.is_floating_point() else t.dtype
        return torch.zeros(t.shape, dtype=dtype, device="cpu")

    copy = replicate(block, wide)
    for module in copy.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.__class__ = nn.BatchNorm2d  # type: ignore[assignment]
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if tensor.is_floating_point() or leaf_kind(module) == "bn":
                _randomise(name, tensor, generator)
    return copy.requires_grad_(True)


def _randomise(name: str, tensor: Tensor, generator: torch.Generator) -> None:
    with torch.no_grad():
        if not tensor.is_floating_point():
            tensor.fill_(3)  # batches tracked so far, which a cumulative average divides by
        elif tensor.dim() == 4:
            fan_in = tensor[0].numel()
            bound = (6 / fan_in) ** 0.5
            tensor.uniform_(-bound, bound, generator=generator)
        elif name == "running_var":
            tensor.uniform_(0.5, 2.0, generator=generator)
        elif name == "weight":  # of a batch norm, of either sign
            tensor.uniform_(0.5, 1.5, generator=generator)
            tensor[1::2] *= -1
        else:
            tensor.normal_(0.0, 0.5, generator=generator)


def _sizes(block: nn.Module, spec: ChainSpec) -> list[tuple[int, int]]:
    """An odd and an even input size, not square, that leave an output of at least 3x3."""
    sizes = []
    for start in (3, 4):
        size = start
        while size < _LARGEST_INPUT and min(_output(block, spec, (size, size))) < _SMALLEST_OUTPUT:
            size += 2
        sizes.append((size, size + 2))
    return sizes


def _output(block: nn.Module, spec: ChainSpec, size: tuple[int, int]) -> tuple[int, int]:
    height, width = chain_size(spec, block, size)
    if spec.pool is not None:
        pool = spec.pool
        height, width = (
            (n + 2 * p - k) // s + 1
            for n, k, s, p in zip((height, width), pool.kernel, pool.stride, pool.padding, strict=True)
        )
    return height, width


def _compare_runs(stock: nn.Module, fused: nn.Module, spec: ChainSpec) -> str | None:
    """The rounds in turn, on the same pair of blocks."""
    try:
        x = _working_input(stock, spec)
    except Exception as error:
        return _raised("the block itself", error)
    rounds = _ROUNDS if sum(p.numel() for p in stock.parameters()) < _LARGE else _ROUNDS[:2]
    for training, layout in rounds:
        given = x.contiguous(memory_format=getattr(torch, layout))
        try:
            expected = _run(stock, given, training)
        except Exception as error:
            return _raised("the block itself", error)
        try:
            got = _run(fused, given, training)
        except Exception as error:
            return _raised("the fused block", error)
        difference = _first_difference(got, expected)
        if difference is not None:
            mode, words = "training" if training else "eval", layout.removesuffix("_format")
            return f"in {mode} mode with {words} input, {difference}"
    return None


def _working_input(stock: nn.Module, spec: ChainSpec) -> Tensor:
    """A random input of the first size that the stock block takes; its buffers stay."""
    channels = cast(nn.Conv2d, stock.get_submodule(spec.sites[0].conv)).in_channels
    generator = torch.Generator("cpu").manual_seed(_SEED)
    failure: Exception | None = None
    for size in _sizes(stock, spec):
        x = torch.randn((_BATCH, channels, *size), dtype=torch.float64, device="cpu", generator=generator)
        try:
            with torch.no_grad():
                stock.eval()(x.clone())
            return x
        except Exception as error:
            failure = failure or error
    assert failure is not None
    raise failure


def _run(module: nn.Module, x: Tensor, training: bool) -> dict[str, Tensor | None]:
    """One step: all that it returns, accumulates and leaves behind, by name."""
    module.train(training)
    module.zero_grad(set_to_none=True)
    leaf = x.detach().clone().requires_grad_(True)
    torch.default_generator.manual_seed(_SEED)  # a shortcut may draw; `probe` has put the user's state aside
    output = module(leaf)
    generator = torch.Generator("cpu").manual_seed(_SEED)
    output.backward(torch.randn(output.shape, dtype=torch.float64, device="cpu", generator=generator))
    results: dict[str, Tensor | None] = {"the output": output.detach(), "the input's gradient": leaf.grad}
    results["the input"] = leaf.detach()
    results |= {f"the gradient of {name}": p.grad for name, p in module.named_parameters()}
    results |= {f"buffer {name}": b.clone() for name, b in module.named_buffers()}
    return results


def _first_difference(got: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None]) -> str | None:
    for name in dict.fromkeys((*expected, *got)):
        difference = _difference(got.get(name), expected.get(name))
        if difference is not None:
            return f"{name} {difference}"
    return None


def _difference(got: Tensor | None, expected: Tensor | None) -> str | None:
    if got is None or expected is None:
        return None if got is expected else f"is {'missing' if got is None else 'there but not in stock'}"
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return f"is {got.dtype} {tuple(got.shape)}, not {expected.dtype} {tuple(expected.shape)}"
    if not got.is_floating_point():
        return None if torch.equal(got, expected) else f"is {got.tolist()}, not {expected.tolist()}"
    if not got.numel():
        return None
    error, size = (got - expected).abs().max().item(), expected.abs().max().item()
    if error <= PROBE_TOLERANCE * max(size, 1.0):
        return None
    return f"differs by {error:.1e}, its largest value being {size:.1e}"
