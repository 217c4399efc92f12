"""Augmentation against torchvision's: pixel by pixel with the same parameters, and the parameters' distributions."""

import math

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from omegaconf import OmegaConf
from scipy.stats import kstest
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.transforms import ColorJitter, RandomResizedCrop, v2

from scclr import augment as module
from scclr.augment import Augment, Draws, colour, geometry
from scclr.config import UserError, build, conf_dir

OFF = {
    "views": [{}, {}], "size": None, "exact": True,
    "crop_scale": [1.0, 1.0], "crop_ratio": [1.0, 1.0], "flip": 0.0, "rotation": 0.0, "jitter": 0.0, "brightness": 0.0,
    "contrast": 0.0, "saturation": 0.0, "hue": 0.0, "grayscale": 0.0, "blur": 0.0, "blur_sigma": [0.1, 2.0],
    "solarize": 0.0,
}  # fmt: skip
JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
CROP = {"crop_scale": [0.2, 1.0], "crop_ratio": [3 / 4, 4 / 3], "flip": 0.5}
ALL = {**CROP, **JITTER, "jitter": 0.8, "grayscale": 0.2, "blur": 0.5, "solarize": 0.3}


def make(**changes: object) -> Augment:
    return Augment(**{**OFF, **changes})  # type: ignore[arg-type]


def pictures(n: int = 6, channels: int = 3, side: int = 32) -> Tensor:
    smooth = torch.rand(n, channels, 6, 6, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(smooth, (side, side), mode="bilinear").mul(255).byte()


def column(values: list[float]) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1)


