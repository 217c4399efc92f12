"""The points of a sweep, and the folders that tell what became of them."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoint_files import state
from conftest import TINY, compose

import scclr.train as train
from scclr.config.errors import UserError
from scclr.run.checkpoint import save
from scclr.run.lock import file_lock, run_lock
from scclr.run.sweep import Point, before, clock, devices, divided, fail, listed, remember, remembered, status

RESULT = {"metrics": {}, "config": asdict(compose(*TINY)), "seconds": {"total": 100}}
# Three times, twelve processes add their points to one file at the same moment.
TOGETHER = """
import os, sys, time
from pathlib import Path
from scclr.run.sweep import Point, remember
for folder in "012":
    start = time.time() + 0.3
    for i in range(12):
        if os.fork() == 0:
            time.sleep(max(0, start - time.time()))
            remember([Point(Path(folder) / f"{i}-{j}", f"seed={i}") for j in range(3)])
            os._exit(0)
    if any(os.wait()[1] for _ in range(12)):
        sys.exit(1)
"""
# Six points run two at a time, each with devices of its own, which it notes; the first one is killed.
SHARED = """
import os, signal, sys, time
from functools import partial
from tempfile import TemporaryDirectory
from scclr.run.parallel import run_points
from scclr.run.sweep import own_devices

