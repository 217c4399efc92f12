"""Images on disk: decoding, keyed views in any number of processes, broken files, and the cache."""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image
from sklearn.datasets import load_sample_images
from test_datasets import COLOUR, COMMON, truncate
from test_probe import CONFIG
from torchvision.transforms.v2 import functional as F

from scclr.augment import Augment
from scclr.config import ProjectorConfig, UserError, build, conf_dir
from scclr.datasets import ImageSet, cache
from scclr.datasets.decode import centre, crops, decode
from scclr.datasets.files import Files, read_ahead
from scclr.datasets.imagefolder import ImageFolder
from scclr.encoders.convnet import ConvNet
from scclr.loader import batch_indices, batches, suited, views
from scclr.model import Model
from scclr.probe import features

# Python 3.12 and later warn of every fork in a process with threads; PyTorch's loader forks.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
PHOTOGRAPHS = [Image.fromarray(photograph) for photograph in load_sample_images().images]  # 640 x 427


def write_photographs(folder: Path, per_class: int = 10, size: tuple[int, int] | None = None) -> None:
    """JPEGs of two classes, of different sizes unless ``size`` is given: one is grey, one CMYK, one a PNG."""
    draw = np.random.default_rng(0)
    for name, photograph in zip(("china", "flower"), PHOTOGRAPHS, strict=True):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            left, top = draw.integers(0, 200, 2).tolist()
            image = photograph.crop((left, top, left + 200, top + 200)).resize(
                size or (70 + 5 * (i % 16), 110 - 4 * (i % 16))
            )
            mode = {1: "L", 2: "CMYK"}.get(i, "RGB")
            image.convert(mode).save(folder / name / (f"{i}.png" if i == 3 else f"{i}.jpg"), quality=95)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    write_photographs(folder)
    return folder


def tree(root: Path, **changes: object) -> ImageFolder:
    settings = {"test": 0.25, "image_size": 24, "root": str(root), "in_memory": False, "workers": 0}
    return ImageFolder(**{**COMMON, **COLOUR, **settings, **changes})  # type: ignore[arg-type]


def everything(root: Path, **changes: object) -> ImageSet:
    return tree(root, **changes).read().train


def augmentation(name: str = "simclr", **changes: object) -> Augment:
    node: Any = OmegaConf.to_container(OmegaConf.load(conf_dir() / "augment" / f"{name}.yaml"))
    augment: Augment = build("augment", {**node, **changes})
    return augment


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize("size", [(61, 50), (50, 61), (40, 40), (30, 90)])
def test_centre_is_torchvisions_resize_and_crop(size: tuple[int, int]) -> None:
    image = PHOTOGRAPHS[0].resize(size)
    expected = F.center_crop(F.resize(pixels(image), [40], antialias=True), [32, 32])
    assert torch.equal(centre(image, 40, 32), expected)


@given(st.tuples(st.integers(0, 20), st.integers(0, 30), st.integers(1, 30), st.integers(1, 40)))
@settings(deadline=None, max_examples=30)
def test_crops_are_torchvisions_resized_crop(box: tuple[int, int, int, int]) -> None:
    image = PHOTOGRAPHS[1].resize((70, 50))
    views = crops(image, torch.tensor([box, (0, 0, 50, 70)], dtype=torch.float32), 24)
    top, left, height, width = box
    assert torch.equal(views[0], F.resized_crop(pixels(image), top, left, height, width, [24, 24], antialias=True))
    assert torch.equal(views[1], F.resize(pixels(image), [24, 24], antialias=True))


def test_a_large_jpeg_is_reduced_while_decoding(tmp_path: Path) -> None:
    PHOTOGRAPHS[0].save(tmp_path / "large.jpg", quality=95)
    with Image.open(tmp_path / "large.jpg") as image:
        assert decode(image, 427 / 48).shape == (3, 107, 160)  # a quarter, more than twice 48
    with Image.open(tmp_path / "large.jpg") as image:
        assert decode(image, 427 / 120).shape == (3, 427, 640)
    box = torch.tensor([[13.0, 101.0, 400.0, 500.0]])
    with Image.open(tmp_path / "large.jpg") as image:
        reduced = crops(image, box, 48)[0]
    with Image.open(tmp_path / "large.jpg") as image:
        whole = F.resized_crop(pixels(image), 13, 101, 400, 500, [48, 48], antialias=True)
    error = (reduced.float() - whole.float()).abs()
    assert error.mean() < 3  # levels of 255; the box is rounded to reduced pixels


