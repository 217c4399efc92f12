"""Features of a folder of images: what is written, and what is left when a program is killed on the way."""

import signal
import sys
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from image_files import write_photographs
from PIL import Image
from processes import kill_started, start, until

import scclr
from scclr.api import embed as module
from scclr.api.embed import embed
from scclr.config.errors import UserError
from scclr.datasets.imagefolder import ImageFolder

WORDS = [
    *("dataset=imagefolder", "dataset.root=photos", "dataset.image_size=24", "dataset.resize=30", "augment=crop"),
    *("dataset.workers=0", "encoder.widths=[8,16]", "projector.hidden_dim=16", "projector.out_dim=8"),
    *("stages=[pretrain]", "pretrain.epochs=1", "pretrain.batch_size=8", "pretrain.knn_every=0"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one run, and its photographs."""
    folder = tmp_path_factory.mktemp("trained")
    with chdir(folder):
        write_photographs(folder / "photos", per_class=9)
        scclr.train(*WORDS)
    return folder


@pytest.fixture
def run(run: "scclr.api.Run", monkeypatch: pytest.MonkeyPatch) -> "scclr.api.Run":
    """A run on the photographs in ``photos``; a part of an output has four images."""
    monkeypatch.setattr(module, "BATCH", 2)
    monkeypatch.setattr(module, "SHARD", 4)
    monkeypatch.setattr(module, "default_workers", lambda: 0)
    return run


def test_features_are_those_of_the_dataset(run: "scclr.api.Run", folder: Path) -> None:
    node = {key: value for key, value in run.config.dataset.items() if key != "_target_"}
    data = ImageFolder(**node).read().train
    names = [name.decode() for name in data.images.names.tolist()]  # type: ignore[union-attr]
    images = ImageFolder(**node).materialize(data).images
    assert isinstance(images, torch.Tensor)
    for layer in ("h", "z"):
        written = np.load(embed(run, "photos", f"{layer}.npz", layer=layer))
        assert written["files"].tolist() == names == sorted(names)
        with torch.no_grad():
            expected = dict(zip("hz", run.model(images.float() / 255), strict=True))[layer]
        torch.testing.assert_close(torch.from_numpy(written[layer]), expected, rtol=1e-5, atol=1e-5)
        assert written[layer].dtype == np.float32
    assert sorted(path.name for path in folder.iterdir()) == ["h.npz", "photos", "runs", "z.npz"]


def test_parquet_has_the_same(run: "scclr.api.Run", scclr: Callable[..., int]) -> None:
    for name in ("a.npz", "a.parquet"):
        assert scclr("embed", str(run.directory), "photos", name) == 0
    arrays, table = np.load("a.npz"), pandas.read_parquet("a.parquet")
    assert list(table.columns) == ["file", "h"]
    assert table["file"].tolist() == arrays["files"].tolist()
    assert np.array_equal(np.stack(table["h"].tolist()), arrays["h"])


def test_files_are_read_as_datasets_read_them(run: "scclr.api.Run", folder: Path) -> None:
    """A picture that is stored lying down, and one of 16 bits, have the features of their plain copies."""
    (folder / "plain").mkdir()
    upright = Image.open(folder / "photos" / "china" / "0.jpg").convert("L")
    upright.save(folder / "plain" / "a.png")
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn to the right shows it upright
    upright.transpose(Image.Transpose.ROTATE_90).save(folder / "plain" / "b.png", exif=exif)
    sixteen = np.asarray(upright).astype(np.uint16) * 257
    Image.fromarray(sixteen).save(folder / "plain" / "c.png")
    h = np.load(embed(run, folder / "plain", "plain.npz"))["h"]
    np.testing.assert_allclose(h[1:], h[[0, 0]], rtol=1e-5, atol=1e-6)
    assert h.std(axis=1).min() > 0


def test_an_interrupted_command_goes_on(
    run: "scclr.api.Run", folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    whole = np.load(embed(run, "photos", "whole.npz"))["h"]
    computed: list[int] = []
    features, write = module._features, module.write_part

    def counted(model: torch.nn.Module, images: torch.Tensor, layer: str) -> torch.Tensor:
        computed.append(len(images))
        return features(model, images, layer)

    def interrupted(path: Path, rows: module.Rows) -> None:
        write(path, rows)
        if path.name.startswith("000000000008"):
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "_features", counted)
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_part", interrupted)
        with pytest.raises(KeyboardInterrupt):
            embed(run, "photos", "again.npz")
    assert not Path("again.npz").exists()
    assert sum(computed) == 12
    embed(run, "photos", "again.npz")
    assert sum(computed) == 18
    assert "again.npz.parts: goes on after 12 of 18 images" in capsys.readouterr().err
    assert np.array_equal(np.load("again.npz")["h"], whole)
    assert not Path("again.npz.parts").exists()


@pytest.mark.parametrize("change", ["layer", "images"])
def test_parts_of_something_else_are_not_used(
    change: str, run: "scclr.api.Run", folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_npz", stop)
        with pytest.raises(KeyboardInterrupt):
            embed(run, "photos", "out.npz")
    assert len(list(Path("out.npz.parts").glob("*.npz"))) == 5
    if change == "images":
        Image.new("RGB", (30, 30), "red").save(folder / "photos" / "china" / "0.jpg")
    layer = "z" if change == "layer" else "h"
    found = np.load(embed(run, "photos", "out.npz", layer=layer))[layer]
    assert np.array_equal(found, np.load(embed(run, "photos", "new.npz", layer=layer))[layer])


KILLED = """
import time
from scclr.api import embed as module
import scclr

write = module.write_part
module.BATCH, module.SHARD, module.default_workers = 2, 4, lambda: 0

def slow(path, rows):
    write(path, rows)
    time.sleep(1)

module.write_part = slow
module.embed(scclr.load({run!r}), "photos", "killed.npz")
"""


@pytest.mark.slow
def test_a_killed_program_goes_on(run: "scclr.api.Run", folder: Path) -> None:
    process = start([sys.executable, "-c", KILLED.format(run=str(run.directory))], folder)
    try:
        until(lambda: len(list(folder.glob("killed.npz.parts/0*.npz"))) >= 2)
        process.send_signal(signal.SIGKILL)
        process.wait()
    finally:
        kill_started()
    assert not Path("killed.npz").exists()
    found = np.load(embed(run, "photos", "killed.npz"))["h"]
    assert np.array_equal(found, np.load(embed(run, "photos", "whole.npz"))["h"])
    assert sorted(path.name for path in folder.iterdir()) == ["killed.npz", "photos", "runs", "whole.npz"]


def test_broken_files_are_named(
    run: "scclr.api.Run", folder: Path, scclr: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    whole = np.load(embed(run, "photos", "whole.npz"))
    for name in ("china/3.png", "flower/5.jpg"):
        path = folder / "photos" / name
        path.write_bytes(path.read_bytes()[:40])
    for _ in range(2):  # the second time from the parts
        assert scclr("embed", str(run.directory), "photos", "out.npz") == 1
        error = capsys.readouterr().err
        assert "photos/china/3.png" in error
        assert "photos/flower/5.jpg" in error
        assert error.splitlines()[-1].endswith(
            "2 of 18 files cannot be decoded; replace them, or type --skip to leave them out"
        )
        assert not Path("out.npz").exists()
    assert scclr("embed", str(run.directory), "photos", "out.npz", "--skip") == 0
    assert "photos/china/3.png" in capsys.readouterr().err
    found = np.load("out.npz")
    kept = ~np.isin(whole["files"], ["china/3.png", "flower/5.jpg"])
    assert kept.sum() == 16
    assert found["files"].tolist() == whole["files"][kept].tolist()
    np.testing.assert_allclose(found["h"], whole["h"][kept], rtol=1e-5, atol=1e-6)


def test_grey_encoders_take_colour_files(folder: Path, run: "scclr.api.Run") -> None:
    grey = scclr.train("dataset.limit=100", *[word for word in WORDS if not word.startswith(("dataset", "augment"))])
    assert np.load(embed(grey, "photos", "grey.npz"))["h"].shape == (18, 16)


def test_mistakes_are_one_line(
    run: "scclr.api.Run", folder: Path, scclr: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    (folder / "empty").mkdir()
    (folder / "there.npz").write_text("")
    name = str(run.directory)
    before = sorted(folder.rglob("*"))
    for words, message in [
        ([name, "photos"], "the following arguments are required: out"),
        ([name, "photo", "out.npz"], "photo: no such folder; give a folder of images"),
        ([name, "empty", "out.npz"], "empty: no images in this folder or below"),
        ([name, "photos", "out.parqet"], "did you mean .parquet?"),
        ([name, "photos", "there.npz"], "there.npz: exists already"),
        ([name, "photos", "nowhere/out.npz"], "nowhere: no such folder; make it"),
        ([name, "photos", "out.npz", "--layer", "y"], "--layer=y: choose one of h, z"),
        ([name[:-1], "photos", "out.npz"], f"did you mean {name}?"),
    ]:
        assert scclr("embed", *words) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert sorted(folder.rglob("*")) == before


def test_weights_from_elsewhere_have_no_z(run: "scclr.api.Run", folder: Path) -> None:
    torch.save(run.model.encoder.state_dict(), folder / "weights.pth")
    words = [word for word in WORDS if word.startswith(("dataset", "encoder"))]
    other = scclr.train(
        "stages=[probe]", "init_from=weights.pth", "init_mean=[0.5,0.5,0.5]", "init_std=[0.2,0.2,0.2]", *words
    )
    assert np.load(embed(other, "photos", "h.npz"))["h"].shape == (18, 16)
    with pytest.raises(UserError, match=r"weights\.pth has no projector"):
        embed(other, "photos", "z.npz", layer="z")
