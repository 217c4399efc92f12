"""Which arguments an augmentation takes, and which it refuses."""

import math
import re

import pytest
import torch
from augment_helpers import OFF, make, pictures

from scclr.augment import RANGES
from scclr.config.build import build
from scclr.config.errors import UserError

PAIRS = ("crop_scale", "crop_ratio", "blur_sigma")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0, 1e30, True, None, "often"])
@pytest.mark.parametrize("name", [*RANGES, "size"])
def test_every_number_must_be_finite_and_in_its_range(name: str, value: object) -> None:
    if (name, value) == ("size", None):
        return  # the size of the images
    wrong = [0.5, value] if name in PAIRS else value
    message = re.escape(f"{name}={wrong}: give ")
    with pytest.raises(ValueError, match=message) as caught:
        make(**{name: wrong})
    assert "\n" not in str(caught.value)
    if name != "size":
        with pytest.raises(ValueError, match=message):
            make(views=[{}, {name: wrong}])
    if isinstance(value, float):
        with pytest.raises(UserError, match=f"augment.*{name}"):
            build("augment", {"_target_": "scclr.augment.Augment", **OFF, name: wrong})


@pytest.mark.parametrize("name", RANGES)
def test_ranges_include_their_ends_and_nothing_beyond(name: str) -> None:
    images = pictures(3, side=20)
    for end, beyond in zip(RANGES[name], (-1.0, 1.0), strict=True):
        inside = [end, end] if name in PAIRS else end
        on = {"jitter": 1.0, "blur": 1.0, "exact": False} | {name: inside}
        assert make(**on)(images, seed=0, step=0).isfinite().all()
        outside = end + beyond * max(1e-3, abs(end)) / 100
        with pytest.raises(ValueError, match=f"{name}="):
            make(**{name: [outside, outside] if name in PAIRS else outside})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotation": 181}, "rotation=181: give a number from 0 to 180"),
        ({"crop_ratio": [2.0, 1.0]}, "0.01 <= low <= high <= 100"),
        ({"crop_scale": [0.5]}, "low <= high"),
        ({"crop_scale": 0.5}, "low <= high"),
        ({"views": []}, "give one or more"),
        ({"views": [{}, {"blurr": 1}]}, "blurr is not part of a recipe"),
        ({"size": 0}, "size=0: give pixels from 1 to 10000"),
        ({"size": 10001}, "size=10001"),
        ({"size": 32.0}, r"size=32\.0"),
    ],
)
def test_malformed_arguments_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_a_view_of_one_pixel_can_be_blurred() -> None:
    images = pictures(2)
    views = make(size=1, blur=1.0, exact=False)(images, seed=0, step=0)
    torch.testing.assert_close(views, make(size=1)(images, seed=0, step=0))
