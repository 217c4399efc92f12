"""Augmentation against torchvision's, operation by operation and parameter by parameter."""

import math

import pytest
import torch
import torchvision.transforms.v2.functional as tv
from omegaconf import OmegaConf
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from scclr import augment as ours
from scclr.augment import Augment
from scclr.config import conf_dir

OFF = {
    "crop_scale": [1.0, 1.0], "crop_ratio": [1.0, 1.0], "flip": 0.0, "rotation": 0.0, "jitter": 0.0, "brightness": 0.0,
    "contrast": 0.0, "saturation": 0.0, "hue": 0.0, "grayscale": 0.0, "blur": 0.0, "blur_sigma": [0.1, 2.0],
    "solarize": 0.0,
}  # fmt: skip


def make(**changes: object) -> Augment:
    return Augment(**{**OFF, **changes})  # type: ignore[arg-type]


def pictures(n: int = 6, channels: int = 3, side: int = 32) -> Tensor:
    smooth = torch.rand(n, channels, 6, 6, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(smooth, (side, side), mode="bilinear").mul(255).byte()


def column(values: list[float]) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1)


def test_nothing_is_the_identity() -> None:
    images = pictures()
    views = make()(images, seed=0, step=0)
    assert torch.equal(views, images.repeat(2, 1, 1, 1) / 255)


def test_views_are_keyed_by_seed_and_step() -> None:
    augment = make(
        crop_scale=[0.2, 1.0], crop_ratio=[0.75, 1.33], flip=0.5, jitter=0.8, brightness=0.4, hue=0.1, blur=0.5
    )
    images = pictures()
    first = augment(images, seed=1, step=5)
    torch.manual_seed(123)  # no state outside (seed, step)
    assert torch.equal(first, augment(images, seed=1, step=5))
    assert not torch.equal(first, augment(images, seed=1, step=6))
    assert not torch.equal(first, augment(images, seed=2, step=5))
    assert not torch.equal(first[:6], first[6:]), "two views of an image differ"
    state = torch.random.get_rng_state()
    augment(images, seed=1, step=5)
    assert torch.equal(state, torch.random.get_rng_state()), "the global generator is left alone"


def test_crop_and_flip_are_torchvisions() -> None:
    x = pictures(4, side=33)[:, :, :, :29] / 255
    boxes = [(0, 0, 33, 29), (3, 5, 10, 20), (20, 1, 13, 9), (32, 28, 1, 1)]
    flips = [False, True, True, False]
    views = ours.resample(x, torch.tensor(boxes).float(), torch.tensor(flips), torch.zeros(4))
    for view, image, (top, left, height, width), flip in zip(views, x, boxes, flips, strict=True):
        expected = tv.resized_crop(image, top, left, height, width, [33, 29], antialias=False)
        expected = tv.horizontal_flip(expected) if flip else expected
        torch.testing.assert_close(view, expected, atol=2e-5, rtol=0)


def test_rotation_is_torchvisions() -> None:
    x = pictures(3, channels=1, side=16) / 255
    degrees = [0.0, 20.0, -75.0]
    box = torch.tensor([0.0, 0.0, 16.0, 16.0]).repeat(3, 1)
    views = ours.resample(x, box, torch.zeros(3, dtype=torch.bool), torch.tensor(degrees))
    for view, image, angle in zip(views, x, degrees, strict=True):
        expected = tv.rotate(image, angle, interpolation=tv.InterpolationMode.BILINEAR)
        inside = tv.rotate(torch.ones_like(image), angle, interpolation=tv.InterpolationMode.BILINEAR) > 0.999
        torch.testing.assert_close(view[inside], expected[inside], atol=2e-5, rtol=0)
    assert views[1, 0, 0, 0] == 0, "corners are black"