def test_cmyk_grey_and_png_come_out_in_rgb(photographs: Path) -> None:
    data = everything(photographs)
    whole = torch.cat(list(data.blocks(7)))
    assert whole.shape == data.images.shape == (20, 3, 24, 24)
    write_photographs(photographs.parent / "plain", size=(70, 70))
    with Image.open(photographs.parent / "plain" / "china" / "2.jpg") as cmyk:
        assert cmyk.mode == "CMYK"
        ink = centre(cmyk, 70, 70)
    expected = Image.open(photographs.parent / "plain" / "china" / "2.jpg").convert("RGB")
    assert (ink.float() - pixels(expected).float()).abs().mean() < 1
    grey = whole[[i for i in range(20) if i % 10 == 1]]
    assert torch.equal(grey[:, 0], grey[:, 2])


# ---------------------------------------------------------------- batches


def gathered(data: ImageSet, steps: range, size: int = 1, **changes: object) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(views of all processes in the order of an image, labels) of each step."""
    augment = augmentation(**{"size": 16, **changes})
    ranks = [
        list(batches(data, augment, seed=3, batch_size=8, steps=steps, rank=rank, size=size)) for rank in range(size)
    ]
    found = []
    for step, parts in zip(steps, zip(*ranks, strict=True), strict=True):
        views = [
            augment(part.images, seed=3, step=step, first=rank * 8 // size, total=8).unflatten(0, (2, -1))
            for rank, part in enumerate(parts)
        ]
        found.append((torch.cat(views, 1), parts[0].labels))
    return found


@pytest.mark.parametrize("cached", [False, True])
def test_workers_processes_and_resuming_change_nothing(
    cached: bool, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scclr.loader.BLOCK", 3)  # several blocks to a share, the last one short
    folder = str(tmp_path) if cached else None
    expected = gathered(everything(photographs, cache=folder), range(6))  # two steps an epoch
    read = everything(photographs, cache=folder, workers=2)
    again = gathered(read, range(6), size=2)
    resumed = gathered(read, range(3, 6), size=1)
    assert len(again) == 6
    for (seen, labels), (other, others) in zip(expected + expected[3:], again + resumed, strict=True):
        assert torch.equal(seen, other)
        assert torch.equal(labels, others)
    assert not torch.equal(expected[0][0], expected[2][0])


def test_crops_of_files_are_those_of_the_images(tmp_path: Path) -> None:
    """The same keyed boxes: cut from files by the workers, or from whole images in memory by the augmentation."""
    write_photographs(tmp_path, size=(60, 60))
    data = everything(tmp_path)
    memory = ImageSet(torch.stack([pixels(Image.open(path)) for path in sorted(tmp_path.glob("*/*"))]), data.labels)
    for (seen, labels), (other, others) in zip(
        gathered(data, range(3), jitter=0, grayscale=0), gathered(memory, range(3), jitter=0, grayscale=0), strict=True
    ):
        assert torch.equal(labels, others)
        assert (seen - other).abs().max() < 1.01 / 255  # the crops are rounded to whole levels


@pytest.mark.parametrize("cached", [False, True])
def test_views_of_a_few_are_those_of_a_step(cached: bool, photographs: Path, tmp_path: Path) -> None:
    data, augment = everything(photographs, cache=str(tmp_path) if cached else None, resize=32), augmentation()
    (batch,) = batches(data, augment, seed=1, batch_size=20, steps=range(1))
    order = batch_indices(1, 0, 20, 20)
    expected = suited(augment, data.images)(batch.images, seed=1, step=0)
    assert expected.shape == (40, 3, 24, 24)
    assert torch.equal(views(data[order], augment, seed=1, step=0), expected)


def test_order_and_labels(photographs: Path) -> None:
    data = everything(photographs)
    whole = torch.cat(list(data.blocks(64)))
    seen = torch.cat([labels for _, labels in gathered(data, range(2))])
    assert torch.equal(data[torch.tensor([3, 1])].images.read(torch.arange(2)).images, whole[[3, 1]])  # type: ignore[union-attr]
    assert seen.bincount().sum() == 16


def test_rotation_of_files_is_refused(photographs: Path, tmp_path: Path) -> None:
    turning = augmentation(views=[{}, {"rotation": 10}])
    with pytest.raises(UserError, match=r"augment\.rotation=10 needs whole images.*dataset\.cache=<folder>"):
        suited(turning, everything(photographs).images)
    assert suited(turning, everything(photographs, cache=str(tmp_path), resize=32).images).size == 24


def test_a_killed_worker_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r"DataLoader worker.*smaller dataset\.workers"):
        list(read_ahead(lambda key: os.kill(os.getpid(), signal.SIGKILL), range(2), workers=1))


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_a_worker_dies_with_its_process(tmp_path: Path) -> None:
    """It would hold the locks of a killed run, which could not be resumed at once."""
    with open(tmp_path / "lock", "w") as lock:
        child = os.fork()
        if child == 0:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for _ in read_ahead(lambda key: key, range(1000), workers=1):
                os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    with open(tmp_path / "lock", "w") as lock:
        for _ in range(20):  # 2 seconds
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            time.sleep(0.1)
    pytest.fail("the lock of a killed process is held")


def test_the_order_of_workers_is_not_drawn_from_the_global_generator(photographs: Path) -> None:
    torch.manual_seed(0)
    list(everything(photographs, workers=2).blocks(5))
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(3))


# ---------------------------------------------------------------- evaluation


def test_features_are_those_of_images_in_memory(photographs: Path) -> None:
    torch.manual_seed(0)
    projector = ProjectorConfig(depth=2, hidden_dim=8, out_dim=4, batch_norm=True, normalize=True)
    model = Model(ConvNet(in_channels=3, widths=[8, 16], stem_stride=1), projector, [0.5] * 3, [0.2] * 3)
    disk, memory = tree(photographs, workers=1).load(), tree(photographs, in_memory=True).load()
    for part in ("train", "validation", "test"):
        a, b = getattr(disk, part), getattr(memory, part)
        assert isinstance(b.images, torch.Tensor)
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(torch.cat(list(a.blocks(64))), b.images)
        torch.testing.assert_close(features(model, a, 3), features(model, b, CONFIG.batch_size))


# ---------------------------------------------------------------- broken files


def broken(tmp_path: Path) -> Path:
    """A tree in which china/4.jpg is cut short, its successor is no image and flower/0.jpg has been deleted since."""
    write_photographs(tmp_path)
    truncate(tmp_path / "china" / "4.jpg")
    (tmp_path / "china" / "5.jpg").write_bytes(b"not an image")
    return tmp_path


def test_a_broken_file_is_refused_and_named(tmp_path: Path) -> None:
    root = broken(tmp_path)
    advice = r"china/4\.jpg: .*truncated.*; replace or delete this file, or type dataset\.on_corrupt=skip"
    with pytest.raises(UserError, match=advice):
        list(everything(root).blocks(64))
    with pytest.raises(UserError, match=r"china/[45]\.jpg"):
        gathered(everything(root, workers=2), range(2))
    for how in ({"in_memory": True, "validation": 0.5}, {"cache": str(tmp_path / "cache")}):
        with pytest.raises(UserError, match=r"china/[45]\.jpg.*on_corrupt=skip"):
            tree(root, **how).load()
    assert not list((tmp_path / "cache").glob("*/"))


def test_a_broken_file_is_replaced_by_the_next_of_its_class(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = broken(tmp_path)
    data = everything(root, on_corrupt="skip", workers=1)
    for _ in range(2):
        whole = torch.cat(list(data.blocks(6)))
        assert torch.equal(whole[4], whole[6])
        assert torch.equal(whole[5], whole[6])
    said = capsys.readouterr().err
    assert said.count("corrupt image 1: ") == said.count("corrupt image 2: ") == 1
    assert said.count("china/4.jpg") == said.count("china/5.jpg") == 1
    last = data[torch.tensor([0, 12, 4])].images  # round to the first of its class that is left
    assert torch.equal(last.read(torch.tensor([2])).images[0], whole[0])  # type: ignore[union-attr]
    for (seen, labels), (other, others) in zip(
        gathered(data, range(4)), gathered(everything(root, on_corrupt="skip"), range(4), size=2), strict=True
    ):
        assert torch.equal(seen, other)
        assert torch.equal(labels, others)


def test_a_disk_that_fails_is_not_a_broken_file(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = everything(photographs, on_corrupt="skip")

    def fail(path: str) -> Image.Image:
        raise OSError(5, "Input/output error", path)

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(UserError, match="Input/output error"):
        list(data.blocks(64))


def test_a_class_without_a_readable_file_is_refused(tmp_path: Path) -> None:
    write_photographs(tmp_path, per_class=2)
    for path in (tmp_path / "china").iterdir():
        path.write_bytes(b"not an image")
    with pytest.raises(UserError, match="no readable image of its class"):
        list(everything(tmp_path, on_corrupt="skip").blocks(64))


@pytest.mark.parametrize("held", ["memory", "cache"])
def test_broken_files_are_left_out_of_memory_and_cache(tmp_path: Path, held: str) -> None:
    root = broken(tmp_path / "tree")
    how = {"in_memory": True} if held == "memory" else {"cache": str(tmp_path / "cache")}
    splits = tree(root, on_corrupt="skip", **how).load()
    parts = (splits.train, splits.validation, splits.test)
    assert sum(map(len, parts)) == 18
    assert sum(part.labels.bincount(minlength=2) for part in parts).tolist() == [8, 10]  # type: ignore[union-attr]
    assert all(block.float().std() > 1 for part in parts for block in part.blocks(1)), "no blank is left"
    if held == "cache":
        with pytest.raises(UserError, match=r"2 of the files were corrupt.*china/4\.jpg.*on_corrupt=skip"):
            tree(root, **how).load()


# ---------------------------------------------------------------- the cache


def squares(folder: Path, root: Path, **changes: object) -> ImageSet:
    return everything(root, cache=str(folder), image_size=24, resize=32, **changes)


def test_a_cache_reads_no_image_again(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_photographs(tmp_path / "tree")
    built = squares(tmp_path / "cache", tmp_path / "tree")
    assert "20 images of 32 x 32 pixels take 0.00 GiB, of " in capsys.readouterr().err
    expected = torch.cat(list(everything(tmp_path / "tree", image_size=32).blocks(64)))
    for path in (tmp_path / "tree").glob("*/*"):
        path.write_bytes(b"")
    found = squares(tmp_path / "cache", tmp_path / "tree", workers=1)
    assert capsys.readouterr().err == ""
    assert found.images.shape == (20, 3, 24, 24)
    for data in (built, found):
        (batch,) = batches(data, augmentation(), seed=0, batch_size=20, steps=range(1))
        assert batch.images.shape == (20, 3, 32, 32)  # whole, for crops on the device
        assert torch.equal(batch.images.flatten(1).sum(1).sort().values, expected.flatten(1).sum(1).sort().values)
        assert torch.equal(torch.cat(list(data.blocks(9))), expected[..., 4:28, 4:28])
    other = everything(tmp_path / "tree", cache=str(tmp_path / "cache"), image_size=16, on_corrupt="skip")
    assert len(other) == 0, "another size is another cache, and no file can be read now"


def test_a_killed_build_is_not_taken_for_whole(tmp_path: Path, photographs: Path) -> None:
    child = os.fork()
    if child == 0:
        Files.squares = lambda self: iter([os.kill(os.getpid(), signal.SIGKILL)])  # type: ignore[assignment, func-returns-value, method-assign]
        squares(tmp_path, photographs)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    left = sorted(path.suffix for path in tmp_path.iterdir())
    assert left == [".lock", ".part"]
    assert len(squares(tmp_path, photographs)) == 20
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", ".lock"]


@pytest.mark.parametrize("stop", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_stopped_build_leaves_nothing(
    stop: BaseException, tmp_path: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Files) -> Iterator[Any]:
        yield torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.ones(2, dtype=torch.bool)
        raise stop

    monkeypatch.setattr(Files, "squares", fail)
    expected = UserError if isinstance(stop, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="No space left.*give another folder" if expected is UserError else None):
        squares(tmp_path, photographs)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_a_full_disk_and_a_short_file_are_refused(
    tmp_path: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    squares(tmp_path / "whole", photographs)
    (path,) = (tmp_path / "whole").glob("*/images.u8")
    truncate(path)
    with pytest.raises(UserError, match="61,410 bytes instead of 61,440; delete this folder"):
        squares(tmp_path / "whole", photographs)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"take 0\.00 GiB, 0\.00 GiB are free; give another folder or a smaller"):
        squares(tmp_path / "new", photographs)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"dataset\.cache=.*file"):
        squares(tmp_path / "file", photographs)


# ---------------------------------------------------------------- memory and whole runs


def test_splits_hold_every_pixel_once() -> None:
    """Subset, carved and thinned, a set in memory keeps the size of its uint8."""
    from test_datasets import digits

    splits = digits(test=0.2).load()
    storages = {
        part.images.untyped_storage().data_ptr(): part.images.untyped_storage().nbytes()  # type: ignore[union-attr]
        for part in (splits.pretrain, splits.train, splits.validation, splits.test)
    }
    assert sum(storages.values()) == 1797 * 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 0}, "image_size=0"),
        ({"resize": 20}, "give at least image_size=24"),
        ({"on_corrupt": "ignore"}, "refuse or skip"),
        ({"workers": -1}, "workers=-1"),
    ],
)
def test_bad_arguments(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tree(Path(), **changes)


def test_a_run_from_files(scclr: Callable[..., int], folder: Path, capfd: Any) -> None:
    write_photographs(folder / "tree" / "train", per_class=24)
    write_photographs(folder / "tree" / "test", per_class=4)
    line = ["train", "dataset=imagefolder", "dataset.root=tree", "dataset.in_memory=false", "dataset.image_size=16"]
    line += [*(word for word in TINY if "limit" not in word and "batch_size" not in word), "pretrain.batch_size=16"]
    assert scclr(*line) == 1
    assert "augment.rotation=15 needs whole images" in capfd.readouterr().err
    assert scclr(*line, "augment=simclr", "dataset.workers=2") == 0
    assert len(list((folder / "runs").glob("*/*/result.json"))) == 1


@pytest.mark.slow
def test_two_processes_stream_the_run_of_one(folder: Path) -> None:
    write_photographs(folder / "tree", per_class=40)
    line = [sys.executable, "-m", "scclr", "train", "stages=[pretrain]", "dataset=imagefolder", "dataset.root=tree"]
    line += ["dataset.in_memory=false", "dataset.image_size=16", "dataset.workers=2", "augment=simclr", "optimizer=sgd"]
    line += [word for word in TINY if "limit" not in word and "batch_size" not in word]
    line += ["pretrain.batch_size=16", "pretrain.log_every=1", "deterministic=true"]
    rows = {}
    for processes in (1, 2):
        words = [*line, f"nproc={processes}", f"runs={processes}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (record,) = (folder / str(processes)).glob("*/*/metrics.jsonl")
        found = [json.loads(row) for row in record.read_text().splitlines()]
        rows[processes] = [row for row in found if "pretrain/loss" in row]
    assert len(rows[1]) == len(rows[2]) > 3
    for step, (one, two) in enumerate(zip(rows[1], rows[2], strict=True)):
        for name in ("pretrain/loss", "pretrain/attract", "pretrain/repel"):
            assert one[name] == pytest.approx(two[name], rel=1e-3 if step else 1e-6)  # rounding grows with the steps
