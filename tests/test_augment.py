"""Augmentation against torchvision: each pixel with the same parameters, and the distribution of the parameters."""

import math

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from augment_helpers import ALL, JITTER, make, pictures, simclr
from scipy.stats import kstest
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.transforms import ColorJitter, RandomResizedCrop, v2

from scclr import augment as module
from scclr.augment import Draws, colour, geometry, with_channels


def by_torchvision(image: Tensor, draws: Draws, row: int, side: int) -> Tensor:
    """View ``row``, made step by step by torchvision with the parameters that were drawn."""
    x = tv.to_dtype(image, torch.float32, scale=True)
    if draws.degrees[row] != 0:
        x = tv.rotate(x, float(draws.degrees[row]), interpolation=tv.InterpolationMode.BILINEAR)
    top, left, height, width = draws.boxes(*image.shape[1:])[row].int().tolist()
    x = tv.resized_crop(x, top, left, height, width, [side, side], antialias=True)
    if draws.flipped[row]:
        x = tv.horizontal_flip(x)
    adjust = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue]
    for kind in draws.jitter_order[row].tolist() if draws.jittered[row] else []:
        x = adjust[kind](x, float(draws.jitter_factors[row, kind]))
    if draws.grey[row]:
        x = tv.rgb_to_grayscale(x, 3 if len(x) == 3 else 1)
    if draws.blurred[row]:
        size = max(3, 2 * (side // 20) + 1)
        x = tv.gaussian_blur(x, [size, size], [float(draws.sigma[row])] * 2)
    return tv.solarize(x, 0.5) if draws.solarized[row] else x


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("side", "size"), [(32, None), (48, 40), (96, 25), (24, 64)])  # a blur by 3, 5, 3 and 7 taps
def test_exact_views_are_those_of_torchvision(channels: int, side: int, size: int | None) -> None:
    """The tolerance is for hue, where two channels are nearly equal; elsewhere pixels agree to rounding."""
    augment = make(**ALL, rotation=30.0, size=size)
    images = pictures(24, channels, side)
    views = augment(images, seed=3, step=7)
    draws = augment.draw(24, seed=3, step=7)
    expected = torch.stack([by_torchvision(images[row % 24], draws, row, size or side) for row in range(48)])
    assert (views - expected).abs().max() < 4e-4
    assert (views - expected).abs().mean() < 2e-6


def test_without_operations_views_are_the_images() -> None:
    images = pictures()
    for exact in (True, False):
        views = make(exact=exact)(images, seed=0, step=0)
        torch.testing.assert_close(views, images.repeat(2, 1, 1, 1) / 255, atol=2e-6, rtol=0)


def test_views_are_a_function_of_seed_and_step() -> None:
    augment, images = make(**ALL), pictures()
    first = augment(images, seed=1, step=5)
    torch.manual_seed(123)  # no state outside (seed, step)
    assert torch.equal(first, augment(images, seed=1, step=5))
    assert not torch.equal(first, augment(images, seed=1, step=6))
    assert not torch.equal(first, augment(images, seed=2, step=5))
    assert not torch.equal(first[:6], first[6:]), "two views of an image differ"
    state = torch.random.get_rng_state()
    augment(images, seed=1, step=5)
    assert torch.equal(state, torch.random.get_rng_state()), "the global generator is left alone"


@pytest.mark.parametrize(
    ("operation", "reference", "factors"),
    [
        (colour.adjust_brightness, tv.adjust_brightness, [0.0, 0.6, 1.0, 1.7]),
        (colour.adjust_contrast, tv.adjust_contrast, [0.0, 0.6, 1.0, 1.7]),
        (colour.adjust_saturation, tv.adjust_saturation, [0.0, 0.6, 1.0, 1.7]),
        (colour.adjust_hue, tv.adjust_hue, [-0.5, -0.1, 0.0, 0.3]),
    ],
)
def test_colour_operations_are_those_of_torchvision(operation, reference, factors: list[float]) -> None:  # type: ignore[no-untyped-def]
    x = pictures(4) / 255
    x[0, :, :4, :4] = 0.5  # grey pixels have no hue
    views = operation(x, torch.tensor(factors).view(-1, 1, 1, 1))
    for view, image, factor in zip(views, x, factors, strict=True):
        torch.testing.assert_close(view, reference(image, factor), atol=2e-4, rtol=0)


@pytest.mark.parametrize("exact", [True, False])
def test_saturation_hue_and_grayscale_do_not_change_grey_images(exact: bool) -> None:
    images, grey = pictures(channels=1), {"jitter": 1.0, "saturation": 0.9, "hue": 0.4, "grayscale": 1.0}
    views = make(**grey, exact=exact)(images, seed=0, step=0)
    torch.testing.assert_close(views, images.repeat(2, 1, 1, 1) / 255, atol=2e-6, rtol=0)
    colours = make(**grey, exact=exact)(images.expand(-1, 3, -1, -1).contiguous(), seed=0, step=0)
    torch.testing.assert_close(colours, views.expand(-1, 3, -1, -1), atol=2e-4, rtol=0)  # LUMA adds up to 0.9999


def test_images_of_other_channels_keep_what_is_defined_on_rgb() -> None:
    """Brightness and contrast act on five channels; saturation, hue and grayscale change nothing."""
    images = (pictures(8).repeat(1, 2, 1, 1)[:, :5] * 0.3 + 90).byte()
    of_rgb = {"jitter": 1.0, "saturation": 0.9, "hue": 0.4, "grayscale": 1.0}
    strengths = {"jitter": 1.0, "brightness": 0.2, "contrast": 0.3}
    for exact in (True, False):
        torch.testing.assert_close(make(**of_rgb, exact=exact)(images, seed=0, step=0), images.repeat(2, 1, 1, 1) / 255)
        augment = make(**strengths, exact=exact)
        draws = augment.draw(8, seed=0, step=0)
        expected = images.repeat(2, 1, 1, 1) / 255
        bright, contrast = draws.jitter_factors[:, :2].view(-1, 2, 1, 1, 1).unbind(1)
        first = (draws.jitter_order == 0).int().argmax(1) < (draws.jitter_order == 1).int().argmax(1)
        # A brighter view has a brighter mean too, so the two operations commute where nothing is clamped.
        assert first.any()
        assert not first.all()
        mean = expected.mean((1, 2, 3), keepdim=True)
        expected = bright * (contrast * expected + (1 - contrast) * mean)
        torch.testing.assert_close(augment(images, seed=0, step=0), expected, atol=1e-5, rtol=0)
        steps = colour.colour_steps(draws, 5)
        torch.testing.assert_close(colour.recolour(images.repeat(2, 1, 1, 1) / 255, steps), expected, atol=1e-5, rtol=0)


def test_the_linear_map_equals_the_operations_one_by_one_without_clamps_and_hue() -> None:
    """The colours are so mild that nothing is clamped. Every view has its own order of operations."""
    images = (pictures(32) * 0.3 + 90).byte()
    strengths = {"jitter": 0.8, "brightness": 0.2, "contrast": 0.3, "saturation": 0.3, "grayscale": 0.2}
    exact, fast = (make(**strengths, exact=value)(images, seed=0, step=1) for value in (True, False))
    torch.testing.assert_close(fast, exact, atol=1e-5, rtol=0)


def test_the_linear_map_departs_from_torchvision_as_documented() -> None:
    """With SimCLR's strengths and saturated colours: the effect of clamps and HSV on pixels in [0, 1]."""
    images = pictures(64)
    exact, fast = (make(**JITTER, jitter=1.0, exact=value)(images, seed=0, step=0) for value in (True, False))
    gap = (exact - fast).abs()
    assert gap.mean() < 0.03
    assert gap.flatten(1).mean(1).max() < 0.12
    assert (exact.mean((2, 3)) - fast.mean((2, 3))).mean(0).abs().max() < 0.01, "no channel gains or loses"


def test_hue_turns_agree_with_hsv_at_thirds_and_for_grey() -> None:
    shifts = torch.tensor([0.0, 1 / 3, -1 / 3, 0.2]).view(-1, 1, 1)
    turns = colour.hue_turns(shifts)
    red = torch.tensor([1.0, 0.0, 0.0])
    for turn, expected in zip(turns, ([1, 0, 0], [0, 1, 0], [0, 0, 1]), strict=False):
        torch.testing.assert_close(turn @ red, torch.tensor(expected).float(), atol=1e-6, rtol=0)
        assert torch.allclose(turn @ torch.full((3,), 0.4), torch.full((3,), 0.4))
    x = pictures(1)[0] / 255
    exact = tv.adjust_hue(x, 1 / 3)
    torch.testing.assert_close((turns[1] @ x.flatten(1)).view_as(x), exact, atol=1e-4, rtol=0)


def same_distribution(ours: Tensor, theirs: Tensor | np.ndarray) -> None:
    """The Kolmogorov-Smirnov test at the 0.1 % level; all seeds are fixed."""
    assert kstest(np.asarray(ours), np.asarray(theirs)).pvalue > 1e-3


def test_crop_boxes_are_distributed_as_in_torchvision() -> None:
    n = 4000
    scale, ratio = [0.08, 1.0], [3 / 4, 4 / 3]
    boxes = make(crop_scale=scale, crop_ratio=ratio).draw(n // 2, seed=0, step=0).boxes(32, 40)
    torch.manual_seed(0)
    reference = torch.tensor([RandomResizedCrop.get_params(torch.empty(3, 32, 40), scale, ratio) for _ in range(n)])
    for mine, theirs in zip(boxes.T, reference.T.float(), strict=True):
        same_distribution(mine, theirs)
    same_distribution(boxes[:, 2] * boxes[:, 3], (reference[:, 2] * reference[:, 3]).float())
    same_distribution(boxes[:, 3] / boxes[:, 2], reference[:, 3] / reference[:, 2])
    top, left, height, width = boxes.T
    assert ((top >= 0) & (left >= 0) & (top + height <= 32) & (left + width <= 40) & (height > 0) & (width > 0)).all()


def test_jitter_factors_are_distributed_as_in_torchvision() -> None:
    n, strengths = 4000, (0.4, 1.3, 0.8, 0.1)  # 1.3: the factor stops at 0
    names = ("brightness", "contrast", "saturation", "hue")
    draws = make(jitter=0.8, **dict(zip(names, strengths, strict=True))).draw(n // 2, seed=0, step=0)
    torch.manual_seed(0)
    theirs = ColorJitter(*strengths)
    reference = [theirs.get_params(theirs.brightness, theirs.contrast, theirs.saturation, theirs.hue) for _ in range(n)]
    for kind in range(4):
        same_distribution(draws.jitter_factors[:, kind], np.array([row[1 + kind] for row in reference]))
    orders, counts = draws.jitter_order.unique(dim=0, return_counts=True)
    assert len(orders) == 24, "every order of the four operations"
    assert counts.max() < n / 24 + 5 * math.sqrt(n / 24)
    assert abs(draws.jittered.double().mean() - 0.8) < 4 * math.sqrt(0.16 / n)


@pytest.mark.parametrize("exact", [True, False])
def test_pixels_are_distributed_as_in_torchvision(exact: bool) -> None:
    """Mean, spread, saturation, tint and contrast of whole SimCLR views."""
    images = pictures(400)
    ours = simclr(blur=0.5, exact=exact)(images, seed=0, step=0)
    torch.manual_seed(0)
    theirs_once = v2.Compose([
        v2.ToDtype(torch.float32, scale=True), v2.RandomResizedCrop(32, (0.08, 1.0)), v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(**JITTER)], 0.8), v2.RandomGrayscale(0.2),
        v2.RandomApply([v2.GaussianBlur(3, (0.1, 2.0))], 0.5),
    ])  # fmt: skip
    theirs = torch.stack([theirs_once(image) for image in images.repeat(2, 1, 1, 1)])
    for statistic in (
        lambda x: x.mean((1, 2, 3)),
        lambda x: x.std((1, 2, 3)),
        lambda x: (x.amax(1) - x.amin(1)).mean((1, 2)),
        lambda x: x[:, 0].mean((1, 2)) - x[:, 2].mean((1, 2)),
        lambda x: (x[..., 1:] - x[..., :-1]).abs().mean((1, 2, 3)),
    ):
        same_distribution(statistic(ours), statistic(theirs))


def test_a_crop_that_never_fits_is_centred() -> None:
    draws = make().draw(3, seed=0, step=0)
    wide, tall = torch.tensor([[0.0, 45.0, 10.0, 10.0]]), torch.tensor([[45.0, 0.0, 10.0, 10.0]])
    assert torch.equal(draws.boxes(10, 100), wide.repeat(6, 1))
    sizes = torch.tensor([10, 100]).repeat(3)  # one for each row
    assert torch.equal(draws.boxes(sizes, sizes.flip(0)), torch.cat([wide, tall]).repeat(3, 1))


def test_flips_have_their_probability_and_are_independent() -> None:
    images = torch.zeros(2000, 1, 4, 4, dtype=torch.uint8)
    images[..., 0] = 255
    flipped = make(flip=0.3)(images, seed=0, step=0)[:, 0, 0, 0] == 0
    assert abs(flipped.double().mean() - 0.3) < 4 * math.sqrt(0.21 / 4000)
    same = (flipped[:2000] == flipped[2000:]).double().mean()
    assert abs(same - 0.58) < 4 * math.sqrt(0.25 / 2000)  # 0.3^2 + 0.7^2


def test_views_may_have_different_recipes() -> None:
    images = pictures(100)
    byol = make(views=[{"blur": 1.0}, {"blur": 0.0, "solarize": 1.0}, {"crop_scale": [0.1, 0.2]}])
    draws = byol.draw(100, seed=0, step=0)
    assert draws.blurred.view(3, 100).double().mean(1).tolist() == [1, 0, 0]
    assert draws.solarized.view(3, 100).double().mean(1).tolist() == [0, 1, 0]
    views = byol(images, seed=0, step=0).unflatten(0, (3, 100))
    assert views.shape == (3, 100, 3, 32, 32)
    torch.testing.assert_close(views[1], tv.solarize(images / 255, 0.5), atol=1e-6, rtol=0)
    assert (draws.boxes(32, 32).view(3, 100, 4)[:2, :, 2:] == 32).all()
    assert (draws.boxes(32, 32).view(3, 100, 4)[2, :, 2:] < 16).all()


def test_with_channels_repeats_grey_and_takes_the_luma_of_colours() -> None:
    colour = pictures(4)
    assert with_channels(colour, 3) is colour
    luma = (torch.tensor([0.2989, 0.587, 0.114]).view(3, 1, 1) * colour).sum(1, keepdim=True)
    grey = with_channels(colour, 1)
    assert grey.dtype == torch.uint8
    assert torch.equal(grey, luma.round().byte())
    torch.testing.assert_close(with_channels(colour / 255, 1), tv.rgb_to_grayscale(colour / 255))
    assert torch.equal(with_channels(grey, 3), grey.repeat(1, 3, 1, 1))
    assert torch.equal(with_channels(with_channels(grey, 3), 1), grey)


@pytest.mark.parametrize("exact", [True, False])
def test_a_part_of_a_batch_gets_the_views_of_the_whole(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    augment = make(**ALL, rotation=5.0 if exact else 0.0, exact=exact)
    images = pictures(6)
    whole = augment(images, seed=0, step=3)
    for first, last in ((0, 2), (2, 5), (5, 6)):
        part = augment(images[first:last], seed=0, step=3, first=first, total=6)
        torch.testing.assert_close(part, torch.cat([whole[first:last], whole[6 + first : 6 + last]]))
    monkeypatch.setattr(module, "CPU_CHUNK_FLOATS", 2 * 2 * 3 * 32 * 32)  # two images at a time
    torch.testing.assert_close(augment(images, seed=0, step=3), whole)


def test_crops_become_the_views_that_their_images_would() -> None:
    augment, images = make(**ALL, size=32), pictures(8, side=32)
    draws = augment.draw(8, seed=0, step=1)
    boxes = enumerate(draws.boxes(32, 32).int().tolist())
    cut = [tv.resized_crop(images[row % 8], *box, [32, 32], antialias=True) for row, box in boxes]
    crops = torch.stack(cut).unflatten(0, (2, 8)).transpose(0, 1)  # [B, V, C, S, S]
    views, whole = augment(crops, seed=0, step=1), augment(images, seed=0, step=1)
    assert (views - whole).abs().mean() < 2e-3, "the crops were rounded to bytes"
    with pytest.raises(ValueError, match="rotation comes before the crop"):
        make(rotation=3.0)(crops, seed=0, step=1)


@pytest.mark.parametrize("exact", [True, False])
def test_on_a_gpu_nothing_leaves_it(exact: bool) -> None:
    """Fake tensors have shapes and devices only. An operation on tensors of different devices raises."""
    views = make(**ALL, rotation=5.0, exact=exact)(
        torch.empty(4, 3, 32, 32, dtype=torch.uint8, device="meta"), seed=0, step=0
    )
    assert views.device.type == "meta"
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        images = mode.from_tensor(torch.empty(4, 3, 32, 32, dtype=torch.uint8)).to("cuda")
        rows = torch.zeros(4, device="cuda")
        taps = geometry.resize_taps(rows, rows + 9, 32, 24, rows)
        out = geometry.blur(geometry.separable(images.float(), taps, taps), rows + 1, 3)
        out = colour.linear(geometry.rotate(out, rows), torch.ones(4, 3, 6, device="cuda"))
        assert out.device.type == "cuda"
        assert out.shape == (4, 3, 24, 24)
