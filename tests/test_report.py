"""``scclr report``: what it reads, compares, says and writes, and what it refuses."""

import json
import re
import shlex
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas
import pytest
from report_runs import METRIC, composed, write_run

from scclr.config.compose import parse, plan
from scclr.report import watch, write
from scclr.report.answer import answer
from scclr.report.runs import find
from scclr.report.study import study
from scclr.report.words import command, sweep, words_of
from scclr.run.lock import run_lock

Command = Callable[..., int]
ALPHAS, NOISE = (0.35, 0.5, 0.65), (0.001, -0.001, 0.0)
SMALL = ("encoder.widths=[8,16]", "pretrain.epochs=2")
OLD = "probe/logreg/top1"


def runs(folder: Path, *words: str, metric: str = METRIC, seeds: int = 3, rows: int = 6) -> None:
    """Balances 0.35, 0.5, 0.65 at temperatures 0.2 and 0.5; an effect at 0.5 only: 1.2 points above, 2 below."""
    rng = np.random.default_rng(0)
    for temperature in (0.2, 0.5):
        for alpha, effect in zip(ALPHAS, (0.012, 0.0, -0.02), strict=True):
            for seed in range(seeds):
                value = 0.9 + NOISE[seed] + effect * (temperature == 0.5) + rng.normal(0, 1e-4)
                metrics = {metric: value, "knn-v1/top1": value - 0.1, f"baseline/untrained/{metric}": 0.5}
                metrics |= {
                    f"{metric}/{name}": value - cut for name, cut in (("many", 0), ("medium", 0.1), ("few", 0.2))
                }
                own = (f"alpha={alpha}", f"loss.temperature={temperature}", f"seed={seed}")
                write_run(folder, *SMALL, *words, *own, metrics=metrics, theory=True, rows=rows)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of such runs; tests do not change it."""
    folder = tmp_path_factory.mktemp("runs")
    runs(folder)
    write([folder])
    return folder


def test_the_answer_is_that_of_the_statistics(made: Path) -> None:
    found = study(find([made]).runs, None, None)
    better, silent = answer(found)
    assert re.fullmatch(
        r"alpha = 0.35 is 1\.\d\d points \[1\.\d\d, 1\.\d\d\] above 0.5 at temperature 0.5 \(3 seeds, paired\); "
        r"alpha = 0.65 is [12]\.\d\d points \[1\.9\d, 2\.\d\d\] below 0.5 \(3 seeds, paired\)\.",
        better,
    ), better
    assert silent == "No difference from alpha = 0.5 is shown at temperature 0.2 (3 seeds)."
    best = [group.values for group in found.groups if group.best]
    assert best == [{"alpha": "0.35", "loss.temperature": "0.5"}]
    means = {tuple(group.values.values()): group.estimate.mean for group in found.groups}
    by_hand = pandas.DataFrame(
        {"alpha": r.settings["alpha"], "t": r.settings["loss.temperature"], "y": r.numbers[METRIC]}
        for r in find([made]).runs
    )
    for (alpha, t), mean in by_hand.groupby(["alpha", "t"])["y"].mean().items():
        assert means[f"{alpha:g}", f"{t:g}"] == pytest.approx(mean)


def test_metric_and_baseline_can_be_chosen(made: Path) -> None:
    read = find([made]).runs
    found = study(read, "knn-v1/top1", {"temperature": "0.20"})
    assert (found.metric, found.baseline) == ("knn-v1/top1", {"loss.temperature": "0.2"})
    assert answer(found)[0].startswith("temperature = 0.5 is 1.19 points [1.18, 1.20] above 0.2 at alpha 0.35 (3 seeds")
    assert study([run for run in read if run.seed == 0], None, None).single
    assert answer(study([run for run in read if run.seed == 0], None, None))[0].startswith("One seed each: nothing")


def test_the_files_are_whole(made: Path) -> None:
    report = made / "report"
    names = {"metric", "map", "tail", "bias", "decomposition", "alignment", "forces", "learning", "slack"}
    assert {path.stem for path in report.glob("*.svg")} == {path.stem for path in report.glob("*.png")} == names
    for name in names:
        ET.parse(report / f"{name}.svg")
        assert (report / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    table = pandas.read_csv(report / "results.csv")
    assert len(table) == 18
    assert table.groupby(["alpha", "loss.temperature"])[METRIC].mean()[0.35, 0.5] == pytest.approx(0.912, abs=2e-4)
    one = table.iloc[0]
    (point,) = plan(parse(shlex.split(one["command"])[2:])).points
    assert (point.config.alpha, point.config.seed) == (one["alpha"], one["seed"])
    text = (report / "report.md").read_text()
    assert "scclr train -m alpha=0.35,0.5,0.65" in text
    assert "AMD EPYC, 1 threads | 18 | 56 s" in text


class Page(HTMLParser):
    """What a page asks of elsewhere, its names, and where tags do not fit."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.ids, self.targets, self.wrong = list[str](), list[str](), list[str](), list[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)
        self.ids += [value for key, value in attrs if key == "id" and value]
        self.targets += [value for key, value in attrs if key in ("src", "href", "xlink:href") and value]
        self.wrong += [tag] if tag in ("script", "link", "iframe") else []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("meta", "link", "img", "br"):
            self.wrong += [] if self.open.pop() == tag else [tag]


