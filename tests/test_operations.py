"""What the host hands to a GPU in one training step: operations, copies, and nothing that it would have to wait for.

No GPU is needed. Fake tensors have the shapes and the device of real ones, and no values. Every operation of the step
is counted that computes, fills or copies; views and empty tensors cost no kernel. Without a driver, autograd cannot ask
fake CUDA tensors for their stream. So the backward pass is counted on fake tensors of the CPU.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from augment_helpers import ALL, CROP, JITTER, make, pictures, simclr
from conftest import compose, training
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scclr.augment import Augment
from scclr.config.build import build
from scclr.datasets.loader import Batch
from scclr.losses import pairs
from scclr.pretrain.loop import train_step
from scclr.pretrain.state import TrainState

IMAGES = 512
NO_KERNEL = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_unsafe_view", "as_strided_")
READS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "_unique2")


class Operations(TorchDispatchMode):
    """Counts what is done on ``device``, and notes what brings values to the host."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.counts, self.copies = device, Counter[str](), 0
        self.waits: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.split("::")[1]
        if name.startswith("_fused_"):  # a fake tensor has no implementation of an optimizer's kernel
            self.counts[name] += 1
            return None
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_device = any(x.device.type == self.device for x in given)
        if on_device and name in READS:
            self.waits.append(name)
        result = function(*args, **(kwargs or {}))
        found = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        to_device = any(x.device.type == self.device for x in found)
        returns = function._schema.returns
        is_view = any(value.alias_info is not None and not value.alias_info.is_write for value in returns)
        if function.namespace == "prim" or not (on_device or to_device):
            return result
        if on_device and any(x.device.type != self.device for x in found):
            self.waits.append(f"{name} to the host")
        if not is_view and name not in NO_KERNEL:
            self.counts[name] += 1
            self.copies += to_device and any(x.device.type != self.device and x.ndim > 0 for x in given)
        return result


@contextmanager
def fake(device: str) -> Iterator[None]:
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            pytest.skip(f"this version of PyTorch makes no fake CUDA tensor without a driver: {error}")
        yield


def fake_parts(device: str, *words: str) -> tuple[TrainState, Augment, Batch]:
    """The preset's state, augmentation and a batch, as fake tensors."""
    config = compose("experiment=cifar10_resnet18", *words)
    with torch.device(device):
        state, augment = training(config, 3)
        for module in state.model.modules():
            for name, p in module._parameters.items():
                if p is not None and p.ndim == 4:
                    channels_last = p.detach().contiguous(memory_format=torch.channels_last)
                    module._parameters[name] = nn.Parameter(channels_last)
        images = torch.empty(IMAGES, 3, 32, 32, dtype=torch.uint8)
        batch = Batch(images, torch.empty(IMAGES, dtype=torch.int64))
    state.optimizer = build("optimizer", config.optimizer, model=state.model, batch_size=IMAGES)
    return state, augment, batch


def step(state: TrainState, augment: Augment, batch: Batch, dtype: torch.dtype) -> None:
    train_step(state, state.model, augment, batch, seed=0, dtype=dtype, memory_format=torch.channels_last)
    state.step += 1


