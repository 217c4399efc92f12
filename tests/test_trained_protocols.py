"""The protocols that train, linear evaluation by SGD and fine-tuning, against plain loops in PyTorch."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from conftest import compose
from image_files import digits
from torch import Tensor, nn

from scclr.augment import generator
from scclr.components import make_protocols
from scclr.config.errors import UserError
from scclr.config.schema import ProjectorConfig
from scclr.datasets import ImageSet, Splits
from scclr.datasets.arrays import MappedArray
from scclr.encoders.convnet import ConvNet
from scclr.encoders.model import Model
from scclr.evaluate.crops import Steps, crop_and_flip, known_images, labelled_share
from scclr.evaluate.features import encoder_hash, extract_layers, own_share
from scclr.evaluate.finetune import FineTune
from scclr.evaluate.logreg import accuracy, choose_l2, fit_logreg, predict
from scclr.evaluate.protocol import Features
from scclr.evaluate.sgd import SGD, scores

WHOLE = {"crop_scale": [1.0, 1.0], "flip": 0.0}
CROPS = {"crop_scale": [0.4, 1.0], "flip": 0.0}


def model() -> Model:
    torch.manual_seed(0)
    projector = ProjectorConfig(depth=2, hidden_dim=8, out_dim=4, batch_norm=True, normalize=True)
    return Model(ConvNet(in_channels=1, widths=[8, 16], stem_stride=1), projector, [0.3], [0.4])


@pytest.fixture(scope="module")
def trained() -> Model:
    """A model whose encoder tells digits apart, by a short training with labels."""
    net, splits = model(), digits().load()
    tuned = finetune(epochs=8, batch_size=32).train(features(net, splits), splits.train, 0.3)
    net.encoder = tuned.model.encoder
    return net


def features(net: Model, splits: Splits, layer: str = "h") -> Features:
    """The features of this process's share."""
    parts = [own_share(part) for part in (splits.train, splits.validation, splits.test)]
    train, validation, test = ((extract_layers(net, part, 64, [layer])[layer], part.labels) for part in parts)
    return Features(train, validation, test, splits, net, layer)


def sgd(**changes: object) -> SGD:
    return SGD(**{"lr": [0.1, 1.0], "epochs": 3, "batch_size": 64, "augment": False, **CROPS, **changes})  # type: ignore[arg-type]


def finetune(**changes: object) -> FineTune:
    return FineTune(**{"lr": [0.01, 0.1], "epochs": 2, "batch_size": 64, "share": 1.0, **CROPS, **changes})  # type: ignore[arg-type]


