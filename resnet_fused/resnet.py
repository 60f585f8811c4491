"""The residual family by name: torchvision's ten builders, the paper's CIFAR and plain nets, and free ones.

Every builder makes the stock net of `resnet_fused.eager` and, unless ``fused=False``, hands it to
`fuse`. Signatures, names and state dict keys are torchvision's where torchvision has the net.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

from typing_extensions import Unpack

from resnet_fused.architectures import ARCHITECTURES, Architecture, CIFAROptions, CommonOptions, ResNetOptions
from resnet_fused.eager import BasicBlock, Bottleneck, PlainBlock, ResNet, Shortcut, StemConfig, StrideIn

StrideRule = Literal["paper", "labml"]

CIFAR_STEM = StemConfig(channels=16, kernel=3, stride=1, pool=False)
CIFAR_PLANES = (16, 32, 64)
CIFAR_DEPTHS = (20, 32, 44, 56, 110, 1202)
IMAGENET_DEPTHS = (18, 34, 50, 101, 152)
PLAIN_DEPTHS = (18, 34, 20, 32, 44, 56)


def _build(
    block: type[BasicBlock | Bottleneck],
    layers: Sequence[int],
    *,
    prepare: Callable[[ResNet], object] | None = None,
    fused: bool = True,
    memory: str = "speed",
    **keywords: Any,
) -> ResNet:
    """The stock net, changed by ``prepare`` (which loads weights), then fused unless ``fused`` is False."""
    model = ResNet(block, layers, **keywords)
    if prepare is not None:
        prepare(model)
    if not fused:
        return model
    from resnet_fused.fuse import fuse

    return fuse(model, memory=memory)


def _resolve_weights(name: str, weights: Any) -> Any:
    """The member of torchvision's enum that ``weights`` is, or is the name of (``"IMAGENET1K_V2"``)."""
    try:
        from torchvision.models import get_model_weights
    except ImportError as error:
        raise ImportError(
            f"{name}: weights: {weights!r} needs torchvision, which is not installed (pip install torchvision)"
        ) from error
    enum = get_model_weights(name)
    try:
        return enum.verify(weights)
    except KeyError as error:
        raise ValueError(f"{name}: weights: expected one of {[*enum.__members__]} or None, got {weights!r}") from error


def _imagenet(name: str, weights: Any, progress: bool, **options: Unpack[ResNetOptions]) -> ResNet:
    """One of `ARCHITECTURES`, with torchvision's checks and, if asked for, its weights."""
    architecture = ARCHITECTURES[name]
    keywords: dict[str, Any] = {"groups": architecture.groups, "width_per_group": architecture.width_per_group}
    for key, value in keywords.items():
        if value != getattr(Architecture, key) and options.get(key, value) != value:
            raise ValueError(f"{name}: {key}: expected {value}, got {options.get(key)}")
    keywords.update(options)
    if weights is None:
        return _build(architecture.block, architecture.layers, **keywords)
    member = _resolve_weights(name, weights)
    for key, value in (("num_classes", len(member.meta["categories"])), ("in_channels", 3)):
        if keywords.get(key, value) != value:
            raise ValueError(f"{name}: {key}: expected {value} with weights={member}, got {keywords[key]}")

    def load(model: ResNet) -> object:
        return model.load_state_dict(member.get_state_dict(progress=progress, check_hash=True))

    return _build(architecture.block, architecture.layers, prepare=load, **keywords)


def resnet18(*, weights: Any = None, progress: bool = True, **options: Unpack[ResNetOptions]) -> ResNet:
    """ResNet-18 (He et al. 2015); see `resnet50` for the arguments."""
    return _imagenet("resnet18", weights, progress, **options)


def resnet34(*, weights: Any = None, progress: bool = True, **options: Unpack[ResNetOptions]) -> ResNet:
    """ResNet-34 (He et al. 2015); see `resnet50` for the arguments."""
    return _imagenet("resnet34", weights, progress, **options)


def resnet50(*, weights: Any = None, progress: bool = True, **options: Unpack[ResNetOptions]) -> ResNet:
    """ResNet-50 (He et al. 2015), v1.5: the stride is in the 3x3, as in torchvision.

    Args:
        weights: a member of torchvision's enum of this net, or its name (``"IMAGENET1K_V2"``,
            ``"DEFAULT"``). Needs torchvision, which also finds and loads the file.
        progress: show a progress bar while the file is loaded.
        **options: see `ResNetOptions`.

    Raises:
        ValueError: unknown ``weights``, or options that do not go with them or with this net.
        ImportError: ``weights`` without torchvision.
    """
    return _imagenet("resnet50", weights, progress, **options)


