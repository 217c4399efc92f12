"""The ``scclr`` command: subcommands, help, exit codes, and one line for whatever the user can mend.

Exit codes: 0 done, 1 an error, 2 an unknown command, 130 interrupted. Nothing is imported before it is needed, so
``scclr --help`` and ``--version`` answer at once.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, NoReturn

from scclr import __version__

if TYPE_CHECKING:
    from scclr.config import TrainConfig

Command = Callable[[list[str]], None]
TAKES_VALUE = ("--cfg", "-c", "--package", "-p", "--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp")
SHOWS_ONLY = ("--cfg", "-c", "--info", "-i", "--hydra-help", "--shell-completion", "-sc")

EXAMPLES = """\
examples
  scclr train loss=balanced alpha=0.5
  scclr train -m alpha=0.3,0.5,0.7 seed=0,1,2
  scclr train stages=[probe] init_from=runs/default/<run> dataset=fashion_mnist"""

STATUS_HELP = """\
usage: scclr sweep-status <folder of runs>

Count the points of the sweeps in a folder of runs, such as runs/default: done, running, failed, stopped, missing."""

SHOW_HELP = """\
usage: scclr show [group=choice ...] [key=value ...]

Draw training images beside the views that pretraining will see of them into views.png of the run's folder.

examples
  scclr show dataset=fashion_mnist augment=crop
  scclr show dataset=imagefolder dataset.root=photos dataset.image_size=96 augment=byol"""


def main() -> NoReturn:
    """Run ``sys.argv`` and exit."""
    sys.exit(dispatch(sys.argv[1:]))


def dispatch(argv: list[str]) -> int:
    """Run one command line; returns the exit code."""
    if argv and argv[0] in ("-sc", "--shell-completion"):  # the shell's completion knows no subcommands
        os.environ["COMP_LINE"] = re.sub(r"^(\S+) +train\b", r"\1", os.environ.get("COMP_LINE", ""))
        argv = ["train", *argv]
    if not argv or argv[0] in ("-h", "--help"):
        print(overview())
        return 0
    if argv[0] == "--version":
        print(f"scclr {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        from scclr.config import did_you_mean

        hint = did_you_mean(argv[0], COMMANDS) or "; `scclr --help` lists the commands"
        print(f"scclr: error: no such command: {argv[0]}{hint}", file=sys.stderr)
        return 2
    return guarded(argv[0], argv[1:])


def overview() -> str:
    """``scclr --help``."""
    commands = "\n".join(f"  {name:<13} {help}" for name, (_, help) in COMMANDS.items())
    return (
        "scclr: self-supervised contrastive learning with a balance between attraction and repulsion\n\n"
        f"usage: scclr <command> ...\n\ncommands\n{commands}\n\n`scclr <command> --help` says more.\n\n{EXAMPLES}"
    )


def guarded(name: str, argv: list[str]) -> int:
    """Run a command; an error of the user's is one line on standard error, any other a traceback."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from scclr.config import UserError, one_line

    full = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra would print tracebacks of its own: let exceptions come here
    try:
        COMMANDS[name][0](argv)
    except (UserError, HydraException, OmegaConfBaseException, OSError) as error:
        if full:
            raise
        print(f"scclr {name}: error: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nscclr {name}: interrupted; type the same command to go on from the last checkpoint", file=sys.stderr)
        return 130
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    finally:
        if not full:
            del os.environ["HYDRA_FULL_ERROR"]
    return 0


def train(argv: list[str]) -> None:
    """``scclr train``: check every point of the command line, then hand it to Hydra."""
    if "-h" in argv or "--help" in argv:
        print(train_help())
        return
    flags, overrides = split(argv)
    sweep = "-m" in flags or "--multirun" in flags
    if sweep and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from scclr.config import UserError

        raise UserError("a sweep cannot run inside torchrun: start torchrun once for each point")
    overrides = name_experiment(overrides)
    check_choices(overrides)
    sys.argv = ["scclr train", *flags, *overrides]
    if any(flag in SHOWS_ONLY for flag in flags):
        from scclr.train import main as job

        job()
        return
    points = check_points(overrides, sweep=sweep)

    from scclr.train import main as job

    if sweep:
        run_sweep(job, points, overrides)
    else:
        job()


