"""Encoders, projector and the normalization of embeddings."""

import re
import warnings
from dataclasses import replace

import pytest
import torch
from conftest import compose
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from scclr.components import check
from scclr.components.make import make_model, make_optimizer, try_encoder
from scclr.config.errors import UserError
from scclr.config.schema import ProjectorConfig
from scclr.encoders.convnet import ConvNet
from scclr.encoders.model import Model, activations, make_projector
from scclr.encoders.resnet import ResNet
from scclr.encoders.vit import ViT

PROJECTOR = ProjectorConfig(depth=2, hidden_dim=24, out_dim=12, batch_norm=True, normalize=True)


def test_embeddings_have_unit_rows() -> None:
    model = Model(ConvNet(in_channels=3, widths=[8, 16], stem_stride=1), PROJECTOR, [0.5] * 3, [0.2] * 3)
    h, z = model(torch.rand(5, 3, 12, 12))
    assert h.shape == (5, 16)
    assert z.shape == (5, 12)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(5))


def test_the_model_normalizes_pixels_and_embeddings() -> None:
    encoder = nn.Flatten()
    encoder.feature_dim = 4  # type: ignore[assignment]
    plain = Model(encoder, replace(PROJECTOR, depth=0), [0.5], [0.25])
    h, z = plain(torch.full((2, 1, 2, 2), 0.75))
    assert torch.equal(h, torch.ones(2, 4))
    assert torch.equal(z, torch.full((2, 4), 0.5)), "a projector of depth 0 is the identity"


def test_the_projector_has_depth_linear_layers() -> None:
    kinds = [type(layer).__name__ for layer in make_projector(16, PROJECTOR)]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    deep = make_projector(16, replace(PROJECTOR, depth=3, batch_norm=False))
    assert [layer.weight.shape for layer in deep if isinstance(layer, nn.Linear)] == [(24, 16), (24, 24), (12, 24)]


@pytest.mark.parametrize("stride", [1, 2])
def test_convnet_halves_the_resolution_after_its_first_block(stride: int) -> None:
    net = ConvNet(in_channels=1, widths=[8, 16, 24], stem_stride=stride)
    assert net(torch.rand(2, 1, 28, 28)).shape == (2, net.feature_dim) == (2, 24)
    last = net.layers[:-1](torch.rand(1, 1, 32, 32))
    assert last.shape[-1] == 16 // stride
    with pytest.raises(ValueError, match="stem_stride=3"):
        ConvNet(in_channels=1, widths=[8], stem_stride=3)


@pytest.mark.parametrize(("depth", "dim"), [(18, 512), (34, 512), (50, 2048)])
@pytest.mark.parametrize("channels", [1, 3])
def test_resnet_stem_follows_the_image_size(depth: int, dim: int, channels: int) -> None:
    with torch.device("meta"):
        small = ResNet(in_channels=channels, image_size=64, depth=depth, stem="auto")
        large = ResNet(in_channels=channels, image_size=65, depth=depth, stem="auto")
        assert small.network.conv1.kernel_size == (3, 3)
        assert isinstance(small.network.maxpool, nn.Identity)
        assert large.network.conv1.kernel_size == (7, 7)
        assert isinstance(large.network.maxpool, nn.MaxPool2d)
        for net in (small, large):
            assert net(torch.empty(2, channels, 64, 64)).shape == (2, dim)
            assert net.feature_dim == dim


