"""The checkpoint formats: for each, a table from the slots of `roles` to the names of its modules.

A table is in the order of the format's own state dict, so it serves both ways: read, key to role; written, role to
key. ``"a|b"`` reads both names and writes the first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from .roles import ConversionError

Table = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the parts of a net stand in a state dict; ``{stage}``, ``{block}`` and ``{flat}`` are indices.

    ``where``: of blocks, after ``prefix``, which the stem has too. ``head``: None if the layout has none. ``stem``:
    whether it has one.
    """

    where: str
    prefix: str = ""
    head: str | None = None
    stem: bool = True


@dataclasses.dataclass(frozen=True)
class Format:
    """One way of naming the tensors of a residual net, and what the models that use it are like.

    Args:
        layouts: the first one that holds a net's parts is the one written; all are read.
        stems: a table for each kind of stem.
        block: the table of a block.
        averaged: of a block whose shortcut averages before its convolution; None: the format has no such block.
        averages_all: whether such a net spells the first stage's shortcut so too, though it does not stride.
        first_stage: the number of the first stage.
        counters: whether its batch norms have ``num_batches_tracked``.
        biases, stem_norm, shortcut_norm: whether its models have them; None: some have.
        pads: whether a block may change the channels without a projection; None: some do.
        stride_in: the convolution of a bottleneck that strides in its models; None: either.
        channel_order: of the images that its published weights expect.
        stem: how its models start; None: in several ways.
    """

    name: str
    about: str
    layouts: tuple[Layout, ...]
    stems: tuple[Table, ...]
    block: Table
    averaged: Table | None = None
    averages_all: bool = True
    first_stage: int = 1
    counters: bool = True
    biases: bool | None = False
    stem_norm: bool | None = True
    shortcut_norm: bool | None = True
    pads: bool | None = False
    stride_in: str | None = "3x3"
    channel_order: str = "RGB"
    stem: str | None = "ReLU and max pool"

    @property
    def tables(self) -> tuple[Table, ...]:
        """The tables of a block."""
        return (self.block,) if self.averaged is None else (self.block, self.averaged)

    @property
    def flat(self) -> bool:
        """Whether its blocks are counted through, without stages."""
        return "{flat}" in self.layouts[0].where


def _numbered(conv: str, norm: str) -> dict[str, str]:
    return {f"{kind}{k}": name.format(k=k) for k in (1, 2, 3) for kind, name in (("conv", conv), ("norm", norm))}


def _shortcut(conv: str, norm: str) -> dict[str, str]:
    return {"shortcut.conv": conv, "shortcut.norm": norm}


def _deep(*names: str) -> dict[str, str]:
    return dict(zip(_numbered("", ""), names))


_MAIN = _numbered("conv{k}", "bn{k}")
_STEM = {"conv1": "conv1", "norm1": "bn1"}
_DOWN = _shortcut("downsample.0", "downsample.1")
_AVERAGED = _shortcut("downsample.1", "downsample.2")
_SEQUENTIAL = _shortcut("shortcut.0", "shortcut.1")
_TIMM = {**_MAIN, "se.1": "se.fc1", "se.2": "se.fc2", "eca": "se.conv"}
_POOL = {"pool.conv": "maxpool.0", "pool.norm": "maxpool.1"}
_DEEP = _deep("conv1.0", "conv1.1", "conv1.3", "conv1.4", "conv1.6", "bn1")
_MM_SE = {"se.1": "se_layer.conv1.conv", "se.2": "se_layer.conv2.conv"}
_MM_DEEP = _deep("stem.0", "stem.1", "stem.3", "stem.4", "stem.6", "stem.7")
_MM_MODULES = _deep("stem.0.conv", "stem.0.bn", "stem.1.conv", "stem.1.bn", "stem.2.conv", "stem.2.bn")
_LAYERS = "layer{stage}.{block}"
_NO_POOL = "ReLU, no pool"

_TORCHVISION = Format(
    "torchvision",
    "torchvision.models",
    (Layout(_LAYERS, head="fc"), Layout(_LAYERS, prefix="backbone.body.")),
    (_STEM,),
    {**_MAIN, **_DOWN},
)
_MMDET = Format(
    "mmdet",
    "mmdet, mmseg and their kin, style 'pytorch'",
    (Layout(_LAYERS, prefix="backbone."), Layout(_LAYERS)),
    (_STEM, _MM_DEEP),
    {**_MAIN, **_DOWN},
    averaged={**_MAIN, **_AVERAGED},
)
_KUANGLIU = Format(
    "kuangliu",
    "kuangliu/pytorch-cifar",
    (Layout(_LAYERS, head="linear"),),
    (_STEM,),
    {**_MAIN, **_SEQUENTIAL},
    stem=_NO_POOL,
)
_LABML = Format(
    "labml",
    "labml's annotated ResNet, alone or as nn.Sequential(net, nn.Linear(...))",
    (Layout("blocks.{flat}"), Layout("blocks.{flat}", prefix="0.", head="1")),
    ({"conv1": "conv", "norm1": "bn"},),
    {**_MAIN, **_shortcut("shortcut.conv", "shortcut.bn")},
    biases=True,
    stem="no ReLU, no pool",
)