def forward_and_update(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, *words: str) -> Operations:
    """The operations of a step on a fake GPU but for the backward pass."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    first, operations = Operations("cuda"), Operations("cuda")
    with fake("cuda"):
        state, augment, batch = fake_parts("cuda", *words)

        def backward(result: Tensor, *_: Any) -> None:
            for p in state.model.parameters():
                p.grad = torch.empty_like(p)

        monkeypatch.setattr(Tensor, "backward", backward)
        with first:  # makes momentum, and draws two steps
            step(state, augment, batch, dtype)
        with operations:
            step(state, augment, batch, dtype)
    return operations


def backward_of(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, *words: str) -> Counter[str]:
    """The operations of the backward pass of a step, on the CPU."""
    operations = Operations("cpu")
    with fake("cpu"):
        state, augment, batch = fake_parts("cpu", *words)
        vars(augment)["render"] = augment.render  # every operation for all views, as on a GPU
        gpu_tile = pairs.tile_of(torch.device("cuda"))
        monkeypatch.setattr(pairs, "tile_of", lambda _: gpu_tile)
        backward = Tensor.backward

        def counted(result: Tensor) -> None:
            with operations:
                backward(result)

        monkeypatch.setattr(Tensor, "backward", counted)
        step(state, augment, batch, dtype)
    assert operations.waits == []
    return operations.counts


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize(("exact", "most", "copies"), [(True, 600, 2), (False, 480, 1)])
@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_is_few_operations_and_reads_nothing_back(
    exact: bool, most: int, copies: int, optimizer: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"augment.exact={exact}", f"optimizer={optimizer}"]
    with monkeypatch.context() as patched:
        found = forward_and_update(dtype, patched, *words)
    assert found.waits == []
    assert found.copies <= copies
    with monkeypatch.context() as patched:
        backward = backward_of(dtype, patched, *words)
    total = found.counts + backward
    assert {"convolution", "convolution_backward", "_embedding_bag_forward_only"} <= total.keys()
    assert total.total() <= most, total.most_common()


@pytest.mark.parametrize("exact", [True, False])
def test_the_parts_of_a_batch_share_one_copy(exact: bool) -> None:
    """Gradient caching asks for the views of every part twice. Those of the next step are sent ahead."""
    operations = Operations("cuda")
    with fake("cuda"):
        words = ["augment.blur=0.5", "augment.solarize=0.2", "augment.rotation=10", f"augment.exact={exact}"]
        _, augment, batch = fake_parts("cuda", *words)
        with operations:
            for part in (0, 200, 400, 0, 200, 400):
                views = augment(batch.images[part : part + 200], seed=0, step=3, first=part, total=IMAGES)
                assert views.device.type == "cuda"
            assert operations.copies == 1
            augment.prepare(batch.images, seed=0, step=4, total=IMAGES)
            assert operations.copies == 2
            augment(batch.images, seed=0, step=4)
    assert (operations.copies, operations.waits) == (2, [])


def test_what_waits_or_copies_is_noticed() -> None:
    """The mode itself: a value read back, and a copy in either direction."""
    operations = Operations("cuda")
    with fake("cuda"), operations:
        x = torch.ones(3).to("cuda")
        assert operations.copies == 1
        x.cpu()
        for read in (Tensor.item, Tensor.nonzero):
            with pytest.raises(Exception, match=r".*"):
                read(x[:1])
    assert operations.waits == ["_to_copy to the host", "_local_scalar_dense", "nonzero"]


EVERY_RECIPE = {
    "all": {**ALL, "rotation": 30.0},
    "smaller": {**ALL, "size": 25},
    "strong": {**JITTER, "hue": 0.5, "jitter": 1.0, "grayscale": 0.1},
    "crop": CROP,
    "three views": {**ALL, "views": [{}, {"jitter": 0.0, "blur": 1.0}, {"grayscale": 1.0, "solarize": 1.0}]},
}


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("channels", "shape"), [(1, (32, 32)), (3, (32, 32)), (3, (32, 40))])
@pytest.mark.parametrize("name", EVERY_RECIPE)
def test_the_same_operations_for_all_views_give_the_same_views(
    name: str, channels: int, shape: tuple[int, int], exact: bool
) -> None:
    """What a GPU does, on the CPU, beside what the CPU does."""
    augment = make(**{**EVERY_RECIPE[name], "exact": exact})
    images = pictures(64, channels, 40)[..., : shape[0], : shape[1]].contiguous()
    for step in range(3):
        found = augment.render(images, augment.prepare(images, seed=1, step=step, total=64))
        expected = augment(images, seed=1, step=step)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
        assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("exact", [True, False])
def test_compiled_views_are_one_graph_for_each_size_of_parts(exact: bool) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    augment, images = simclr(blur=0.5, solarize=0.2, rotation=10.0, exact=exact), pictures(20)
    compiled, whole = augment.compiled(backend="eager"), augment(images, seed=0, step=3)  # fullgraph: no break
    for first, last in ((0, 8), (8, 16), (16, 20)) * 2:
        part = compiled(images[first:last], seed=0, step=3, first=first, total=20)
        torch.testing.assert_close(
            part, torch.cat([whole[first:last], whole[20 + first : 20 + last]]), atol=1e-6, rtol=0
        )
    assert counters["stats"]["unique_graphs"] == 2


def test_the_parts_of_a_batch_are_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    augment, images, steps = simclr(), pictures(6), []
    draw = Augment.draw
    counted = lambda self, total, *, seed, step: (steps.append(step), draw(self, total, seed=seed, step=step))[1]  # noqa: E731
    monkeypatch.setattr(Augment, "draw", counted)
    for step in (3, 4):
        for first in (0, 3, 0, 3):
            augment(images[first : first + 3], seed=0, step=step, first=first, total=6)
    assert steps == [3, 4]
    assert torch.equal(augment(images, seed=0, step=3), simclr()(images, seed=0, step=3)), (
        "an earlier step is drawn anew"
    )
