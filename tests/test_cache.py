"""The cache of decoded images: when it is built, shared, refused and left behind."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from augment_helpers import simclr
from image_files import all_images, image_folder, truncate, write_image, write_photographs

from scclr.config.errors import UserError
from scclr.datasets import ImageSet, cache
from scclr.datasets.files import Files
from scclr.datasets.loader import batch_indices, batches

# Python 3.12 and later warn of every fork in a process with threads.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    write_photographs(folder)
    return folder


def squares(folder: Path, root: Path, **changes: object) -> ImageSet:
    return all_images(root, cache=str(folder), image_size=24, resize=32, **changes)


def test_a_cache_reads_no_image_again(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_photographs(tmp_path / "tree")
    built = squares(tmp_path / "cache", tmp_path / "tree")
    assert "20 images of 32 x 32 pixels take 0.00 GiB, of " in capsys.readouterr().err
    expected = torch.cat(list(all_images(tmp_path / "tree", image_size=32).blocks(64)))
    for path in (tmp_path / "tree").glob("*/*"):
        path.write_bytes(bytes(path.stat().st_size))
    found = squares(tmp_path / "cache", tmp_path / "tree", workers=1)
    assert capsys.readouterr().err == ""
    assert found.images.shape == (20, 3, 24, 24)
    for data in (built, found):
        (batch,) = batches(data, simclr(), seed=0, batch_size=20, steps=range(1))
        assert torch.equal(batch.images, expected[batch_indices(0, 0, 20, 20)])  # whole, to be cropped on the device
        assert torch.equal(torch.cat(list(data.blocks(9))), expected[..., 4:28, 4:28])
    other = all_images(tmp_path / "tree", cache=str(tmp_path / "cache"), image_size=16, on_corrupt="skip")
    assert len(other) == 0, "another size is another cache, and no file can be read now"
    write_image(tmp_path / "tree" / "china" / "0.jpg")
    with pytest.raises(UserError, match=r"china/1\.jpg"):  # so are other files
        squares(tmp_path / "cache", tmp_path / "tree")


def test_parts_of_a_tree_share_a_cache_that_is_built_last(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_photographs(tmp_path / "tree", size=(32, 32))
    how = {"cache": str(tmp_path / "cache"), "image_size": 32, "classes": [1, 0]}
    with pytest.raises(UserError, match=r"dataset\.limit=1 cannot split"):
        image_folder(tmp_path / "tree", **how, limit=1).load()
    assert not (tmp_path / "cache").exists()
    cached = image_folder(tmp_path / "tree", **how, limit=12).load()
    assert capsys.readouterr().err.count("take 0.00 GiB") == 1
    files = image_folder(tmp_path / "tree", **{**how, "cache": None}, limit=12).load()
    for part in ("train", "validation", "test"):
        a, b = getattr(cached, part), getattr(files, part)
        assert torch.equal(torch.cat(list(a.blocks(9))), torch.cat(list(b.blocks(9))))
        assert torch.equal(a.labels, b.labels)


def test_a_killed_build_is_not_taken_for_whole(tmp_path: Path, photographs: Path) -> None:
    child = os.fork()
    if child == 0:
        Files.iterate = lambda self, **_: os.kill(os.getpid(), signal.SIGKILL)
        squares(tmp_path, photographs)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".lock", ".part"]
    assert len(squares(tmp_path, photographs)) == 20
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", ".lock"]


@pytest.mark.parametrize("stop", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_stopped_build_leaves_nothing(
    stop: BaseException, tmp_path: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Files, **_: object) -> Iterator[Any]:
        yield torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.ones(2, dtype=torch.bool)
        raise stop

    monkeypatch.setattr(Files, "iterate", fail)
    expected = UserError if isinstance(stop, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="No space left.*give another folder" if expected is UserError else None):
        squares(tmp_path, photographs)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_what_is_wrong_with_a_cache(tmp_path: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    squares(tmp_path / "whole", photographs)
    (path,) = (tmp_path / "whole").glob("*/images.u8")
    truncate(path)
    with pytest.raises(UserError, match="61,410 bytes instead of 61,440; delete this folder"):
        squares(tmp_path / "whole", photographs)
    (path.parent / "good.json").write_text("[0,")
    with pytest.raises(UserError, match=r"good\.json: .*damaged; delete this folder"):
        squares(tmp_path / "whole", photographs)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"take 0\.00 GiB, 0\.00 GiB are free; give another folder or a smaller"):
        squares(tmp_path / "new", photographs)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"dataset\.cache=.*file"):
        squares(tmp_path / "file", photographs)


def test_a_planted_link_is_not_followed(tmp_path: Path, photographs: Path) -> None:
    """Somebody else who may write into the cache's folder cannot have our files overwritten."""
    squares(tmp_path / "cache", photographs)
    (folder,) = (tmp_path / "cache").glob("*/")
    shutil.rmtree(folder)
    (tmp_path / "mine").write_text("kept")
    folder.with_suffix(".lock").unlink()
    folder.with_suffix(".lock").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="a symbolic link where a lock belongs"):
        squares(tmp_path / "cache", photographs)
    assert (tmp_path / "mine").read_text() == "kept"
