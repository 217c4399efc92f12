"""Images on disk: keyed views in any number of processes, worker processes, and broken files."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from augment_helpers import simclr
from conftest import TINY, rows_of
from image_files import all_images, image_folder, truncate, write_image, write_photographs
from PIL import Image

from scclr.config.errors import UserError
from scclr.datasets import ImageSet
from scclr.datasets.loader import batch_indices, batches, views, with_view_size
from scclr.datasets.workers import IGNORED_SIGNALS, read_ahead

# Python 3.12 and later warn of every fork in a process with threads; PyTorch's loader forks.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
assert_equal = partial(torch.testing.assert_close, rtol=0, atol=0)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    write_photographs(folder)
    return folder


# Batches --------------------------------------------------------------------------------------------------------------


def gathered(data: ImageSet, steps: range, size: int = 1, **changes: object) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(views of all processes in the order of an image, labels) of each step."""
    augment = simclr(**{"size": 16, **changes})
    ranks = [batches(data, augment, seed=3, batch_size=8, steps=steps, rank=rank, size=size) for rank in range(size)]
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
    monkeypatch.setattr("scclr.datasets.loader.IMAGES_PER_JOB", 3)  # several jobs in a step, the last one smaller
    folder = str(tmp_path) if cached else None
    expected = gathered(all_images(photographs, cache=folder), range(6))  # two steps an epoch
    data = all_images(photographs, cache=folder, workers=2)
    assert_equal(gathered(data, range(6), size=2), expected)
    assert_equal(gathered(data, range(3, 6)), expected[3:])
    assert not torch.equal(expected[0][0], expected[2][0])


def test_crops_of_files_are_those_of_the_images(tmp_path: Path) -> None:
    """The same keyed boxes: cut from files by the workers, or from whole images in memory by the augmentation."""
    write_photographs(tmp_path, size=(60, 60))
    data, memory = (all_images(tmp_path, image_size=60, in_memory=held) for held in (False, True))
    assert isinstance(memory.images, torch.Tensor)
    cut, whole = (gathered(images, range(3), jitter=0.0, grayscale=0.0) for images in (data, memory))
    torch.testing.assert_close(cut, whole, rtol=0, atol=1.01 / 255)  # the crops are rounded to whole levels


@pytest.mark.parametrize("cached", [False, True])
def test_views_of_a_few_are_those_of_a_step(cached: bool, photographs: Path, tmp_path: Path) -> None:
    data, augment = all_images(photographs, cache=str(tmp_path) if cached else None, resize=32), simclr()
    (batch,) = batches(data, augment, seed=1, batch_size=20, steps=range(1))
    expected = with_view_size(augment, data.images)(batch.images, seed=1, step=0)
    assert expected.shape == (40, 3, 24, 24)
    assert torch.equal(views(data[batch_indices(1, 0, 20, 20)], augment, seed=1, step=0), expected)


def test_an_index_selects_images_with_their_labels(tmp_path: Path) -> None:
    for i in range(12):
        write_image(tmp_path / ("cat" if i < 6 else "dog") / f"{i:02}.png", level=20 * i)
    data, levels = all_images(tmp_path), torch.arange(12) * 20
    some = data[torch.tensor([7, 1])]
    assert torch.cat(list(some.blocks(1)))[:, 0, 12, 12].tolist() == [140, 20]
    assert some.labels.tolist() == [1, 0]
    augment = simclr(jitter=0.0)
    for step, batch in enumerate(batches(data, augment, seed=0, batch_size=6, steps=range(4))):
        rows = batch_indices(0, step, 12, 6)
        assert torch.equal(batch.images[:, 0, 0, 12, 12].long(), levels[rows])
        assert torch.equal(batch.labels, data.labels[rows])


def test_rotation_of_files_is_refused(photographs: Path, tmp_path: Path) -> None:
    turning = simclr(views=[{}, {"rotation": 10}])
    with pytest.raises(UserError, match=r"augment\.rotation=10 needs whole images.*dataset\.cache=<folder>"):
        with_view_size(turning, all_images(photographs).images)
    assert with_view_size(turning, all_images(photographs, cache=str(tmp_path), resize=32).images).size == 24


# Worker processes -----------------------------------------------------------------------------------------------------


def test_a_killed_worker_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r"DataLoader worker.*smaller dataset\.workers"):
        list(read_ahead(lambda key: os.kill(os.getpid(), signal.SIGKILL), range(2), workers=1))


