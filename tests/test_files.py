"""Images on disk: keyed views in any number of processes, worker processes, and broken files."""

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
from conftest import TINY, rows_of, run_folders
from image_files import all_images, image_folder, truncate, write_image, write_photographs
from PIL import Image
from processes import children, ended, finish, kill_started, start, until
from worker_jobs import kill, own_number

from scclr.config.errors import UserError
from scclr.datasets import ImageSet
from scclr.datasets.loader import batch_indices, batches, views, with_view_size
from scclr.datasets.workers import read_ahead
from scclr.run.checkpoint import load
from scclr.run.preemption import SIGNALS

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


@pytest.mark.slow
def test_a_killed_worker_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r"DataLoader worker.*smaller dataset\.workers"):
        list(read_ahead(kill, range(2), workers=1))


def test_workers_are_no_forks_of_the_training_process() -> None:
    """Whose other threads may hold locks at that moment. They are not its children either, but those of a server."""
    numbers = set(read_ahead(own_number, range(40), workers=2))
    assert len(numbers) == 2
    assert numbers.isdisjoint({os.getpid(), *children(os.getpid(), "")})


def test_a_component_that_workers_do_not_find_is_refused() -> None:
    with pytest.raises(UserError, match=r"^worker processes do not find a component .*type dataset\.workers=0$"):
        list(read_ahead(lambda key: key, range(2), workers=1))
    assert list(read_ahead(lambda key: key, range(2), workers=0)) == [0, 1]


# A script without a guard: only its own process may run it.
SCRIPT = """
from scclr.datasets.workers import read_ahead
print("begins", flush=True)
print(list(read_ahead(abs, range(-3, 0), workers=2)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", ["a file", "-c", "standard input"])
def test_a_script_is_not_run_again_by_its_workers(way: str, folder: Path) -> None:
    (folder / "script.py").write_text(SCRIPT)
    (folder / "torch.py").write_text("raise SystemExit('a local torch.py was imported')")
    words = {"a file": ["-P", "script.py"], "-c": ["-P", "-c", SCRIPT], "standard input": ["-P", "-"]}[way]
    text = SCRIPT if way == "standard input" else ""
    done = subprocess.run([sys.executable, *words], input=text, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("begins\n[3, 2, 1]\n", "")


GROUP = """
import signal, time
from scclr.datasets.workers import read_ahead
from scclr.run.preemption import SIGNALS
from worker_jobs import slowly

noted = set()
for number in SIGNALS:
    signal.signal(number, lambda number, frame: noted.add(number))
print("starts", flush=True)
for key in read_ahead(slowly, range(40), workers=2):
    print(key, flush=True)
print(noted == set(SIGNALS))
"""


@pytest.mark.slow
@pytest.mark.parametrize("lines", [1, 3], ids=["while the workers start", "while they read"])
def test_a_signal_to_the_group_stops_no_worker(lines: int) -> None:
    """The training process decides what a signal means, and reads on until it has saved."""
    words, environment = [sys.executable, "-c", GROUP], {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 0}  # communicate skips what is buffered
    with subprocess.Popen(words, env=environment, start_new_session=True, **pipes) as process:
        assert process.stdout is not None
        first = [process.stdout.readline() for _ in range(lines)]
        for number in SIGNALS:
            os.killpg(process.pid, number)
            time.sleep(0.05)
        rest, errors = process.communicate(timeout=60)
    assert errors == b""
    shown = [line.strip() for line in (*first, *rest.splitlines())]
    assert shown == [b"starts", *(b"%d" % key for key in range(40)), b"True"]
    assert process.returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_workers_and_their_server_die_with_the_training_process(folder: Path) -> None:
    words = [sys.executable, "-c", KILLED]
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)}, timeout=60)
    assert done.returncode == -signal.SIGKILL
    numbers = [int(word) for word in (folder / "numbers").read_text().split()]
    assert len(numbers) == 3
    for number in numbers:
        until(partial(ended, number), 10)


KILLED = """
import os, signal
from pathlib import Path
from processes import children
from scclr.datasets.workers import read_ahead
from worker_jobs import own_number

numbers = set()
for number in read_ahead(own_number, range(10**6), workers=2):
    numbers.add(number)
    if len(numbers) == 2:
        Path("numbers").write_text(" ".join(map(str, [*numbers, *children(os.getpid(), "forkserver")])))
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_more_workers_than_cores_are_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    assert list(read_ahead(abs, range(40), workers=(os.cpu_count() or 1) + 2)) == list(range(40))
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


# Waiting for images ---------------------------------------------------------------------------------------------------


