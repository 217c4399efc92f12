"""Files of a run folder, its lock, and output whose reader goes away."""

import errno
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from scclr.config.errors import UserError
from scclr.run import files, machine, torchrun
from scclr.run.checkpoint import save
from scclr.run.lock import HeldError, is_locked, run_lock


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------- files


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path, older = tmp_path / "a", tmp_path / "b"
    for text in ("first", "second", "third"):
        files.write_atomic(path, lambda file, text=text: file.write(text.encode()), keep=older)  # type: ignore[misc]
    with pytest.raises(ZeroDivisionError):
        files.write_atomic(path, lambda file: file.write(b"fourth") // 0)
    assert (path.read_text(), older.read_text(), names(tmp_path)) == ("third", "second", ["a", "b"])


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_new_file_has_the_mode_of_any_other(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        files.write_text(tmp_path / "a", "å")
        (tmp_path / "b").touch()
    finally:
        os.umask(before)
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ab"}
    assert modes == {0o666 & ~umask}
    assert (tmp_path / "a").read_bytes() == "å".encode()


def test_a_planted_symbolic_link_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scclr.run.files.secrets.token_hex", lambda _: "guessed")
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".last.pt.guessed.partial").symlink_to("precious")
    with pytest.raises(FileExistsError):
        files.write_text(tmp_path / "last.pt", "theirs")
    assert (tmp_path / "precious").read_text() == "mine"


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    texts = [letter * 10**5 for letter in "abcdefgh"]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: files.write_text(tmp_path / "x", text), texts * 20))  # raises their errors
    assert (tmp_path / "x").read_text() in texts
    assert names(tmp_path) == ["x"]


def test_json_holds_finite_numbers_only(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"x": [0.1, None]})
    assert files.read_json(tmp_path / "a.json") == {"x": [0.1, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "a.json", {"x": float("nan")})
    assert files.read_json(tmp_path / "a.json") == {"x": [0.1, None]}


@pytest.mark.parametrize("data", [b"", b'{"a": 1', b"[1]", b"\xff", b"[" * 10**5, b'{"a": NaN}'], ids=range(6))
def test_damaged_json_is_named(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.json: damaged \([^\n]*\); delete it"):
        files.read_json(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError):
        files.read_json(tmp_path / "b.json")


def test_what_is_no_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    path.mkdir()
    with pytest.raises(UserError, match=r"a\.json: not a file; delete it and type the command again"):
        files.read_json(path)
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(UserError, match="not a file"):
        files.read_json(path)
    path.unlink()
    path.write_text("{}")
    monkeypatch.setattr(Path, "read_bytes", lambda _: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(UserError, match=r"a\.json: cannot be read \(Permission denied\); make it readable"):
        files.read_json(path)


def test_room_is_that_of_the_disk_which_will_hold_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, usage = [], files.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: asked.append(path) or usage._replace(free=2 * 10**6))
    files.require_room(tmp_path / "new" / "run", 2 * 10**6)
    with pytest.raises(UserError, match=r"new/run: 3\.0 MB are needed and 2\.0 MB are free .*runs=<a folder on ano"):
        files.require_room(tmp_path / "new" / "run", 3 * 10**6)
    assert asked == [tmp_path] * 2


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EPIPE, errno.ENOENT, errno.EACCES])
def test_only_errors_of_the_disk_are_blamed_on_it(number: int, tmp_path: Path) -> None:
    error = files.storage_error(OSError(number, os.strerror(number), "a/b"))
    if number in (errno.EPIPE, errno.ENOENT, errno.EACCES):
        assert error is None
        with pytest.raises(OSError, match=os.strerror(number)), run_lock(tmp_path, overwrite=False):
            raise OSError(number, os.strerror(number))
        return
    remedy = "make the disk writable" if number == errno.EROFS else "free space"
    assert str(error) == f"a/b: {os.strerror(number)}; {remedy} and type the command again"
    with pytest.raises(UserError, match=f"{tmp_path}: .*{remedy}"), run_lock(tmp_path, overwrite=False):
        raise OSError(number, os.strerror(number))


# ---------------------------------------------------------------- the lock of a run folder


def test_a_held_folder_names_its_holder(tmp_path: Path) -> None:
    assert not is_locked(tmp_path)
    assert names(tmp_path) == [], "looking leaves nothing"
    with run_lock(tmp_path, overwrite=False):
        assert is_locked(tmp_path)
        with pytest.raises(HeldError, match=f"pid {os.getpid()} on "), run_lock(tmp_path, overwrite=True):
            pass
        assert is_locked(tmp_path), "the attempt did not free it"
    assert not is_locked(tmp_path)
    with run_lock(tmp_path, overwrite=False):
        pass