def test_resnet_warns_about_the_imagenet_stem_on_small_images() -> None:
    with pytest.warns(UserWarning, match="a 7x7 stem .* on 32-pixel images: stem=auto suits them"):
        ResNet(in_channels=3, image_size=32, depth=18, stem="imagenet")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ResNet(in_channels=3, image_size=32, depth=18, stem="small")
        ResNet(in_channels=3, image_size=96, depth=18, stem="imagenet")
        check(compose("encoder=resnet18", "encoder.stem=imagenet"))  # no weight is made, so the run itself will warn
    with pytest.raises(ValueError, match="depth=19"):
        ResNet(in_channels=3, image_size=32, depth=19, stem="auto")
    with pytest.raises(ValueError, match="stem=tiny"):
        ResNet(in_channels=3, image_size=32, depth=18, stem="tiny")


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize(("side", "patch"), [(8, 2), (32, 4), (28, 4), (64, 8)])
def test_a_small_transformer_takes_small_images(side: int, patch: int, channels: int) -> None:
    net = ViT(in_channels=channels, image_size=side, patch=patch, dim=24, depth=2, heads=3)
    images = torch.rand(2, channels, side, side)
    assert net(images).shape == (2, net.feature_dim) == (2, 24)
    net(images).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    moved = images.roll(patch, 3)
    assert not torch.allclose(net(images), net(moved)), "it knows where a patch lies"