def run_sweep(job: Callable[[], None], points: "list[tuple[str, TrainConfig]]", overrides: list[str]) -> None:
    """Run what is not done of the points, side by side if the launcher does so, and say what became of them.

    Raises:
        SystemExit: with code 1, if a point is not done.
    """
    from scclr.launch import environment
    from scclr.sweep import Point, before, cores, count, listed, remember
    from scclr.train import adopted

    configs = [(words, adopted(config, words.split())) for words, config in points]
    swept = [Point(config.directory, words) for words, config in configs]
    rest = sum(point.state != "done" or config.overwrite for point, (_, config) in zip(swept, configs, strict=True))
    at_once = beside(overrides, rest)
    print(before(swept, at_once=at_once), file=sys.stderr)
    if rest > 0:
        remember(swept)
        local = "hydra/launcher=submitit_slurm" not in overrides
        threads = {"OMP_NUM_THREADS": str(max(1, cores() // at_once))} if local and at_once > 1 else {}
        with environment(**({} if "OMP_NUM_THREADS" in os.environ else threads)):
            job()
    print("\n".join([count(swept), *listed(swept)]))
    if any(point.state != "done" for point in swept):
        raise SystemExit(1)


def beside(overrides: list[str], points: int) -> int:
    """How many of so many points Hydra's launcher runs at the same time."""
    given = dict(override.split("=", 1) for override in overrides if "=" in override)
    launcher = given.get("hydra/launcher", "basic")
    if launcher.startswith("submitit"):
        return max(1, points)
    if launcher != "joblib":
        return 1
    from scclr.sweep import cores

    jobs = int(given.get("hydra.launcher.n_jobs", "-1"))
    return max(1, min(points, jobs if jobs > 0 else cores() + 1 + jobs))


def sweep_status(argv: list[str]) -> None:
    """``scclr sweep-status DIR``: what became of the points of a sweep, also while it runs."""
    from pathlib import Path

    from scclr.config import UserError
    from scclr.sweep import status

    if "-h" in argv or "--help" in argv:
        print(STATUS_HELP)
        return
    if len(argv) != 1:
        raise UserError("type scclr sweep-status <folder of runs>, such as runs/default")
    print("\n".join(status(Path(argv[0]))))


def show(argv: list[str]) -> None:
    """``scclr show``: write the sheet of views that a run with these words would begin with."""
    from scclr.config import UserError, build

    if "-h" in argv or "--help" in argv:
        print(SHOW_HELP)
        return
    flags, overrides = split(argv)
    if flags:
        raise UserError(f"{flags[0]}: no such flag; `scclr show --help` says what it takes")
    overrides = name_experiment(overrides)
    check_choices(overrides)
    ((_, config),) = check_points(overrides, sweep=False)

    from scclr.show import sheet, write_sheet

    page = sheet(build("dataset", config.dataset).load(), build("augment", config.augment), seed=config.seed)
    config.directory.mkdir(parents=True, exist_ok=True)
    print(write_sheet(page, config.directory))


def split(argv: list[str]) -> tuple[list[str], list[str]]:
    """(flags with their values, overrides): Hydra wants flags first and overrides last."""
    flags: list[str] = []
    overrides: list[str] = []
    for i, word in enumerate(argv):
        value_of_flag = i > 0 and argv[i - 1] in (*TAKES_VALUE, "-sc", "--shell-completion", "--info", "-i")
        (flags if word.startswith("-") or (value_of_flag and not _is_override(word)) else overrides).append(word)
        if value_of_flag and _is_override(word) and argv[i - 1] in ("-sc", "--shell-completion"):
            flags.append(overrides.pop())
    return flags, overrides


def _is_override(word: str) -> bool:
    return "=" in word or word.startswith("~")


def groups() -> dict[str, list[str]]:
    """The choices of every configuration group."""
    from scclr.config import conf_dir

    return {
        folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
        for folder in sorted(conf_dir().iterdir())
        if folder.is_dir()
    }


def train_help() -> str:
    """``scclr train --help``."""
    from scclr.config import TrainConfig

    values = "\n".join(f"  {f.name:<15} {f.metadata['help']}" for f in fields(TrainConfig) if "help" in f.metadata)
    choices = "\n".join(f"  {name:<15} {', '.join(stems)}" for name, stems in groups().items() if stems)
    return (
        "usage: scclr train [-m] [group=choice ...] [key=value ...]\n\n"
        "Pretrain an encoder, then evaluate it frozen; with -m, once for every combination of values.\n\n"
        f"root values (key=value)\n{values}\n\n"
        f"groups (group=choice; group.key=value sets a value inside; experiment is +experiment=NAME)\n{choices}\n\n"
        f"{EXAMPLES}\n\n"
        "`scclr train --cfg job` prints the composed configuration; `scclr train --hydra-help` lists Hydra's own flags."
    )


def name_experiment(overrides: list[str]) -> list[str]:
    """Make ``experiment=NAME`` name the folder of runs.

    Hydra takes it for a choice of the group of presets, which shares the word; an option of another, in-memory group
    sets the value instead.
    """
    from hydra.core.config_store import ConfigStore

    from scclr.config import UserError

    renamed = []
    for override in overrides:
        key, _, value = override.partition("=")
        if key != "experiment":
            renamed.append(override)
            continue
        for name in value.split(","):
            if name in groups()["experiment"]:
                raise UserError(f"experiment={name}: to load this preset type +experiment={name}")
            if not re.fullmatch(r"[\w.-]+", name):
                raise UserError(f"experiment={name}: give a plain folder name")
            ConfigStore.instance().store(
                group="experiment_name", name=name, node={"experiment": name}, package="_global_"
            )
        renamed.append(f"+experiment_name={value}")
    return renamed


def check_choices(overrides: list[str]) -> None:
    """Refuse a group's choice that does not exist, with the ones that do."""
    from scclr.config import did_you_mean, require

    choices = groups()
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if key in choices and re.fullmatch(r"[\w.,-]+", value):
            for name in value.split(","):
                hint = did_you_mean(name, choices[key])
                listed = ", ".join(choices[key])
                require(name in choices[key], f"{key}={name}: no such {key}{hint} (choices: {listed})")


def check_points(overrides: list[str], *, sweep: bool) -> "list[tuple[str, TrainConfig]]":
    """Compose and check every point of the sweep before the first one runs: (words that only it has, configuration)."""
    import hydra
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from scclr.components import check
    from scclr.config import UserError, conf_dir, refuse_ignored, resolve

    points, configs = [overrides], []
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        try:
            if sweep:
                parsed = OverridesParser.create().parse_overrides(overrides)
                points = [list(point) for point in BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]]
            for point in points:
                config = resolve(hydra.compose("train", overrides=point))
                refuse_ignored(config, point)
                if config.overwrite or not (config.directory / "result.json").exists():
                    check(config)
                own = [word for word in point if not all(word in other for other in points)]
                configs.append((" ".join(own), config))
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(explain(error)) from error
    return configs


def explain(error: Exception) -> str:
    """One line for a command line that does not compose."""
    import hydra
    from omegaconf import OmegaConf

    from scclr.config import unknown_key

    lines = [line.strip() for line in str(error).strip().splitlines()]
    if "hydra/launcher" in lines[0]:
        return f"{lines[0]}: pip install 'scclr[sweep]' brings joblib, submitit_local and submitit_slurm"
    if unknown := re.match(r"Could not override '([^']*)'", lines[0]):
        return unknown_key(unknown[1], list(keys(OmegaConf.to_container(hydra.compose("train")))))
    if lines[0].startswith("Error merging override") and (cause := error.__cause__) is not None:
        return f"{lines[0].removeprefix('Error merging override ')}: {str(cause).strip().splitlines()[0]}"
    if word := re.match(r"Error parsing override '([^']*)'", lines[0]):
        return f"{word[1]}: write key=value, such as alpha=0.5 ({lines[1] if len(lines) > 1 else lines[0]})"
    return lines[0]


def keys(node: object, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a nested mapping."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield f"{prefix}{name}"
            yield from keys(value, f"{prefix}{name}.")


COMMANDS: dict[str, tuple[Command, str]] = {
    "train": (train, "pretrain an encoder and evaluate it frozen"),
    "sweep-status": (sweep_status, "done, running, failed, stopped and missing points of a sweep"),
    "show": (show, "draw the views that pretraining will see"),
}