def resnet101(*, weights: Any = None, progress: bool = True, **options: Unpack[ResNetOptions]) -> ResNet:
    """ResNet-101 (He et al. 2015), v1.5; see `resnet50` for the arguments."""
    return _imagenet("resnet101", weights, progress, **options)


def resnet152(*, weights: Any = None, progress: bool = True, **options: Unpack[ResNetOptions]) -> ResNet:
    """ResNet-152 (He et al. 2015), v1.5; see `resnet50` for the arguments."""
    return _imagenet("resnet152", weights, progress, **options)


def resnext50_32x4d(*, weights: Any = None, progress: bool = True, **options: Unpack[ResNetOptions]) -> ResNet:
    """ResNeXt-50 with 32 groups of width 4 (Xie et al. 2017); see `resnet50` for the arguments."""
    return _imagenet("resnext50_32x4d", weights, progress, **options)


def resnext101_32x8d(*, weights: Any = None, progress: bool = True, **options: Unpack[ResNetOptions]) -> ResNet:
    """ResNeXt-101 with 32 groups of width 8 (Xie et al. 2017); see `resnet50` for the arguments."""
    return _imagenet("resnext101_32x8d", weights, progress, **options)


def resnext101_64x4d(*, weights: Any = None, progress: bool = True, **options: Unpack[ResNetOptions]) -> ResNet:
    """ResNeXt-101 with 64 groups of width 4 (Xie et al. 2017); see `resnet50` for the arguments."""
    return _imagenet("resnext101_64x4d", weights, progress, **options)


def wide_resnet50_2(*, weights: Any = None, progress: bool = True, **options: Unpack[ResNetOptions]) -> ResNet:
    """Wide ResNet-50-2 (Zagoruyko & Komodakis 2016); see `resnet50` for the arguments."""
    return _imagenet("wide_resnet50_2", weights, progress, **options)


def wide_resnet101_2(*, weights: Any = None, progress: bool = True, **options: Unpack[ResNetOptions]) -> ResNet:
    """Wide ResNet-101-2 (Zagoruyko & Komodakis 2016); see `resnet50` for the arguments."""
    return _imagenet("wide_resnet101_2", weights, progress, **options)


def resnet(
    depth: int, shortcut: Shortcut | None = "B", stride_in: StrideIn = "3x3", **options: Unpack[ResNetOptions]
) -> ResNet:
    """An ImageNet net of the paper's Table 1, with its shortcuts and stride where it is asked for.

    ``resnet(50)`` is `resnet50`; ``resnet(50, stride_in="1x1")`` is the paper's own ResNet-50 (v1).

    Args:
        depth: 18, 34, 50, 101 or 152.
        shortcut: ``"A"``, ``"A-sym"``, ``"B"`` or ``"C"``, see `resnet_fused.eager.ResNet`; None is the
            plain net.
        stride_in: ``"3x3"`` (v1.5) or ``"1x1"`` (v1). It has no effect on basic blocks (18, 34).
        **options: see `ResNetOptions`.

    Raises:
        ValueError: unknown ``depth``, ``shortcut`` or ``stride_in``.
    """
    if depth not in IMAGENET_DEPTHS:
        raise ValueError(f"resnet: depth: expected one of {IMAGENET_DEPTHS} (CIFAR: cifar_resnet), got {depth!r}")
    architecture = ARCHITECTURES[f"resnet{depth}"]
    if shortcut is not None:
        return _build(architecture.block, architecture.layers, shortcut=shortcut, stride_in=stride_in, **options)
    if architecture.block is not BasicBlock:
        raise ValueError(f"resnet: depth: expected 18 or 34 with shortcut=None (a plain net), got {depth!r}")
    return _build(PlainBlock, architecture.layers, stride_in=stride_in, **options)


def cifar_resnet(
    depth: int,
    shortcut: Shortcut | None = "A",
    num_classes: int | None = 10,
    in_channels: int = 3,
    **options: Unpack[CIFAROptions],
) -> ResNet:
    """The paper's CIFAR net, section 4.2: a 3x3 stem and three stages of 16, 32 and 64 channels, 32x32 images.

    Args:
        depth: 6n + 2 layers: 20, 32, 44, 56, 110, 1202, or any other n of at least 1.
        shortcut: as in `resnet`; the paper uses ``"A"``.
        num_classes: None leaves the classifier out.
        in_channels: channels of the image.
        **options: see `CIFAROptions`.

    Raises:
        ValueError: ``depth`` is not 6n + 2, or ``shortcut`` is unknown.
    """
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        raise ValueError(f"cifar_resnet: depth: expected 6n + 2 with n at least 1 (8, 14, 20, ...), got {depth!r}")
    keywords: dict[str, Any] = {"num_classes": num_classes, "in_channels": in_channels, **options}
    if shortcut is not None:
        keywords["shortcut"] = shortcut
    block = PlainBlock if shortcut is None else BasicBlock
    return _build(block, (blocks,) * 3, planes=CIFAR_PLANES, stem=CIFAR_STEM, **keywords)


