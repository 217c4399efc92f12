"""The first download of a dataset, which several processes want at the same time."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scclr.config.errors import UserError
from scclr.datasets.reading import check_files, downloading

# Python 3.12 and later warn of every fork in a process with threads.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
CONTENT = b"0123456789" * 1000
FILES = [("part", hashlib.md5(CONTENT).hexdigest())]
# Six processes read a dataset, three at the same moment and three while the first half of its file is there. As
# torchvision's readers, one fetches the file unless it is whole. argv[1] is how many of them fail.
TOGETHER = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_reading import CONTENT, FILES, check_files, downloading

root, calls = Path("data/raw"), Path("calls")

def fetch():
    if (root / "set" / "part").exists():
        return
    with open(calls, "a") as file:
        file.write("x")
    time.sleep(0.1)
    if calls.stat().st_size <= int(sys.argv[1]):
        raise OSError("no network")
    (root / "set").mkdir()
    with open(root / "set" / "part", "wb", 0) as file:
        file.write(CONTENT[:5000])
        time.sleep(0.4)
        file.write(CONTENT[5000:])

def read():
    if not (root / "set").exists():
        with downloading(root, "give a network"):
            fetch()
    check_files(root / "set", FILES, "delete it")

start = time.time() + 0.3
for i in range(6):
    if os.fork() == 0:
        time.sleep(max(0, start + 0.3 * (i // 3) - time.time()))
        try:
            read()
        except Exception as error:
            print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(0)
for _ in range(6):
    os.wait()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("failures", "calls", "left"), [(0, 1, {"part"}), (2, 3, {"part"}), (9, 6, set())])
def test_one_process_downloads_and_the_others_wait(failures: int, calls: int, left: set[str], folder: Path) -> None:
    words = [sys.executable, "-W", "ignore", "-c", TOGETHER, str(failures), str(Path(__file__).parent)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["UserError: data/raw: no network; give a network"] * min(failures, 6)
    assert (folder / "calls").read_text() == "x" * calls
    assert {path.name for path in folder.rglob("*") if path.is_file()} == {"calls", *left}
    assert (folder / "data").exists() == bool(left)


def test_a_killed_download_holds_nobody_up(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        with downloading(tmp_path / "raw", ""):
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    clock = time.monotonic()
    with downloading(tmp_path / "raw", ""):
        (tmp_path / "raw" / "part").write_bytes(CONTENT)
    check_files(tmp_path / "raw", FILES, "")
    assert time.monotonic() - clock < 5
    assert [path.name for path in (tmp_path / "raw").iterdir()] == ["part"]


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / ".lock").symlink_to(tmp_path / "mine")
    with (
        pytest.raises(UserError, match=r"raw: .*; give another folder$"),
        downloading(tmp_path / "raw", "give another folder"),
    ):
        pytest.fail("entered")
    assert (tmp_path / "mine").read_text() == "kept"


@pytest.mark.parametrize(("content", "message"), [(None, "no such file"), (CONTENT[:-1], "truncated or corrupt")])
def test_files_are_checked(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "part").write_bytes(content)
    with pytest.raises(UserError, match=rf"part: {message}.*; delete it$"):
        check_files(tmp_path, FILES, "delete it")
