"""A U-Net with one encoder and several decoders, for 2D and 3D."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = 5  # as networks.py's U-Net


class BranchedUNet(nn.Module):
    """(B, inputs, *S) -> (B, branches, outputs, *S); any S of more than 16 pixels.

    Built of the blocks of networks.py's "unet" (MONAI's residual U-Net), which it equals with one branch. S is
    padded with zeros to multiples of 16, and what was added is cut off again.
    """

    rowwise = ("encode", "decode")  # parallel.py

    def __init__(self, dims: int, inputs: int, outputs: int, width: int, branches: int) -> None:
        from monai.networks.blocks import Convolution, ResidualUnit

        super().__init__()
        sizes = [width << level for level in range(LEVELS)]
        before = [inputs, *sizes[:-1]]
        self.encoder = nn.ModuleList(
            ResidualUnit(dims, a, b, strides=2 if level < LEVELS - 1 else 1, subunits=2)
            for level, (a, b) in enumerate(zip(before, sizes, strict=True))
        )

        def decoder() -> nn.ModuleList:
            steps = []
            for level in range(LEVELS - 2, -1, -1):
                # What comes from below and the encoder's own, which is as wide.
                wide = sizes[level] + (sizes[level + 1] if level == LEVELS - 2 else sizes[level])
                out = outputs if level == 0 else sizes[level - 1]
                up = Convolution(dims, wide, out, strides=2, is_transposed=True)
                steps.append(
                    nn.Sequential(up, ResidualUnit(dims, out, out, subunits=1, last_conv_only=level == 0))
                )
            return nn.ModuleList(steps)

        self.decoders = nn.ModuleList(decoder() for _ in range(branches))

    @torch.no_grad()
    def start_at(self, logit: float) -> None:
        """Set the bias of each decoder's last convolution, so that an untrained network begins near that logit."""
        for decoder in self.decoders:
            *_, last = (m for m in decoder.modules() if isinstance(m, nn.modules.conv._ConvNd))
            assert last.bias is not None
            last.bias.fill_(logit)

    def predictors(self) -> nn.ModuleList:
        """The parts that each end in logits."""
        return self.decoders

    def encode(self, image: Tensor) -> list[Tensor]:
        """The features of each level, the finest first, of (B, inputs, *S) with S padded to multiples of 16."""
        levels: list[Tensor] = []
        image = pad(image)
        for block in self.encoder:
            image = block(image)
            levels.append(image)
        return levels

    def features(self, levels: list[Tensor], branch: int = 0) -> Tensor:
        """What a decoder's last block gets: (B, 2 width, *S/2), S padded."""
        up = levels[-1]
        steps: Any = self.decoders[branch]
        for level, block in zip(range(LEVELS - 2, 0, -1), steps[:-1], strict=True):
            up = block(torch.cat([levels[level], up], 1))
        return torch.cat([levels[0], up], 1)

    def decode(self, levels: list[Tensor]) -> Tensor:
        """(B, branches, outputs, *S), S padded."""
        steps: Any = self.decoders
        return torch.stack([steps[i][-1](self.features(levels, i)) for i in range(len(steps))], 1)

    def forward(self, image: Tensor) -> Tensor:
        return cut(self.decode(self.encode(image)), image)


def pad(image: Tensor) -> Tensor:
    """With zeros behind each spatial axis, to multiples of 16."""
    lacking = [-n % (1 << (LEVELS - 1)) for n in image.shape[2:]]
    return F.pad(image, [n for axis in reversed(lacking) for n in (0, axis)]) if any(lacking) else image


def cut(result: Tensor, image: Tensor) -> Tensor:
    """What belongs to the image before it was padded."""
    place: Any = (..., *(slice(n) for n in image.shape[2:]))
    return result[place]
