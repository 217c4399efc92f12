"""The commands about runs that are to come, and about folders of runs: ``train``, ``show``, ``sweep-status``."""

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from scclr.cli.errors import reported
from scclr.config.errors import UserError, one_line, require

if TYPE_CHECKING:
    from scclr.config.compose import CommandLine, Plan
    from scclr.config.resolve import RunIdentity
    from scclr.config.schema import TrainConfig
    from scclr.run.sweep import Point

PRELOAD = ("scclr.train", "torch._dynamo")  # the latter is imported by every optimizer, which takes seconds
Prepared = tuple["Point", "TrainConfig", "RunIdentity"]

EXAMPLES = """\
examples
  scclr train loss=balanced alpha=0.5
  scclr train -m alpha=0.3,0.5,0.7 seed=0,1,2
  scclr train experiment=fashion_mnist_cpu
  scclr train -m experiment=balance_grid size=smoke
  scclr train stages=[probe] init_from=runs/default/<run> dataset=fashion_mnist"""

STATUS_HELP = """\
usage: scclr sweep-status <folder of runs>

Count the runs in a folder such as runs/default: done, running, failed, stopped, missing."""

SHOW_HELP = """\
usage: scclr show [group=choice ...] [key=value ...]

Draw training images beside the views that pretraining will see of them, into views.png of the run's folder.

examples
  scclr show dataset=fashion_mnist augment=crop
  scclr show dataset=imagefolder dataset.root=photos dataset.image_size=96 augment=byol"""


def train(argv: list[str]) -> None:
    """``scclr train``: compose and check every point of the command line, then run them."""
    from scclr.config.compose import parse, plan
    from scclr.run import torchrun
    from scclr.run.preemption import Stop

    with Stop():  # a signal during the checks means the same as one during the training
        command = parse(argv)
        if command.shows_only:
            run_hydra(command)
            return
        processes = torchrun.group().size
        require(processes == 1 or not command.sweep, "a sweep cannot run inside torchrun: start one for each point")
        planned = plan(command)
        prepared = prepare_points(planned)
        if not planned.enumerated:
            run_hydra(command)
        elif command.sweep:
            run_sweep(command, planned, prepared)
        else:
            from scclr.train import run

            if planned.params:
                print(f"one run; with -m, a sweep over {' '.join(planned.params)}", file=sys.stderr)
            run(*prepared[0][1:])


def prepare_points(planned: "Plan") -> list[Prepared]:
    """Check every point before the first one runs."""
    from scclr.components import prepare
    from scclr.run.sweep import Point

    found = []
    digests: dict[str, str] = {}  # a folder of images is listed once, not for every point
    for point in planned.points:
        config, identity = prepare(point.config, point.overrides, digests, here=planned.launcher != "submitit_slurm")
        found.append((Point(identity.directory, point.words), config, identity))
    return found


