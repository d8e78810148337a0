"""COPLE-Net (Wang et al., IEEE TMI 2020, Fig. 3), with the modules and names of its published code.

    level 0   block(inputs -> C)                                          bridge: 1x1, C -> C/2
    level i   [max pooling, average pooling] -> block(2 c -> 2 c) + skip  bridge likewise, i = 1, 2, 3
    level 4   the same, then ASPP
    up        1x1 to the bridge's width, bilinear x2, [bridge, up] -> block + skip
    out       3x3 convolution

A block is [3x3, BN, LeakyReLU 0.01, dropout, 3x3, BN, LeakyReLU, squeeze-and-excitation], and the published
code's gate of the last ends with a ReLU, not a sigmoid: f(x) x + x.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DROPOUT = (0.0, 0.0, 0.3, 0.4, 0.5)  # by level, the published configuration


def by_slices(network: Callable[[Tensor], Tensor], volume: Tensor, axis: int = -1) -> Tensor:
    """A 2D network on volumes (B, C, *S): their slices across that axis as one batch, stacked again after."""
    slices = volume.movedim(axis, 1)
    batch, depth = slices.shape[:2]
    stacked: Tensor = network(slices.flatten(0, 1)).unflatten(0, (batch, depth))
    return stacked.movedim(1, axis)


class COPLENet(nn.Module):
    """(B, in_channels, H, W) -> logits (B, out_channels, H, W), any H and W; volumes go slice by slice.

    10 521 666 parameters with 1 input and 2 outputs; `load_state_dict` takes the published names. aspp,
    dual_pooling, bridge: False for the paper's ablations (-A), (-D), (-B), Table II. slice_axis: of a volume
    (B, C, *S); the published code's is 2, NIfTI's usually the last.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 2,
        width: int = 32,
        *,
        aspp: bool = True,
        dual_pooling: bool = True,
        bridge: bool = True,
        dropout: tuple[float, float, float, float, float] = DROPOUT,
        slice_axis: int = 2,
    ) -> None:
        super().__init__()
        if width < 4 or width % 2:
            raise ValueError(f"width must be an even number from 4 up for COPLE-Net, got {width}")
        self.slice_axis = slice_axis
        channels = [width << level for level in range(5)]
        bridged = [c // 2 if bridge else c for c in channels[:4]]
        self.in_conv = _Block(in_channels, channels[0], dropout[0])
        for i in range(1, 5):
            self.add_module(f"down{i}", _Down(channels[i - 1], channels[i], dropout[i], dual_pooling))
        for i in range(4):
            layer = _ConvLayer(channels[i], bridged[i]) if bridge else nn.Identity()
            self.add_module(f"bridge{i}", layer)
        for i in range(1, 5):
            level = 4 - i
            self.add_module(
                f"up{i}", _Up(channels[level + 1], bridged[level], channels[level], dropout[level])
            )
        self.aspp = _ASPP(channels[4]) if aspp else nn.Identity()
        self.out_conv = nn.Conv2d(channels[0], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 5:
            return by_slices(self, x, self.slice_axis)
        height, width = x.shape[2:]
        # The four halvings need multiples of 16; what the padding adds is cut off again.
        if height % 16 or width % 16:
            x = F.pad(x, (0, -width % 16, 0, -height % 16))
        levels = [self.in_conv(x)]
        for i in range(1, 5):
            levels.append(self.get_submodule(f"down{i}")(levels[-1]))
        y = self.aspp(levels[4])
        for i in range(1, 5):
            y = self.get_submodule(f"up{i}")(y, self.get_submodule(f"bridge{4 - i}")(levels[4 - i]))
        logits: Tensor = self.out_conv(y)
        return logits[:, :, :height, :width]


class _ConvLayer(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(inputs, outputs, 1), nn.BatchNorm2d(outputs), nn.LeakyReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)  # type: ignore[no-any-return]


class _SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.se_layers = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, channels // 2, 1),
            nn.LeakyReLU(),
            nn.Conv2d(channels // 2, channels, 1),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.se_layers(x) * x + x  # type: ignore[no-any-return]


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.conv_conv = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1),
            nn.BatchNorm2d(outputs),
            nn.LeakyReLU(),
            nn.Dropout(dropout),
            nn.Conv2d(outputs, outputs, 3, padding=1),
            nn.BatchNorm2d(outputs),
            nn.LeakyReLU(),
            _SqueezeExcite(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_conv(x)  # type: ignore[no-any-return]


class _Down(nn.Module):
    def __init__(self, inputs: int, outputs: int, dropout: float, dual: bool) -> None:
        super().__init__()
        self.dual = dual
        self.conv = _Block(2 * inputs if dual else inputs, outputs, dropout)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.max_pool2d(x, 2)
        # Without the average the channels do not double before the block: the skip's second half is 0.
        pooled = torch.cat([pooled, F.avg_pool2d(x, 2)], 1) if self.dual else pooled
        y: Tensor = self.conv(pooled)
        return y + (pooled if self.dual else F.pad(pooled, (0, 0, 0, 0, 0, y.shape[1] - pooled.shape[1])))


class _Up(nn.Module):
    def __init__(self, inputs: int, bridged: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.conv1x1 = nn.Conv2d(inputs, bridged, 1)
        self.conv = _Block(2 * bridged, outputs, dropout)

    def forward(self, x: Tensor, bridge: Tensor) -> Tensor:
        up = F.interpolate(self.conv1x1(x), scale_factor=2, mode="bilinear", align_corners=True)
        joined = torch.cat([bridge, up], 1)
        y: Tensor = self.conv(joined)
        # Without bridges twice as many channels come together as go out: the skip is the sum of both halves.
        return y + (joined if y.shape[1] == joined.shape[1] else bridge + up)


class _ASPP(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        quarter = channels // 4
        self.conv_1 = nn.Conv2d(channels, quarter, 1)
        self.conv_2 = nn.Conv2d(channels, quarter, 3, padding=2, dilation=2)
        self.conv_3 = nn.Conv2d(channels, quarter, 3, padding=4, dilation=4)
        self.conv_4 = nn.Conv2d(channels, quarter, 3, padding=6, dilation=6)
        self.conv_1x1 = nn.Sequential(
            nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels), nn.LeakyReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        branches = [self.conv_1(x), self.conv_2(x), self.conv_3(x), self.conv_4(x)]
        return self.conv_1x1(torch.cat(branches, 1))  # type: ignore[no-any-return]