def test_the_first_layer_of_a_transformer_keeps_the_variance_of_a_pixel() -> None:
    for channels in (1, 3):
        torch.manual_seed(0)
        net = ViT(in_channels=channels, image_size=32, patch=4, dim=192, depth=1, heads=3)
        tokens = net.network.conv_proj(torch.randn(64, channels, 32, 32))
        assert tokens.std().item() == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 33}, "patch=4 does not divide images of 33 pixels; give a divisor of these"),
        ({"patch": 0}, "patch=0: give a number from 1"),
        ({"patch": 1, "image_size": 10_000}, "patch=1 makes more than 100,000 tokens"),
        ({"dim": 0}, "dim=0"),
        ({"dim": 10**6}, "dim=1000000"),
        ({"depth": 0}, "depth=0"),
        ({"heads": 5}, "heads=5 does not divide dim=192; give a divisor of it"),
        ({"heads": 0}, "heads=0 does not divide"),
        ({"heads": -3}, "heads=-3 does not divide"),
    ],
)
def test_sizes_of_a_transformer_have_to_fit(changes: dict[str, int], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        ViT(**{"in_channels": 3, "image_size": 32, "patch": 4, "dim": 192, "depth": 1, "heads": 3, **changes})


def test_views_of_a_size_that_the_encoder_does_not_take_are_refused() -> None:
    words = ["encoder=vit_tiny", "encoder.depth=1", "dataset=cifar10", "augment=simclr"]
    check(compose(*words))
    with pytest.raises(UserError, match=r"the encoder takes no images of 24 x 24 pixels .*type another augment\.size"):
        check(compose(*words, "augment.size=24"))


def test_images_of_a_size_that_the_encoder_does_not_take_are_refused() -> None:
    """After pretraining on images of another size: the model is made for those."""
    config = compose("encoder=vit_tiny", "encoder.depth=1")
    model = Model(ViT(in_channels=1, image_size=32, patch=4, dim=24, depth=1, heads=3), PROJECTOR, [0.5], [0.2])
    try_encoder(config, model, [32])
    with pytest.raises(
        UserError, match=r"the encoder takes no images of 28 x 28 pixels .*; give images of another size"
    ):
        try_encoder(config, model, [32, 28])
    assert model.training


def test_a_forward_pass_stays_on_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors have shapes and devices only. An operation on tensors of different devices raises."""
    monkeypatch.setattr("torch.nn.init.trunc_normal_", lambda x, **_: x)  # it draws until all numbers are in a range
    with FakeTensorMode(), torch.device("cuda"):
        small = ConvNet(in_channels=3, widths=[8, 16], stem_stride=2)
        transformer = ViT(in_channels=3, image_size=32, patch=4, dim=24, depth=1, heads=3)
        for encoder in (small, ResNet(in_channels=3, image_size=32, depth=18, stem="auto"), transformer):
            model = Model(encoder, PROJECTOR, [0.5] * 3, [0.2] * 3)
            h, z = model(torch.rand(4, 3, 32, 32).contiguous(memory_format=torch.channels_last))
            assert h.device.type == z.device.type == "cuda"


@pytest.mark.parametrize("size", [9, 32])
@pytest.mark.parametrize("encoder", ["convnet", "resnet18"])
def test_activations_are_a_part_of_what_the_backward_pass_keeps(encoder: str, size: int) -> None:
    def make() -> Model:
        if encoder == "convnet":
            return Model(ConvNet(in_channels=1, widths=[8, 16], stem_stride=1), PROJECTOR, [0.5], [0.2])
        return Model(ResNet(in_channels=1, image_size=size, depth=18, stem="auto"), PROJECTOR, [0.5], [0.2])

    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if not isinstance(x, nn.Parameter):
            kept[x.data_ptr()] = x.numel()
        return x

    images, model = torch.rand(4, 1, size, size), make()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(images)[1].sum().backward()
    with torch.device("meta"):
        least = 4 * activations(make().train(), size)
    assert sum(kept.values()) / 3 < least < sum(kept.values())


def test_activations_leave_the_model_as_it_was() -> None:
    with torch.device("meta"):
        model = Model(ConvNet(in_channels=3, widths=[8], stem_stride=1), PROJECTOR, [0.5] * 3, [0.2] * 3)
    assert activations(model, 8) == activations(model, 8) > 0
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ([0], "from 1 to 100000"),
        ([8, -1], "from 1 to 100000"),
        ([100_001], r"widths=\[100001\]: give numbers of channels"),
        ([2**63], "from 1 to 100000"),
        ([8] * 101, "101 numbers: give 1 to 100"),
        ([], "0 numbers: give 1 to 100"),
    ],
)
def test_widths_have_a_range(widths: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvNet(in_channels=1, widths=widths, stem_stride=1)


STEP = "2 views of 256 images, .* pixels each, take .* GiB or more of the .* GiB of memory: type "


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("augment.size=10000", STEP + "a smaller augment.size or encoder"),
        ("augment.size=1000", STEP + r"pretrain\.micro_batch=\d+$"),
        ("augment.size=1000 pretrain.micro_batch=128", "2 views of 128 images"),
        ("augment.size=1000 nproc=2", r"2 views of 128 images, .* of the 4.0 GiB of memory of a process"),
        ("augment.size=1000 pretrain.precision=bf16", STEP),
        ("encoder.widths=[100000,100000]", "weights, gradients and optimizer take 5,.* type a smaller encoder"),
        ("projector.hidden_dim=100000 projector.out_dim=100000", "projector.hidden_dim or projector.out_dim"),
        ("encoder=resnet50 augment.size=224", r"pretrain\.micro_batch="),
    ],
)
def test_what_cannot_fit_into_memory_is_refused(words: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scclr.components.memory_limit", lambda: 2**33)
    with pytest.raises(UserError, match=message) as caught:
        check(compose("device=cpu", *words.split()))
    if advice := re.search(r"pretrain\.micro_batch=\d+", str(caught.value)):
        check(compose("device=cpu", *(word for word in words.split() if "micro_batch" not in word), advice[0]))


def test_the_default_run_fits_into_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scclr.components.memory_limit", lambda: 2**27)
    check(compose("device=cpu"))


@pytest.mark.parametrize("words", [["encoder=vit_tiny"], ["encoder=timm", "encoder.name=test_vit"]])
def test_a_transformers_class_token_and_positions_do_not_decay(words: list[str]) -> None:
    config = compose(*words, "dataset=cifar10", "augment=simclr", "optimizer.weight_decay=0.1")
    model = make_model(config, [0.5] * 3, [0.25] * 3, image_size=32)
    decay = {
        id(p): group["weight_decay"] for group in make_optimizer(config, model).param_groups for p in group["params"]
    }
    decayed = {name for name, p in model.named_parameters() if decay[id(p)] > 0}
    assert not [name for name in decayed if "token" in name or "pos_embed" in name]
    assert decayed >= {name for name, p in model.named_parameters() if p.ndim in (2, 4)}
    assert len(decay) == len(list(model.parameters()))
