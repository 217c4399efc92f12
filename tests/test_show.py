"""The sheet of views."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from augment_helpers import simclr
from conftest import TINY, run_folders
from PIL import Image

from scclr.datasets import ImageSet, Splits
from scclr.datasets.show import SHOWN_STEPS, examples, sheet

Run = Callable[..., int]


def test_a_sheet_shows_every_class_beside_its_own_views() -> None:
    images = torch.stack([torch.full((3, 16, 16), 20 * label, dtype=torch.uint8) for label in (2, 0, 1, 2)])
    data = ImageSet(images, torch.tensor([2, 0, 1, 2]))
    splits = Splits(data, data, data, data, ("a", "bb", "ccc"), (0.5,) * 3, (0.2,) * 3)
    plain = simclr(jitter=0.0, grayscale=0.0, views=[{}, {}, {"solarize": 1.0}])
    page = sheet(splits, plain, seed=0)
    assert examples(data).labels.tolist() == [0, 1, 2, 2]
    rows, columns = 4, 1 + 3 * SHOWN_STEPS
    assert page.width > columns * 96
    assert page.height > rows * 96
    for row, label in enumerate((0, 1, 2, 2)):
        middle = page.height - 48 - (rows - 1 - row) * 100
        seen = {page.getpixel((x, middle))[0] for x in range(40, page.width)}
        assert seen == {20 * label, 255}, "its own class, and white between"


@pytest.mark.parametrize("channels", [1, 3])
def test_few_images_are_enough(channels: int) -> None:
    data = ImageSet(torch.zeros(2, channels, 200, 200, dtype=torch.uint8), torch.tensor([-1, -1]))
    splits = Splits(data, data, data, data, ("a", "b"), (0.5,) * channels, (0.2,) * channels)
    assert sheet(splits, simclr(), seed=0).mode == "RGB"


def test_show_writes_what_the_run_begins_with(scclr: Run, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scclr("show", *TINY) == 0
    path = folder / capsys.readouterr().out.strip()
    assert path.name == "views.png"
    first = Image.open(path).tobytes()
    assert scclr("train", *TINY) == 0
    (run,) = run_folders(folder)
    assert run == path.parent
    assert Image.open(path).tobytes() == first


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["augment.views=[{}]"], "two views or more"),
        (["augment=simcrl"], "did you mean simclr"),
        (["dataset=imagefolder", "dataset.root=nowhere", "dataset.image_size=8"], "nowhere: no such folder"),
        (["-m", "seed=0,1"], "no flag of this command"),
    ],
)
def test_errors(words: list[str], message: str, scclr: Run, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scclr("show", *words) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (folder / "runs").exists()
