"""The command line: what it answers, what it refuses in one line, and what it leaves behind."""

import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TINY, run_folders

from scclr import __version__

Run = Callable[..., int]


def test_version_and_help_do_not_import_torch() -> None:
    for flag, expected in (("--version", __version__), ("--help", "scclr train -m alpha=0.3,0.5,0.7 seed=0,1,2")):
        probe = f"import sys; from scclr.cli import dispatch; dispatch(['{flag}']); print('torch' not in sys.modules)"
        start = time.perf_counter()
        out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
        assert time.perf_counter() - start < 2
        assert expected in out
        assert out.endswith("True\n")


@pytest.mark.parametrize("words", ["alpha=7", "loss=balnced", "+typo=1", "-m loss=balanced,nothing", "seed=0,1"])
def test_a_command_line_that_does_not_compose_is_refused_without_torch(words: str) -> None:
    run = f"dispatch(['train', *{words.split()}])"
    probe = f"import sys; from scclr.cli import dispatch; print({run}, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout == "1 False\n", done.stderr


def test_what_trains_imports_neither_compiler_nor_torchvision_until_they_are_used() -> None:
    probe = "import sys, scclr.train; print({'torch._dynamo', 'torchvision'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_module_runs() -> None:
    out = subprocess.run([sys.executable, "-m", "scclr", "--version"], capture_output=True, text=True, check=True)
    assert out.stdout == f"scclr {__version__}\n"


