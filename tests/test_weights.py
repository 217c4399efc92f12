"""Weights from elsewhere: which files are read, how names are matched, what is refused, and the features they give."""

import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from conftest import TINY, compose, result_of, run_folders
from torch import Tensor, nn
from torchvision.models import VisionTransformer
from torchvision.transforms._presets import ImageClassification

import scclr as package
from scclr.components import check, make_model, prepare
from scclr.config.errors import UserError
from scclr.encoders.convnet import ConvNet
from scclr.encoders.resnet import ResNet
from scclr.encoders.vit import ViT
from scclr.encoders.weights import IMAGENET, load_foreign, read_weights

Run = Callable[..., int]
EVALUATE = ["stages=[probe]", "probe.protocols.logreg.l2=[0.1]", "probe.protocols.logreg.max_iter=5"]
IMAGES = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def resnet(depth: int = 18, classes: int = 5, stem: str = "imagenet") -> nn.Module:
    """A ResNet of torchvision whose every number is its own, with a classifier."""
    torch.manual_seed(depth)
    model = getattr(torchvision.models, f"resnet{depth}")(num_classes=classes)
    if stem == "small":
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    for name, value in model.state_dict().items():
        if "running" in name:
            value.copy_(torch.rand_like(value) + 0.5)
    return model.eval()


@pytest.fixture(scope="module")
def plain() -> dict[str, Tensor]:
    return resnet(stem="small").state_dict()


def encoder(depth: int = 18) -> ResNet:
    return ResNet(in_channels=3, image_size=64, depth=depth, stem="small")


def below(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in state.items()}


FORMS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"epoch": 3, "state_dict": state, "optimizer": {"state": {0: {"step": torch.ones(1)}}}},
    "model": lambda state: {"model": below("module.", state)},
    "backbone": lambda state: {"state_dict": {**below("backbone.", state), "projector.0.weight": torch.zeros(4, 4)}},
    "teacher": lambda state: {
        "student": below("module.backbone.", {name: value * 0 for name, value in state.items()}),
        "teacher": below("backbone.", state),
    },
    "moco": lambda state: {
        "state_dict": {
            **below("module.encoder_k.", {name: value * 0 for name, value in state.items()}),
            **below("module.encoder_q.", state),
            "module.queue": torch.zeros(8, 8),
        }
    },
    "half": lambda state: {name: value.half() if value.is_floating_point() else value for name, value in state.items()},
    "old": lambda state: {name: value for name, value in state.items() if "num_batches" not in name},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_encoder(form: str, plain: dict[str, Tensor], tmp_path: Path) -> None:
    path, filled = tmp_path / "weights.pth", encoder()
    torch.save(FORMS[form](plain), path)
    note = load_foreign(filled, str(path))
    for name, value in filled.network.state_dict().items():
        torch.testing.assert_close(value, plain[name], rtol=1e-3 if form == "half" else 0, atol=1e-4)
    assert "fc.weight" in note or form in ("teacher", "moco", "backbone")
    assert " others are left out (" in note
    assert note.startswith(f"{path}: 100 weights of the encoder" if form != "old" else str(path))


