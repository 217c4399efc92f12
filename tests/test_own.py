"""Components of the user's own: found without a fork, refused in one line, kept with the run, run only if trusted."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY, result_of, run_folders

import scclr as package
from scclr.config.build import build
from scclr.config.errors import UserError
from scclr.run.checkpoint import load, save

Run = Callable[..., int]
SMALL = [word for word in TINY if not word.startswith("encoder.")]
PARTS = '''
from dataclasses import dataclass
import torch
from torch import Tensor, nn
from scclr.augment import Augment
from scclr.datasets import ImageSet, Parts, Source
from scclr.losses import Loss

class Net(nn.Module):
    def __init__(self, *, in_channels: int, width: int = 6) -> None:
        super().__init__()
        self.feature_dim = 4 * width
        self.body = nn.Sequential(nn.Conv2d(in_channels, width, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

class Narrow(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)[:, 1:]

def any_net(**options: object) -> nn.Module:
    return Net(in_channels=1, **options)

@dataclass(frozen=True, kw_only=True)
class Stripes(Source):
    """Stripes across or down, in noise."""
    images: int = 90
    def read(self) -> Parts:
        labels = torch.arange(self.images) % 2
        noise = torch.randint(0, 99, (self.images, 1, 8, 8), generator=torch.Generator().manual_seed(0))
        noise[labels == 0, :, ::2] += 99
        noise[labels == 1, :, :, ::2] += 99
        return Parts(ImageSet(noise.byte(), labels), None, ["across", "down"])

@dataclass(frozen=True, kw_only=True)
class Posterize(Augment):
    levels: int = 4
    def __call__(self, images: Tensor, **step: int) -> Tensor:
        return (super().__call__(images, **step) * self.levels).round() / self.levels

class Silent(Loss):
    def terms(self, anchors):
        return anchors.z.sum()

class Detached(Loss):
    def terms(self, anchors):
        from scclr.losses import balance
        return balance(self.alpha, -anchors.positives().mean().detach(), anchors.z.detach().sum())
'''


@pytest.fixture
def own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with components of the user's own, from which modules are found."""
    (folder / "parts.py").write_text(PARTS)
    (folder / "broken.py").write_text("def half(:\n")
    monkeypatch.syspath_prepend(str(folder))
    for name in ("parts", "broken", "margin"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("loss._target_=nowhere.Loss", "No module named 'nowhere'; modules are found from the current folder and on"),
        ("loss._target_=parts.Silnt", "parts has no Silnt; did you mean Silent?"),
        ("loss._target_=Silent", "give module.Class, such as my_losses.MyLoss"),
        ("loss._target_=broken.Loss", "broken.py, line 1: invalid syntax"),
        ("loss._target_=parts.Net", "loss.in_channels is missing: Net needs it"),
        ("loss._target_=parts.any_net", "this is no loss; derive from scclr.losses.Loss, and define terms(anchors)"),
        ("loss._target_=parts.Silent", "terms() must return scclr.losses.LossTerms of three scalars"),
        ("loss._target_=parts.Detached", "its total must depend on anchors.z"),
        ("loss._target_=parts.Silent loss.x=1", "type +loss.x=... for an argument that loss._target_ takes"),
        ("loss._target_=parts.Silent +loss.x=1", "loss.x: Silent takes alpha"),
        ("encoder._target_=parts.Narrow", "it gives [2, 23] for 2 images, and feature_dim is 24"),
        ("encoder._target_=torch.nn.ReLU", "set feature_dim to the width of its output"),
        ("encoder._target_=parts.Net +encoder.width=wide", "encoder.width=wide: give a whole number"),
        ("augment._target_=parts.Net", "augment.in_channels is missing"),
        ("dataset._target_=builtins.dict", "its arguments are not known"),
        ("optimizer._target_=builtins.max", "its arguments are not known"),
        ("loss._target_=scclr.run.files.write_text", "those of scclr lie in scclr.losses"),
        ("dataset._target_=scclr.datasets.digits.load_digits", "scclr.datasets.digits has no load_digits"),
    ],
)
def test_what_is_no_component_is_refused(
    words: str, message: str, own: Path, scclr: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scclr("train", *words.split()) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (own / "runs").exists()


def test_every_kind_of_component_may_be_the_users_own(own: Path, scclr: Run) -> None:
    targets = {"dataset": "Stripes", "augment": "Posterize", "encoder": "Net"}
    words = [f"{group}._target_=parts.{name}" for group, name in targets.items()]
    assert scclr("train", *words, "+encoder.width=5", *TINY[2:], "pretrain.batch_size=16") == 0
    (run,) = run_folders(own)
    result = result_of(run)
    assert result["sources"].keys() == targets.keys()
    assert (run / "source_encoder.py").read_text() == PARTS
    assert result["config"]["encoder"] == {"_target_": "parts.Net", "width": 5}, "what Net does not take is dropped"
    loaded = package.load(run, trust=["parts"])
    assert loaded.features(torch.zeros(3, 1, 8, 8)).shape == (3, 20)


def test_an_edit_of_the_source_makes_another_run(own: Path, scclr: Run) -> None:
    words = ["train", "encoder._target_=parts.Net", "stages=[pretrain]", *SMALL]
    assert scclr(*words) == 0
    (own / "parts.py").write_text(PARTS.replace("width: int = 6", "width: int = 7"))
    assert scclr(*words) == 0
    assert len(run_folders(own)) == 2


def test_a_checkpoint_runs_no_code_that_is_not_trusted(
    own: Path, scclr: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scclr("train", "encoder._target_=parts.Net", "stages=[pretrain]", *SMALL) == 0
    (run,) = run_folders(own)
    capsys.readouterr()
    words = ["train", "stages=[probe]", f"init_from={run}", *TINY[:1], *TINY[-2:]]
    assert scclr(*words) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "its encoder is parts.Net" in line
    assert line.endswith("type trust=[parts]")
    assert scclr(*words, "trust=[part]") == 1
    assert scclr(*words, "trust=[parts]") == 0


@pytest.mark.slow
@pytest.mark.parametrize("group", ["augment", "encoder", "loss", "optimizer"])
@pytest.mark.parametrize("target", ["os.system", "scclr.run.files.write_text", "scclr.augment.Augment", "planted.Code"])
def test_a_crafted_checkpoint_runs_nothing(group: str, target: str, own: Path, scclr: Run) -> None:
    """Also in the parts of the configuration that the command does not build."""
    assert scclr("train", "stages=[pretrain]", *TINY) == 0
    (run,) = run_folders(own)
    (own / "planted.py").write_text("open('ran', 'w')\n\n\ndef Code(**options): open('ran', 'w')\n")
    state = load(run)
    state["config"][group] = {"_target_": target, "command": "touch ran", "path": "ran", "text": ""}
    save(run, state, "crafted.pt")
    other = group == "augment" and target == "scclr.augment.Augment"
    for stages in ("[probe]", "[probe,theory]"):
        assert scclr("train", f"stages={stages}", f"init_from={run}/crafted.pt", *TINY[-2:]) == 1 or other
    state["step"] = 1
    save(run, state)
    (run / "result.json").unlink()
    scclr("train", "stages=[pretrain]", *TINY)
    assert not (own / "ran").exists()


@pytest.mark.slow
def test_new_writes_a_loss_that_works(own: Path, scclr: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert scclr("new", "loss", "my_margin") == 0
    assert capsys.readouterr().out.endswith("next  scclr train --config-dir my_conf loss=my_margin alpha=0.4\n")
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "test_my_margin.py"], capture_output=True, text=True)
    assert "2 passed" in done.stdout, done.stdout
    assert scclr("train", "--config-dir", "my_conf", "loss=my_margin", "--help") == 0
    assert "my_margin, nscl" in capsys.readouterr().out
    assert scclr("train", "--config-dir", "my_conf", "loss=my_margn") == 1
    assert "did you mean my_margin?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("loss", "type scclr new loss <name>"),
        ("encoder mine", "type scclr new loss <name>"),
        ("loss Mine", "give a name such as margin"),
        ("loss ../x", "give a name such as margin"),
        ("loss json", "Python has a module of this name"),
        ("loss parts", "parts.py: there is such a file already"),
    ],
)
def test_new_refuses(words: str, message: str, own: Path, scclr: Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(own.rglob("*"))
    assert scclr("new", *words.split()) == 1
    assert message in capsys.readouterr().err
    assert sorted(own.rglob("*")) == before


def test_types_that_no_configuration_can_check_are_left_to_the_constructor() -> None:
    assert build("encoder", {"_target_": "torch.nn.Softmax", "dim": 1}).dim == 1
    made = build("encoder", {"_target_": "torchvision.models.resnet18", "num_classes": 3})
    assert made.fc.out_features == 3, "resnet18 passes on what it does not name"
    with pytest.raises(UserError, match=r"encoder\.dims: Softmax takes dim"):
        build("encoder", {"_target_": "torch.nn.Softmax", "dims": 1})


@pytest.mark.slow
def test_modules_beside_the_user_are_found_by_every_launcher(folder: Path) -> None:
    """As a module by its worker processes, and as a command by two ranks; a local torch.py hides nothing."""
    (folder / "parts.py").write_text(PARTS)
    (folder / "torch.py").write_text("raise SystemExit('a local torch.py was imported')")
    words = ["train", "encoder._target_=parts.Net", "stages=[pretrain]", *SMALL]
    command = [shutil.which("scclr", path=str(Path(sys.executable).parent)) or "scclr"]
    swept = ["-m", "seed=1,2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    for line in (
        [sys.executable, "-m", "scclr", *words, *swept],
        [*command, *words, "nproc=2", "seed=3"],
    ):
        done = subprocess.run(line, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    assert len(run_folders(folder)) == 3
    assert all(re.search(r"source_encoder", " ".join(map(str, run.iterdir()))) for run in run_folders(folder))