def plain(depth: int, **options: Unpack[ResNetOptions]) -> ResNet:
    """The paper's plain net: no shortcuts.

    Args:
        depth: 18 or 34 is the ImageNet net; 6n + 2 (20, 32, 44, 56) the CIFAR net. No depth is both.
        **options: see `ResNetOptions`.

    Raises:
        ValueError: ``depth`` is neither.
    """
    if depth in (18, 34):
        return resnet(depth, shortcut=None, **options)
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"plain: depth: expected 18 or 34 (ImageNet) or 6n + 2 (CIFAR: 20, 32, ...), got {depth!r}")
    return cifar_resnet(depth, None, **options)


def from_stages(
    n_blocks: Sequence[int],
    n_channels: Sequence[int],
    bottlenecks: Sequence[int] | None = None,
    in_channels: int = 3,
    stem_kernel: int = 7,
    stride_rule: StrideRule = "paper",
    bias: bool = True,
    stem_relu: bool = False,
    stem_pool: bool = False,
    num_classes: int | None = None,
    *,
    bottleneck: Sequence[int] | None = None,
    img_channels: int | None = None,
    first_kernel_size: int | None = None,
    **options: Unpack[CommonOptions],
) -> ResNet:
    """A net by its stages, as labml's ``ResNetBase`` builds it; the first three arguments and the defaults are its.

    Args:
        n_blocks: blocks in each stage.
        n_channels: output channels of each stage; the stem has those of the first.
        bottlenecks: width of each stage's bottlenecks; None builds basic blocks.
        in_channels: channels of the image.
        stem_kernel: kernel of the stem's convolution, which has stride 2.
        stride_rule: ``"paper"`` halves the image in every stage but the first; ``"labml"`` only in the
            first, which is what its code does, though not its comment.
        bias: give every convolution a bias.
        stem_relu: whether a ReLU follows the stem's batch norm.
        stem_pool: whether the stem ends in a 3x3 max pool of stride 2.
        num_classes: None gives the pooled features ``(N, n_channels[-1])``.
        bottleneck: another name of ``bottlenecks``.
        img_channels: another name of ``in_channels``.
        first_kernel_size: another name of ``stem_kernel``.
        **options: see `CommonOptions`.

    Raises:
        ValueError: unknown ``stride_rule``, or lists of different lengths.
    """
    if stride_rule not in ("paper", "labml"):
        raise ValueError(f"from_stages: stride_rule: expected 'paper' or 'labml', got {stride_rule!r}")
    bottlenecks = bottlenecks if bottleneck is None else bottleneck
    widths = {"n_channels": n_channels, "bottlenecks": bottlenecks}
    for name, given in widths.items():
        if given is not None and (len(given) != len(n_blocks) or not given):
            raise ValueError(f"from_stages: {name}: expected {len(n_blocks)} values, as in n_blocks, got {given}")
    first, later = (1, 2) if stride_rule == "paper" else (2, 1)
    kernel = stem_kernel if first_kernel_size is None else first_kernel_size
    return _build(
        BasicBlock if bottlenecks is None else Bottleneck,
        n_blocks,
        planes=n_channels if bottlenecks is None else bottlenecks,
        out_channels=None if bottlenecks is None else n_channels,
        strides=[first if i == 0 else later for i in range(len(n_blocks))],
        stem=StemConfig(n_channels[0], kernel, relu=stem_relu, pool=stem_pool),
        num_classes=num_classes,
        in_channels=in_channels if img_channels is None else img_channels,
        bias=bias,
        **options,
    )


BUILDERS: dict[str, Callable[..., ResNet]] = {
    **{name: globals()[name] for name in ARCHITECTURES},
    **{f"cifar-{depth}": functools.partial(cifar_resnet, depth) for depth in CIFAR_DEPTHS},
    **{f"plain-{depth}": functools.partial(plain, depth) for depth in PLAIN_DEPTHS},
}
"""Nets by the names the command line uses; every value takes `ResNetOptions`."""
