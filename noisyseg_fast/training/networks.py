"""Networks by name, for 2D and 3D: COPLE-Net, the Left Atrium scripts' V-Net, MONAI's, and MONAI's with scSE.

The settings are MONAI's defaults; `width` is the number of channels on the finest level. NAME-2d is network
NAME in 2D, which takes volumes slice by slice across their last axis. TwoHeads gives any of them a second head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .cople import COPLENet, by_slices
from .vnet import VNet

Builder = Callable[[int, int, int, int], nn.Module]


class Network(NamedTuple):
    build: Builder  # (spatial_dims, in_channels, out_channels, width)
    divisor: int  # every side of a patch must be a multiple of this
    summary: str


def _unet(dims: int, inputs: int, outputs: int, width: int) -> nn.Module:
    from monai.networks.nets import UNet

    channels = [width << level for level in range(5)]
    network: nn.Module = UNet(dims, inputs, outputs, channels=channels, strides=(2, 2, 2, 2), num_res_units=2)
    return network


def _basicunet(dims: int, inputs: int, outputs: int, width: int) -> nn.Module:
    from monai.networks.nets import BasicUNet

    features = (width, width, 2 * width, 4 * width, 8 * width, width)
    network: nn.Module = BasicUNet(dims, inputs, outputs, features=features)
    return network


class SpatialChannelSE(nn.Module):
    """Concurrent spatial and channel squeeze and excitation, x * sigmoid(W2 relu(W1 mean(x))) + x * sigmoid(w x)
    (Roy et al., MICCAI 2018, sec. 2, where the two are added; reduction 2)."""

    def __init__(self, dims: int, channels: int) -> None:
        from monai.networks.blocks import ChannelSELayer

        super().__init__()
        self.channel = ChannelSELayer(dims, channels, r=2)
        self.spatial = (nn.Conv2d if dims == 2 else nn.Conv3d)(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.channel(x) + x * self.spatial(x).sigmoid()
        return result


def _scse_unet(dims: int, inputs: int, outputs: int, width: int) -> nn.Module:
    from monai.networks.nets.basic_unet import TwoConv

    if width < 2:
        raise ValueError(f"width must be at least 2 for network scse_unet, got {width}")
    network = _basicunet(dims, inputs, outputs, width)
    for parent in list(network.modules()):
        for name, block in list(parent.named_children()):
            if isinstance(block, TwoConv):
                channels = block.conv_1.conv.out_channels
                setattr(parent, name, nn.Sequential(block, SpatialChannelSE(dims, channels)))
    return network


def _attention_unet(dims: int, inputs: int, outputs: int, width: int) -> nn.Module:
    from monai.networks.nets import AttentionUnet

    channels = [width << level for level in range(5)]
    network: nn.Module = AttentionUnet(dims, inputs, outputs, channels=channels, strides=(2, 2, 2, 2))
    return network


def _segresnet(dims: int, inputs: int, outputs: int, width: int) -> nn.Module:
    from monai.networks.nets import SegResNet

    if width % 8:
        raise ValueError(f"width must be a multiple of 8 for network segresnet (group norm), got {width}")
    network: nn.Module = SegResNet(dims, init_filters=width, in_channels=inputs, out_channels=outputs)
    return network


def _dynunet(dims: int, inputs: int, outputs: int, width: int) -> nn.Module:
    from monai.networks.nets import DynUNet

    widest = 512 if dims == 2 else 320  # nnU-Net's
    network: nn.Module = DynUNet(
        dims,
        inputs,
        outputs,
        kernel_size=[3] * 5,
        strides=[1, 2, 2, 2, 2],
        upsample_kernel_size=[2] * 4,
        filters=[min(width << level, widest) for level in range(5)],
        deep_supervision=False,
    )
    return network


def _vnet(norm: str) -> Builder:
    return lambda dims, inputs, outputs, width: VNet(dims, inputs, outputs, width, norm=norm)


def _monai_vnet(dims: int, inputs: int, outputs: int, width: int) -> nn.Module:
    from monai.networks.nets import VNet

    if width != 16:
        raise ValueError(f"width must be 16 for network monai_vnet, which has no other, got {width}")
    if 16 % inputs:
        raise ValueError(f"network monai_vnet takes images of 1, 2, 4, 8 or 16 channels, not {inputs}")
    network: nn.Module = VNet(dims, inputs, outputs, dropout_dim=dims)
    return network


def _coplenet(dims: int, inputs: int, outputs: int, width: int) -> nn.Module:
    return COPLENet(inputs, outputs, width, slice_axis=-1)


class TwoHeads(nn.Module):
    """Logits (B, C, *S) and signed distance maps (B, C, *S) in [-1, 1], float32, of one network with 2 C outputs.

    Whatever the network, its last layer makes both from the same features: the first C outputs are the logits, the
    others the maps, through tanh.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        logits, maps = self.network(image).chunk(2, 1)
        return logits, maps.float().tanh()


