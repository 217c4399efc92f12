"""A small residual network that trains in minutes on a CPU."""

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

MOST_BLOCKS, MOST_CHANNELS = 100, 100_000


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch normalization and a shortcut (He et al. 2016, fig. 5 left)."""

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or width_in != width_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width_in, width_out, 1, stride, bias=False), nn.BatchNorm2d(width_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)  # the backward pass of batch norm does not need its output
        y = self.norm2(self.conv2(y)).add_(self.shortcut(x))
        return F.relu(y, inplace=True)


class ConvNet(nn.Module):
    """A 3x3 stem, one residual block per width, and global average pooling; every block but the first halves the
    resolution.

    Args:
        widths: channels of each block, from 1 to 100000; the last one is ``feature_dim``. There may be 100 blocks.
        stem_stride: 1, or 2 for a quarter of the work; that suits images above 16 pixels.

    Raises:
        ValueError: for no widths, too many or one out of range, or a stride other than 1 and 2.
    """

    def __init__(self, *, in_channels: int, widths: list[int], stem_stride: int) -> None:
        super().__init__()
        if not 1 <= len(widths) <= MOST_BLOCKS:
            raise ValueError(f"widths has {len(widths)} numbers: give 1 to {MOST_BLOCKS}, one for each block")
        if not all(1 <= width <= MOST_CHANNELS for width in widths):
            raise ValueError(f"widths={widths}: give numbers of channels from 1 to {MOST_CHANNELS}")
        if stem_stride not in (1, 2):
            raise ValueError(f"stem_stride={stem_stride}: give 1 or 2")
        self.feature_dim = widths[-1]
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            conv=nn.Conv2d(in_channels, widths[0], 3, stem_stride, 1, bias=False),
            norm=nn.BatchNorm2d(widths[0]),
            relu=nn.ReLU(inplace=True),
        )
        for i, width in enumerate(widths):
            layers[f"block{i + 1}"] = ResidualBlock(widths[max(i - 1, 0)], width, stride=1 if i == 0 else 2)
        self.layers = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean((2, 3))  # [B, feature_dim]
