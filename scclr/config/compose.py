"""The command line of ``scclr train``, composed by Hydra.

Everything that depends on the inside of Hydra is in this file, so hydra-core is pinned to 1.3. Hydra has no public way
to parse its flags, to list the points of a sweep before the first one runs, or to say in one line what is wrong with an
override. Importing this file takes Hydra but not torch.
"""

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from scclr.config.errors import UserError, did_you_mean, one_line, require
from scclr.config.resolve import resolve
from scclr.config.schema import COMPONENTS, TrainConfig
from scclr.config.words import dotted, for_hydra, root_key, short_float, take_joblib, unknown_key

CONFIG = "train"  # conf/train.yaml
BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
SWEEP_EXTRA = "pip install 'scclr[sweep]' brings submitit_local and submitit_slurm"

ConfigStore.instance().store(name="schema", node=TrainConfig)


@dataclass(frozen=True)
class CommandLine:
    """``scclr train`` [flags] [overrides], told apart as Hydra does it."""

    flags: list[str]  # with their values, as Hydra takes them: before the overrides
    overrides: list[str]
    sweep: bool  # -m
    shows_only: bool  # --cfg, --info and the like: nothing is run
    config_dir: str | None
    config_path: str | None
    config_name: str

    @property
    def argv(self) -> list[str]:
        """The words for Hydra."""
        return [*self.flags, *self.overrides]


@dataclass(frozen=True)
class Point:
    """One run of a command line: one combination of the values of a sweep, or the only one."""

    words: str  # the overrides that the other points do not have
    overrides: list[str]
    config: TrainConfig


@dataclass(frozen=True)
class Plan:
    """What a command line asks for: its points, and how Hydra is to launch them."""

    points: list[Point]  # of another sweeper than Hydra's basic one, only what its points have in common
    enumerated: bool  # whether the points are known before the first one runs
    launcher: str  # the choice of hydra/launcher
    jobs: int  # hydra.launcher.n_jobs of joblib; -1 is one for each core, or for each GPU
    runs_here: bool  # scclr runs the points itself, not a launcher of Hydra's
    params: list[str]  # the axes of the preset's own sweep, which needs -m


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `scclr train --help` says more")


def conf_dir() -> Path:
    """The folder of YAML files: inside an installed package, or beside it in a source tree."""
    inside = Path(__file__).parents[1] / "conf"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "conf"


def parse(argv: Sequence[str]) -> CommandLine:
    """Tell flags from overrides, in any order.

    Raises:
        UserError: a flag that Hydra does not have, or one without its value.
    """
    parser = _Parser(add_help=False, allow_abbrev=False, parents=[get_args_parser()], conflict_handler="resolve")
    args = parser.parse_intermixed_args(list(argv))
    require(args.experimental_rerun is None, "--experimental-rerun: type the same command to go on with a run")
    require(not args.resolve or args.cfg is not None, "--resolve goes with --cfg job")
    switches = ("hydra_help", "resolve", "run", "multirun", "shell_completion")
    flags = [f"--{name.replace('_', '-')}" for name in switches if getattr(args, name)]
    for name in ("cfg", "package", "config_path", "config_name", "config_dir", "info"):
        value = getattr(args, name)
        flags += [] if value is None else [f"--{name.replace('_', '-')}", value]
    shows_only = bool(args.cfg or args.info or args.hydra_help or args.shell_completion)
    overrides = [word for override in args.overrides for word in for_hydra(override)]
    return CommandLine(
        flags, overrides, args.multirun, shows_only, args.config_dir, args.config_path, args.config_name or CONFIG
    )


@contextmanager
def composer(command: CommandLine) -> Iterator[Hydra]:
    """Hydra, with the folders of configuration that the flags name."""
    path = str(conf_dir()) if command.config_path is None else str(Path(command.config_path).resolve())
    require(Path(path).is_dir(), f"--config-path {command.config_path}: no such folder")
    search = create_config_search_path(path)
    if command.config_dir is not None:
        folder = Path(command.config_dir).resolve()
        require(folder.is_dir(), f"--config-dir {command.config_dir}: no such folder")
        assert isinstance(search, ConfigSearchPathImpl)
        search.prepend("command-line", f"file://{folder}", SearchPathQuery(provider="schema"))
    older = GlobalHydra.instance().hydra  # of a program that calls ``scclr.train``
    GlobalHydra.instance().clear()
    try:
        yield Hydra.create_main_hydra2("scclr", search)
    finally:
        GlobalHydra.instance().hydra = older