def test_a_killed_holder_frees_the_folder(tmp_path: Path) -> None:
    code = f"import pathlib, scclr.run.lock as l, time\nwith l.run_lock(pathlib.Path({str(tmp_path)!r}), False):\n"
    line = [sys.executable, "-c", f"{code}    print('held', flush=True); time.sleep(60)"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(HeldError, match=f"pid {process.pid} on "), run_lock(tmp_path, overwrite=False):
            pass
        process.kill()
    assert not is_locked(tmp_path)
    with run_lock(tmp_path, overwrite=False):
        assert (tmp_path / ".holder").read_text().startswith(f"pid {os.getpid()} on ")


def test_what_an_older_attempt_left_is_deleted(tmp_path: Path) -> None:
    kept = ["config.yaml", "last.pt", "metrics.jsonl", "result.json", "theory.json"]
    for name in [*kept, "error.txt", ".last.pt.12.partial"]:
        (tmp_path / name).touch()
    with run_lock(tmp_path, overwrite=False):
        assert names(tmp_path) == [".holder", ".lock", *kept]
    with run_lock(tmp_path, overwrite=True):
        assert names(tmp_path) == [".holder", ".lock", "config.yaml"]


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/run: cannot write there \(Not a directory\); type runs="):
        run_lock(tmp_path / "file" / "run", overwrite=False).__enter__()


def attempt(run: Path, work: Callable[[], object], error: BaseException | None = None) -> None:
    """Hold the run folder, do some work in it, and fail."""
    with run_lock(run, overwrite=False):
        work()
        raise error or UserError("refused")


def test_an_attempt_that_fails_at_once_leaves_nothing(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "default" / "a"

    def begin() -> None:
        files.write_text(run / "config.yaml", "seed: 0")
        (run / "wandb").mkdir()
        (run / "metrics.jsonl").touch()

    with pytest.raises(UserError, match="refused"):
        attempt(run, begin)
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["last.pt", "previous.pt", "crash.pt", "metrics.jsonl", "result.json"])
def test_a_later_failure_keeps_the_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="refused"):
        attempt(tmp_path / "a", lambda: files.write_text(tmp_path / "a" / name, "{}"))
    assert names(tmp_path / "a") == [".lock", name]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_signal_keeps_the_folder_and_a_failure_one_that_was_there(stop: type, tmp_path: Path) -> None:
    with pytest.raises(stop):
        attempt(tmp_path / "a", lambda: None, stop())
    with pytest.raises(UserError, match="refused"):
        attempt(tmp_path / "a", lambda: None)
    assert names(tmp_path / "a") == [".lock"]


@pytest.mark.parametrize("write", [lambda run: files.write_text(run / "x", ""), lambda run: save(run, {"step": 1})])
def test_a_folder_that_is_deleted_meanwhile_is_said(write: Callable[[Path], None], tmp_path: Path) -> None:
    run = tmp_path / "a"

    def lose() -> None:
        shutil.rmtree(run)
        write(run)

    with pytest.raises(UserError, match=f"{run}: deleted while the run worked in it; type the command again"):
        attempt(run, lose)
    assert names(tmp_path) == []


def test_a_folder_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").mkdir()
    with pytest.raises(UserError, match=r"config\.yaml: Is a directory; delete it"):
        attempt(tmp_path, lambda: files.write_text(tmp_path / "config.yaml", "seed: 0"))
    (tmp_path / "error.txt").mkdir()
    with pytest.raises(UserError, match=r"error\.txt: Is a directory; delete it"):
        attempt(tmp_path, lambda: None)


def test_a_pipe_in_place_of_a_lock_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".lock")
    assert not is_locked(tmp_path)
    with pytest.raises(UserError, match="cannot write there"):
        run_lock(tmp_path, overwrite=False).__enter__()


def test_a_planted_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".lock").symlink_to("precious")
    with pytest.raises(UserError, match=r"\.lock: a symbolic link where a lock belongs"):
        run_lock(tmp_path, overwrite=True).__enter__()
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with run_lock(tmp_path, overwrite=False):
        assert "its file system has no locks; start one command at a time there" in capsys.readouterr().err


# ---------------------------------------------------------------- output

TALK = """
import sys, time
from scclr.run.output import survive_closed_output
survive_closed_output()
survive_closed_output()
print("\\udcff")  # a file name that is not UTF-8
for i in range(2000):
    print("out", i, "x" * 100)
    print("err", i, "x" * 100, file=sys.stderr)
sys.stdout.flush()
open("finished", "x").close()
sys.exit(7)
"""


@pytest.mark.parametrize("flags", ["", "-u"])
@pytest.mark.parametrize(
    "redirection", ["2>&1 | head -1", "2>&1 >/dev/null | head -1", "2>&-", ">&- 2>&-", ">/dev/full 2>/dev/full"]
)
def test_a_process_outlives_its_output(redirection: str, flags: str, folder: Path) -> None:
    line = f"set -o pipefail; {sys.executable} {flags} -c '{TALK}' {redirection}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert done.stderr == ""
    assert (folder / "finished").exists()
    if "|" in redirection:
        assert len(done.stdout.splitlines()) == 1