def run_hydra(command: "CommandLine", *more: str) -> None:
    """Let Hydra's own ``main`` run the command line, with ``more`` overrides."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from scclr.train import main as job

    sys.argv = ["scclr train", *command.argv, *more]
    try:
        job()
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(one_line(error)) from error
    except ValueError as error:
        raise UserError(one_line(error)) if command.shows_only else error from error


def run_sweep(command: "CommandLine", planned: "Plan", prepared: list[Prepared]) -> None:
    """Run what is not done of the points, and say what became of all of them.

    Raises:
        SystemExit: with code 1 if a point is not done; with code 75 if a signal stopped the sweep.
    """
    from scclr.components import pick_device
    from scclr.run.machine import available_cores
    from scclr.run.parallel import run_points
    from scclr.run.sweep import before, count, devices, divided, fail, listed, remember

    points = [point for point, _, _ in prepared]
    rest = [one for one in prepared if one[0].state != "done" or one[1].overwrite]
    here = rest if planned.launcher == "joblib" else []  # others' points find devices where they run
    on_cuda = [config.nproc for _, config, _ in here if pick_device(config.device).type == "cuda"]
    each, names = max(on_cuda, default=1), devices() if on_cuda else []
    jobs, shares = divided(planned.jobs, cores=available_cores(), names=names, each=each)
    at_once = max(1, min({"joblib": jobs, "basic": 1}.get(planned.launcher, len(rest)), len(rest)))
    print(before(points, at_once=at_once), file=sys.stderr)
    if rest:
        remember(points)
    if not planned.runs_here and rest:
        if planned.launcher == "submitit_local":  # all points share the cores of this machine
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // at_once)))
        run_hydra(command, *planned.params, "hydra.sweeper.params=null")  # typed axes replace those of a preset
    elif at_once == 1:
        for one in rest:
            run_point(one)
    else:

        def killed(one: Prepared, signal_name: str) -> None:
            fail(one[0].directory, f"killed by {signal_name}; type the command again to go on from the last checkpoint")

        with TemporaryDirectory() as folder:
            work = partial(run_point, folder=folder, shares=shares)
            run_points(work, rest, at_once, preload=PRELOAD, killed=killed)
    print("\n".join([count(points), *listed(points)]))
    if any(point.state != "done" for point in points):
        raise SystemExit(1)


def run_point(prepared: Prepared, folder: str = "", shares: Sequence[str] = ()) -> None:
    """One point of a sweep, on ``own_devices``. If it fails, it says so here and in its folder; the others go on."""
    from scclr.run.lock import HeldError
    from scclr.run.sweep import fail, own_devices
    from scclr.train import run

    point, config, identity = prepared
    try:
        with own_devices(folder, shares) if shares else nullcontext():
            run(config, identity)
    except Exception as error:
        message = reported(error)
        if not isinstance(error, HeldError):
            fail(identity.directory, message)
        print(f"scclr train: error: {point.words}: {message}", file=sys.stderr)


def train_help(words: list[str]) -> str:
    """``scclr train --help``; with ``--config-dir``, the choices of that folder too."""
    from scclr.config.compose import described_keys, groups, parse

    keys = "\n".join(f"  {key:<22} {text}" for key, text in described_keys())
    choices = "\n".join(f"  {name:<15} {', '.join(stems)}" for name, stems in groups(parse(words)).items() if stems)
    return (
        "usage: scclr train [-m] [group=choice ...] [key=value ...]\n\n"
        "Pretrain an encoder, then evaluate it frozen. With -m, do so for every combination of values.\n\n"
        f"groups (group=choice; group.key=value sets a value inside)\n{choices}\n\n"
        f"keys (key=value)\n{keys}\n\n{EXAMPLES}\n\n"
        "`scclr train --cfg job` prints the composed configuration; `scclr train --hydra-help` lists Hydra's own flags."
    )


def show(argv: list[str]) -> None:
    """``scclr show``: write the sheet of views that a run with these words would begin with."""
    from scclr.config.compose import parse, plan

    command = parse(argv)
    one = not command.sweep and not command.shows_only
    require(one, f"{' '.join(command.flags)}: no flag of this command; `scclr show --help` says what it takes")
    ((_, config, identity),) = prepare_points(plan(command))

    from scclr.components import make_augment, make_dataset
    from scclr.datasets.show import sheet, write_sheet

    page = sheet(make_dataset(config).load(), make_augment(config), seed=config.seed)
    identity.directory.mkdir(parents=True, exist_ok=True)
    print(write_sheet(page, identity.directory))


def sweep_status(argv: list[str]) -> None:
    """``scclr sweep-status DIR``: what became of the runs of a folder, also while a sweep runs."""
    from pathlib import Path

    from scclr.run.sweep import status

    require(len(argv) == 1, "type scclr sweep-status <folder of runs>, such as runs/default")
    print("\n".join(status(Path(argv[0]))))