def plan(command: CommandLine) -> Plan:
    """Compose every point of a command line.

    Raises:
        UserError: the first thing that is wrong with it, with what to type instead.
    """
    with composer(command) as hydra:
        try:
            return _plan(command, hydra)
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise UserError(_explain(error, hydra, command)) from error


def _plan(command: CommandLine, hydra: Hydra) -> Plan:
    parser = OverridesParser.create(config_loader=hydra.config_loader)
    jobs, words = take_joblib(command.overrides)
    overrides = [_parse_override(parser, word) for word in words]
    _refuse_unknown_choices(hydra, command, overrides)
    for override in overrides if not command.sweep else []:
        mended = "put them in brackets" if override.key_or_group == "protocol" else "quote them"
        advice = f"several values make a sweep: add -m, or {mended}"
        require(not override.is_sweep_override(), f"{override.input_line}: {advice}")
    fixed = [str(override.input_line) for override in overrides if not override.is_sweep_override()]
    base = hydra.compose_config(command.config_name, fixed, RunMode.RUN, from_shell=False)
    settings = base.hydra
    launcher = "joblib" if jobs is not None else settings.runtime.choices.get("hydra/launcher") or "basic"
    basic_sweeper = settings.sweeper._target_ == BASIC_SWEEPER
    runs_here = basic_sweeper and launcher in ("basic", "joblib") and not settings.callbacks
    params = _params(settings, overrides)
    if not (command.sweep and basic_sweeper):
        composed = [Point("", fixed, resolve_job(base, settings.runtime.choices, fixed))]
    else:
        overrides = [*(_parse_override(parser, word) for word in params), *overrides]
        found = BasicSweeper.split_arguments(overrides, max_batch_size=None)[0]
        points = [[short_float(word) for word in point] for point in found]
        require(len(points) > 0, "this sweep has no points: a glob in it matches nothing")
        shared, composed = set.intersection(*map(set, points)), []
        for point in points:
            own = " ".join(word for word in point if word not in shared)
            config = hydra.compose_config(command.config_name, point, RunMode.RUN, from_shell=False)
            other = _params(config.hydra, overrides)
            require(not other, f"{own}: a sweep over {' '.join(other)}; type one such preset at a time")
            resolved = resolve_job(config, config.hydra.runtime.choices, point)
            composed.append(Point(own.replace("'", ""), point, resolved))
    return Plan(composed, basic_sweeper, launcher, -1 if jobs is None else jobs, runs_here, params)


def _params(settings: DictConfig, typed: Sequence[Override]) -> list[str]:
    """The axes that ``hydra.sweeper.params`` has besides those that are typed."""
    keys = {override.key_or_group for override in typed}
    return [f"{key}={value}" for key, value in (settings.sweeper.get("params") or {}).items() if key not in keys]


def _parse_override(parser: OverridesParser, word: str) -> Override:
    try:
        return parser.parse_overrides([word])[0]
    except HydraException as error:
        advice = "write key=value, such as alpha=0.5, and special characters in quotes, as in \"key='a b'\""
        detail = str(error.__cause__ or error).strip().splitlines()[0]
        raise UserError(f"{word}: {advice} ({detail})") from error


def resolve_job(config: DictConfig, choices: Mapping[str, Any], overrides: Sequence[str]) -> TrainConfig:
    """``resolve``, with the folder named by the experiment and its size unless ``name`` is given."""
    with open_dict(config):
        config.pop("hydra", None)
    named = [choices[group] for group in ("experiment", "size") if choices.get(group) is not None]
    return resolve(config, "-".join(named), overrides)


def groups(command: CommandLine) -> dict[str, list[str]]:
    """The choices of every configuration group, also those of the user's own folders."""
    with composer(command) as hydra:
        names = _options(hydra, command, "", ObjectType.GROUP)
        return {name: _options(hydra, command, name, ObjectType.CONFIG) for name in names if name != "hydra"}


