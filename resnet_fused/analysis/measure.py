"""Layer responses of a model on given images, fused or not, leaving the model as it was."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..calls import SiteCall, SiteOutputs, SiteParams
from ..modules import NOTICE
from ..site import observed
from .responses import (
    CLOSED,
    MEASURED,
    Channels,
    LayerResponse,
    LayerResponses,
    Spread,
    channels_of,
    channels_of_moments,
)
from .sites import Site, SiteIndex, chain_sites, is_norm, order_of

_OUTPUT_IS_RESPONSE = (nn.modules.batchnorm._BatchNorm.forward, nn.SyncBatchNorm.forward)


def layer_responses(
    model: nn.Module,
    data: Tensor | Iterable[Any],
    *,
    kernel: str | int | tuple[int, ...] | None = None,
    batches: int | None = None,
) -> LayerResponses:
    """The standard deviation of each layer's response (He et al. 2015, Fig. 7): after batch norm, before ReLU and add.

    In fused blocks in training mode it comes in closed form from the batch statistics: no output is made, no hook set
    (see `analysis.responses` for the formula, and for what is exact over several batches). Where batch norm runs on
    running statistics, and outside fused blocks, it is measured, by the same moments of the raw output or by hooks that
    are gone afterwards; each row says which. The model runs in the mode it is in, without gradients; its parameters,
    running statistics, gradients, modes and hooks, and the random generators, are afterwards as they were.

    Args:
        model: any module; a compiled or data-parallel wrapper is looked through.
        data: images ``(N, C, H, W)``, a pair ``(images, labels)``, or an iterable of either; they are moved to the
            model's device.
        kernel: keep only the layers with this kernel, ``"3x3"`` as in the paper; None keeps all.
        batches: look at no more than so many.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``, or a batch is not images.
        ValueError: ``kernel`` is no kernel, no batch came, or the model has no batch norm that ran.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"layer_responses: model: expected a torch.nn.Module, got {type(model).__name__}")
    LayerResponses(()).only(kernel)
    model = _unwrapped(model)
    with _generators_kept(model), torch.no_grad():
        stream = itertools.islice(_images(model, data), batches)
        first = next(stream, None)
        if first is None:
            raise ValueError("layer_responses: data: expected at least one batch, got none")
        collector = _collect(model, first, stream)
    rows = tuple(collector.rows())
    if not rows:
        raise ValueError("layer_responses: model: expected one with batch norms that run, saw none")
    seen = {row.norm for row in rows}
    unseen = tuple(name for name, module in model.named_modules() if is_norm(module) and name not in seen)
    return LayerResponses(rows, collector.batches, unseen).only(kernel)


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _images(model: nn.Module, data: Any) -> Iterator[Tensor]:
    """The batches' images, on the model's device."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    pair = isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[1], Tensor) and data[1].dim() < 2
    for batch in [data] if isinstance(data, Tensor) or pair else data:
        images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(images, Tensor) or images.dim() < 2:
            got = f"{images.dim()}-D tensor" if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"layer_responses: data: expected images (N, C, H, W) or (images, labels), got {got}")
        yield images.to(device)


@contextlib.contextmanager
def _generators_kept(model: nn.Module) -> Iterator[None]:
    """Random generators of the CPU and of the model's devices as before, afterwards."""
    devices = {tensor.device for tensor in itertools.chain(model.parameters(), model.buffers())}
    kind = next((device.type for device in devices if device.type not in ("cpu", "meta")), None)
    indices = [device.index for device in devices if device.type == kind]
    with torch.random.fork_rng(indices, device_type=kind) if kind else torch.random.fork_rng([]):
        yield


def _collect(model: nn.Module, first: Tensor, others: Iterator[Tensor]) -> _Collector:
    """Run all batches. A fused block that runs as written shows nothing, so the first is run again with hooks there."""
    hooked: set[nn.Module] = set()
    while True:
        collector = _Collector(model, hooked)
        collector.run(first)
        dark = collector.dark()
        if not dark:
            break
        hooked |= dark
    for images in others:
        collector.run(images)
    return collector


