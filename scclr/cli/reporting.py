"""The commands about finished runs together: ``report``, ``sync``."""

import sys
from pathlib import Path

from scclr.cli.finished import Parser
from scclr.config.errors import require

REPORT_HELP = """\
usage: scclr report <folder> [<folder>] [--metric <name>] [--baseline <key>=<value>,...] [--watch] [--wandb]

Say what the runs of a folder show: a page with an answer, a table of means over seeds with intervals, differences from
a baseline in pairs of seeds, and figures. It is written to <folder>/report: report.html, report.md, results.csv, and
every figure as SVG and PNG. Two folders are compared with each other; a run folder has a report of its own. --watch
writes it again while a sweep runs.

The metric is the first accuracy, unless --metric names another number of result.json. Where alpha varies, the baseline
is alpha=0.5. What `scclr evaluate` has added is a metric too, such as mnist/knn-v1/top1.

--wandb logs the page, the figures and the table to Weights & Biases, in one run for each report; tracking.mode=online
and the other keys of tracking, and W&B's environment variables, mean the same as for `scclr train`. With --watch the
last report is logged.

examples
  scclr report runs/default
  scclr report runs/default --metric knn-v1/top1 --baseline alpha=0.3
  scclr report runs/digits runs/digits_weak
  scclr report runs/default --wandb tracking.project=mine
  scclr report runs/default/<run>"""

SYNC_HELP = """\
usage: scclr sync <folder> [<folder> ...]

Upload the W&B runs that were logged offline in these folders and below: those that have not been uploaded yet, and
whose training is over. Type `wandb login` first. A run that fails is named, and the same command tries it again.

examples
  scclr sync runs
  scclr sync runs/default runs/other/report"""


def report(argv: list[str]) -> None:
    """``scclr report FOLDER``: write a report of its runs, and print how it begins."""
    words = [word for word in argv if word.startswith("tracking.") and "=" in word]
    parser = Parser(prog="scclr report", add_help=False, allow_abbrev=False)
    parser.add_argument("folders", nargs="*")
    parser.add_argument("--metric", default=None)
    parser.add_argument("--baseline", default=None)
    parser.add_argument("--watch", action="store_true")
    parser.add_argument("--wandb", action="store_true")
    args = parser.parse_intermixed_args([word for word in argv if word not in words])
    require(
        len(args.folders) in (1, 2), "type scclr report <folder of runs>, such as runs/default; at most two folders"
    )
    folders = [Path(folder) for folder in args.folders]
    require(len({folder.resolve() for folder in folders}) == len(folders), "give two different folders")
    baseline = None
    if args.baseline is not None:
        pairs = args.baseline.split(",")
        plain = all("=" in pair for pair in pairs)
        require(plain, f"--baseline {args.baseline}: give <key>=<value>, such as --baseline alpha=0.5")
        baseline = dict(pair.split("=", 1) for pair in pairs)
    require(args.wandb or not words, f"{' '.join(words)}: a report is logged with --wandb; add it")

    from scclr.report import logged, watch, write
    from scclr.report.answer import answer

    typed = logged.typed(words)
    tracking = logged.tracking(typed) if args.wandb else None
    if args.watch:
        made = watch(folders, args.metric, baseline, lambda line: print(line, file=sys.stderr))
    else:
        made = write(folders, args.metric, baseline)
    print("\n".join([*answer(made.study), str(made.page)]))
    if tracking is not None:
        print(logged.log(made, tracking, typed))


def sync(argv: list[str]) -> None:
    """``scclr sync FOLDER ...``: upload the offline W&B runs below folders, and say which were not."""
    flags = [word for word in argv if word.startswith("-")]
    require(not flags, f"{' '.join(flags)}: no flag of this command; `scclr sync --help` says what it takes")
    require(len(argv) > 0, "type scclr sync <folder>, such as runs/default")

    from scclr.run.sync import upload

    lines, whole = upload([Path(folder) for folder in argv])
    print("\n".join(lines))
    if not whole:
        raise SystemExit(1)
