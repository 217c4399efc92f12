"""Exported encoders: other libraries make the run's features of them, by the code of the model card alone."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from scipy import stats

import scclr
from scclr.api.card import interval, table
from scclr.api.export import export
from scclr.config.errors import UserError
from scclr.evaluate.features import encoder_hash

WORDS = ["alpha=0.4", *TINY]  # of the fixture ``run``, which was evaluated
STEP = [
    *("stages=[pretrain]", "pretrain.epochs=1", "pretrain.knn_every=0", "pretrain.warmup=0"),
    *("projector.hidden_dim=16", "projector.out_dim=8"),
]
GREY = ["dataset.limit=80", "pretrain.batch_size=64"]  # digits
COLOUR = [
    *("dataset=arrays", "dataset.root=images.npz", "augment=crop", "pretrain.batch_size=8"),
    *("dataset.mean=[0.5,0.4,0.3]", "dataset.std=[0.2,0.3,0.25]"),
]
ENCODERS = {
    "resnet_grey": ["encoder=resnet18", *GREY],
    "resnet_colour": ["encoder=resnet18", *COLOUR],  # 72 pixels: the stem for large images
    "vit": ["encoder=vit_tiny", "encoder.patch=2", "encoder.depth=2", *GREY],
    "timm_resnet": ["encoder=timm", "encoder.name=test_resnet", *GREY],
    "timm_vit": ["encoder=timm", "encoder.name=test_vit", "encoder.patch_size=12", *COLOUR],
}
ONLY_WEIGHTS = ("resnet_colour", "timm_resnet")  # ONNX is tried with the others
OUTSIDE = """
import sys, json, os, re
import numpy as np
import torch

torch.set_num_threads(1)
for folder in sys.argv[1:]:
    os.chdir(folder)
    images = np.load("../images.npy")
    images = images if folder.endswith("-onnx") else torch.from_numpy(images)
    (code,) = re.findall(r"```python\\n(.*?)```", open("README.md").read(), re.S)
    found = {"images": images}
    exec(code, found)
    np.save("h.npy", np.asarray(found["h"]))
assert not any(name.split(".")[0] == "scclr" for name in sys.modules)
"""


def write_images(folder: Path) -> None:
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (40, 72, 72, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", images=images, labels=np.arange(40) % 2)


def images_for(run: "scclr.api.Run") -> torch.Tensor:
    shape = (5, run.model.channels, run.image_size, run.image_size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


def through_the_cards(run: "scclr.api.Run", *folders: Path) -> list[torch.Tensor]:
    """h of ``images_for(run)`` by the code of the card in each folder, in a process without scclr."""
    np.save(run.directory / "images.npy", images_for(run).numpy())
    line = [sys.executable, "-c", OUTSIDE, *(str(folder.resolve()) for folder in folders)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [torch.from_numpy(np.load(folder / "h.npy")) for folder in folders]


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODERS)
def test_the_card_alone_gives_the_features(name: str, folder: Path) -> None:
    write_images(folder)
    run = scclr.train(*ENCODERS[name], *STEP)
    library = "timm" if name.startswith("timm") else "torchvision"
    written = [export(run)] if name in ONLY_WEIGHTS else [export(run), export(run, "onnx")]
    assert [path.name for path in written] == [f"export-{library}", "export-onnx"][: len(written)]
    for path, content in zip(written, ("model.safetensors", "model.onnx"), strict=False):
        assert sorted(file.name for file in path.iterdir()) == ["README.md", "config.json", content]
    expected = run.features(images_for(run))
    for h, tolerance in zip(through_the_cards(run, *written), (1e-6, 1e-4), strict=False):
        torch.testing.assert_close(h, expected, rtol=tolerance, atol=tolerance)
    if library == "timm":
        torch.testing.assert_close(through_timm(run, written[0]), expected, rtol=1e-6, atol=1e-6)


def through_timm(run: "scclr.api.Run", folder: Path) -> torch.Tensor:
    """h of ``images_for(run)`` as timm makes the model from a folder of the Hub."""
    import timm

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    mean, std = (torch.tensor(config[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        return model((images_for(run) - mean) / std)


def test_an_encoder_of_no_library_is_a_state_dict(run: "scclr.api.Run", scclr: Callable[..., int]) -> None:
    assert scclr("export", str(run.directory)) == 0
    written = run.directory / "export-state_dict"
    (code,) = re.findall(r"```python\n(.*?)```", (written / "README.md").read_text(), re.S)
    found = {"images": images_for(run)}
    exec(code.replace('"model.safetensors"', repr(str(written / "model.safetensors"))), found)
    torch.testing.assert_close(found["h"], run.features(images_for(run)), rtol=1e-6, atol=1e-6)
    about = json.loads((written / "config.json").read_text())["scclr"]
    assert about["encoder_sha256"] == run.result["encoder_sha256"] == encoder_hash(run.model.encoder)
    assert (about["run"], about["image_size"], about["channels"]) == (run.directory.name, 8, 1)


OWN = """
import torch


class Own(torch.nn.Module):
    feature_dim = 4

    def __init__(self, *, in_channels: int, scale: float = 1.0) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(in_channels, 4, 3)
        self.scale = scale

    def forward(self, x):
        if x.sum() > 0:  # no graph holds this
            x = x * self.scale
        return self.layer(x).mean((2, 3))