def in_torch(batches: list[tuple[Tensor, Tensor]], lr: float) -> nn.Linear:
    """A linear layer of zeros, trained on ``batches`` by PyTorch's optimizer and schedule."""
    layer = nn.Linear(batches[0][0].shape[1], 10)
    for weights in layer.parameters():
        nn.init.zeros_(weights)
    optimizer = torch.optim.SGD(layer.parameters(), lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(layer(x), y).backward()
        optimizer.step()
        schedule.step()
    return layer


def order(epoch: int, n: int, seed: int = 0) -> Tensor:
    return torch.randperm(n, generator=generator(seed, epoch, 0))


@pytest.mark.parametrize("refit", [False, True])
def test_rates_side_by_side_are_torch_one_by_one(refit: bool) -> None:
    given = features(model(), digits(limit=400).load())
    parts = given.known if refit else [given.train]
    x, y = (torch.cat(values) for values in zip(*parts, strict=True))
    rows = [batch for epoch in range(3) for batch in order(epoch, len(y)).split(64) if len(batch) == 64]
    found = sgd().train(given, parts, [0.1, 1.0])
    for lr, weights in zip((0.1, 1.0), found, strict=True):
        layer = in_torch([(x[i], y[i]) for i in rows], lr * 64 / 256)
        torch.testing.assert_close(weights[:, :-1], layer.weight, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(weights[:, -1], layer.bias, atol=1e-5, rtol=1e-4)


def test_crops_are_seen_by_the_encoder_in_eval_mode() -> None:
    net, splits = model(), digits(limit=200).load()
    given, before = features(net, splits), encoder_hash(net.encoder)
    protocol, n = sgd(augment=True, epochs=2), len(splits.train)
    found = protocol.train(given, [given.train], [1.0])[0]
    frozen, batches = copy.deepcopy(net).eval(), []
    for step, rows in enumerate(i for epoch in range(2) for i in order(epoch, n).split(64) if len(i) == 64):
        images = crop_and_flip([0.4, 1.0], 0.0)(splits.train.images[rows], seed=0, step=step)  # type: ignore[index]
        batches.append((frozen.represent(images).detach(), splits.train.labels[rows]))
    layer = in_torch(batches, 64 / 256)
    torch.testing.assert_close(found[:, :-1], layer.weight, atol=1e-5, rtol=1e-4)
    assert net.training
    assert encoder_hash(net.encoder) == before
    whole = sgd(augment=True, **WHOLE).train(given, given.known, [1.0])
    torch.testing.assert_close(whole, sgd().train(given, given.known, [1.0]), atol=1e-4, rtol=1e-3)


def test_the_rate_is_chosen_on_validation_and_tested_once(trained: Model) -> None:
    given, rates = features(trained, digits(limit=400).load()), [1e-6, 3.0, 30.0]
    protocol = sgd(lr=[3.0, 30.0, 1e-6], epochs=20)
    outcome = protocol(given)
    trained = protocol.train(given, [given.train], rates)
    right = [accuracy(scores(given.validation[0], trained)[:, i].argmax(1), given.validation[1]) for i in range(3)]
    assert outcome.validation == max(right) > right[0]
    best = right.index(max(right))
    assert outcome.chosen == {"lr": rates[best]}
    final = protocol.train(given, given.known, [rates[best]])
    predicted, y = scores(given.test[0], final)[:, 0].argmax(1), given.test[1]
    assert outcome.metrics["top1"] == accuracy(predicted, y)
    assert outcome.confusion is not None
    counted = torch.zeros(10, 10).index_put_((y, predicted), torch.ones(1), accumulate=True)
    assert torch.equal(outcome.confusion, counted.long())
    without_refit = replace(given, splits=replace(given.splits, refit=False))
    predicted = scores(given.test[0], trained)[:, best].argmax(1)
    assert protocol(without_refit).metrics["top1"] == accuracy(predicted, y)


def test_equally_good_rates_give_the_lowest() -> None:
    apart = torch.tensor([[-1.0], [1.0]]).repeat(20, 1), torch.tensor([0, 1]).repeat(20)
    images = ImageSet(torch.zeros(40, 1, 8, 8, dtype=torch.uint8), apart[1])
    splits = Splits(images, images, images, images, ("a", "b"), (0.5,), (0.5,))
    outcome = sgd(lr=[3.0, 0.1, 1.0])(Features(apart, apart, apart, splits))
    assert (outcome.validation, outcome.chosen) == (1.0, {"lr": 0.1})


def finetuned(net: Model, data: ImageSet, lr: float, epochs: int) -> tuple[Model, nn.Linear]:
    """A copy of ``net`` and a linear layer, trained end to end by a plain loop over whole images."""
    net, head = copy.deepcopy(net).train(), nn.Linear(16, 10)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    parameters = [*net.encoder.parameters(), *head.parameters()]
    steps = [rows for epoch in range(epochs) for rows in order(epoch, len(data)).split(64) if len(rows) == 64]
    velocity = [torch.zeros_like(p) for p in parameters]
    for step, rows in enumerate(steps):
        images = data.images[rows].float() / 255  # type: ignore[union-attr]
        loss = F.cross_entropy(head(net.represent(images)), data.labels[rows])
        rate = lr * 64 / 256 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / len(steps)))).item()
        for p, v, g in zip(parameters, velocity, torch.autograd.grad(loss, parameters), strict=True):
            v.mul_(0.9).add_(g)
            p.data.sub_(rate * (g + 0.9 * v))  # Nesterov's, as PyTorch has it
    return net, head


