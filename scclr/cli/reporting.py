"""The command about finished runs together: ``report``."""

import sys
from pathlib import Path

from scclr.cli.finished import Parser
from scclr.config.errors import require

REPORT_HELP = """\
usage: scclr report <folder> [<folder>] [--metric <name>] [--baseline <key>=<value>,...] [--watch]

Say what the runs of a folder show: a page with an answer, a table of means over seeds with intervals, differences from
a baseline in pairs of seeds, and figures. It is written to <folder>/report: report.html, report.md, results.csv, and
every figure as SVG and PNG. Two folders are compared with each other; a run folder has a report of its own. --watch
writes it again while a sweep runs.

The metric is the first accuracy, unless --metric names another number of result.json. Where alpha varies, the baseline
is alpha=0.5.

examples
  scclr report runs/default
  scclr report runs/default --metric knn-v1/top1 --baseline alpha=0.3
  scclr report runs/digits runs/digits_weak
  scclr report runs/default/<run>"""


def report(argv: list[str]) -> None:
    """``scclr report FOLDER``: write a report of its runs, and print how it begins."""
    parser = Parser(prog="scclr report", add_help=False, allow_abbrev=False)
    parser.add_argument("folders", nargs="*")
    parser.add_argument("--metric", default=None)
    parser.add_argument("--baseline", default=None)
    parser.add_argument("--watch", action="store_true")
    args = parser.parse_intermixed_args(argv)
    require(
        len(args.folders) in (1, 2), "type scclr report <folder of runs>, such as runs/default; at most two folders"
    )
    folders = [Path(folder) for folder in args.folders]
    require(len({folder.resolve() for folder in folders}) == len(folders), "give two different folders")
    baseline = None
    if args.baseline is not None:
        words = args.baseline.split(",")
        plain = all("=" in word for word in words)
        require(plain, f"--baseline {args.baseline}: give <key>=<value>, such as --baseline alpha=0.5")
        baseline = dict(word.split("=", 1) for word in words)

    from scclr.report import watch, write
    from scclr.report.answer import answer

    if args.watch:
        path, study = watch(folders, args.metric, baseline, lambda line: print(line, file=sys.stderr))
    else:
        path, study = write(folders, args.metric, baseline)
    print("\n".join([*answer(study), str(path)]))
