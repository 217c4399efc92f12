"""What evaluations see: features of un-augmented images, computed once by a frozen encoder, and fresh views.

Dimensions: N images, V views of each in a training step, D features, C channels, H x W pixels, S pixels on the side of
a view.
"""

import hashlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scclr.augment import SAMPLE_STREAM, Augment, generator, with_channels
from scclr.datasets import ImageSet
from scclr.datasets.loader import views
from scclr.encoders.model import Model
from scclr.run import distributed

FRESH = 2**40  # training steps have smaller numbers, so no training has seen the views of this step and later ones
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


def held(rows: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """Which of the ``rows`` int64 [n] of ``images`` images this process holds by ``own_share``.

    Returns:
        Their positions in ``rows``, and in the share of this process.
    """
    share = -(-images // distributed.world_size())
    local = rows - distributed.rank() * share
    where = ((local >= 0) & (local < share)).nonzero().squeeze(1)
    return where, local[where]


def extract_features(model: Model, data: ImageSet, batch_size: int) -> Tensor:
    """h [N, D] in float32 of un-augmented images. The model is in eval mode meanwhile."""
    return extract_layers(model, data, batch_size, ["h"])["h"]


@torch.no_grad()
def extract_layers(model: Model, data: ImageSet, batch_size: int, layers: Sequence[str]) -> dict[str, Tensor]:
    """``h`` [N, D] or ``z`` [N, P], or both, in float32 of un-augmented images, computed in one pass.

    The model is in eval mode meanwhile.
    """
    training = model.training
    model.eval()
    found = {name: torch.empty(len(data), model.width(name), device=data.labels.device) for name in layers}
    done = 0
    for part in data.blocks(batch_size):
        images = with_channels(part, model.channels).float() / 255
        computed = dict(zip("hz", model(images), strict=True)) if "z" in found else {"h": model.represent(images)}
        for name, x in found.items():
            x[done : done + len(part)] = computed[name]
        done += len(part)
    model.train(training)
    return found


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


def chosen_rows(count: int, seed: int, images: int) -> Tensor:
    """``images`` of ``count`` images, or all, drawn by ``seed``; int64 on the CPU."""
    return torch.randperm(count, generator=generator(seed, 0, stream=SAMPLE_STREAM))[:images]


def fresh_views(
    data: ImageSet, augment: Augment, count: int, channels: int, *, seed: int, part: int
) -> Iterator[Tensor]:
    """As many steps' views [V N, C, S, S] as give ``count`` views of each image, none of which training has seen.

    Args:
        part: the number of these images among the parts of a set; each part has views of its own.
    """
    steps = -(-count // len(augment.views))
    for step in range(FRESH + part * steps, FRESH + (part + 1) * steps):
        yield with_channels(views(data, augment, seed=seed, step=step), channels)


def by_image(outputs: Sequence[Tensor], images: int, count: int) -> Tensor:
    """``count`` views of each image, [N, count, D], from the outputs [V N, D] of several steps."""
    return torch.cat(list(outputs)).float().unflatten(0, (-1, images))[:count].transpose(0, 1)
