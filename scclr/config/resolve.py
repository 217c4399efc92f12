"""From composed YAML to a checked ``TrainConfig``, and from that to the identity of a run.

A run is its configuration and its data: the same configuration on the same data has the same run folder.
"""

import hashlib
import inspect
import json
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING as NO_DEFAULT
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from scclr.config.build import argument_defaults, find_component, group_of, is_own, source_file, typed_arguments
from scclr.config.errors import UserError, one_line, require
from scclr.config.schema import COMPONENTS, TrainConfig
from scclr.config.words import dotted, root_key, unknown_key

# What a run without pretraining takes from the checkpoint that it evaluates. The theory may use another augmentation.
ADOPTED = (
    *("alpha", "alpha_schedule", "alpha_end", "seed"),
    *("augment", "encoder", "projector", "loss", "optimizer", "pretrain"),
)
# What may differ between two attempts at the same run: the machine, where files lie, and who watches.
VOLATILE = ("device", "nproc", "deterministic", "runs", "name", "overwrite", "trust", "checkpoint", "tracking")
VOLATILE_DATASET = ("root", "workers")
SUPPLIED = {"encoder": ("in_channels", "image_size"), "loss": ("classes",), "optimizer": ("model", "batch_size")}
SECTIONS: list[tuple[str, typing.Any]] = [("", TrainConfig)]
SECTIONS += [(f"{field.name}.", field.type) for field in fields(TrainConfig) if is_dataclass(field.type)]
SWITCHES = {f"{prefix}{field.name}" for prefix, kind in SECTIONS for field in fields(kind) if "bool" in str(field.type)}
PAPER_ALPHA = 0.5  # alpha=null: the plain sum A + R, which is the loss of its paper


@dataclass(frozen=True)
class RunIdentity:
    """Where a run lives, and which runs differ from it in the seed alone."""

    directory: Path  # <runs>/<name>/<loss>-alpha<alpha>-seed<seed>-<hash>
    group: str  # the name that all seeds of a configuration share


def resolve(config: DictConfig, name: str | None = None, overrides: Iterable[str] = ()) -> TrainConfig:
    """The composed YAML as a typed and checked ``TrainConfig``.

    Args:
        name: the folder inside ``runs``, unless the configuration names one.
        overrides: of the command line. Where one of them sets the ``_target_`` of a component, the arguments of the
            YAML that the new target does not take are dropped.

    Raises:
        UserError: a key that nobody reads, a missing value or one of another type, a value out of range, or an
            ``alpha`` that the loss would ignore.
    """
    _refuse_unknown(config, TrainConfig, "")
    typed_keys = [dotted(override) for override in overrides]
    for override in overrides:
        number = re.fullmatch(r"[-\d.]+", override.partition("=")[2]) is not None  # OmegaConf takes 2 for true
        require(not (number and dotted(override) in SWITCHES), f"{override}: give true or false")
    try:
        for group in (group for group in COMPONENTS if f"{group}._target_" in typed_keys):
            _drop_not_taken(group, config[group], typed_keys)
        filled: dict[str, object] = {"name": name or "default"} if config.name is None else {}
        filled |= {"alpha": PAPER_ALPHA} if config.alpha is None and "alpha" in config.loss else {}
        typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TrainConfig), config, filled))
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key} is missing: type {error.full_key}=...") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key or error.key}: {one_line(error)}") from error
    assert isinstance(typed, TrainConfig)
    return typed


def _drop_not_taken(group: str, node: DictConfig, typed_keys: Iterable[str]) -> None:
    parameters = inspect.signature(find_component(group, node)).parameters
    kept = ("_target_", *parameters, *(key.removeprefix(f"{group}.") for key in typed_keys))
    with open_dict(node):
        for key in [key for key in node if key not in kept]:
            del node[key]


def identify(config: TrainConfig, data: str) -> RunIdentity:
    """The folder and the group of a run.

    The hash covers what the run computes: every value of the configuration but the volatile ones (the machine, paths,
    tracking), the data, the contents of ``init_from``, and the files of components that are not scclr's own. Values
    that equal a default of the schema or of a constructor are left out, so that a key which is added with a default
    changes no hash.

    Args:
        data: what identifies the dataset's files (``Source.digest``).
    """
    plain = {**essence(asdict(config)), "data": data}
    if config.init_from is not None:
        plain["init_from"] = hashlib.sha256(checkpoint_path(config.init_from).read_bytes()).hexdigest()
    if files := sources(config):
        plain["sources"] = {group: hashlib.sha256(path.read_bytes()).hexdigest() for group, path in files.items()}
    balance = "" if config.alpha is None else f"-alpha{config.alpha:g}"
    title = f"{config.loss_name}{balance}" + ("" if config.alpha_end is None else f"to{config.alpha_end:g}")
    group = _hash8({key: value for key, value in plain.items() if key != "seed"})
    directory = Path(config.runs) / (config.name or "default") / f"{title}-seed{config.seed}-{_hash8(plain)}"
    return RunIdentity(directory, f"{title}-{group}")