def _options(hydra: Hydra, command: CommandLine, group: str, kind: ObjectType) -> list[str]:
    paths = [word for word in command.overrides if "hydra.searchpath=" in word]
    found = hydra.config_loader.get_group_options(group, kind, command.config_name, paths)
    return sorted(name for name in found if not name.startswith("_"))


def _refuse_unknown_choices(hydra: Hydra, command: CommandLine, overrides: list[Override]) -> None:
    groups = _options(hydra, command, "", ObjectType.GROUP) if overrides else []
    for override in overrides:
        key = override.key_or_group
        if key not in groups or override.is_delete():
            continue
        choices = _options(hydra, command, key, ObjectType.CONFIG)
        require(not (key == "experiment" and override.is_add()), f"{override.input_line}: type it without the plus")
        if override.is_sweep_override():
            values = list(override.sweep_string_iterator()) if override.is_discrete_sweep() else []
        else:
            value = override.value()
            values = list(value) if isinstance(value, list) else ["null" if value is None else str(value)]
        names = (name for value in values for name in str(value).strip("[]").split(","))  # [a,b] is a value of a sweep
        for value in (name.strip("'\"") for name in names if name):
            message = f"{key}={value}: no such {key}{did_you_mean(value, choices)} (choices: {', '.join(choices)})"
            advice = "; to name the folder of the run, type name=..." if key == "experiment" else ""
            require(value in ("null", *choices), message + advice)


def _explain(error: Exception, hydra: Hydra, command: CommandLine) -> str:
    """One line for what Hydra says about a command line, in prose of several lines."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    if "hydra/launcher" in lines[0] or "hydra/sweeper" in lines[0]:
        return f"{lines[0]}: {SWEEP_EXTRA}"
    if unknown := re.match(r"Could not override '([^']*)'", lines[0]):
        return _unknown_key(unknown[1], hydra, command)
    if lines[0].startswith("Error merging override") and (cause := error.__cause__) is not None:
        return f"{lines[0].removeprefix('Error merging override ')}: {one_line(cause)}"
    return lines[0]


def _unknown_key(key: str, hydra: Hydra, command: CommandLine) -> str:
    group = root_key(key)
    if any(dotted(override) == f"{group}._target_" for override in command.overrides):
        return f"{key}: not in the YAML of {group}; type +{key}=... for an argument that {group}._target_ takes"
    choices = [word for word in command.overrides if re.fullmatch(r"[a-z]+=\w+", word) and root_key(word) in COMPONENTS]
    lists = r"protocol=\[?[\w, ]+\]?|\+dataset@probe\.[\w.]+=\w+"
    choices += [word for word in command.overrides if re.fullmatch(lists, word)]
    known = _known_keys(hydra, command, choices)
    found = re.match(r"probe\.(protocols|transfer)\.(\w+)", key)
    group = "protocol" if found and found[1] == "protocols" else "dataset"
    if found and found[0] not in known and found[2] in _options(hydra, command, group, ObjectType.CONFIG):
        chosen = [name.split(".")[2] for name in known if re.fullmatch(rf"probe\.{found[1]}\.\w+", name)]
        return f"{key}: {found[2]} is not chosen; type probe.{found[1]}=[{','.join([*chosen, found[2]])}]"
    return unknown_key(key, [*known, *_options(hydra, command, "", ObjectType.GROUP)])


def _known_keys(hydra: Hydra, command: CommandLine, choices: list[str]) -> list[str]:
    """Every dotted key that the defaults and the components of ``choices`` have."""
    config = hydra.compose_config(command.config_name, choices, RunMode.RUN, from_shell=False)
    with open_dict(config):
        config.pop("hydra")
    return list(_dotted_keys(OmegaConf.to_container(config)))


def _dotted_keys(node: object, prefix: str = "") -> Iterator[str]:
    if isinstance(node, dict):
        for name, value in node.items():
            yield f"{prefix}{name}"
            yield from _dotted_keys(value, f"{prefix}{name}.")


def described_keys(schema: type = TrainConfig, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, what its value does) of every key of the schema."""
    for field in fields(schema):
        if "help" in field.metadata:
            yield f"{prefix}{field.name}", field.metadata["help"]
        elif is_dataclass(nested := field.type):
            yield from described_keys(nested, f"{prefix}{field.name}.")  # type: ignore[arg-type]
