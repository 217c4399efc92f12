"""torchvision's vision transformer, in a size that works on small images."""

from torch import Tensor, nn
from torchvision.models import VisionTransformer

MOST_TOKENS = 100_000  # of an image; attention compares all pairs


class ViT(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2021) without its classifier: h is the class token of the last layer.

    torchvision's class needs no library besides those of scclr, and its weights fit: ViT-B/16 is ``patch=16 dim=768
    depth=12 heads=12``. Every image has ``image_size`` pixels a side, because a learned position belongs to each patch.

    Args:
        image_size: pixels on a side, a multiple of ``patch``.
        patch: pixels on a side of a patch.
        dim: width of a token, a multiple of ``heads``; the hidden layer of each block is four times as wide.
        depth: number of blocks.
        heads: attention heads.

    Raises:
        ValueError: a number out of range, or sizes that do not divide.
    """

    def __init__(self, *, in_channels: int, image_size: int, patch: int, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        for name, value, most in (("patch", patch, 1000), ("dim", dim, 10_000), ("depth", depth, 100)):
            if not 1 <= value <= most:
                raise ValueError(f"{name}={value}: give a number from 1 to {most}")
        if image_size % patch != 0:
            raise ValueError(f"patch={patch} does not divide images of {image_size} pixels; give a divisor of these")
        if (image_size // patch) ** 2 > MOST_TOKENS:
            raise ValueError(f"patch={patch} makes more than {MOST_TOKENS:,} tokens of an image: give a larger one")
        if not 1 <= heads <= dim or dim % heads != 0:
            raise ValueError(f"heads={heads} does not divide dim={dim}; give a divisor of it")
        self.feature_dim = dim
        self.network = VisionTransformer(image_size, patch, depth, heads, dim, 4 * dim, num_classes=1)
        self.network.heads = nn.Identity()
        if in_channels != 3:
            conv = nn.Conv2d(in_channels, dim, patch, patch)
            # torchvision starts its own convolution like this: the variance of an output is that of a pixel.
            nn.init.trunc_normal_(conv.weight, std=(in_channels * patch**2) ** -0.5)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
            self.network.conv_proj = conv

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that do not decay besides biases and norms: class token and positions, as in timm."""
        return {"network.class_token", "network.encoder.pos_embedding"}

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)  # [B, dim]