def sources(config: TrainConfig) -> dict[str, Path]:
    """The Python files of the components that are not scclr's own, by configuration group."""
    nodes = [(key, node) for key, node in components(asdict(config)) if key in COMPONENTS or "protocols" in key]
    files = {key: source_file(key, node) for key, node in nodes}
    names = {key: key.replace("probe.protocols.", "protocol_") for key in files}
    return {names[key]: path for key, path in files.items() if path is not None}


def essence(plain: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration, as nested plain values, that says what a run computes. See ``identify``."""
    kept = {key: value for key, value in plain.items() if key not in VOLATILE}
    found = _without_defaults(kept, TrainConfig)
    if found.get("pretrain", {}).get("compile") == "auto":
        found["pretrain"]["compile"] = False  # the device chooses, and a device does not make another run
    for key, node in components(kept):
        *outer, name = key.split(".")
        part = found
        for step in outer:
            part[step] = dict(part.get(step, {}))
            part = part[step]
        part[name] = _component_essence(key, node)
    return found


def _component_essence(key: str, node: Mapping[str, Any]) -> dict[str, Any]:
    defaults, typed = argument_defaults(key, node), typed_arguments(key, node, *SUPPLIED.get(key, ()))
    found = {key: value for key, value in typed.items() if key not in defaults or defaults[key] != value}
    if group_of(key) == "dataset":
        found = {key: value for key, value in found.items() if key not in VOLATILE_DATASET}
        found |= {"cache": True} if "cache" in found else {}  # crops are then cut from its squares, wherever they lie
    return {"_target_": node["_target_"], **found}


def _without_defaults(plain: Mapping[str, Any], schema: type) -> dict[str, Any]:
    known = {field.name: field for field in fields(schema)}
    found = {}
    for key, value in plain.items():
        nested = known[key].type if key in known else None  # another version may have had other keys
        if is_dataclass(nested):
            found[key] = _without_defaults(value, typing.cast(type, nested))
        elif key not in known or _default(known[key]) != value:
            found[key] = value
    return found


def _default(field: "Field[Any]") -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return object() if field.default in (MISSING, NO_DEFAULT) else field.default


def _hash8(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:8]


def adopt(config: TrainConfig, saved: Mapping[str, Any], typed: Iterable[str] = ()) -> TrainConfig:
    """``config`` with what defines the encoder taken from ``saved``, the configuration inside a checkpoint.

    Args:
        typed: overrides of the command line. If the theory is a stage, its overrides of ``augment`` stay.

    Raises:
        UserError: as ``restore``.
    """
    taken = {key: saved[key] for key in ADOPTED if key in saved}
    if "theory" in config.stages and "augment" in taken:
        words = [dotted(override) for override in typed if root_key(override) == "augment"]
        changed = [word.split(".")[1] for word in words if "." in word]
        other = {key: value for key, value in config.augment.items() if key in changed}
        taken["augment"] = config.augment if "augment" in words else {**taken["augment"], **other}
    return restore({**asdict(config), **taken}, f"init_from={config.init_from}", config.trust, groups=taken)


def restore(
    saved: Mapping[str, Any],
    source: str,
    trust: Iterable[str] = (),
    groups: Iterable[str] | None = None,
) -> TrainConfig:
    """A configuration that was saved with a run, checked. Nothing in it may run code or read the environment.

    Args:
        source: where it comes from, for messages.
        trust: packages outside scclr whose code its components may be.
        groups: the parts of ``saved`` that come from there; None if all do.

    Raises:
        UserError: it is no configuration of this version, holds an interpolation, or names a component that is neither
            scclr's own nor in a trusted package.
    """
    require(not _interpolates(saved), f"{source}: its configuration holds an interpolation (${{)")
    for group, node in components(saved):
        if (groups is not None and group not in groups) or is_own(group, node):
            continue
        target = str(node.get("_target_", ""))
        package = target.split(".")[0]
        trusted = any(f"{target}.".startswith(f"{name}.") for name in trust)
        code = f"its {group} is {target}, and to build that is to run code that this checkpoint chooses"
        require(trusted, f"{source}: {code}; if you trust both, type trust=[{package}]")
    try:
        return resolve(OmegaConf.create(_with_protocols(saved)))
    except UserError as error:
        raise UserError(f"{source}: another version of scclr wrote it ({error})") from error


def _with_protocols(saved: Mapping[str, Any]) -> dict[str, Any]:
    """``saved``, where the older form of ``probe``, with the options of its two protocols in itself, is replaced."""
    probe = dict(saved["probe"])
    if not probe.keys() >= {"l2", "max_iter", "knn_k", "knn_temperature"}:
        return dict(saved)
    logreg = {"_target_": "scclr.evaluate.logreg.LogReg"} | {key: probe.pop(key) for key in ("l2", "max_iter")}
    voting = {key: probe.pop(key) for key in ("knn_k", "knn_temperature")}
    knn = {"_target_": "scclr.evaluate.knn.Knn"} | {key[4:]: [value] for key, value in voting.items()}
    protocols = {"logreg": logreg, "knn": knn}
    return {**saved, "probe": {**probe, "protocols": protocols}, "pretrain": {**saved["pretrain"], **voting}}


def components(saved: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The nodes of a configuration that name code, by their keys."""
    nodes: list[tuple[str, Any]] = [(group, saved[group]) for group in COMPONENTS]
    if (other := saved["probe"].get("dataset")) is not None:
        nodes.append(("probe.dataset", other))
    for group in ("protocols", "transfer"):
        if isinstance(found := saved["probe"].get(group), Mapping):
            nodes += [(f"probe.{group}.{name}", node) for name, node in found.items()]
    return [(key, node if isinstance(node, Mapping) else {}) for key, node in nodes]


def _interpolates(node: object) -> bool:
    if isinstance(node, Mapping):
        return any(_interpolates(value) for value in node.values())
    if isinstance(node, list | tuple):
        return any(_interpolates(value) for value in node)
    return isinstance(node, str) and "${" in node


def refuse_other(config: TrainConfig, saved: Mapping[str, Any], directory: Path) -> None:
    """Raise ``UserError`` if ``saved``, the configuration in the run folder, is of another run than ``config``."""
    plain = asdict(config)
    targets = [
        {f"{group}._target_": part.get("_target_") for group, part in components(node)} for node in (plain, saved)
    ]
    if targets[0] != targets[1]:  # what a saved target names is not even looked up
        here, there = targets
    else:
        here, there = ({**leaves(essence(node)), "init_from": None} for node in (plain, saved))
    others = [key for key in sorted({*here, *there}) if here.get(key) != there.get(key)]
    shown = ", ".join(f"{key}={there.get(key)} there, {here.get(key)} here" for key in others)
    advice = "type name=<another folder>, or overwrite=true to discard what is there"
    require(not others, f"{directory} holds another run ({shown}): {advice}")


def leaves(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a nested configuration by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in node.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def refuse_ignored(config: TrainConfig, overrides: Iterable[str]) -> None:
    """Raise ``UserError`` for an override that a run without pretraining would ignore, since its checkpoint decides."""
    if "pretrain" not in config.stages:
        stages = f"stages=[{','.join(config.stages)}]"
        for override in overrides:
            key = root_key(override)
            read = key not in ADOPTED or (key == "augment" and "theory" in config.stages)
            require(read, f"{override}: {stages} takes {key} from init_from; drop it")


def _refuse_unknown(config: DictConfig, schema: type, prefix: str) -> None:
    """OmegaConf accepts ``+typo=1`` beside a schema, but nothing would read it."""
    known = {field.name: field.type for field in fields(schema)}
    for key in map(str, config):
        require(key in known, f"{prefix}{unknown_key(key, known)}")
        if is_dataclass(nested := known[key]) and isinstance(value := config[key], DictConfig):
            _refuse_unknown(value, typing.cast(type, nested), f"{prefix}{key}.")


def checkpoint_path(source: str | Path) -> Path:
    """The checkpoint file that a run folder or a file name means.

    Raises:
        UserError: nothing is there.
    """
    path = Path(source)
    if path.is_dir():
        require((path / "last.pt").is_file(), f"{path}: no last.pt in this folder; give a run folder or a checkpoint")
        return path / "last.pt"
    require(path.is_file(), f"{path}: no such file or folder; give a run folder or a checkpoint")
    return path