"""


@pytest.mark.slow
def test_an_encoder_of_the_users_own(folder: Path, scclr: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "own_encoder.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(folder))
    run = __import__("scclr").train("encoder._target_=own_encoder.Own", "+encoder.scale=2.0", *GREY, *STEP)
    assert scclr("export", str(run.directory)) == 1
    assert scclr("export", str(run.directory), "trust=[own_encoder]", "--to", "exported") == 0
    assert (folder / "exported" / "own_encoder.py").read_text() == OWN
    card = (folder / "exported" / "README.md").read_text()
    assert "from own_encoder import Own" in card
    assert "model = Own(in_channels=1, scale=2.0)" in card
    with pytest.raises(UserError, match=r"ONNX does not express Own .*leave --format out") as error:
        export(run, "onnx")
    assert "\n" not in str(error.value)
    assert not (run.directory / "export-onnx").exists()
    assert [path.name for path in run.directory.iterdir() if path.name.startswith(".export")] == []


def test_features_that_onnxruntime_does_not_repeat_are_refused(
    run: "scclr.api.Run", monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = type(run.encoder).forward
    calls: list[int] = []

    def drifting(self: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return forward(self, images) + (0.01 if not torch.compiler.is_compiling() else 0.0)

    monkeypatch.setattr(type(run.encoder), "forward", drifting)
    with pytest.raises(UserError, match=r"not those of ConvNet within 0\.0001"):
        export(run, "onnx")
    assert calls
    assert not (run.directory / "export-onnx").exists()


def test_a_target_is_replaced_only_by_the_same_run(run: "scclr.api.Run", folder: Path) -> None:
    other = scclr.train("seed=1", "stages=[pretrain]", *TINY)
    target = folder / "encoder"
    target.mkdir()
    export(run, to=target)  # an empty folder is no one's
    (target / "more.txt").write_text("")
    with pytest.raises(UserError, match=f"exists already, from {run.directory.name}; type --to"):
        export(other, to=target)
    export(run, to=target)
    assert sorted(path.name for path in target.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    (folder / "photos").mkdir()
    (folder / "photos" / "a.jpg").write_text("")
    with pytest.raises(UserError, match="exists already, and is no export"):
        export(run, to=folder / "photos")
    assert sorted(path.name for path in folder.iterdir()) == ["encoder", "photos", "runs"]


def test_a_failure_leaves_what_was_there(run: "scclr.api.Run", monkeypatch: pytest.MonkeyPatch) -> None:
    target = export(run)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    monkeypatch.setattr("scclr.api.export.card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(run)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in run.directory.iterdir() if "partial" in path.name] == []


def test_mistakes_are_one_line(run: "scclr.api.Run", scclr: Callable[..., int], capsys: pytest.CaptureFixture) -> None:
    name = str(run.directory)
    for words, message in [
        ([f"{name}x"], f"no finished run; did you mean {name}?"),
        (["runs"], "give a folder such as runs/default/<run>"),
        ([name, "--format", "onx"], "did you mean onnx?"),
        ([name, "--format", "timm"], "ConvNet is no model of timm; choose state_dict, or onnx"),
        ([name, "--fromat", "onnx"], "--fromat"),
        ([name, "alpha=0.5"], "unrecognized arguments: alpha=0.5"),
        ([name, "--to", "/proc/encoder"], "type --to <a folder of yours>"),
        ([], "the following arguments are required: run; `scclr export --help` says more"),
    ]:
        assert scclr("export", *words) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    (run.directory / "last.pt").unlink()
    assert scclr("export", name) == 1
    assert "no last.pt in this folder" in capsys.readouterr().err


def test_a_missing_library_is_named(run: "scclr.api.Run", monkeypatch: pytest.MonkeyPatch) -> None:
    for form, package in (("onnx", "onnxscript"), ("onnx", "onnxruntime"), ("state_dict", "safetensors.torch")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(UserError, match=r"type pip install 'scclr\[export\]'"):
                export(run, form)
    assert list(run.directory.glob("*export*")) == []


def test_the_card_has_intervals_over_seeds(folder: Path) -> None:
    runs = [scclr.train(f"seed={seed}", *TINY) for seed in (0, 1, 2)]
    scclr.train("alpha=0.3", "stages=[pretrain]", *TINY)  # of another group
    card = (export(runs[0]) / "README.md").read_text()
    values = [run.metrics["logreg-v1/top1"] for run in runs]
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    (row,) = (line for line in card.splitlines() if line.startswith("| `logreg-v1/top1`"))
    assert row.endswith(f"| {np.mean(values):.4g} [{low:.4g}, {high:.4g}] |")
    assert f"| {values[0]:.4g} |" in row
    assert f"{runs[0].metrics['baseline/pixels/logreg-v1/top1']:.4g}" in row
    assert "mean of 3 seeds [95% interval]" in card
    assert card.startswith("---\nlibrary_name: pytorch\n")


def test_one_run_has_no_interval() -> None:
    assert interval([0.5]) == ""
    assert "seeds" not in table({"knn-v1/top1": 0.5}, [{"knn-v1/top1": 0.5}])
    assert table({}, [{}]) == "It was not evaluated."