class _Slices(nn.Module):
    """A 2D network for volumes (B, C, *S)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, volume: Tensor) -> Tensor:
        return by_slices(self.network, volume)


NETWORKS: dict[str, Network] = {
    "unet": Network(_unet, 16, "residual U-Net, 5 levels, strided convolutions (MONAI UNet)"),
    "basicunet": Network(_basicunet, 16, "plain U-Net, 5 levels, max pooling (MONAI BasicUNet)"),
    "scse_unet": Network(_scse_unet, 16, "the same with scSE after each block (Roy et al., MICCAI 2018)"),
    "attention_unet": Network(_attention_unet, 16, "U-Net with gated skips (MONAI AttentionUnet)"),
    "segresnet": Network(_segresnet, 8, "residual encoder-decoder with group norm (MONAI SegResNet)"),
    "dynunet": Network(_dynunet, 16, "nnU-Net's plain U-Net with instance norm (MONAI DynUNet)"),
    "vnet": Network(_vnet("batch"), 16, "V-Net with batch norm, as in UA-MT, SASSNet, DTC and DTML"),
    "vnet_group": Network(_vnet("group"), 16, "the same with group norm"),
    "vnet_instance": Network(_vnet("instance"), 16, "the same with instance norm"),
    "vnet_plain": Network(_vnet("none"), 16, "the same without norm"),
    "monai_vnet": Network(_monai_vnet, 16, "V-Net, width 16 (MONAI VNet)"),
    "coplenet": Network(_coplenet, 1, "COPLE-Net, 2D; volumes slice by slice (Wang et al., TMI 2020)"),
}


def get(name: str) -> Network:
    """The network of that name; ValueError lists those there are."""
    base = name.removesuffix("-2d")
    try:
        network = NETWORKS[base]
    except KeyError:
        raise ValueError(f"unknown network {name!r}; choose from {', '.join(NETWORKS)}") from None
    if base == name:
        return network

    def build_2d(dims: int, inputs: int, outputs: int, width: int) -> nn.Module:
        flat = network.build(2, inputs, outputs, width)
        return _Slices(flat) if dims == 3 else flat

    return network._replace(build=build_2d, summary=f"{network.summary}, slice by slice")


def build(name: str, spatial_dims: int, in_channels: int, out_channels: int, width: int = 16) -> nn.Module:
    """A fresh network: (B, in_channels, *S) -> logits (B, out_channels, *S), S multiples of
    `get(name).divisor`."""
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    return get(name).build(spatial_dims, in_channels, out_channels, width)


def head(network: nn.Module) -> nn.Module:
    """The block of a network of `build` that makes the logits of the features of all the others."""
    for name in ("final_conv", "conv_final", "output_block", "out_tr", "out_conv"):
        if hasattr(network, name):
            found: nn.Module = getattr(network, name)
            return found
    inner = getattr(network, "network", None)  # a network within another
    if isinstance(inner, nn.Module):
        return head(inner)
    blocks = getattr(network, "model", None)  # MONAI's UNet and AttentionUnet
    if not isinstance(blocks, nn.Sequential):
        raise ValueError(f"network {type(network).__name__} has no head that is known")
    return blocks[-1]


def before_head(network: nn.Module) -> nn.Module:
    """The module of a network of `build` whose last input in a pass are the features that its head makes the logits
    of: the head, or what drops some of them out before it."""
    inner = getattr(network, "network", network)
    return inner.dropout if isinstance(inner, VNet) else head(network)


def start_at(network: nn.Module, foreground: float) -> None:
    """Set the bias of the last convolution so that an untrained network begins near so much foreground, shared
    alike by the foreground classes (Lin et al., Focal Loss, ICCV 2017, sec. 3.3); else it begins near a half."""
    predictors = getattr(network, "predictors", None)  # of a network that makes logits in several places
    if predictors is not None:
        for part in predictors():
            start_at(part, foreground)
        return
    convolutions = [m for m in network.modules() if isinstance(m, nn.modules.conv._ConvNd)]
    bias = convolutions[-1].bias if convolutions else None
    if bias is None:
        raise ValueError("the network ends in no convolution with a bias, so foreground cannot be set")
    with torch.no_grad():
        if isinstance(network, TwoHeads):
            bias = bias[: len(bias) // 2]  # a view
        if len(bias) == 1:
            bias.fill_(math.log(foreground / (1 - foreground)))
        else:
            bias.fill_(math.log(foreground / (len(bias) - 1)))
            bias[0] = math.log(1 - foreground)
