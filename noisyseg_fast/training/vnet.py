"""V-Net as the semi-supervised Left Atrium scripts have it, in 2D and 3D."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

NORMS = ("batch", "group", "instance", "none")


class VNet(nn.Module):
    """(B, inputs, *S) -> (B, outputs, *S), sides multiples of 16.

    networks/vnet_sdf.py of SASSNet, DTC and DTML: stages of 1, 2, 3, 3, 3 convolutions, strided ones down,
    transposed ones up, sums for skips, dropout of whole channels at the bottom and before the output. They have
    two output convolutions, for the signed distance map and the segmentation; here these are one with twice the
    outputs (`networks.TwoHeads` takes it apart): 9,448,866 parameters for one class in 3D. The other modules
    have the public names.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        inputs: int = 1,
        outputs: int = 2,
        width: int = 16,
        *,
        norm: str = "batch",
        dropout: float = 0.5,
    ) -> None:
        """width: channels on the finest level. norm "group": 16 groups, or as many as divide the width.

        ValueError for a norm or a number of dimensions that it has not."""
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}")
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
        flat = spatial_dims == 2
        conv: Any = nn.Conv2d if flat else nn.Conv3d
        up: Any = nn.ConvTranspose2d if flat else nn.ConvTranspose3d
        made = _norm(norm, flat, math.gcd(width, 16))

        def stage(count: int, channels: int, first: int | None = None) -> nn.Module:
            sources = [first or channels] + [channels] * (count - 1)
            return _Block(*(_layer(conv(c, channels, 3, padding=1), made(channels)) for c in sources))

        def down(channels: int) -> nn.Module:
            return _Block(_layer(conv(channels, 2 * channels, 2, stride=2), made(2 * channels)))

        def rise(channels: int) -> nn.Module:
            return _Block(_layer(up(channels, channels // 2, 2, stride=2), made(channels // 2)))

        w = width
        self.block_one, self.block_one_dw = stage(1, w, inputs), down(w)
        self.block_two, self.block_two_dw = stage(2, 2 * w), down(2 * w)
        self.block_three, self.block_three_dw = stage(3, 4 * w), down(4 * w)
        self.block_four, self.block_four_dw = stage(3, 8 * w), down(8 * w)
        self.block_five, self.block_five_up = stage(3, 16 * w), rise(16 * w)
        self.block_six, self.block_six_up = stage(3, 8 * w), rise(8 * w)
        self.block_seven, self.block_seven_up = stage(3, 4 * w), rise(4 * w)
        self.block_eight, self.block_eight_up = stage(2, 2 * w), rise(2 * w)
        self.block_nine = stage(1, w)
        self.dropout = (nn.Dropout2d if flat else nn.Dropout3d)(dropout)
        self.out_conv = conv(w, outputs, 1)

    def forward(self, image: Tensor) -> Tensor:
        one = self.block_one(image)
        two = self.block_two(self.block_one_dw(one))
        three = self.block_three(self.block_two_dw(two))
        four = self.block_four(self.block_three_dw(three))
        x = self.dropout(self.block_five(self.block_four_dw(four)))
        x = self.block_six(self.block_five_up(x) + four)
        x = self.block_seven(self.block_six_up(x) + three)
        x = self.block_eight(self.block_seven_up(x) + two)
        x = self.block_nine(self.block_eight_up(x) + one)
        outputs: Tensor = self.out_conv(self.dropout(x))
        return outputs


class _Block(nn.Module):
    """Layers in a row, named as in the public code: conv.0, conv.1, ..."""

    def __init__(self, *layers: list[nn.Module]) -> None:
        super().__init__()
        self.conv = nn.Sequential(*(module for layer in layers for module in layer))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.conv(x)
        return result


def _layer(convolution: nn.Module, norm: nn.Module | None) -> list[nn.Module]:
    return [convolution, *([] if norm is None else [norm]), nn.ReLU(inplace=True)]


def _norm(name: str, flat: bool, groups: int) -> Callable[[int], nn.Module | None]:
    if name == "batch":
        return nn.BatchNorm2d if flat else nn.BatchNorm3d
    if name == "instance":
        return nn.InstanceNorm2d if flat else nn.InstanceNorm3d
    return lambda channels: nn.GroupNorm(groups, channels) if name == "group" else None
