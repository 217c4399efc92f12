"""The online probe: it learns, and changes nothing else; it resumes, and N processes are one."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from conftest import TINY, compose, noise, result_of, rows_of, run_folders, training
from torch import Tensor

from scclr.components import check_data
from scclr.config.errors import UserError
from scclr.datasets import ImageSet, Splits
from scclr.datasets.loader import Batch
from scclr.evaluate.quality import measure_quality
from scclr.pretrain.loop import train_step
from scclr.pretrain.online import LR, OnlineProbe
from scclr.run import distributed
from scclr.run.checkpoint import load

Run = Callable[..., int]
CPU = torch.device("cpu")
ON = "pretrain.online_probe=true"
NAME = "pretrain/online/top1"


def weights_of(run: Path) -> dict[str, Tensor]:
    """The weights and buffers of a run's last checkpoint."""
    found: dict[str, Tensor] = load(run)["model"]
    return found


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_step_is_that_of_softmax_regression_by_adam() -> None:
    """Two steps again by hand, with the accuracy before each."""
    draw = torch.Generator().manual_seed(0)
    random = torch.get_rng_state()
    probe = OnlineProbe(5, 3, CPU, seed=1)
    assert torch.equal(torch.get_rng_state(), random)
    weight, bias = (p.detach().clone().requires_grad_() for p in probe.layer.parameters())
    adam, right = torch.optim.Adam([weight, bias], lr=LR), 0
    for _ in range(2):
        h, labels = torch.randn(2, 7, 5, generator=draw), torch.randint(0, 3, (7,), generator=draw)
        logits = torch.cat([h[0], h[1]]) @ weight.T + bias
        right += int((logits.argmax(1) == torch.cat([labels, labels])).sum())
        adam.zero_grad()
        F.cross_entropy(logits, torch.cat([labels, labels])).backward()
        adam.step()
        probe.learn(h.requires_grad_(), labels)
        assert h.grad is None
    torch.testing.assert_close(list(probe.layer.parameters()), [weight, bias], rtol=1e-5, atol=1e-6)
    assert probe.top1() == {"online/top1": right / 28}
    assert probe.top1() == {"online/top1": 0.0}, "a new window"


