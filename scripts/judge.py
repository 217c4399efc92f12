"""Did the predictions hold? Judges the runs of an experiment of conf/experiment.

    python scripts/judge.py RUNS [NAME]      RUNS: a folder of runs, such as runs/balance_grid-cpu
    python scripts/judge.py --list           every prediction and criterion

NAME is the experiment, by default the name of the folder up to the first hyphen. Prints mean and standard deviation
over seeds for each configuration, of a folder of any name, and the verdicts if it is an experiment with a judge. Writes
scripts/results/<folder>.csv, a row for each run, and for most experiments <folder>.png. A folder or runs that cannot be
judged are said in one line, and the exit code is 2.
"""

import csv
import inspect
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
from cycler import cycler
from judges import JUDGES, Judge

from scclr.config.errors import UserError, did_you_mean, require
from scclr.report.drawing import COLOURS, DPI, style
from scclr.report.runs import ADVICE, Run, axes, find, label, shown, value_of
from scclr.report.statistics import estimate
from scclr.report.units import number, titled
from scclr.run.files import is_number, write_atomic, write_text

RESULTS = Path(__file__).parent / "results"
ENVIRONMENT = {"device": "machine", "threads": "machine", "git": "versions", "torch": "versions"}


def main(words: Sequence[str], results: Path = RESULTS) -> int:
    """What the program does with the words after its name; returns the exit code."""
    if list(words) == ["--list"]:
        print("\n\n".join(f"{name}\n    {inspect.getdoc(judge.rule)}" for name, judge in JUDGES.items()))
        return 0
    try:
        require(len(words) in (1, 2), "give a folder of runs, such as runs/balance_grid-cpu, or --list")
        folder = Path(words[0])
        name = words[1] if len(words) == 2 else folder.resolve().name.partition("-")[0]
        hint = did_you_mean(name, JUDGES) or f"; choose {', '.join(JUDGES)}"
        require(len(words) == 1 or name in JUDGES, f"{name}: no such experiment{hint}")
        judge_folder(folder, JUDGES.get(name), results)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def judge_folder(folder: Path, judge: Judge | None, results: Path) -> None:
    """Print and write what the runs of a folder say.

    Raises:
        UserError: there are no finished runs, they are not what the judge is about, or the results cannot be written.
    """
    runs = read(folder)
    varying = axes(runs)
    title, verdicts = folder.resolve().name, []
    names = list(dict.fromkeys(name for run in runs for name in run.numbers if name not in run.settings))
    if judge is not None:
        check(runs, varying, judge)
        runs, names = judge.measure(runs), [*judge.needs, *judge.also, "seconds/total"]
        verdicts = judge.rule(runs)
    try:
        results.mkdir(exist_ok=True)
        write_text(results / f"{title}.csv", table(runs, varying, names))
        if judge is not None and judge.draw is not None:
            with style():
                mpl.rcParams["axes.prop_cycle"] = cycler(color=COLOURS)
                figure = judge.draw(runs)
                write_atomic(results / f"{title}.png", lambda file: figure.savefig(file, format="png", dpi=DPI))
    except OSError as error:
        raise UserError(f"{results}: cannot write there ({error.strerror})") from error
    print("\n".join([*means(runs, varying), *map(str, verdicts)]))


def read(folder: Path) -> list[Run]:
    """The finished runs of a folder, with the numbers of their configuration by key, such as ``loss.temperature``.

    Raises:
        UserError: there are none.
    """
    found = find([folder])
    for line in found.others:
        print(f"left out: {line}", file=sys.stderr)
    require(len(found.runs) > 0, f"{folder}: no finished run that this version reads; {ADVICE}")
    return [replace(run, numbers={**numeric(run.settings), **run.numbers}) for run in found.runs]


def numeric(settings: Mapping[str, object]) -> dict[str, float]:
    """The settings that are numbers."""
    return {key: float(str(value)) for key, value in settings.items() if is_number(value)}


def check(runs: Sequence[Run], varying: Sequence[str], judge: Judge) -> None:
    """Raise ``UserError`` unless these are runs of the experiment, with all that its judge reads."""
    other = [axis for axis in varying if axis not in judge.axes and not axis.startswith(groups(judge))]
    advice = f"this experiment varies {', '.join(judge.axes)} and seed only; judge the others in folders of their own"
    require(not other, f"the runs differ in {', '.join(other)}: {advice}")
    for name in judge.needs:
        lacking = [run for run in runs if name not in run.numbers]
        first = "".join(f"; {run.directory} is one" for run in lacking[:1])
        advice = "type stages=[pretrain,probe,theory] and size=cpu, as the experiment does"
        require(not lacking, f"{len(lacking)} of {len(runs)} runs have no {name}{first}: {advice}")
    seeds = {run.seed for run in runs}
    require(len(seeds) > 1, f"one seed only ({', '.join(map(str, seeds))}): no verdict without more; add seed=0,1,2")


def groups(judge: Judge) -> tuple[str, ...]:
    """The beginnings of the keys that may vary together."""
    return tuple(axis for axis in judge.axes if axis.endswith("."))


def table(runs: Sequence[Run], varying: Sequence[str], names: Sequence[str]) -> str:
    """A CSV with a row for each run: what varies, the seed, the numbers ``names``, the machine and the versions."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [name for name in names if name not in varying]
    writer.writerow(["run", *varying, "seed", *names, *ENVIRONMENT])
    for run in runs:
        around = [run.result.get(part, {}).get(name, "") for name, part in ENVIRONMENT.items()]
        values = [shown(value_of(run, axis)) for axis in varying]
        writer.writerow(
            [run.directory.name, *values, run.seed, *(run.numbers.get(name, "") for name in names), *around]
        )
    return text.getvalue()


def means(runs: Sequence[Run], varying: Sequence[str]) -> Iterator[str]:
    """Mean ± sd over seeds as a table in Markdown: accuracies and seconds, and the baselines of all configurations."""
    names = [name for name in dict.fromkeys(name for run in runs for name in run.numbers) if name.endswith("top1")]
    baselines = [name for name in names if "baseline/" in name]
    columns = [name for name in names if name not in baselines and not name.startswith("validation/")]
    columns.append("seconds/total")
    parts: dict[str, list[Run]] = {}
    for run in runs:
        parts.setdefault(run.group, []).append(run)
    yield row([*(label(axis, varying) for axis in varying), "n", *(titled(name) for name in columns)])
    yield row(["---"] * (len(varying) + 1 + len(columns)))
    for members in parts.values():
        chosen = [shown(value_of(members[0], axis)) for axis in varying]
        yield row([*chosen, str(len(members)), *(spread(name, members) for name in columns)])
    yield from (f"{titled(name)}: {spread(name, runs)}" for name in baselines)


def row(cells: Sequence[str]) -> str:
    """A row of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


def spread(name: str, runs: Sequence[Run]) -> str:
    """Mean and standard deviation; without the latter for one run."""
    values = [run.numbers[name] for run in runs if name in run.numbers]
    if not values:
        return "-"
    found = estimate(values)
    return number(name, found.mean) + ("" if found.sd is None else f" ± {number(name, found.sd)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