def test_the_page_stands_alone(made: Path) -> None:
    text = (made / "report" / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert not page.wrong
    assert not page.open
    assert len(page.ids) == len(set(page.ids))
    assert all(re.match(r"#|data:|[\w]+\.png$", target) for target in page.targets), page.targets
    assert {target[1:] for target in page.targets if target.startswith("#")} <= set(page.ids)
    assert "url(http" not in text
    assert "prefers-color-scheme: dark" in text
    assert "refresh" not in text


def test_names_are_shown_as_text(tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>|`"
    folder = tmp_path / "a<b>|c"
    for seed in range(2):
        write_run(folder, *SMALL, f"seed={seed}", metrics={METRIC: 0.9 + seed / 100, f"z/{evil}/top1": 0.5})
    (folder / "bad").mkdir()
    (folder / "bad" / "config.yaml").write_text("")
    (folder / "bad" / "error.txt").write_text(evil)
    path, *_ = write([folder])
    assert "<img" not in path.read_text()
    assert "<b>" not in path.read_text()
    rows = [line for line in path.with_suffix(".md").read_text().splitlines() if line.startswith("| ")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in rows[:2]}) == 1


def test_old_names_of_metrics_are_read_too(tmp_path: Path) -> None:
    runs(tmp_path, metric=OLD, seeds=2, rows=0)
    found = study(find([tmp_path]).runs, None, None)
    assert found.metric == OLD
    write_run(tmp_path, *SMALL, "alpha=0.9", metrics={METRIC: 0.5})
    mixed = study(find([tmp_path]).runs, None, None)
    assert (mixed.metric, len(mixed.lacking)) == (OLD, 1)
    assert "0.9" not in {group.values["alpha"] for group in mixed.groups}


def test_unfinished_and_damaged_runs_are_named_and_left_out(tmp_path: Path) -> None:
    first, damaged, stopped, failed, other = (
        write_run(tmp_path, *SMALL, f"alpha={alpha}", metrics={METRIC: 0.9}) for alpha in (0.1, 0.2, 0.3, 0.4, 0.5)
    )
    (damaged / "result.json").write_text((damaged / "result.json").read_text()[:200])
    for path in (stopped, failed):
        (path / "result.json").unlink()
    (stopped / "last.pt").write_bytes(b"")
    (failed / "error.txt").write_text("out of luck\n")
    changed = json.loads((other / "result.json").read_text())
    del changed["config"]["loss"]  # another schema
    (other / "result.json").write_text(json.dumps(changed))
    copy = tmp_path / "copy"
    shutil.copytree(first, copy)
    with run_lock(tmp_path / "busy", overwrite=False):
        (tmp_path / "busy" / "config.yaml").write_text("")
        found = find([tmp_path])
    assert [run.directory for run in found.runs] == [first]
    said = "\n".join(found.others)
    for words in (
        f"damaged  {damaged}/result.json: damaged", "stopped", "failed", "out of luck", f"{other}/result.json: damaged",
        f"repeated {copy}", "running",
    ):  # fmt: skip
        assert words in said
    path, *_ = write([tmp_path])
    assert "out of luck" in path.read_text()


def test_two_folders_are_compared(tmp_path: Path) -> None:
    for name, change in (("a", 0.0), ("b", 0.01)):
        for alpha in (0.3, 0.5):
            for seed in range(3):
                value = 0.9 + NOISE[seed] + change + alpha * seed * 1e-5
                write_run(
                    tmp_path / name,
                    *SMALL,
                    f"alpha={alpha}",
                    f"seed={seed}",
                    f"pretrain.epochs={name == 'b' or 2}".replace("True", "3"),
                    metrics={METRIC: value + change * seed / 100},
                )
    path, found, _ = write([tmp_path / "a", tmp_path / "b"])
    assert path == tmp_path / "a" / "report-b" / "report.html"
    assert found.baseline == {"folder": str(tmp_path / "a")}
    assert sorted(group.mark for group in found.groups) == ["", "", "above", "above"]  # though epochs differ too


@pytest.mark.parametrize(
    "line",
    [
        "",
        "alpha=0.3 seed=3 name=other",
        "dataset=cifar10_lt augment=simclr loss=debiased encoder=resnet18 optimizer=lars pretrain.epochs=7",
        "experiment=fashion_mnist_cpu",
        "experiment=collapse_strong alpha=0.8",
        "augment=byol encoder.widths=[8,16] 'augment.views=[{blur: 1}, {solarize: 0.2}]'",
        "dataset=imagefolder \"dataset.root='a b/it\\'s'\" dataset.image_size=32",
        "loss=ntxent probe.protocols=[knn200] probe.protocols.knn200.k=[100] probe.dataset=mnist",
        "alpha_schedule=linear alpha_end=0.7 dataset.classes=[3,5]",
    ],
)
def test_the_words_of_a_configuration_compose_it_again(line: str) -> None:
    plain = json.loads(json.dumps(asdict(composed(tuple(shlex.split(line))))))
    words = words_of(plain)
    assert words is not None
    again = composed(tuple(shlex.split(command(words))[2:]))
    assert json.loads(json.dumps(asdict(again))) == plain
    assert len(words) <= max(1, len(shlex.split(line))) or "experiment" in line


def test_a_grid_is_one_command() -> None:
    parts = [({"alpha": "0.3"}, [0, 1]), ({}, [1, 0])]  # 0.5 is the default
    assert sweep(parts) == "scclr train -m alpha=0.3,0.5 seed=0,1"
    assert sweep([*parts, ({"alpha": "0.7"}, [0])]) is None  # not all seeds
    assert sweep([({"alpha": "0.3", "loss.temperature": "0.2"}, [0]), ({"alpha": "0.4"}, [0])]) is None
    assert words_of({"stages": ["pretrain"]}) is None  # of another version


def test_a_sweep_is_watched_until_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path, *SMALL, "alpha=0.3", metrics={METRIC: 0.9})
    (tmp_path / "sweep.json").write_text(json.dumps({"late": "alpha=0.5"}))
    naps, said, pages = [], [], []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        pages.append((tmp_path / "report" / "report.html").read_text())
        if len(naps) == 2:
            write_run(tmp_path, *SMALL, "alpha=0.5", metrics={METRIC: 0.8}).rename(tmp_path / "late")

    monkeypatch.setattr("time.sleep", sleep)
    path, found, _ = watch([tmp_path], None, None, said.append, seconds=5)
    assert naps == [5, 5]
    assert ['http-equiv="refresh" content="5"' in page for page in [*pages, path.read_text()]] == [True, True, False]
    assert [line.split(";")[0] for line in said] == ["2 points: 1 done, 1 missing", "2 points: 2 done"]
    assert len(found.groups) == 2
    shutil.rmtree(tmp_path / "late")
    naps.clear()
    monkeypatch.setattr("time.sleep", naps.append)
    watch([tmp_path], None, None, said.append, seconds=100)
    assert len(naps) == 6  # ten minutes without a run


def test_the_command_line(scclr: Command, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 1):
        write_run(folder / "mine", *SMALL, f"seed={seed}", metrics={METRIC: 0.9 + seed / 100})
    assert scclr("report", "mine") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("logreg-v1/top1 is 90.50 %, 95 % interval [")
    assert out[-1] == "mine/report/report.html"
    assert scclr("report", "mine", "--watch") == 0
    capsys.readouterr()
    (folder / "empty").mkdir()
    (folder / "later").mkdir()
    (folder / "later" / "sweep.json").write_text('{"x": "alpha=0.5"}')
    for words, message in {
        ("report",): "type scclr report <folder of runs>",
        ("report", "mine", "./mine"): "two different folders",
        ("report", "absent"): "absent: no runs; give a folder of runs",
        ("report", "empty"): "empty: no runs",
        ("report", "later"): "no finished run yet (1 points: 0 done, 1 missing",
        ("report", "mine", "--metric", "logreg-v1/top"): "did you mean logreg-v1/top1?",
        ("report", "mine", "--baseline", "alpha"): "give <key>=<value>",
        ("report", "mine", "--baseline", "alpha=0.5"): "alpha does not vary",
        ("report", "mine", "--metrics", "x"): "unrecognized arguments",
    }.items():
        assert scclr(*words) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    (folder / "mine" / "report").rename(folder / "old")
    (folder / "mine" / "report").write_text("in the way")
    assert scclr("report", "mine") == 1
    assert "cannot write there" in capsys.readouterr().err


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scclr.report.find_spec", lambda name: None if name == "jinja2" else object())
    with pytest.raises(Exception, match=r"a report needs jinja2: pip install 'scclr\[report\]'"):
        write([tmp_path])