def test_a_closed_stream_gives_its_number_to_no_file(folder: Path) -> None:
    code = "from scclr.run.output import survive_closed_output as s; s(); f = open('data', 'w'); print(f.fileno())"
    code += "; import os; os.write(2, b'from a library')"
    done = subprocess.run(f'{sys.executable} -c "{code}" 2>&-', shell=True, capture_output=True, text=True)
    assert int(done.stdout) > 2
    assert (folder / "data").read_text() == ""


def test_a_vanished_terminal_ends_nothing(folder: Path) -> None:
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", f"input()\n{TALK}"], stdin=subprocess.PIPE, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    os.close(ours)
    process.communicate(b"\n", timeout=30)
    assert process.returncode == 7
    assert (folder / "finished").exists()


# ---------------------------------------------------------------- the machine


def test_the_revision_is_that_of_the_source_tree_only(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", "-C", tmp_path, *identity, *words], capture_output=True, text=True).stdout.strip()

    assert machine._revision(tmp_path) is None, "no repository"
    git("init")
    git("commit", "--allow-empty", "-m", "first")
    assert machine._revision(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "site-packages").mkdir()
    assert machine._revision(tmp_path / "site-packages") is None, "the repository of something else"


def test_the_processor_has_its_name() -> None:
    found = machine.describe(torch.device("cpu"))
    assert found["cpu"] in Path("/proc/cpuinfo").read_text()
    assert found["cores"] == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(2**60, dtype=torch.uint8),
        lambda: torch.empty(2**62, 2**62),
        lambda: np.empty(2**60, dtype=np.uint8),
        lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory.\nMore")),
        lambda: (_ for _ in ()).throw(MemoryError()),
    ],
    ids=["PyTorch", "overflow", "NumPy", "CUDA", "Python"],
)
def test_too_little_memory_is_said(allocate: Callable[[], object]) -> None:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        allocate()
    assert re.fullmatch(r".{10,120}; type pretrain\.micro_batch=64, .*", str(machine.memory_error(caught.value)))


@pytest.mark.parametrize("error", [RuntimeError("shapes do not fit"), ValueError("DefaultCPUAllocator"), KeyError("a")])
def test_other_errors_are_not_blamed_on_memory(error: Exception) -> None:
    assert machine.memory_error(error) is None


@pytest.mark.parametrize("on", [True, False])
def test_kernels_are_as_before_afterwards(on: bool) -> None:
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    with machine.deterministic_kernels(on):
        assert (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark) == (on, not on)
    assert (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark) == before


# ---------------------------------------------------------------- what torchrun says

FOUR = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    """Set the variables of torchrun, and no other."""

    def set_only(variables: dict[str, str]) -> None:
        for name in (*FOUR, "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_only


def test_a_process_knows_its_place(said: Callable[[dict[str, str]], None]) -> None:
    said(FOUR)
    assert torchrun.group() == (3, 4, 1, 1)
    assert not torchrun.is_main()
    said({**FOUR, "LOCAL_WORLD_SIZE": "2"})
    assert torchrun.group() == (3, 4, 1, 2)


@pytest.mark.parametrize(
    "stray", [{}, {"RANK": "1"}, {"LOCAL_RANK": "x"}, {"LOCAL_WORLD_SIZE": "0"}, {"WORLD_SIZE": "1"}]
)
def test_stray_variables_leave_a_process_on_its_own(
    stray: dict[str, str], said: Callable[[dict[str, str]], None]
) -> None:
    said({"RANK": "7", **stray})
    assert torchrun.group() == (0, 1, 0, 1)
    assert torchrun.is_main()


WRONG = ("", "-1", "two", "1.5", "9" * 30, "\u00b2")


@pytest.mark.parametrize("name", [*FOUR, "LOCAL_WORLD_SIZE"])
def test_a_damaged_environment_is_refused(name: str, said: Callable[[dict[str, str]], None]) -> None:
    for value in WRONG if name != "MASTER_ADDR" else [""]:
        said({**FOUR, name: value})
        with pytest.raises(UserError, match=rf"{name}.*start with torchrun, or unset WORLD_SIZE"):
            torchrun.group()
        assert torchrun.is_main(), "somebody says so"


@pytest.mark.parametrize(
    "change", [{"RANK": "4"}, {"LOCAL_RANK": "4"}, {"LOCAL_WORLD_SIZE": "0"}, {"MASTER_PORT": "65536"}]
)
def test_variables_that_do_not_fit_each_other_are_refused(
    change: dict[str, str], said: Callable[[dict[str, str]], None]
) -> None:
    said({**FOUR, **change})
    with pytest.raises(UserError, match=f"{next(iter(change))}="):
        torchrun.group()