def by_torchvision(image: Tensor, draws: Draws, row: int, side: int) -> Tensor:
    """View ``row``, transformed step by step by torchvision's own functions with the parameters drawn."""
    x = tv.to_dtype(image, torch.float32, scale=True)
    if draws.degrees[row] != 0:
        x = tv.rotate(x, float(draws.degrees[row]), interpolation=tv.InterpolationMode.BILINEAR)
    top, left, height, width = draws.boxes(*image.shape[1:])[row].int().tolist()
    x = tv.resized_crop(x, top, left, height, width, [side, side], antialias=True)
    if draws.flipped[row]:
        x = tv.horizontal_flip(x)
    adjust = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue]
    for kind in draws.turn[row].tolist() if draws.jittered[row] else []:
        x = adjust[kind](x, float(draws.factors[row, kind]))
    if draws.grey[row]:
        x = tv.rgb_to_grayscale(x, 3 if len(x) == 3 else 1)
    if draws.blurred[row]:
        size = max(3, 2 * (side // 20) + 1)
        x = tv.gaussian_blur(x, [size, size], [float(draws.sigma[row])] * 2)
    return tv.solarize(x, 0.5) if draws.inverted[row] else x


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("side", "size"), [(32, None), (48, 40), (96, 25), (24, 64)])
def test_exact_views_are_torchvisions(channels: int, side: int, size: int | None) -> None:
    """Every pixel within 1/2550 of torchvision's, but for hue where two channels are nearly equal."""
    augment = make(**ALL | {"solarize": 0.0, "rotation": 30.0, "size": size})
    images = pictures(24, channels, side)
    views = augment(images, seed=3, step=7)
    draws = augment.draw(24, seed=3, step=7)
    expected = torch.stack([by_torchvision(images[row % 24], draws, row, size or side) for row in range(48)])
    assert (views - expected).abs().max() < 4e-4
    assert (views - expected).abs().mean() < 2e-6


def test_solarize_is_torchvisions_but_for_ties() -> None:
    augment, images = make(**ALL), pictures(24)
    views, draws = augment(images, seed=0, step=0), augment.draw(24, seed=0, step=0)
    expected = torch.stack([by_torchvision(images[row % 24], draws, row, 32) for row in range(48)])
    tie = (expected - 0.5).abs() < 1e-3  # on which side of the threshold a pixel falls
    assert draws.inverted.any()
    torch.testing.assert_close(views[~tie], expected[~tie], atol=4e-4, rtol=0)


def test_nothing_is_the_identity() -> None:
    images = pictures()
    for exact in (True, False):
        views = make(exact=exact)(images, seed=0, step=0)
        torch.testing.assert_close(views, images.repeat(2, 1, 1, 1) / 255, atol=2e-6, rtol=0)


def test_views_are_keyed_by_seed_and_step() -> None:
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


def test_rotation_is_torchvisions() -> None:
    x = pictures(3, channels=1, side=16) / 255
    degrees = [0.0, 20.0, -75.0]
    views = geometry.rotate(x, torch.tensor(degrees))
    for view, image, angle in zip(views, x, degrees, strict=True):
        expected = tv.rotate(image, angle, interpolation=tv.InterpolationMode.BILINEAR)
        inside = tv.rotate(torch.ones_like(image), angle, interpolation=tv.InterpolationMode.BILINEAR) > 0.999
        torch.testing.assert_close(view[inside], expected[inside], atol=2e-5, rtol=0)
    assert views[1, 0, 0, 0] == 0, "corners are black"


@pytest.mark.parametrize(
    ("operation", "reference", "factors"),
    [
        (colour.adjust_brightness, tv.adjust_brightness, [0.0, 0.6, 1.0, 1.7]),
        (colour.adjust_contrast, tv.adjust_contrast, [0.0, 0.6, 1.0, 1.7]),
        (colour.adjust_saturation, tv.adjust_saturation, [0.0, 0.6, 1.0, 1.7]),
        (colour.adjust_hue, tv.adjust_hue, [-0.5, -0.1, 0.0, 0.3]),
    ],
)
def test_colour_is_torchvisions(operation, reference, factors: list[float]) -> None:  # type: ignore[no-untyped-def]
    x = pictures(4) / 255
    x[0, :, :4, :4] = 0.5  # grey pixels have no hue
    views = operation(x, column(factors))
    for view, image, factor in zip(views, x, factors, strict=True):
        torch.testing.assert_close(view, reference(image, factor), atol=2e-4, rtol=0)


@pytest.mark.parametrize("exact", [True, False])
def test_saturation_hue_and_grey_leave_grey_images_alone(exact: bool) -> None:
    images, grey = pictures(channels=1), {"jitter": 1.0, "saturation": 0.9, "hue": 0.4, "grayscale": 1.0}
    views = make(**grey, exact=exact)(images, seed=0, step=0)
    torch.testing.assert_close(views, images.repeat(2, 1, 1, 1) / 255, atol=2e-6, rtol=0)
    colours = make(**grey, exact=exact)(images.expand(-1, 3, -1, -1).contiguous(), seed=0, step=0)
    torch.testing.assert_close(colours, views.expand(-1, 3, -1, -1), atol=2e-4, rtol=0)  # LUMA adds up to 0.9999


def test_the_linear_map_is_the_exact_colour_without_clamps() -> None:
    """On mild colours nothing is clamped, and without hue every order of operations is the same as one by one."""
    images = (pictures(32) * 0.3 + 90).byte()
    strengths = {"jitter": 0.8, "brightness": 0.2, "contrast": 0.3, "saturation": 0.3, "grayscale": 0.2}
    exact, fast = (make(**strengths, exact=value)(images, seed=0, step=1) for value in (True, False))
    torch.testing.assert_close(fast, exact, atol=1e-5, rtol=0)


def test_the_linear_map_departs_from_torchvision_as_documented() -> None:
    """SimCLR's strengths on saturated colours: what the clamps and HSV amount to, in units of one pixel."""
    images = pictures(64)
    exact, fast = (make(**JITTER, jitter=1.0, exact=value)(images, seed=0, step=0) for value in (True, False))
    gap = (exact - fast).abs()
    assert gap.mean() < 0.03
    assert gap.flatten(1).mean(1).max() < 0.12
    assert (exact.mean((2, 3)) - fast.mean((2, 3))).mean(0).abs().max() < 0.01, "no channel gains or loses"


def test_hue_turns_are_hsvs_at_thirds_and_keep_grey() -> None:
    shifts = torch.tensor([0.0, 1 / 3, -1 / 3, 0.2]).view(-1, 1, 1)
    turns = colour.hue_turns(shifts)
    red = torch.tensor([1.0, 0.0, 0.0])
    for turn, expected in zip(turns, ([1, 0, 0], [0, 1, 0], [0, 0, 1]), strict=False):
        torch.testing.assert_close(turn @ red, torch.tensor(expected).float(), atol=1e-6, rtol=0)
        assert torch.allclose(turn @ torch.full((3,), 0.4), torch.full((3,), 0.4))
    x = pictures(1)[0] / 255
    exact = tv.adjust_hue(x, 1 / 3)
    torch.testing.assert_close((turns[1] @ x.flatten(1)).view_as(x), exact, atol=1e-4, rtol=0)


def test_blur_is_torchvisions() -> None:
    x = pictures(3) / 255
    sigmas = [0.1, 0.7, 2.0]
    for size in (3, 7):
        views = geometry.blur(x, torch.tensor(sigmas), size)
        for view, image, sigma in zip(views, x, sigmas, strict=True):
            torch.testing.assert_close(view, tv.gaussian_blur(image, [size, size], [sigma, sigma]), atol=1e-5, rtol=0)


def test_jitter_order_varies_between_images() -> None:
    images = pictures(1).repeat(64, 1, 1, 1)
    for exact in (True, False):
        views = make(jitter=1.0, **JITTER, exact=exact)(images, seed=0, step=0)
        assert len({view.numpy().tobytes() for view in views}) == 128
        assert views.min() >= 0
        assert views.max() <= 1


def same_distribution(ours: Tensor, theirs: Tensor | np.ndarray) -> None:
    """Kolmogorov-Smirnov, with the seeds fixed: fails at the 0.1% level."""
    assert kstest(np.asarray(ours), np.asarray(theirs)).pvalue > 1e-3


def test_crop_boxes_are_distributed_as_torchvisions() -> None:
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


def test_jitter_factors_are_distributed_as_torchvisions() -> None:
    n, strengths = 4000, (0.4, 1.3, 0.8, 0.1)  # 1.3: the factor stops at 0
    names = ("brightness", "contrast", "saturation", "hue")
    draws = make(jitter=0.8, **dict(zip(names, strengths, strict=True))).draw(n // 2, seed=0, step=0)
    torch.manual_seed(0)
    theirs = ColorJitter(*strengths)
    reference = [theirs.get_params(theirs.brightness, theirs.contrast, theirs.saturation, theirs.hue) for _ in range(n)]
    for kind in range(4):
        same_distribution(draws.factors[:, kind], np.array([row[1 + kind] for row in reference]))
    orders = torch.stack([draws.turn[:, turn] * 4 ** (3 - turn) for turn in range(4)]).sum(0).unique(return_counts=True)
    assert len(orders[0]) == 24, "every order of the four operations"
    assert orders[1].max() < n / 24 + 5 * math.sqrt(n / 24)
    assert abs(draws.jittered.double().mean() - 0.8) < 4 * math.sqrt(0.16 / n)


@pytest.mark.parametrize("exact", [True, False])
def test_pixels_are_distributed_as_torchvisions(exact: bool) -> None:
    """Mean, spread, saturation and contrast of whole SimCLR views beside torchvision's random ones."""
    images = pictures(400)
    recipe = {**CROP, "crop_scale": [0.08, 1.0], **JITTER, "jitter": 0.8, "grayscale": 0.2, "blur": 0.5}
    ours = make(**recipe, exact=exact)(images, seed=0, step=0)
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


def test_crop_falls_back_to_the_centre() -> None:
    draws = make().draw(3, seed=0, step=0)
    assert torch.equal(draws.boxes(10, 100), torch.tensor([[0.0, 45.0, 10.0, 10.0]]).repeat(6, 1))
    tall = draws.boxes(torch.full((6,), 100), torch.full((6,), 10))  # a size for each
    assert torch.equal(tall, torch.tensor([[45.0, 0.0, 10.0, 10.0]]).repeat(6, 1))


def test_probabilities_are_kept() -> None:
    images = torch.zeros(2000, 1, 4, 4, dtype=torch.uint8)
    images[..., 0] = 255
    flipped = make(flip=0.3)(images, seed=0, step=0)[:, 0, 0, 0] == 0
    assert abs(flipped.double().mean() - 0.3) < 4 * math.sqrt(0.21 / 4000)
    same = (flipped[:2000] == flipped[2000:]).double().mean()
    assert abs(same - 0.58) < 4 * math.sqrt(0.25 / 2000), "views are independent"


def test_digits_are_turned_and_never_flipped() -> None:
    values = OmegaConf.load(conf_dir() / "augment" / "digits.yaml")
    assert values.flip == 0
    assert values.rotation > 0


def test_views_may_have_recipes_of_their_own() -> None:
    images = pictures(100)
    byol = make(views=[{"blur": 1.0}, {"blur": 0.0, "solarize": 1.0}, {"crop_scale": [0.1, 0.2]}])
    draws = byol.draw(100, seed=0, step=0)
    assert draws.blurred.view(3, 100).double().mean(1).tolist() == [1, 0, 0]
    assert draws.inverted.view(3, 100).double().mean(1).tolist() == [0, 1, 0]
    views = byol(images, seed=0, step=0).unflatten(0, (3, 100))
    assert views.shape == (3, 100, 3, 32, 32)
    torch.testing.assert_close(views[1], tv.solarize(images / 255, 0.5), atol=1e-6, rtol=0)
    assert (draws.boxes(32, 32).view(3, 100, 4)[:2, :, 2:] == 32).all()
    assert (draws.boxes(32, 32).view(3, 100, 4)[2, :, 2:] < 16).all()
    values = OmegaConf.to_container(OmegaConf.load(conf_dir() / "augment" / "byol.yaml").views)
    assert values == [{"blur": 1.0}, {"blur": 0.1, "solarize": 0.2}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flip": 1.1}, "flip=1.1"),
        ({"crop_scale": [0.5, 1.5]}, "larger than its image"),
        ({"crop_ratio": [2.0, 1.0]}, "low <= high"),
        ({"hue": 0.6}, "hue=0.6"),
        ({"contrast": -1.0}, "at least 0"),
        ({"views": [{}]}, "two views or more"),
        ({"views": []}, "two views or more"),
        ({"views": [{}, {"blurr": 1}]}, "blurr is no part of a recipe"),
        ({"views": [{}, {"blur": 2}]}, "blur=2"),
        ({"views": [{}, {"blur": "often"}]}, "blur=often: give a number"),
        ({"size": 0}, "size=0"),
    ],
)
def test_bad_arguments(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)
    with pytest.raises(UserError, match=message):
        build("augment", {"_target_": "scclr.augment.Augment", **OFF, **changes})


@pytest.mark.parametrize("exact", [True, False])
def test_a_part_of_a_batch_gets_the_views_of_the_whole(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    augment = make(**ALL, rotation=5.0) if exact else Augment(**{**OFF, **ALL, "exact": False})  # type: ignore[arg-type]
    images = pictures(6)
    whole = augment(images, seed=0, step=3)
    for first, last in ((0, 2), (2, 5), (5, 6)):
        part = augment(images[first:last], seed=0, step=3, first=first, total=6)
        torch.testing.assert_close(part, torch.cat([whole[first:last], whole[6 + first : 6 + last]]))
    monkeypatch.setattr(module, "CHUNK", 2 * 2 * 3 * 32 * 32)  # two images at a time
    torch.testing.assert_close(augment(images, seed=0, step=3), whole)


def test_crops_that_were_cut_before_are_finished_as_whole_images_are() -> None:
    augment, images = make(**ALL, size=32), pictures(8, side=32)
    draws = augment.draw(8, seed=0, step=1)
    cut = []
    for row, (top, left, height, width) in enumerate(draws.boxes(32, 32).int().tolist()):
        cut.append(tv.resized_crop(images[row % 8], top, left, height, width, [32, 32], antialias=True))
    views, whole = augment.finish(torch.stack(cut), draws), augment(images, seed=0, step=1)
    assert (views - whole).abs().mean() < 2e-3, "but for rounding the crops to bytes"
    with pytest.raises(ValueError, match="rotation comes before the crop"):
        make(rotation=3.0).finish(torch.stack(cut), draws)


@pytest.mark.parametrize("exact", [True, False])
def test_on_a_gpu_nothing_leaves_it(exact: bool) -> None:
    """Shapes and devices of the whole pipeline, without a GPU: a mix of devices raises."""
    augment = Augment(**{**OFF, **ALL, "rotation": 5.0, "exact": exact})  # type: ignore[arg-type]
    views = augment(torch.empty(4, 3, 32, 32, dtype=torch.uint8, device="meta"), seed=0, step=0)
    assert views.device.type == "meta"
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        images = mode.from_tensor(torch.empty(4, 3, 32, 32, dtype=torch.uint8)).to("cuda")
        rows = torch.zeros(4, device="cuda")
        taps = geometry.resize_taps(rows, rows + 9, 32, 24, rows)
        out = geometry.blur(geometry.separable(images.float(), taps, taps), rows + 1, 3)
        out = colour.linear(geometry.rotate(out, rows), torch.ones(4, 3, 6, device="cuda"))
        assert out.device.type == "cuda"
        assert out.shape == (4, 3, 24, 24)