@pytest.mark.parametrize(
    ("operation", "reference", "factors"),
    [
        (ours.adjust_brightness, tv.adjust_brightness, [0.0, 0.6, 1.0, 1.7]),
        (ours.adjust_contrast, tv.adjust_contrast, [0.0, 0.6, 1.0, 1.7]),
        (ours.adjust_saturation, tv.adjust_saturation, [0.0, 0.6, 1.0, 1.7]),
        (ours.adjust_hue, tv.adjust_hue, [-0.5, -0.1, 0.0, 0.3]),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_colour_is_torchvisions(operation, reference, factors: list[float], channels: int) -> None:  # type: ignore[no-untyped-def]
    if channels == 1 and operation in (ours.adjust_saturation, ours.adjust_hue):
        augment = make(jitter=1.0, saturation=0.9, hue=0.4, grayscale=1.0)
        images = pictures(channels=1)
        assert torch.equal(augment(images, seed=0, step=0), images.repeat(2, 1, 1, 1) / 255)
        return
    x = pictures(4, channels) / 255
    x[0, :, :4, :4] = 0.5  # grey pixels have no hue
    views = operation(x, column(factors))
    for view, image, factor in zip(views, x, factors, strict=True):
        torch.testing.assert_close(view, reference(image, factor), atol=2e-4, rtol=0)


def test_blur_is_torchvisions() -> None:
    x = pictures(3) / 255
    sigmas = [0.1, 0.7, 2.0]
    for size in (3, 7):
        views = ours.gaussian_blur(x, column(sigmas), size)
        for view, image, sigma in zip(views, x, sigmas, strict=True):
            torch.testing.assert_close(view, tv.gaussian_blur(image, [size, size], [sigma, sigma]), atol=1e-5, rtol=0)


def test_solarize_and_grayscale_are_torchvisions() -> None:
    images = pictures()
    x = images.repeat(2, 1, 1, 1) / 255
    torch.testing.assert_close(make(solarize=1.0)(images, seed=0, step=0), tv.solarize(x, 0.5))
    torch.testing.assert_close(make(grayscale=1.0)(images, seed=0, step=0), tv.rgb_to_grayscale(x, 3))


def test_jitter_order_varies_between_images() -> None:
    images = pictures(1).repeat(64, 1, 1, 1)
    augment = make(jitter=1.0, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
    views = augment(images, seed=0, step=0)
    assert len({view.numpy().tobytes() for view in views}) == 128
    assert views.min() >= 0
    assert views.max() <= 1


def test_crop_boxes_are_distributed_as_torchvisions() -> None:
    scale, ratio, n = [0.08, 1.0], [3 / 4, 4 / 3], 4000
    boxes = ours.crop_boxes(n, 32, 32, scale, ratio, ours.generator(0, 0, 1))
    torch.manual_seed(0)
    reference = torch.tensor([RandomResizedCrop.get_params(torch.empty(3, 32, 32), scale, ratio) for _ in range(n)])
    for ours_, theirs in zip(boxes.T, reference.T.float(), strict=True):
        both = torch.cat([ours_, theirs]).sort().values
        gap = (
            torch.searchsorted(ours_.sort().values, both, right=True)
            - torch.searchsorted(theirs.sort().values, both, right=True)
        ) / n
        assert gap.abs().max() < 1.95 * math.sqrt(2 / n), "Kolmogorov-Smirnov at the 0.1% level"
    top, left, height, width = boxes.T
    assert ((top >= 0) & (left >= 0) & (top + height <= 32) & (left + width <= 32) & (height > 0) & (width > 0)).all()


def test_crop_falls_back_to_the_centre() -> None:
    boxes = ours.crop_boxes(5, 10, 100, [1.0, 1.0], [1.0, 1.0], ours.generator(0, 0, 1))
    assert torch.equal(boxes, torch.tensor([[0.0, 45.0, 10.0, 10.0]]).repeat(5, 1))


def test_probabilities_are_kept() -> None:
    images = torch.zeros(2000, 1, 4, 4, dtype=torch.uint8)
    images[..., 0] = 255
    flipped = make(flip=0.3)(images, seed=0, step=0)[:, 0, 0, 0] == 0
    assert abs(flipped.double().mean() - 0.3) < 4 * math.sqrt(0.21 / 4000)
    assert abs((flipped[:2000] == flipped[2000:]).double().mean() - 0.58) < 4 * math.sqrt(0.25 / 2000), (
        "views are independent"
    )


def test_digits_are_turned_and_never_flipped() -> None:
    values = OmegaConf.load(conf_dir() / "augment" / "digits.yaml")
    assert values.flip == 0
    assert values.rotation > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flip": 1.1}, "flip=1.1"),
        ({"crop_scale": [0.5, 1.5]}, "larger than its image"),
        ({"crop_ratio": [2.0, 1.0]}, "low <= high"),
        ({"hue": 0.6}, "hue=0.6"),
        ({"contrast": -1.0}, "at least 0"),
    ],
)
def test_bad_arguments(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_a_part_of_a_batch_gets_the_views_of_the_whole() -> None:
    augment = make(crop_scale=[0.2, 1.0], flip=0.5, jitter=0.8, brightness=0.4, hue=0.1, blur=0.5, solarize=0.3)
    images = pictures(6)
    whole = augment(images, seed=0, step=3)
    for first, last in ((0, 2), (2, 5), (5, 6)):
        part = augment(images[first:last], seed=0, step=3, first=first, total=6)
        torch.testing.assert_close(part, torch.cat([whole[first:last], whole[6 + first : 6 + last]]))
