"""What the protocols see: features of un-augmented images, computed once by a frozen encoder.

Dimensions: N images, D features, C channels, H x W pixels.
"""

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scclr.augment import with_channels
from scclr.datasets import ImageSet
from scclr.encoders.model import Model
from scclr.run import distributed

MAX_PIXELS = 32  # a side; the baseline on raw pixels sees no more than CIFAR's 3,072 values


def encoder_hash(encoder: nn.Module) -> str:
    """SHA-256 over the names and the bytes of all weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.no_grad()
def extract_features(model: Model, data: ImageSet, batch_size: int) -> Tensor:
    """h [N, D] in float32 of un-augmented images. The model is in eval mode meanwhile.

    Every process computes its share, and all of them return the whole.
    """
    training = model.training
    model.eval()
    share = -(-len(data) // distributed.world_size())
    own = data[slice(distributed.rank() * share, (distributed.rank() + 1) * share)]
    parts = (with_channels(part, model.channels).float() / 255 for part in own.blocks(batch_size))
    h = torch.cat([model.represent(part).float() for part in parts])
    h = distributed.gather(F.pad(h, (0, 0, 0, share - len(h))))[: len(data)]  # the last share is padded to be equal
    model.train(training)
    return h


def pixels(data: ImageSet) -> Tensor:
    """The images themselves as features in [0, 1], [N, C H W]; larger ones are averaged down to 32 x 32 pixels."""
    parts = (part.float() / 255 for part in data.blocks(512))
    if max(data.images.shape[-2:]) > MAX_PIXELS:
        parts = (F.adaptive_avg_pool2d(part, MAX_PIXELS) for part in parts)
    return torch.cat([part.flatten(1) for part in parts])
