"""MONAI's networks by name, for 2D and 3D.

The settings are MONAI's defaults; `width` is the number of channels on the finest level.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from .branches import BranchedUNet

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


def _segresnet(dims: int, inputs: int, outputs: int, width: int) -> nn.Module:
    from monai.networks.nets import SegResNet

    if width % 8:
        raise ValueError(f"width must be a multiple of 8 for network segresnet (group norm), got {width}")
    network: nn.Module = SegResNet(dims, init_filters=width, in_channels=inputs, out_channels=outputs)
    return network


NETWORKS: dict[str, Network] = {
    "unet": Network(_unet, 16, "residual U-Net, 5 levels, strided convolutions (MONAI UNet)"),
    "basicunet": Network(_basicunet, 16, "plain U-Net, 5 levels, max pooling (MONAI BasicUNet)"),
    "segresnet": Network(_segresnet, 8, "residual encoder-decoder with group norm (MONAI SegResNet)"),
}


def get(name: str) -> Network:
    """The network of that name; ValueError lists those there are."""
    try:
        return NETWORKS[name]
    except KeyError:
        raise ValueError(f"unknown network {name!r}; choose from {', '.join(NETWORKS)}") from None


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


def start_at(network: nn.Module, foreground: float) -> None:
    """Set the bias of the last convolution so that an untrained network begins near so much foreground, shared
    alike by the foreground classes (Lin et al., Focal Loss, ICCV 2017, sec. 3.3); else it begins near a half."""
    if isinstance(network, BranchedUNet):
        for decoder in network.decoders:
            start_at(decoder, foreground)
        return
    convolutions = [m for m in network.modules() if isinstance(m, nn.modules.conv._ConvNd)]
    bias = convolutions[-1].bias if convolutions else None
    if bias is None:
        raise ValueError("the network ends in no convolution with a bias, so foreground cannot be set")
    with torch.no_grad():
        if len(bias) == 1:
            bias.fill_(math.log(foreground / (1 - foreground)))
        else:
            bias.fill_(math.log(foreground / (len(bias) - 1)))
            bias[0] = math.log(1 - foreground)