@pytest.fixture
def told(photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[int, str]]]:
    """(step, line) of what ``batches`` says, if a step waits ``wait`` seconds for its images and computes ``compute``.

    The time that passes is what these say. ``held`` is where the images are: in files, a cache or memory.
    """
    now = [0.0]
    monkeypatch.setattr("scclr.datasets.loader.time.monotonic", lambda: now[0])

    def run(
        wait: Callable[[int], float],
        compute: float,
        workers: int,
        held: str = "files",
        steps: int = 300,
        cores: int = 8,
    ) -> list[tuple[int, str]]:
        step, found = 0, []

        def read(job: Callable[[int], Any], keys: range, *_: object, **__: object) -> Any:
            block = job(0)
            for _ in keys:
                now[0] += wait(step)
                yield block

        monkeypatch.setattr("scclr.datasets.loader.read_ahead", read)
        monkeypatch.setattr("scclr.datasets.loader.own_cores", lambda: cores)
        cache = {"cache": str(tmp_path), "resize": 24} if held == "cache" else {}
        data = all_images(photographs, workers=workers, in_memory=held == "memory", **cache)
        parts = batches(
            data, simclr(), seed=0, batch_size=4, steps=range(steps), say=lambda line: found.append((step, line))
        )
        for step, _ in enumerate(parts, 1):  # noqa: B007
            now[0] += compute
        return found

    return run


@pytest.mark.parametrize(
    ("wait", "compute", "workers", "cores", "advice"),
    [
        (0.1, 0.9, 3, 8, "10% of the time: type dataset.workers=4"),
        (1.5, 0.5, 2, 8, "75% of the time: type dataset.workers=8"),
        (1.5, 0.5, 0, 8, "75% of the time: type dataset.workers=3"),
        (0.6, 0.4, 4, 8, "60% of the time: type dataset.workers=8, or type dataset.cache=<folder>, which keeps"),
        (0.6, 0.4, 8, 8, "60% of the time: type dataset.cache=<folder>, which keeps the images decoded"),
        (1.0, 0.0, 9, 8, "100% of the time: type dataset.cache=<folder>, which keeps the images decoded"),
    ],
)
def test_a_training_that_waits_for_images_says_so_once(
    wait: float, compute: float, workers: int, cores: int, advice: str, told: Callable[..., list[tuple[int, str]]]
) -> None:
    ((step, line),) = told(lambda _: wait, compute, workers, cores=cores)
    assert line.startswith(f"training waits for images {advice}")
    assert 40 < step < 80


def test_waiting_is_judged_again_later(told: Callable[..., list[tuple[int, str]]]) -> None:
    """As when a disk becomes slow."""
    ((step, _),) = told(lambda step: 0.01 if step < 150 else 0.5, 0.99, 2)
    assert 150 < step < 250


def test_a_cache_that_is_waited_for_needs_a_faster_disk(told: Callable[..., list[tuple[int, str]]]) -> None:
    ((_, line),) = told(lambda _: 1.0, 1.0, 8, held="cache")
    assert line.endswith("50% of the time: put the data on a faster disk")


@pytest.mark.parametrize(
    ("wait", "compute", "held", "steps"),
    [
        (lambda step: 0.04, 0.96, "files", 300),  # below a twentieth of the time
        (lambda step: 60 if step < 19 else 0, 1.0, "files", 300),  # in the first steps only, in which workers start
        (lambda step: 0.1, 0.1, "files", 100),  # over before it can be judged
        (lambda step: 9.0, 1.0, "memory", 300),
    ],
)
def test_nothing_is_said_without_need(
    wait: Callable[[int], float],
    compute: float,
    held: str,
    steps: int,
    told: Callable[..., list[tuple[int, str]]],
) -> None:
    assert told(wait, compute, 2, held, steps) == []


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
def test_a_signal_to_the_whole_job_saves_a_run_from_files(folder: Path) -> None:
    """Slurm sends SIGTERM to every process. The workers go on until the last step is saved, and end with the run."""
    write_photographs(folder / "tree", per_class=40)
    line = [sys.executable, "-m", "scclr", *RUN, "stages=[pretrain]", "dataset.workers=2", "augment=simclr"]
    line += ["pretrain.epochs=30", "pretrain.knn_every=0", "pretrain.log_every=1", "checkpoint.every=1000000"]
    environment = {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}

    def steps() -> list[int]:
        return [row["step"] for run in run_folders(folder) for row in rows_of(run)]

    try:
        process = start(line, folder, **environment)
        until(lambda: (folder / "runs").exists() and any((folder / "runs").rglob("metrics.jsonl")) and len(steps()) > 2)
        (server,) = children(process.pid, "forkserver")
        workers = children(server, "")
        assert len(workers) == 2
        os.killpg(process.pid, signal.SIGTERM)
        assert finish(process, 75).endswith("stopped by SIGTERM; type the same command to go on\n")
        for number in [server, *workers]:
            until(partial(ended, number), 10)
        (run,) = run_folders(folder)
        done = load(run)["step"]
        assert steps() == list(range(1, done + 1)), "the last finished step is saved"
        finish(start(line, folder, **environment))
        assert steps() == list(range(1, load(run)["step"] + 1))
        assert len(steps()) > done
    finally:
        kill_started()


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