FORMATS: dict[str, Format] = {
    found.name: found
    for found in (
        _TORCHVISION,
        dataclasses.replace(
            _TORCHVISION,
            name="resnet_fused",
            about="this package's builders",
            biases=None,
            stem_norm=None,
            shortcut_norm=None,
            pads=None,
            stride_in=None,
            stem=None,
        ),
        Format(
            "timm",
            "timm's ResNet, with its C, D, S and T stems, averaging shortcuts, SE and ECA",
            (Layout(_LAYERS, head="fc"),),
            ({**_STEM, **_POOL}, {**_DEEP, **_POOL}),
            {**_TIMM, **_DOWN},
            averaged={**_TIMM, **_AVERAGED},
        ),
        Format(
            "transformers",
            "Hugging Face transformers' ResNet",
            (
                Layout("encoder.stages.{stage}.layers.{block}"),
                Layout("encoder.stages.{stage}.layers.{block}", prefix="resnet.", head="classifier.1"),
            ),
            ({"conv1": "embedder.embedder.convolution", "norm1": "embedder.embedder.normalization"},),
            {
                **_shortcut("shortcut.convolution", "shortcut.normalization"),
                **_deep(*(f"layer.{k}.{kind}" for k in (0, 1, 2) for kind in ("convolution", "normalization"))),
            },
            first_stage=0,
        ),
        Format(
            "mmpretrain",
            "mmpretrain and mmcls, style 'pytorch', with SE",
            (Layout(_LAYERS, prefix="backbone.", head="head.fc"), Layout(_LAYERS, head="head.fc")),
            (_STEM, _MM_MODULES),
            {**_MAIN, **_MM_SE, **_DOWN},
            averaged={**_MAIN, **_MM_SE, **_AVERAGED},
            averages_all=False,
        ),
        _MMDET,
        dataclasses.replace(
            _MMDET,
            name="caffe",
            about="mmdet, mmpretrain and their kin, style 'caffe'",
            layouts=(Layout(_LAYERS, prefix="backbone.", head="head.fc"), Layout(_LAYERS, head="head.fc")),
            stride_in="1x1",
            channel_order="BGR",
        ),
        Format(
            "detectron2",
            "detectron2, frozen batch norm",
            (
                Layout("res{stage}.{block}", prefix="backbone.bottom_up."),
                Layout("res{stage}.{block}", prefix="backbone."),
                Layout("res{stage}.{block}"),
            ),
            (
                {"conv1": "stem.conv1", "norm1": "stem.conv1.norm"},
                _numbered("stem.conv{k}", "stem.conv{k}.norm"),
            ),
            {**_shortcut("shortcut", "shortcut.norm"), **_numbered("conv{k}", "conv{k}.norm")},
            first_stage=2,
            counters=False,
            stride_in="1x1",
            channel_order="BGR",
        ),
        _KUANGLIU,
        dataclasses.replace(_KUANGLIU, name="akamaster", about="akamaster/pytorch_resnet_cifar10", pads=None),
        dataclasses.replace(
            _KUANGLIU,
            name="shortcut",
            about="torchvision's names with `shortcut` for `downsample`",
            layouts=(Layout(_LAYERS, head="fc"),),
        ),
        _LABML,
        dataclasses.replace(
            _LABML,
            name="labml-old",
            about="labml's older spelling",
            block={
                **_numbered("conv_net_{k}|conv{k}", "bn{k}|batch_norm_{k}"),
                **_shortcut("shortcut.conv_network|shortcut.conv", "shortcut.batch_norm|shortcut.bn"),
            },
        ),
        Format(
            "sequences",
            "stages in `sequences`, batch norms named `batch1`, projections `projection.down`",
            (Layout("sequences.{stage}.{block}", head="fc"),),
            ({"conv1": "conv", "norm1": "batch"},),
            {**_numbered("conv{k}", "batch{k}"), **_shortcut("projection.down", "projection.batch")},
            first_stage=0,
            biases=True,
            stride_in="1x1",
        ),
        Format(
            "resnetl",
            "nested nn.Sequential with `l1 BN1 conform_layer`, alone or between a stem and a head",
            (Layout("{stage}.{block}", stem=False), Layout("2.{stage}.{block}", head="5")),
            ({"conv1": "0"},),
            {
                **{f"conv{k}": f"l{k}" for k in (1, 2, 3)},
                **{f"norm{k}": f"BN{k}" for k in (1, 2, 3)},
                "shortcut.conv": "conform_layer",
            },
            first_stage=0,
            biases=True,
            stem_norm=False,
            shortcut_norm=False,
            stride_in="1x1",
            stem="no ReLU, max pool",
        ),
    )
}

ALIASES = {
    "hf": "transformers",
    "huggingface": "transformers",
    "mmcls": "mmpretrain",
    "mmseg": "mmdet",
    "source_a": "labml",
    "source_b": "shortcut",
    "source_c": "sequences",
    "source_d": "resnetl",
}


def find_format(name: str, argument: str) -> Format:
    """The format of this name or alias.

    Raises:
        ConversionError: there is none.
    """
    found = FORMATS.get(ALIASES.get(name, name))
    if found is None:
        raise ConversionError(f"convert: {argument}: expected one of {sorted({*FORMATS, *ALIASES})}, got {name!r}")
    return found