def test_safetensors_are_read(plain: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    path, filled = tmp_path / "model.safetensors", encoder()
    safetensors.save_file(plain, path)
    load_foreign(filled, str(path))
    assert torch.equal(filled.network.conv1.weight, plain["conv1.weight"])
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"model\.safetensors: .*; give an intact file"):
        read_weights(str(path))
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match="type pip install safetensors"):
        read_weights(str(path))


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("hacked", "w")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda state: {**state, "args": Payload()}, "holds more than tensors and plain values, so it is not read"),
        (lambda state: pickle.dumps(Payload()), "damaged, or holds more than tensors and plain values"),
        (lambda state: b"PK", "damaged, or holds more than"),
        (lambda state: b"", "damaged"),
        (lambda state: [1, 2], "holds no named tensors; give a file with a state_dict alone: torch.save"),
        (lambda state: {"model": {"a": 1}}, "holds no named tensors"),
        (lambda state: {"format": 2, "config": {}, "model": state}, r"a checkpoint of scclr; let its name end in \.pt"),
        (
            lambda state: resnet(34).state_dict(),
            r"the file has 96 that the encoder has not \(layer1\.2\.conv1\.weight, ",
        ),
        (
            lambda state: {**state, "layer1.2.conv1.weight": torch.zeros(1)},
            r"has 1 that the encoder has not \(layer1\.2",
        ),
        (
            lambda state: {k: v for k, v in state.items() if "bn1" not in k},
            r"the encoder has 36 weights .* \(bn1\.weight",
        ),
        (
            lambda state: {**state, "conv1.weight": state["conv1.weight"].to_sparse()},
            r"has 1 weights .* \(conv1\.weight\)|holds more than tensors",
        ),
        (
            lambda state: {**state, "bn1.bias": torch.zeros(3)},
            r"1 weights .* bn1\.bias \[3\] instead of \[64\]; choose the",
        ),
        (lambda state: {**state, "bn1.bias": torch.full((64,), torch.nan)}, r"bn1\.bias is not finite"),
        (lambda state: resnet().state_dict(), r"conv1\.weight \[64, 3, 7, 7\] .*type encoder\.stem=imagenet"),
        (
            lambda state: {"a": state["bn1.bias"]},
            r"none of its 1 weights \(a\) has a name of the encoder's \(conv1\.weight",
        ),
        (lambda state: {"a": state, "b": state}, r"holds the encoder 2 times, below a\. and b\.; give a file with one"),
    ],
)
def test_other_files_are_refused_in_one_line(
    content: Callable[[dict[str, Tensor]], Any], message: str, plain: dict[str, Tensor], folder: Path
) -> None:
    made = content(plain)
    if isinstance(made, bytes):
        Path("weights.pth").write_bytes(made)
    else:
        torch.save(made, "weights.pth")
    with pytest.raises(UserError, match=message) as caught:
        load_foreign(encoder(), "weights.pth")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("weights.pth: ")
    assert not Path("hacked").exists()


def test_a_view_that_repeats_one_number_takes_no_memory(folder: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(1).expand(10**14), "queue": torch.zeros(1).expand(10**14)}, "weights.pth")
    with pytest.raises(UserError, match="the encoder has"):
        load_foreign(encoder(), "weights.pth")


# Features -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [18, 50])
def test_features_are_those_of_torchvision_with_its_preprocessing(depth: int, folder: Path) -> None:
    theirs = resnet(depth)
    torch.save(theirs.state_dict(), "weights.pth")
    theirs.fc = nn.Identity()
    words = [*EVALUATE, f"encoder=resnet{depth}", "encoder.stem=imagenet", "init_from=weights.pth"]
    ours = make_model(compose(*words), [0.1] * 3, [0.9] * 3, image_size=96).eval()
    load_foreign(ours.encoder, "weights.pth")
    with torch.no_grad():
        expected = theirs(ImageClassification(crop_size=64, resize_size=64)(IMAGES))
        torch.testing.assert_close(ours.represent(IMAGES.float() / 255), expected, rtol=1e-5, atol=1e-5)


def test_torchvisions_transformers_fit(folder: Path) -> None:
    theirs = VisionTransformer(64, 16, 2, 4, 64, 256, num_classes=5).eval()
    torch.save(theirs.state_dict(), "weights.pth")
    ours = ViT(in_channels=3, image_size=64, patch=16, dim=64, depth=2, heads=4).eval()
    assert "2 others are left out (heads.head.weight, heads.head.bias)" in load_foreign(ours, "weights.pth")
    theirs.heads = nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(ours(IMAGES / 255), theirs(IMAGES / 255))
    with pytest.raises(
        UserError, match=r"encoder\.pos_embedding .* give images of the size that the weights were made"
    ):
        load_foreign(ViT(in_channels=3, image_size=32, patch=16, dim=64, depth=2, heads=4), "weights.pth")
    with pytest.raises(UserError, match="the file has 12 that the encoder has not"):
        load_foreign(ViT(in_channels=3, image_size=64, patch=16, dim=64, depth=1, heads=4), "weights.pth")