def work(point, folder):
    with own_devices(folder, ["0,3", "GPU-b,GPU-c"]):
        share = os.environ["CUDA_VISIBLE_DEVICES"]
        print(time.monotonic(), point, "begins", share, flush=True)
        time.sleep(0.4)
        if point == 0:
            print(time.monotonic(), point, "ends", share, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        print(time.monotonic(), point, "ends", share, flush=True)

if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        run_points(partial(work, folder=folder), range(6), 2, killed=print, preload=[])
"""


def test_states_costs_and_outlook(tmp_path: Path) -> None:
    points = [Point(tmp_path / name, f"seed={i}") for i, name in enumerate("abcde")]
    unknown = "5 points: 0 done, 5 missing; no finished run beside them tells how long they take"
    assert before(points, at_once=1) == unknown
    remember(points[:3])
    remember(points[2:])
    for point in points[:4]:
        point.directory.mkdir()
    (tmp_path / "a" / "result.json").write_text(json.dumps(RESULT))
    fail(tmp_path / "b", "loss: too high")
    save(tmp_path / "c", state())
    with run_lock(tmp_path / "d", overwrite=False):
        assert [point.state for point in points] == ["done", "failed", "stopped", "running", "missing"]
        lines = status(tmp_path)
    assert lines[0] == f"{tmp_path}: 5 points: 1 done, 1 running, 1 failed, 1 stopped, 1 missing"
    assert lines[1] == "2 min so far; about 100 s each and 7 min for all, as in 1 finished runs"
    assert lines[2] == f"  failed   seed=1 ({tmp_path / 'b'}): loss: too high"
    assert [line.split()[0] for line in lines[2:]] == ["failed", "stopped", "running", "missing"]
    assert before(points, at_once=4).endswith("about 100 s each and 100 s for all, as in 1 finished runs")
    with run_lock(tmp_path / "b", overwrite=False):
        assert listed(points[1:2])[0].startswith("  running")
    assert points[1].state == "missing", "the next attempt takes the error away"


@pytest.mark.parametrize(("seconds", "shown"), [(119, "119 s"), (121, "2 min"), (7300, "2.0 h")])
def test_durations_are_shown_in_the_unit_that_fits(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown


@pytest.mark.parametrize("text", ["\n\n", "two\nlines\x1b[2J", "x" * 10**6])
def test_the_reason_of_a_failure_is_part_of_a_line(text: str, tmp_path: Path) -> None:
    point = Point(tmp_path / "a", "seed=0")
    fail(point.directory, text)
    (line,) = listed([point])
    assert line.startswith("  failed   seed=0 (")
    assert line.isprintable()
    assert len(line) < 1000


@pytest.mark.parametrize("text", ["", '{"metr', "[]", "{}", '{"metrics": {}}'])
def test_a_damaged_result_is_named_and_counts_as_not_done(text: str, tmp_path: Path) -> None:
    point = Point(tmp_path / "a", "seed=0")
    remember([point])
    point.directory.mkdir()
    (point.directory / "result.json").write_text(text)
    assert (point.state, point.seconds) == ("missing", 0)
    assert before([point], at_once=1).startswith("1 points: 0 done, 1 missing; no finished run")
    with pytest.raises(UserError, match=r"^[^\n]*/a/result\.json: damaged[^\n]*$"):
        status(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', '{"../a": "seed=0"}', '{"": "seed=0"}'])
def test_a_damaged_list_of_points_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(text)
    for read in (status, remembered, lambda folder: remember([Point(folder / "a", "")])):
        with pytest.raises(UserError, match=r"^[^\n]*/sweep\.json: damaged[^\n]*delete it and type the command again$"):
            read(tmp_path)
    assert (tmp_path / "sweep.json").read_text() == text


@pytest.mark.parametrize("name", ["missing", "file", "empty"])
def test_a_folder_without_runs_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"{name}: no runs; give a folder such as runs/default"):
        status(tmp_path / name)


def test_points_that_cannot_be_noted_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file: cannot write there .*; type runs="):
        remember([Point(tmp_path / "file" / "a", "")])


def test_a_list_of_points_that_stays_locked_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scclr.run.sweep.LOCK_SECONDS", 0.1)
    held = r"\.sweep\.lock: another process has held this lock for 0\.1 s"
    with file_lock(tmp_path / ".sweep.lock", 0), pytest.raises(UserError, match=held):
        remember([Point(tmp_path / "a", "")])


def test_torch_is_not_imported_for_the_status_of_finished_runs(tmp_path: Path) -> None:
    remember([Point(tmp_path / "a", "")])
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "result.json").write_text(json.dumps(RESULT))
    code = "import sys; from scclr.cli import dispatch; dispatch(sys.argv[1:]); print(*sys.modules)"
    line = [sys.executable, "-c", code, "sweep-status", str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert "1 points: 1 done\n100 s so far\n" in done.stdout
    assert "torch" not in done.stdout.split()


@pytest.mark.slow
def test_sweeps_that_start_together_lose_no_point(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", TOGETHER], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    for name in "012":
        assert remembered(folder / name) == {f"{i}-{j}": f"seed={i}" for i in range(12) for j in range(3)}
        assert sorted(path.name for path in (folder / name).iterdir()) == [".sweep.lock", "sweep.json"]


@pytest.mark.parametrize(
    ("visible", "count", "names"),
    [(None, 3, ["0", "1", "2"]), ("2,5", 2, ["2", "5"]), ("GPU-a, GPU-b,9", 2, ["GPU-a", "GPU-b"]), ("", 0, [])],
)
def test_devices_are_named_as_the_user_has_chosen_them(
    visible: str | None, count: int, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    assert devices() == names


@pytest.mark.parametrize(
    ("jobs", "names", "each", "expected"),
    [
        (-1, "", 1, (8, [])),  # one on each core
        (-2, "", 1, (7, [])),
        (20, "", 1, (20, [])),
        (-1, "0 1 2 3", 1, (4, ["0", "1", "2", "3"])),
        (-1, "0 1 2 3", 2, (2, ["0,1", "2,3"])),
        (-1, "4 5 6", 2, (1, ["4,5"])),
        (-2, "0 1 2 3", 1, (3, ["0", "1", "2", "3"])),
        (2, "0 1 2 3", 1, (2, ["0", "1", "2", "3"])),
        (-9, "0 1", 1, (1, ["0", "1"])),
    ],
)
def test_jobs_and_processes_divide_the_devices(
    jobs: int, names: str, each: int, expected: tuple[int, list[str]]
) -> None:
    assert divided(jobs, cores=8, names=names.split(), each=each) == expected


@pytest.mark.parametrize(
    ("jobs", "each", "message"),
    [
        (5, 1, r"^hydra\.launcher\.n_jobs=5: 4 CUDA devices are enough for 4 runs at once; type .*n_jobs=4$"),
        (
            3,
            2,
            r"^hydra\.launcher\.n_jobs=3: 4 CUDA devices are enough for 2 runs of nproc=2 at once; type .*n_jobs=2$",
        ),
    ],
)
def test_more_jobs_than_devices_are_refused(jobs: int, each: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        divided(jobs, cores=64, names=["0", "1", "2", "3"], each=each)


@pytest.mark.slow
def test_no_two_points_share_a_device(folder: Path) -> None:
    (folder / "script.py").write_text(SHARED)
    done = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["0", "SIGKILL"] in lines
    events = sorted((float(line[0]), *line[1:]) for line in lines if len(line) == 4)
    assert len(events) == 12
    used: set[str] = set()
    seen: set[str] = set()
    for _, _, what, share in events:
        assert (share in used) == (what == "ends")
        used ^= {share}
        seen.add(share)
    assert seen == {"0,3", "GPU-b,GPU-c"}


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, tuple[str, ...]]]:
    """Four CUDA devices, as far as the checks see; (runs at once, shares of the devices) of each sweep is noted."""
    seen = []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in {"device_count": 4, "is_available": True, "is_bf16_supported": True}.items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *_, value=value, **__: value)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(total_memory=2**36))
    monkeypatch.setattr("scclr.run.machine.available_cores", lambda: 3)
    monkeypatch.setattr(
        "scclr.run.parallel.run_points",
        lambda work, points, jobs, **_: seen.append((jobs, tuple(work.keywords["shares"]))),
    )
    return seen


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", (4, ("0", "1", "2", "3"))),
        ("nproc=2 pretrain.batch_size=64", (2, ("0,1", "2,3"))),
        ("nproc=1,4 pretrain.batch_size=64", None),
        ("hydra.launcher.n_jobs=2", (2, ("0", "1", "2", "3"))),
        ("device=cpu", (3, ())),
    ],
)
def test_a_sweep_divides_the_devices(
    words: str, expected: tuple[int, tuple[str, ...]] | None, scclr: Callable[..., int], cards: list, folder: Path
) -> None:
    if expected is None:  # all four at once: one point after the other, in this process
        ran = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("scclr.cli.training.run_point", lambda one: ran.append(one))
            assert scclr("train", "-m", "seed=0,1,2", "hydra/launcher=joblib", *TINY, *words.split()) == 1
        assert (len(ran), cards) == (6, [])
        return
    assert scclr("train", "-m", "seed=0,1,2,3,4", "hydra/launcher=joblib", *TINY, *words.split()) == 1
    assert cards == [expected]


def test_a_sweep_with_too_many_jobs_leaves_nothing(
    scclr: Callable[..., int], cards: list, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["-m", "seed=0,1,2,3,4", "nproc=2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=4", *TINY]
    assert scclr("train", *words) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("4 CUDA devices are enough for 2 runs of nproc=2 at once; type hydra.launcher.n_jobs=2")
    assert (cards, list(folder.iterdir())) == ([], [])


def test_failed_points_are_listed_and_the_finished_ones_not_run_again(
    scclr: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain = train.pretrain

    def faulty(*args, **named):  # type: ignore[no-untyped-def]
        if named["seed"] == 1:
            raise ZeroDivisionError("by seed 1")
        return pretrain(*args, **named)

    monkeypatch.setattr(train, "pretrain", faulty)
    line = ["train", "-m", "seed=0,1", "stages=[pretrain]", *TINY]
    assert scclr(*line) == 1
    shown = capsys.readouterr()
    assert "seed=1" in shown.err
    assert "ZeroDivisionError: by seed 1" in shown.err
    assert shown.out.splitlines()[-2] == "2 points: 1 done, 1 failed"
    assert shown.out.splitlines()[-1].endswith("ZeroDivisionError: by seed 1")
    (finished,) = {path.parent for path in folder.glob("runs/*/*/result.json")}
    stamp = (finished / "result.json").stat().st_mtime_ns
    monkeypatch.setattr(train, "pretrain", pretrain)
    assert scclr(*line) == 0
    assert "about" in capsys.readouterr().err.splitlines()[0]
    assert scclr("sweep-status", "runs/default") == 0
    assert "2 points: 2 done" in capsys.readouterr().out
    assert (finished / "result.json").stat().st_mtime_ns == stamp
    assert scclr("sweep-status") == 1
