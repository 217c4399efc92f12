"""What README prints: every command composes or runs, in the order printed; every file and every program works."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import TINY, result_of, rows_of, run_folders

from scclr.cli import COMMANDS
from scclr.components import prepare
from scclr.config.compose import parse, plan
from scclr.config.errors import UserError

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"(?:^`(?P<file>[\w./]+)`\n)?^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.M | re.S)
SMALL = [word for word in TINY if not word.startswith(("encoder.", "dataset."))]


def blocks(kind: str) -> Iterator[re.Match[str]]:
    return (match for match in BLOCK.finditer(TEXT) if match["kind"] == kind)


def commands() -> list[list[str]]:
    """The words of every command, in the order printed: lines of shell blocks, and code between backquotes."""
    names = "scclr|torchrun|python|pip|pytest"
    lines = re.findall(rf"^(?:{names}) .*$|(?<=`)(?:{names}) [^`]+(?=`)", TEXT, re.M)
    words = [shlex.split(re.sub(r"[<>]", "", line), comments=True) for line in lines]
    return [part for line in words for part in split(line, "&&")]


def split(words: list[str], mark: str) -> list[list[str]]:
    if mark not in words:
        return [words]
    return [words[: words.index(mark)], *split(words[words.index(mark) + 1 :], mark)]


@pytest.fixture
def beside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory outside the project, from which modules are found."""
    monkeypatch.syspath_prepend(str(folder))
    for name in ("margin", "parts"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return folder


def write_files(folder: Path) -> None:
    for match in BLOCK.finditer(TEXT):
        if match["file"]:
            path = folder / match["file"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(match["text"])


def test_it_is_short_and_has_its_commands() -> None:
    assert TEXT.count("\n") <= 250
    trains = [words for words in commands() if words[:2] == ["scclr", "train"]]
    assert len(trains) >= 15
    assert ["scclr", "new", "loss", "margin"] in commands()


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\((?!https://)([^)]+)\)", TEXT):
        path, _, heading = link.partition("#")
        titles = re.findall(r"(?m)^#+ (.*)", (ROOT / (path or "README.md")).read_text()) if heading else []
        anchors = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
        assert (ROOT / path).exists(), link
        assert not heading or heading in anchors, link
    for path in re.findall(r"`((?:scripts|tests|conf|scclr)/[\w./]+)`", TEXT):
        assert (ROOT / path).exists(), path


def test_the_files_of_a_loss_are_those_that_new_writes(beside: Path, scclr: Callable[..., int]) -> None:
    assert scclr("new", "loss", "margin") == 0
    written = {match["file"]: match["text"] for match in BLOCK.finditer(TEXT) if match["file"]}
    for name in ("margin.py", "my_conf/loss/margin.yaml"):
        assert (beside / name).read_text() == written[name]


@pytest.mark.slow
def test_every_command_composes(beside: Path, scclr: Callable[..., int]) -> None:
    write_files(beside)
    for words in commands():
        if words[0] == "torchrun":
            words = words[words.index("scclr") :]
        if words[:2] == ["scclr", "train"] and "--help" not in words and "..." not in words:
            slurm = any("submitit" in word for word in words)
            if slurm and find_spec("hydra_plugins") is None:
                with pytest.raises(UserError, match=r"pip install 'scclr\[sweep\]'"):
                    plan(parse(words[2:]))
                continue
            points = plan(parse(words[2:])).points
            for point in (points[0], points[-1]):  # each of them is composed; preparing takes longer
                if point.config.init_from is None:
                    prepare(point.config, point.overrides)
        elif words[0] == "scclr" and words[1] in ("train", "--help"):
            assert scclr(*words[1:2], "--help") == 0
        elif words[0] == "scclr":
            assert words[1] in COMMANDS, words
            assert scclr(words[1], "--help") == 0
        elif words[0] == "python":
            assert (ROOT / words[1]).exists(), words


@pytest.mark.slow
def test_the_printed_components_run(beside: Path, scclr: Callable[..., int]) -> None:
    """The loss with one process and two, over several alphas and with the theory; and every other component."""
    write_files(beside)
    own = [words for words in commands() if "--config-dir" in words or "_target_=parts." in " ".join(words)]
    assert len(own) >= 4
    for words in own:
        assert scclr(*words[1:], *SMALL) == 0, words
    losses = [run for run in run_folders(beside) if run.name.startswith("MarginLoss")]
    results = [result_of(run) for run in losses]
    assert [result["config"]["alpha"] for result in results] == [0.3, 0.4, 0.5, 0.7]
    assert [(run / "theory.json").exists() for run in losses] == [True, False, True, True]
    words = ["train", "--config-dir", "my_conf", "loss=margin", "alpha=0.4", "nproc=2", "name=two", *SMALL]
    subprocess.run([sys.executable, "-m", "scclr", *words], check=True, capture_output=True)
    (two,) = (run for run in run_folders(beside) if run.parent.name == "two")
    first_rows = [rows_of(run)[0]["pretrain/loss"] for run in (losses[1], two)]
    assert first_rows[0] == pytest.approx(first_rows[1], rel=1e-4)


@pytest.mark.slow
def test_the_program_runs_and_its_types_are_right(beside: Path) -> None:
    (program,) = (match for match in blocks("python") if not match["file"])
    (beside / "example.py").write_text(program["text"])
    types = ["-m", "mypy", "--strict", "--ignore-missing-imports", "--follow-imports=silent", "example.py"]
    checked = subprocess.run([sys.executable, *types], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    done = subprocess.run([sys.executable, "example.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "BalancedLoss" in done.stdout