def test_fine_tuning_trains_a_copy_end_to_end() -> None:
    net, splits = model(), digits(limit=400).load()
    before = encoder_hash(net)
    reference, head = finetuned(net, splits.train, 0.1, 4)
    tuned = finetune(**WHOLE, epochs=4).train(features(net, splits), splits.train, 0.1)
    expected = reference.encoder.state_dict()
    for name, found in tuned.model.encoder.state_dict().items():
        torch.testing.assert_close(found, expected[name], atol=2e-4, rtol=1e-3, msg=name)
    torch.testing.assert_close(tuned.head.weight, head.weight, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(tuned.head.bias, head.bias, atol=2e-4, rtol=1e-3)
    assert encoder_hash(tuned.model.encoder) != encoder_hash(net.encoder)
    assert encoder_hash(net) == before
    assert net.training


def test_the_rate_of_fine_tuning_is_chosen_on_validation_and_tested_once(trained: Model) -> None:
    splits = digits(limit=400).load()
    given, protocol = features(trained, splits), finetune(lr=[1.0, 1e-6], epochs=4)
    outcome, before = protocol(given), encoder_hash(trained)
    tuned = [protocol.train(given, splits.train, lr) for lr in (1e-6, 1.0)]
    right = [accuracy(one.scores(splits.validation, 64).argmax(1), splits.validation.labels) for one in tuned]
    best = right.index(max(right))
    assert right[0] != right[1]
    assert outcome.validation == right[best]
    assert outcome.chosen == {"lr": (1e-6, 1.0)[best], "images": len(splits.train) + len(splits.validation)}
    final = protocol.train(given, known_images(splits, 2), outcome.chosen["lr"])
    assert outcome.metrics["top1"] == accuracy(final.scores(splits.test, 64).argmax(1), splits.test.labels)
    without_refit = protocol(replace(given, splits=replace(splits, refit=False)))
    assert without_refit.metrics["top1"] == accuracy(tuned[best].scores(splits.test, 64).argmax(1), splits.test.labels)
    assert encoder_hash(trained) == before


def test_batch_normalization_moves_as_simclr_says() -> None:
    """By 10 / s of the new statistics, where an epoch has more than 100 steps."""
    net, splits = model(), digits(limit=400).load()
    momenta = [
        {m.momentum for m in tuned.modules() if isinstance(m, nn.BatchNorm2d)}
        for tuned in (
            finetune(epochs=1, batch_size=batch).train(features(net, splits), splits.train, 0.01) for batch in (2, 64)
        )
    ]
    assert momenta == [{10 / (len(splits.train) // 2)}, {0.1}]


def test_a_share_of_the_labels() -> None:
    data = digits().load().train
    share = labelled_share(data, 0.1, seed=3)
    counts, all_counts = (torch.bincount(part.labels) for part in (share, data))
    assert torch.equal(counts, (0.1 * all_counts).round().long())
    assert labelled_share(data, 1e-6, seed=3).labels.tolist().count(4) == 1
    assert torch.equal(share.images, labelled_share(data, 0.1, seed=3).images)  # type: ignore[arg-type]
    assert not torch.equal(share.images, labelled_share(data, 0.1, seed=4).images)  # type: ignore[arg-type]
    kept = {image.numpy().tobytes(): int(label) for image, label in zip(data.images, data.labels, strict=True)}  # type: ignore[call-overload]
    assert all(kept[i.numpy().tobytes()] == y for i, y in zip(share.images, share.labels.tolist(), strict=True))  # type: ignore[call-overload]
    outcome = finetune(share=0.1, lr=[0.01], epochs=1)(features(model(), digits(limit=400).load()))
    assert outcome.chosen["images"] == 40


class Products(nn.Module):
    """An encoder without batch normalization, whose outputs grow with every step at a high rate."""

    feature_dim = 8

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), *(nn.Linear(n, 8, bias=False) for n in (64, 8, 8)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_fine_tuning_that_diverges_is_said() -> None:
    net = model()
    net.encoder = Products()
    given = features(net, digits(limit=200).load())
    with pytest.raises(UserError, match=r"diverged at lr=100: type smaller ones") as caught:
        finetune(lr=[100.0], epochs=10)(given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layer", ["h", "z"])
def test_both_layers_and_images_on_disk(layer: str) -> None:
    """Images that are mapped from a file give what the same images in memory do."""
    net, splits = model(), digits(limit=300).load()
    whole = torch.cat([part.images for part in (splits.train, splits.validation)])  # type: ignore[arg-type]
    array, n = whole.numpy(), len(splits.train)

    def mapped(rows: Tensor) -> MappedArray:
        return MappedArray(index=rows, size=8, workers=0, array=array)

    train = ImageSet(mapped(torch.arange(n)), splits.train.labels)
    validation = ImageSet(mapped(torch.arange(n, len(whole))), splits.validation.labels)
    on_disk = replace(splits, pretrain=train, train=train, validation=validation)
    for protocol in (sgd(augment=True), finetune(epochs=1)):
        found, expected = protocol(features(net, on_disk, layer)), protocol(features(net, splits, layer))
        assert found.metrics == expected.metrics
        assert found.chosen == expected.chosen


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": []}, "lr=.*one or more"),
        ({"lr": [0.0]}, "lr="),
        ({"epochs": 0}, "epochs=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"flip": 2.0}, "flip=2"),
        ({"crop_scale": [1.0, 0.5]}, "crop_scale"),
    ],
)
def test_arguments_out_of_range_are_refused(changes: dict, message: str) -> None:
    for make in (sgd, finetune):
        with pytest.raises(ValueError, match=message):
            make(**changes)
    with pytest.raises(ValueError, match="share=0"):
        finetune(share=0.0)


def test_files_of_the_group_name_their_own_protocol() -> None:
    """Those of semi-supervised learning differ from ``finetune`` in the share, and one in the epochs."""
    names = ["sgd", "finetune", "finetune10", "finetune1"]
    made = make_protocols(compose(f"probe.protocols=[{','.join(names)}]"))
    assert list(made) == names
    linear, *tuned = made.values()
    assert isinstance(linear, SGD)
    assert [(one.share, one.epochs) for one in tuned if isinstance(one, FineTune)] == [(1, 30), (0.1, 30), (0.01, 60)]
    assert not any(one.baselines for one in made.values())


def test_linear_evaluation_is_near_logistic_regression(trained: Model) -> None:
    """Within 0.3 points on digits' features, of 450 test images."""
    given = features(trained, digits().load())
    choice = choose_l2(given.train, given.validation, 10, [1e-5, 1e-4, 1e-3, 1e-2], 100)
    fit = fit_logreg(given.known, 10, choice.l2, 100)
    expected = accuracy(predict(given.test[0], fit.weights), given.test[1])
    found = sgd(lr=[0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0], epochs=100)(given).metrics["top1"]
    assert abs(found - expected) < 0.003, (found, expected)


def plain_features() -> Features:
    """Fixed features of three overlapping classes in the share of one process."""
    labels = torch.arange(300) % 3
    wave = torch.sin(torch.arange(300.0).unsqueeze(1) * torch.tensor([1.3, 2.1, 0.7, 3.3]))
    x = F.one_hot(labels, 4) * 0.8 + wave
    parts = [(x[i : i + 100], labels[i : i + 100]) for i in (0, 100, 200)]
    sets = [ImageSet(torch.zeros(100, 1, 1, 1, dtype=torch.uint8), y) for _, y in parts]
    return Features(parts[0], parts[1], parts[2], Splits(sets[0], *sets, ("a", "b", "c"), (0.5,), (0.5,)))


def test_the_numbers_of_version_1() -> None:
    """A change that moves these is a new version of the protocol."""
    outcome = sgd(epochs=10)(plain_features())
    assert outcome.metrics == pytest.approx({"top1": 0.66, "balanced": 0.656566, "ece": 0.167867}, abs=1e-4)
    assert (outcome.validation, outcome.chosen) == (0.82, {"lr": 0.1})
    given = features(model(), digits(limit=400).load())
    outcome = sgd(augment=True, epochs=20, lr=[1.0, 30.0])(given)
    assert outcome.metrics["top1"] == pytest.approx(0.2133, abs=0.01), "rounding may move four images"
    outcome = finetune(epochs=8, lr=[0.1, 1.0])(given)
    assert outcome.metrics["top1"] == pytest.approx(0.74, abs=0.03)
    assert outcome.chosen == {"lr": 1.0, "images": 400}


def evaluate_shares(rank: int, size: int, folder: str) -> None:
    """One process of ``test_processes_that_hold_shares_are_one``: what it finds is in ``<rank>.pt``."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    torch.save(found_by(), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def found_by() -> list[Tensor]:
    torch.set_num_threads(1)
    net, splits = model(), digits(limit=401).load()  # the shares differ in size
    given = features(net, splits)
    tuned = finetune(epochs=1).train(given, splits.train, 0.1)
    outcomes = [protocol(given) for protocol in (sgd(), finetune(epochs=1, lr=[0.1]))]
    return [
        sgd().train(given, given.known, [0.1, 1.0]),
        sgd(augment=True).train(given, given.known, [0.1, 1.0]),
        tuned.head.weight.detach(),
        tuned.model.encoder.layers.norm.running_var,  # type: ignore[union-attr, list-item]
        torch.tensor([[outcome.metrics["top1"], outcome.validation or 0.0] for outcome in outcomes]),
    ]


@pytest.mark.slow
def test_processes_that_hold_shares_are_one(tmp_path: Path) -> None:
    mp.spawn(evaluate_shares, (2, str(tmp_path)), nprocs=2)
    expected = found_by()
    for rank in range(2):
        for found, one in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
            torch.testing.assert_close(found, one, atol=1e-4, rtol=1e-3)


def test_a_batch_is_no_larger_than_the_images_and_a_multiple_of_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Steps.of(100, 256, 3) == Steps(100, 1, 3)
    assert Steps.of(100, 30, 3) == Steps(30, 3, 9)
    monkeypatch.setattr("scclr.run.distributed.world_size", lambda: 4)
    assert Steps.of(100, 30, 3) == Steps(28, 3, 9)
    with pytest.raises(UserError, match="3 images of 4 processes"):
        Steps.of(3, 30, 3)
