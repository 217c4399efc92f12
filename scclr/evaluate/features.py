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


def own_share(data: ImageSet) -> ImageSet:
    """The images of ``data`` that this process evaluates: one share for each process, in order; all if it is alone."""
    share = -(-len(data) // distributed.world_size())
    return data[slice(distributed.rank() * share, (distributed.rank() + 1) * share)]


@torch.no_grad()
def extract_features(model: Model, data: ImageSet, batch_size: int) -> Tensor:
    """h [N, D] in float32 of un-augmented images. The model is in eval mode meanwhile."""
    training = model.training
    model.eval()
    h = torch.empty(len(data), int(model.encoder.feature_dim), device=data.labels.device)  # type: ignore[arg-type]
    done = 0
    for part in data.blocks(batch_size):
        h[done : done + len(part)] = model.represent(with_channels(part, model.channels).float() / 255)
        done += len(part)
    model.train(training)
    return h


def pixels(data: ImageSet) -> Tensor:
    """The images themselves as features in [0, 1], [N, C H W]; larger ones are averaged down to 32 x 32 pixels."""
    channels, *sides = data.images.shape[1:]
    height, width = (MAX_PIXELS, MAX_PIXELS) if max(sides) > MAX_PIXELS else sides
    x = torch.empty(len(data), channels * height * width, device=data.labels.device)
    done = 0
    for part in data.blocks(512):
        images = part.float() / 255
        images = F.adaptive_avg_pool2d(images, MAX_PIXELS) if max(sides) > MAX_PIXELS else images
        x[done : done + len(part)] = images.flatten(1)
        done += len(part)
    return x