class _Collector:
    """Spreads of a model's sites; ``hooked``: fused blocks that are watched by hooks, as unfused ones are."""

    def __init__(self, model: nn.Module, hooked: set[nn.Module]) -> None:
        self._model = model
        self._sites = [site for site in chain_sites(model) if site.block not in hooked]
        self._index = SiteIndex(self._sites)
        # Running statistics move in copies, so the model's own never do.
        self._buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        self._found: dict[str, tuple[str, Any, str, Spread]] = {}
        self._convolved: tuple[str, nn.Module, Tensor] | None = None
        own = {module for site in self._sites for module in site.modules()}
        self._watched = [(name, m) for name, m in model.named_modules() if m not in own]
        self.batches = 0

    def dark(self) -> set[nn.Module]:
        """Fused blocks with sites that gave nothing."""
        return {site.block for site in self._sites if site.name not in self._found}

    def rows(self) -> Iterator[LayerResponse]:
        """A row for each site, in network order."""
        order = order_of(self._model)
        for name in sorted(self._found, key=order.__getitem__):
            norm, kernel, how, spread = self._found[name]
            yield LayerResponse(name, norm, kernel, spread.std, how)

    def run(self, images: Tensor) -> None:
        """One batch."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(_notices_kept(self._model))
            stack.enter_context(observed(self._observe))
            for name, module in self._watched:
                hook = self._hook(name, module)
                if hook is not None:
                    stack.callback(module.register_forward_hook(hook).remove)
            torch.func.functional_call(self._model, self._buffers, (images,))
        self.batches += 1

    def _add(self, name: str, norm: str, kernel: Any, how: str, channels: Channels) -> None:
        self._found.setdefault(name, (norm, kernel, how, Spread()))[3].add(channels)

    def _observe(self, call: SiteCall, params: SiteParams, outputs: SiteOutputs) -> None:
        site: Site | None = self._index.find(params.weight)
        if site is None:
            return
        if call.training:
            how, channels = CLOSED, channels_of_moments(outputs.moments, call.eps)
        else:
            how, raw = MEASURED, channels_of(outputs.y)
            mean, _, scale, shift, _ = outputs.moments.to("cpu", torch.float64)
            channels = Channels(raw.rows, scale * (raw.means - mean) + shift, scale.square() * raw.variances)
        self._add(site.name, site.norm, site.conv.kernel_size, how, channels)

    def _hook(self, name: str, module: nn.Module) -> Any:
        if isinstance(module, nn.modules.conv._ConvNd):

            def convolved(_: nn.Module, __: Any, out: Tensor) -> None:
                self._convolved = (name, module, out)

            return convolved
        if not is_norm(module):
            return None

        def normalised(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            conv, kernel = name, None
            if self._convolved is not None and self._convolved[2] is args[0]:
                conv, kernel = self._convolved[0], self._convolved[1].kernel_size
            self._add(conv, name, kernel, MEASURED, _response(module, args[0], out))

        return normalised


def _response(norm: Any, x: Tensor, out: Tensor) -> Channels:
    """A batch norm's response: its output, but for a subclass whose forward does more, such as an activation."""
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or type(norm).forward in _OUTPUT_IS_RESPONSE:
        return channels_of(out)
    raw = channels_of(x)
    gamma = torch.ones_like(raw.means) if norm.weight is None else norm.weight.detach().to("cpu", torch.float64)
    beta = torch.zeros_like(raw.means) if norm.bias is None else norm.bias.detach().to("cpu", torch.float64)
    if norm.training or norm.running_mean is None:
        return Channels(raw.rows, beta, gamma.square() * raw.variances / (raw.variances + norm.eps))
    assert norm.running_var is not None
    mean, var = (buffer.to("cpu", torch.float64) for buffer in (norm.running_mean, norm.running_var))
    scale = gamma * (var + norm.eps).rsqrt()
    return Channels(raw.rows, scale * (raw.means - mean) + beta, scale.square() * raw.variances)


@contextlib.contextmanager
def _notices_kept(model: nn.Module) -> Iterator[None]:
    """Our hooks make a block say that it runs unfused: not said, and not taken for said."""
    before = [(module, module.__dict__.get(NOTICE)) for module in model.modules()]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "resnet_fused: a .* runs unfused", UserWarning)
            yield
    finally:
        for module, notice in before:
            module.__dict__.pop(NOTICE, None)
            if notice is not None:
                module.__dict__[NOTICE] = notice