@pytest.mark.parametrize(
    ("words", "mean", "std"),
    [
        ([], [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        (["init_mean=[0.5,0.4,0.3]", "init_std=[0.2,0.2,0.2]"], [0.5, 0.4, 0.3], [0.2, 0.2, 0.2]),
        (["init_mean=${dataset.mean}", "init_std=${dataset.std}", "dataset=cifar10"], [0.4914, 0.4822, 0.4465], None),
        (["init_mean=[0.5]", "init_std=[0.2]"], [0.5], [0.2]),
    ],
)
def test_pixels_are_normalized_as_the_user_says_or_as_for_imagenet(words: list, mean: list, std: list | None) -> None:
    config = compose(*EVALUATE, "encoder=resnet18", "init_from=weights.pth", *words)
    model = make_model(config, [0.1], [0.9], image_size=32)
    assert model.mean.flatten().tolist() == pytest.approx(mean)
    assert model.std.flatten().tolist() == pytest.approx(std or model.std.flatten().tolist())
    assert model.encoder.network.conv1.in_channels == len(mean)


# Runs -----------------------------------------------------------------------------------------------------------------


def test_other_peoples_encoders_are_evaluated(scclr: Run, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On digits, which are grey: they are shown as colour images, and numbers differ from the untrained one's."""
    torch.save(ConvNet(in_channels=3, widths=[8, 16], stem_stride=1).state_dict(), "theirs.pth")
    words = [*EVALUATE, "init_from=theirs.pth", "encoder.widths=[8,16]", "dataset.limit=300"]
    assert scclr("train", *words, "loss=ntxent") == 1
    assert "loss=ntxent: stages=[probe] with weights from elsewhere reads no loss; drop it" in capsys.readouterr().err
    assert not (folder / "runs").exists()
    assert scclr("train", *words) == 0
    said = (
        "theirs.pth: 30 weights of the encoder below layers; pixels: mean 0.485, 0.456, 0.406, std 0.229, 0.224, 0.225"
    )
    assert said in capsys.readouterr().err
    (run,) = run_folders(folder)
    result = result_of(run)
    assert result["metrics"]["logreg-v1/top1"] > 0.3
    assert result["config"]["init_from"] == "theirs.pth"
    mean, std, images = (torch.tensor(x).view(1, 3, 1, 1) for x in (*IMAGENET, [0.2, 0.4, 0.6]))
    theirs = ConvNet(in_channels=3, widths=[8, 16], stem_stride=1).eval()
    theirs.load_state_dict(torch.load("theirs.pth"))
    images = images.expand(2, 3, 8, 8)
    torch.testing.assert_close(package.load(run).features(images), theirs((images - mean) / std))
    first = prepare(compose(*words), words)[1].directory
    assert first.name == run.name
    torch.save(ConvNet(in_channels=3, widths=[8, 16], stem_stride=1).state_dict(), "theirs.pth")
    assert prepare(compose(*words), words)[1].directory != first, "other weights in the file are another run"


def test_the_theory_takes_h_of_weights_without_a_projector(
    scclr: Run, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(ConvNet(in_channels=1, widths=[8, 16], stem_stride=1).state_dict(), "theirs.pth")
    words = ["stages=[theory]", "init_from=theirs.pth", "init_mean=[0.5]", "init_std=[0.2]", "encoder.widths=[8,16]"]
    assert scclr("train", *words, "theory.images=60") == 1
    assert "type projector.depth=0, which takes h itself" in capsys.readouterr().err
    assert scclr("train", *words, "theory.images=60", "projector.depth=0", "loss.temperature=0.3") == 0


def test_training_may_start_from_them(scclr: Run, folder: Path) -> None:
    torch.save(ConvNet(in_channels=1, widths=[8, 16], stem_stride=1).state_dict(), "theirs.pth")
    given = ["init_mean=[0.5]", "init_std=[0.2]"]
    assert scclr("train", "init_from=theirs.pth", *given, "optimizer.lr=1e-12", *TINY) == 0
    (run,) = run_folders(folder)
    model = package.load(run).model
    assert model.mean.item() == 0.5
    torch.testing.assert_close(model.encoder.layers.conv.weight, torch.load("theirs.pth")["layers.conv.weight"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("init_from=gone.pth", r"gone\.pth: no such file"),
        ("init_from=theirs.pth init_mean=[0.5]", "give both, one number a channel"),
        ("init_from=theirs.pth init_mean=[0.5,0.5] init_std=[1]", "give both, one number a channel"),
        ("init_from=theirs.pth init_mean=[2] init_std=[1]", r"init_mean=\[2\.0\]: .* from 0 to 1"),
        ("init_from=theirs.pth init_mean=[1] init_std=[0]", r"init_std=\[0\.0\]: .* from 0\.0001 to 1"),
        ("init_mean=[0.5] init_std=[0.5]", "init_mean=.* is read for weights from elsewhere only"),
        ("init_from=theirs.pth encoder=resnet18", "the encoder has .* weights that the file has not"),
        ("init_from=theirs.pth", "the images have|these have 1"),
    ],
)
def test_what_does_not_fit_together_is_refused_before_anything_is_read(
    words: str, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scclr.datasets.digits.load_digits", lambda: pytest.fail("images are read"))
    torch.save(ConvNet(in_channels=3, widths=[32, 64, 128], stem_stride=1).state_dict(), "theirs.pth")
    with pytest.raises(UserError, match=message) as caught:
        check(compose(*words.split()))
    assert "\n" not in str(caught.value)


def test_the_default_hash_has_nothing_of_it() -> None:
    from dataclasses import asdict

    from scclr.config.resolve import essence

    found = essence(asdict(compose()))
    assert not {"init_mean", "init_std"} & found.keys()
    assert "dataset" not in found["probe"]


# timm -----------------------------------------------------------------------------------------------------------------


def timm_encoder(**changes: Any) -> Any:
    pytest.importorskip("timm")
    from scclr.encoders.timm import Timm

    return Timm(**{"in_channels": 3, "image_size": 32, "name": "test_vit", **changes})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("name", ["test_vit", "resnet10t", "test_efficientnet", "test_resnet.r160_in1k"])
def test_timms_models_take_small_images_of_any_channels(name: str, channels: int) -> None:
    encoder = timm_encoder(name=name, in_channels=channels)
    h = encoder(torch.rand(2, channels, 32, 32))
    assert h.shape == (2, encoder.feature_dim)
    assert encoder.training


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_features_are_those_of_timm_with_its_preprocessing(folder: Path) -> None:
    timm, safetensors = pytest.importorskip("timm"), pytest.importorskip("safetensors.torch")
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=7, depth=2).eval()
    safetensors.save_file(dict(theirs.state_dict()), "weights.safetensors")
    words = ["encoder=timm", "encoder.name=vit_tiny_patch16_224", "init_from=weights.safetensors"]
    model = make_model(compose(*EVALUATE, *words), [0.1] * 3, [0.9] * 3, image_size=64).eval()
    with pytest.raises(UserError, match=r"the encoder has 120 weights that the file has not \(blocks\.2"):
        load_foreign(model.encoder, "weights.safetensors")
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=7).eval()
    safetensors.save_file(dict(theirs.state_dict()), "weights.safetensors")
    assert "2 others are left out (head.bias, head.weight)" in load_foreign(model.encoder, "weights.safetensors")
    with torch.no_grad():
        expected = theirs.forward_head(theirs.forward_features((IMAGES / 255 - 0.5) / 0.5), pre_logits=True)
        torch.testing.assert_close(model.represent(IMAGES / 255), expected, rtol=1e-5, atol=1e-5)
    small = timm_encoder(name="vit_tiny_patch16_224")
    with pytest.raises(UserError, match=r"pos_embed \[1, 17, 192\] instead of \[1, 5, 192\]; .*encoder\.img_size="):
        load_foreign(small, "weights.safetensors")
    resized = timm_encoder(name="vit_tiny_patch16_224", img_size=64)
    load_foreign(resized, "weights.safetensors")
    assert resized(torch.rand(1, 3, 32, 32)).shape == (1, 192)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "vit_smal_patch16_224"}, "has no such model; did you mean vit_small_patch16_224"),
        ({"name": "hf-hub:someone/model"}, r"has no such model; timm\.list_models\(\) lists"),
        ({"name": "local-dir:/tmp"}, "has no such model"),
        ({"name": ""}, "has no such model"),
        ({"image_size": 33}, r"name=test_vit on images of 3 x 33 x 33: Input height \(33\) should be divisible"),
        ({"patch_size": 0}, "patch_size=0: give a number of pixels"),
        ({"patch_size": 64}, "name=test_vit on images of 3 x 32 x 32: "),
        ({"name": "resnet10t", "patch_size": 4}, "patch_size=4: resnet10t has none; drop it"),
        ({"name": "resnet10t", "img_size": 64}, "img_size=64: resnet10t takes one size only"),
        ({"name": "inception_v3", "image_size": 8}, "Output size is too small; give another size"),
    ],
)
def test_what_timm_cannot_do_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        timm_encoder(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_timms_models_are_never_fetched_and_the_seed_alone_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("it reaches for the network"))
    first, second = (timm_encoder(patch_size=8) for _ in range(2) if torch.manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert first.network.patch_embed.patch_size == (8, 8)


def test_without_timm_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"pip install 'scclr\[timm\]'"):
        check(compose("encoder=timm", "encoder.name=vit_tiny_patch16_224"))