@pytest.mark.parametrize("micro_batch", [None, 6])
def test_it_sees_the_views_of_the_step_with_their_labels(micro_batch: int | None) -> None:
    state, augment = training(compose(*TINY))
    data = noise(16)
    labels = torch.arange(16) % 4
    seen: list[tuple[Tensor, Tensor]] = []
    state.online = OnlineProbe(16, 4, CPU, seed=0)
    state.online.learn = lambda h, y: seen.append((h, y))  # type: ignore[method-assign]
    model = deepcopy(state.model).train()
    train_step(
        state, state.model, augment, Batch(data.images, labels),
        seed=0, dtype=torch.float32, memory_format=torch.contiguous_format, micro_batch=micro_batch,
    )  # fmt: skip
    ((h, y),) = seen
    assert torch.equal(y, labels)
    assert not h.requires_grad
    parts = [range(16)] if micro_batch is None else [range(0, 6), range(6, 12), range(12, 16)]
    views = augment(data.images, seed=0, step=0).unflatten(0, (2, 16))
    with torch.no_grad():
        expected = torch.cat([model(views[:, part].flatten(0, 1))[0].unflatten(0, (2, -1)) for part in parts], 1)
    torch.testing.assert_close(h, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("words", [[], ["pretrain.micro_batch=24"]], ids=["whole", "micro_batch"])
def test_the_encoder_is_bit_for_bit_the_same_with_it_also_resumed(
    words: list[str], scclr: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import scclr.run.checkpoint as checkpoint

    line = ["train", "stages=[pretrain]", "checkpoint.every=1", *TINY, *words]
    assert scclr(*line, "runs=without") == 0
    assert scclr(*line, ON, "runs=with") == 0
    save, saves = checkpoint.save, []

    def killed(directory: Path, state: dict, name: str) -> None:
        save(directory, state, name)
        saves.append(state["step"])
        if len(saves) == 5:  # between two rows
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", killed)
    assert scclr(*line, ON, "runs=parts") == 130
    assert scclr(*line, ON, "runs=parts") == 0
    assert saves == [1, 2, 3, 4, 5, 6]
    without, whole, parts = (next((folder / name / "default").glob("*/")) for name in ("without", "with", "parts"))
    assert equal(weights_of(without), weights_of(whole))
    assert equal(weights_of(whole), weights_of(parts))
    assert rows_of(whole) == rows_of(parts)
    assert [{k: v for k, v in row.items() if k != NAME} for row in rows_of(whole)] == rows_of(without)
    assert all(NAME in row for row in rows_of(whole))
    a, b = (load(run)["online"] for run in (whole, parts))
    assert equal(a["layer"], b["layer"])
    assert "online" not in load(without)
    assert whole.name != without.name, "another identity"
    assert without.name == next((folder / "without" / "default").glob("*/")).name


def test_the_default_changes_no_identity(scclr: Run, folder: Path) -> None:
    for words in ([], ["pretrain.online_probe=false", "pretrain.quality_every=20"]):
        assert scclr("train", "stages=[pretrain]", "pretrain.epochs=1", *TINY, *words) == 0
    assert len(run_folders(folder)) == 1


def test_it_learns(scclr: Run, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scclr("train", "stages=[pretrain]", ON, *TINY, "pretrain.epochs=20", "pretrain.log_every=10") == 0
    (run,) = run_folders(folder)
    values = [row[NAME] for row in rows_of(run)]
    assert values[0] < 0.25
    assert values[-1] > 2 * values[0]
    assert result_of(run)["last"][NAME] == values[-1]
    assert f"probe {values[-1]:.3g}" in capsys.readouterr().err


def test_images_without_labels_are_refused_in_one_line(scclr: Run, folder: Path) -> None:
    config = compose(*TINY, ON, "stages=[pretrain]", "pretrain.knn_every=0")
    data = noise(80)
    unlabelled = ImageSet(data.images, torch.full((80,), -1))
    splits = Splits(unlabelled, unlabelled, unlabelled[slice(0, 8)], unlabelled[slice(0)], (), (0.5,), (0.25,))
    with pytest.raises(UserError, match=r"^pretrain\.online_probe=true reads labels[^\n]+$"):
        check_data(config, splits)
    config.pretrain.online_probe = False
    check_data(config, splits)


def test_another_probe_does_not_fit_a_checkpoint() -> None:
    state, _ = training(compose(*TINY))
    saved = state.state_dict()
    state.online = OnlineProbe(16, 10, CPU, seed=0)
    with pytest.raises(UserError, match=r"the checkpoint does not fit this run"):
        state.load_state_dict(saved)


def steps_and_quality() -> dict[str, Any]:
    """The probe after four steps of all processes together, and then the quality of the model."""
    state, augment = training(compose(*TINY, "optimizer=sgd"))
    state.model.double()
    state.online = OnlineProbe(16, 4, CPU, seed=0)
    network, data = distributed.replicate(state.model), noise(16)
    batch = Batch(distributed.shard(data.images), torch.arange(16) % 4)  # type: ignore[arg-type]
    for state.step in range(4):
        train_step(
            state, network, augment, batch,
            seed=0, dtype=torch.float32, memory_format=torch.contiguous_format,
        )  # fmt: skip
    saved = state.online.state_dict()
    state.online.load_state_dict(saved)
    quality = measure_quality(state.model.float(), noise(150), augment, 64, seed=0)
    return {**saved["layer"], **state.online.top1(), "quality": quality.metrics}


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(steps_and_quality(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    """Also through a checkpoint. Of the two parts of LiDAR's images each process has one."""
    one = steps_and_quality()
    mp.spawn(process, (str(tmp_path),), 2)  # type: ignore[no-untyped-call]
    for two in (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)):
        assert two["online/top1"] == one["online/top1"] > 0
        for name in ("weight", "bias"):
            torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-4)
        assert two["quality"] == pytest.approx(one["quality"], rel=1e-4)