GROUP = """
import signal, time
from scclr.datasets.workers import IGNORED_SIGNALS, read_ahead

noted = set()
for number in IGNORED_SIGNALS:
    signal.signal(number, lambda number, frame: noted.add(number))

def job(key):
    time.sleep(0.02)
    return key

for key in read_ahead(job, range(40), workers=2):
    print(key, flush=True)
print(noted == set(IGNORED_SIGNALS))
"""


def test_a_signal_to_the_group_stops_no_worker() -> None:
    """The training process decides what a signal means, and reads on until it has saved."""
    words = [sys.executable, "-c", GROUP]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 0}  # communicate skips what is buffered
    with subprocess.Popen(words, start_new_session=True, **pipes) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]  # so both workers have started
        for number in IGNORED_SIGNALS:
            os.killpg(process.pid, number)
            time.sleep(0.05)
        rest, errors = process.communicate(timeout=60)
    assert errors == b""
    assert [line.strip() for line in (*lines, *rest.splitlines())] == [b"%d" % key for key in range(40)] + [b"True"]
    assert process.returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="the signal at the parent's death is Linux's")
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


def test_more_workers_than_cores_are_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    assert list(read_ahead(lambda key: key, range(40), workers=(os.cpu_count() or 1) + 2)) == list(range(40))
    assert [str(warning.message) for warning in recwarn if "DataLoader" in str(warning.message)] == []


def test_reading_leaves_the_global_generator_alone(photographs: Path) -> None:
    torch.manual_seed(0)
    list(all_images(photographs, workers=2).blocks(5))
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(3))


def test_whole_images_are_those_in_memory(photographs: Path) -> None:
    disk, memory = image_folder(photographs, workers=1).load(), image_folder(photographs, in_memory=True).load()
    for part in ("train", "validation", "test"):
        a, b = getattr(disk, part), getattr(memory, part)
        assert isinstance(b.images, torch.Tensor)
        assert torch.equal(a.labels, b.labels)
        for size in (3, 64):
            assert torch.equal(torch.cat(list(a.blocks(size))), b.images)


# Broken files ---------------------------------------------------------------------------------------------------------


def broken(tmp_path: Path) -> Path:
    """A tree in which china/4.jpg is cut short and china/5.jpg is no image."""
    write_photographs(tmp_path)
    truncate(tmp_path / "china" / "4.jpg")
    (tmp_path / "china" / "5.jpg").write_bytes(b"not an image")
    return tmp_path


def test_a_broken_file_is_refused_and_named(tmp_path: Path) -> None:
    root = broken(tmp_path / "tree")
    advice = r"china/4\.jpg: .*truncated.*; replace or delete this file, or type dataset\.on_corrupt=skip"
    with pytest.raises(UserError, match=advice):
        list(all_images(root).blocks(64))
    with pytest.raises(UserError, match=r"china/[45]\.jpg"):
        gathered(all_images(root, workers=2), range(2))
    for how in ({"in_memory": True, "validation": 0.5}, {"cache": str(tmp_path / "cache")}):
        with pytest.raises(UserError, match=r"china/[45]\.jpg.*on_corrupt=skip"):
            image_folder(root, **how).load()
    assert not list((tmp_path / "cache").glob("*/"))