def test_unknown_command(scclr: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert scclr("trian") == 2
    assert capsys.readouterr().err == "scclr: error: no such command: trian; did you mean train?\n"


@pytest.mark.parametrize("command", ["train", "sweep-status", "report", "sync", "show"])
def test_every_command_has_help(scclr: Run, capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert scclr(command, "--help") == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"usage: scclr {command} ")
    assert shown.err == ""


def test_train_help(scclr: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert scclr("train", "--help") == 0
    out = capsys.readouterr().out
    for word in (
        "alpha ",
        "overwrite",
        "digits, fashion_mnist",
        "balanced, ",
        "scclr train loss=balanced alpha=0.5",
    ):
        assert word in out


def test_cfg_prints_the_composed_configuration(scclr: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert scclr("train", "alpha=0.3", "--cfg", "job") == 0
    assert "alpha: 0.3" in capsys.readouterr().out


def test_completion_knows_no_subcommand(
    scclr: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMP_LINE", "scclr train loss=bal")
    monkeypatch.setenv("COMP_POINT", "20")
    assert scclr("-sc", "query=bash") == 0
    assert "loss=balanced" in capsys.readouterr().out


REFUSED = [
    ("loss=balnced", "did you mean balanced? (choices: align_uniform, balanced"),
    ("dataset=digit", "did you mean digits?"),
    ("encoder=resnet", "did you mean resnet"),
    ("experiment=fashion_mnist", "no such experiment; did you mean fashion_mnist_cpu?"),
    ("experiment=mine", "to name the folder of the run, type name=..."),
    ("+experiment=balance_grid", "type it without the plus"),
    ("name=a/b", "give a plain folder name"),
    ("seed=0,1", "several values make a sweep: add -m"),
    ("alpha=1.5", "in [0, 1]"),
    ("alpha=half", "could not be converted to Float"),
    ("alhpa=1", "did you mean alpha?"),
    ("loss.temprature=1", "did you mean loss.temperature?"),
    ("+typo=1", "typo: no such key"),
    ("pretrain.accumulate=4", "adds no negatives; type pretrain.micro_batch"),
    ("+pretrain.accumulate=4", "adds no negatives; type pretrain.micro_batch"),
    ("alpha_end=0.3", "add alpha_schedule=linear"),
    ("alpha_schedule=linear", "add alpha_end"),
    ("loss=ntxent alpha_end=0.3", "has no balance"),
    ("loss=ntxent alpha_schedule=cosine", "has no balance"),
    ("projector.normalize=false", "type loss=balanced loss.similarity=dot alpha=0.5"),
    ("projector.normalize=false loss.similarity=dot alpha=0.4", "type alpha=0.5, or similarity=cosine"),
    ("loss.similarity=dot alpha_schedule=linear alpha_end=0.6", "similarity=dot"),
    ("loss.rescale=attract", "choose one of none, constant_force"),
    ("+loss.typo=1", "takes alpha, temperature, similarity, rescale"),
    ("loss.temperature=0", "temperature=0.0: give a number from"),
    ("loss=ntxent alpha=0.5", "type loss=balanced alpha=0.5"),
    ("pretrain.batch_size=5000", "larger than the 1144 images"),
    ("init_from=nowhere", "no such file or folder"),
    ("stages=[probe] init_from=nowhere", "no such file or folder"),
    ("stages=[probe] init_from=. ", "no last.pt"),
    ("stages=[probe] init_from=junk.pt", "not a checkpoint"),
    ("stages=[probe] init_from=junk.pt encoder=resnet18", "drop it"),
    ("dataset=fashion_mnist dataset.root=empty", "apt-get install dataset-fashion-mnist"),
    ("dataset=imagefolder", "dataset.root is missing"),
    ("dataset=imagefolder dataset.root=empty", "one folder for each class"),
    ("dataset.classes=[0,10]", "labels run from 0 to 9"),
    ("runs=junk.pt/runs", "type runs="),
    ("-m alpha=0.3,1.5", "in [0, 1]"),
    ("-m loss.temperature=1,-1", "temperature=-1.0: give a number from"),
    ("-m loss=balanced,nothing", "no such loss"),
    ("-m alpha=range(0,1,0)", "range"),
    ("-m hydra/launcher=joblib hydra.launcher.n_jobs=0 seed=0,1", "give a number of runs at once"),
    ("--cfg job --info defaults", "Only one of"),
    ("--resolve", "--resolve"),
    ("--bogus", "--bogus"),
    ("word", "write key=value"),
    ("augment.rotation=nan", "augment.rotation=nan: give a finite number"),
    ("stages=[pretrain,theory] theory.images=4", "type a larger theory.images"),
    ("stages=[pretrain,theory] theory.temperatures=[inf]", "give one or more positive numbers"),
    ("theory.views=100000", "theory.views=100000: give a value from 2 to 1000"),
    ("loss.temperature=1e-30", "temperature=1e-30: give a number from"),
    ("optimizer.lr=inf", "optimizer.lr=inf: give a finite number"),
    ("optimizer.lr=1e30", "optimizer.lr=1e+30: give a number from -1e+09 to 1e+09"),
    ("dataset.limit=99999999999999999999", "dataset.limit=99999999999999999999: give a smaller number"),
    ("probe.protocols.logreg.l2=[inf]", "probe.protocols.logreg.l2=inf: give a finite number"),
    ("probe.protocols.logreg.l2=[-1]", "logreg: l2=[-1.0]: give one or more different numbers, from 1e-12 to 1e+06"),
    ("pretrain.knn_temperature=1e30", "pretrain.knn_temperature=1e+30: give a value from 1e-06 to 1e+06"),
    ("probe.protocols=[]", "choose one or more, as in probe.protocols=[logreg,knn]"),
    ("probe.protocols=null", "choose one or more, as in probe.protocols=[logreg,knn]"),
    ("probe.protocols=knn,ncc", "add -m, or put them in brackets"),
    ("probe.protocols=[knn,nccc]", "protocol=nccc: no such protocol; did you mean ncc?"),
    ("-m probe.protocols=[knn],[logreg,nccc]", "protocol=nccc: no such protocol; did you mean ncc?"),
    ("probe.protocols.knn200.k=[9]", "knn200 is not chosen; type probe.protocols=[logreg,knn,knn200]"),
    ("probe.protocols=[knn] probe.protocols.logreg.l2=[1]", "logreg is not chosen; type probe.protocols=[knn,logreg]"),
    (
        "+probe.protocols.knn200.k=[9]",
        "knn200: not chosen, so nothing would read it; type probe.protocols=",
    ),
    ("probe.protocols.knn.kk=[9]", "did you mean probe.protocols.knn.k?"),
    ("+probe.protocols.knn.kk=[9]", "probe.protocols.knn.kk: Knn takes k, temperature; did you mean k?"),
    ("probe.protocols.knn.k=9", "probe.protocols.knn.k=9: give a list such as [1, 2]"),
    ("probe.protocols.knn._target_=scclr.evaluate.probe.probe", "probe.protocols.knn.k: probe takes"),
    ("probe.protocols.knn._target_=scclr.run.lock.run_lock", "those of scclr lie in scclr.evaluate"),
    ("probe.max_iter=9", "did you mean probe.protocols.logreg.max_iter?"),
    ("probe.layers=[z,h]", "probe.layers=[z,h]: choose [h], [z] or [h,z]"),
    ("-m loss=glob(zz*)", "this sweep has no points"),
    ("probe.protocols=[lowshot] probe.protocols.lowshot.shots=[500]", "training images; give at most that many"),
    ("pretrain.epochs=99999999999999999999", "give a value from 1 to 1e+09"),
    ("pretrain.micro_batch=99999999999999999999", "give a value from 1 to 1e+09"),
    ("checkpoint.every=0s", "give steps, as in 500, or time, as in 10min"),
    (f"checkpoint.every={'9' * 400}s", "give steps, as in 500, or time, as in 10min"),
    ("nproc=5000", "nproc=5000: give a value from 1 to 1024"),
    (f"name={'a' * 256}", "give a name of at most 255 bytes"),
    ("runs=", "runs is empty"),
    ("tracking.project=", "tracking.project is empty"),
    ("alpha=", "alpha"),
]


@pytest.mark.parametrize(("line", "message"), REFUSED, ids=[line for line, _ in REFUSED])
def test_errors_are_one_line_and_leave_nothing(
    line: str,
    message: str,
    scclr: Run,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torchvision.datasets.FashionMNIST.mirrors", ["http://127.0.0.1:9/"])
    (folder / "junk.pt").write_text("not a checkpoint")
    (folder / "empty").mkdir()
    before = sorted(folder.rglob("*"))
    assert scclr("train", *line.split()) == 1
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert lines[-1].startswith("scclr train: error: ")
    assert message in lines[-1]
    assert [text for text in lines if "Traceback" in text] == []
    assert len(lines) == 1
    assert sorted(folder.rglob("*")) == before


def test_cuda_is_refused_where_there_is_none(
    scclr: Run, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert scclr("train", "device=cuda") == 1
    assert (
        capsys.readouterr().err
        == "scclr train: error: device=cuda: PyTorch finds no CUDA device here; type device=cpu\n"
    )
    assert list(folder.iterdir()) == []


def test_name_is_the_folder(scclr: Run, folder: Path) -> None:
    assert scclr("train", "name=mine", "stages=[pretrain]", *TINY) == 0
    assert [path.parent.name for path in run_folders(folder)] == ["mine"]


def test_interrupt(scclr: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("scclr.train.pretrain", stop)
    assert scclr("train", *TINY) == 130
    assert "type the same command to go on" in capsys.readouterr().err


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_freed_memory_is_kept_for_the_next_tensor() -> None:
    """Writing 128 MiB anew takes 32,768 page faults where the memory comes from the kernel."""
    probe = (
        "import resource, torch; from scclr.run.machine import keep_freed_memory; keep_freed_memory();"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt;"
        "print(*(-faults() + (torch.ones(2**25).numel() and faults()) for _ in range(9)))"
    )
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
    assert min(map(int, out.split())) < 1000  # not each time: a small block may have come to lie between