def test_a_broken_file_is_replaced_by_the_next_of_its_class(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = broken(tmp_path)
    data = all_images(root, on_corrupt="skip", workers=1)
    for _ in range(2):
        whole = torch.cat(list(data.blocks(6)))
        assert torch.equal(whole[4], whole[6])
        assert torch.equal(whole[5], whole[6])
    said = capsys.readouterr().err
    assert said.count("corrupt image 1: ") == said.count("corrupt image 2: ") == 1
    assert said.count("china/4.jpg") == said.count("china/5.jpg") == 1
    last = data[torch.tensor([0, 12, 4])]  # there is no readable one behind china/4.jpg, so the first one is taken
    assert torch.equal(torch.cat(list(last.blocks(9)))[2], whole[0])
    assert_equal(gathered(all_images(root, on_corrupt="skip"), range(4), size=2), gathered(data, range(4)))


def test_a_disk_that_fails_is_not_a_broken_file(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = all_images(photographs, on_corrupt="skip")

    def fail(path: str) -> Image.Image:
        raise OSError(5, "Input/output error", path)

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(UserError, match="Input/output error; check the disk or the network") as caught:
        list(data.blocks(64))
    assert "on_corrupt" not in str(caught.value), "it is on already, and would not help"


def test_a_class_without_a_readable_file_is_refused(tmp_path: Path) -> None:
    write_photographs(tmp_path, per_class=2)
    for path in (tmp_path / "china").iterdir():
        path.write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"no readable image of its class is left; replace the broken files$"):
        list(all_images(tmp_path, on_corrupt="skip").blocks(64))


@pytest.mark.parametrize("held", ["memory", "cache"])
def test_no_class_is_left_out_with_its_broken_files(tmp_path: Path, held: str) -> None:
    write_photographs(tmp_path / "tree")
    for path in (tmp_path / "tree" / "china").iterdir():
        path.write_bytes(b"not an image")
    how = {"in_memory": True} if held == "memory" else {"cache": str(tmp_path / "cache")}
    message = r"no readable training image is left of 1 classes, such as \['china'\]; replace the broken files$"
    with pytest.raises(UserError, match=message):
        image_folder(tmp_path / "tree", on_corrupt="skip", **how).load()


@pytest.mark.parametrize("held", ["memory", "cache"])
def test_broken_files_are_left_out_of_memory_and_cache(tmp_path: Path, held: str) -> None:
    root = broken(tmp_path / "tree")
    how = {"in_memory": True} if held == "memory" else {"cache": str(tmp_path / "cache")}
    splits = image_folder(root, on_corrupt="skip", **how).load()
    parts = (splits.train, splits.validation, splits.test)
    assert sum(map(len, parts)) == 18
    assert sum(part.labels.bincount(minlength=2) for part in parts).tolist() == [8, 10]
    assert all(block.float().std() > 1 for part in parts for block in part.blocks(1)), "no black image is left"
    if held == "cache":
        with pytest.raises(UserError, match=r"2 of the files were corrupt.*china/4\.jpg.*on_corrupt=skip"):
            image_folder(root, **how).load()


@pytest.mark.parametrize("name", [b"caf\xe9 \xff.jpg", b"two\nlines\t.jpg"])
@pytest.mark.parametrize("workers", [0, 1])
def test_any_name_is_shown_in_one_line_of_utf8(name: bytes, workers: int, tmp_path: Path) -> None:
    write_photographs(tmp_path, per_class=2)
    (tmp_path / "china" / os.fsdecode(name)).write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"china/.*\\.*\.jpg: cannot identify image file; replace or delete") as caught:
        list(all_images(tmp_path, workers=workers).blocks(1))
    assert str(caught.value).isprintable()


# Whole runs -----------------------------------------------------------------------------------------------------------

RUN = ["train", "dataset=imagefolder", "dataset.root=tree", "dataset.in_memory=false", "dataset.image_size=16"]
RUN += [*(word for word in TINY if "limit" not in word and "batch_size" not in word), "pretrain.batch_size=16"]


def test_a_run_from_files(scclr: Callable[..., int], folder: Path, capfd: Any) -> None:
    write_photographs(folder / "tree" / "train", per_class=24)
    write_photographs(folder / "tree" / "test", per_class=4)
    for stages in ("[pretrain]", "[pretrain,theory]"):
        assert scclr(*RUN, f"stages={stages}") == 1
        assert "augment.rotation=15 needs whole images" in capfd.readouterr().err
    assert scclr(*RUN, "augment=simclr", "dataset.workers=2") == 0
    assert len(list((folder / "runs").glob("*/*/result.json"))) == 1


@pytest.mark.slow
def test_two_processes_stream_the_run_of_one(folder: Path) -> None:
    write_photographs(folder / "tree", per_class=40)
    line = [sys.executable, "-m", "scclr", *RUN, "stages=[pretrain]", "dataset.workers=2", "augment=simclr"]
    line += ["optimizer=sgd", "pretrain.log_every=1", "deterministic=true"]
    rows = {}
    for processes in (1, 2):
        words = [*line, f"nproc={processes}", f"runs={processes}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (record,) = (folder / str(processes)).glob("*/*/metrics.jsonl")
        rows[processes] = [row for row in rows_of(record.parent) if "pretrain/loss" in row]
    assert len(rows[1]) == len(rows[2]) > 3
    for step, (one, two) in enumerate(zip(rows[1], rows[2], strict=True)):
        for name in ("pretrain/loss", "pretrain/attract", "pretrain/repel"):
            assert one[name] == pytest.approx(two[name], rel=1e-3 if step else 1e-6)  # rounding grows with the steps
