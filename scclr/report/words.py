"""The command line that makes a run, found from its configuration."""

import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from itertools import product
from typing import Any

import yaml

from scclr.config.compose import conf_dir, parse, plan
from scclr.config.errors import UserError
from scclr.config.resolve import ADOPTED, VOLATILE, leaves
from scclr.config.schema import COMPONENTS

UNTYPED = {*VOLATILE, "loss.alpha", "probe.protocols"}  # not typed, or typed in another way
BARE = re.compile(r"(?!(?:null|true|false|nan|inf)$)[A-Za-z_/.][\w./:@+-]*", re.IGNORECASE)  # text without quotes
Words = dict[str, str]  # a value as one types it, by key


def words_of(config: Mapping[str, Any]) -> Words | None:
    """The shortest words that compose a configuration, in the order of its keys; None if it does not compose.

    Of the choices of a group the one with the fewest other values is taken. Keys of other versions are left out, and so
    is what the folder of a run does not depend on, but for ``name``.
    """
    try:
        return dict(_words(config))
    except (UserError, KeyError, TypeError, AttributeError):  # another version, or a component that is gone
        return None


def _words(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    adopted = [key for key in ADOPTED if key != "augment" or "theory" not in config["stages"]]
    left_out = [] if "pretrain" in config["stages"] else adopted
    config = {key: value for key, value in config.items() if key not in left_out}
    choices, saved = dict(_choices(config)), leaves(config)
    base = _composed(tuple(f"{key}={value}" for key, value in choices.items()))
    yield from choices.items()
    if config.get("name", "default") != "default":
        yield "name", typed(config["name"])
    for key, value in saved.items():
        group = key.rpartition(".")[0]
        if key.partition(".")[0] in UNTYPED or key in UNTYPED or key in choices:
            continue
        if key in base and base[key] != value:
            yield key, typed(value)
        elif key not in base and (group in COMPONENTS or group.startswith("probe.protocols.")):
            yield f"+{key}", typed(value)  # an argument that the YAML of its component lacks


def _choices(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The choice of each group that is not the default one, and what that choice lacks."""
    default = _composed(())
    nodes = {group: config[group] for group in COMPONENTS if group in config}
    if config["probe"].get("dataset") is not None:
        nodes["probe.dataset"] = config["probe"]["dataset"]
    for key, node in nodes.items():
        usual = {name.removeprefix(f"{key}."): value for name, value in default.items() if name.startswith(f"{key}.")}
        distances = {stem: _distance(one, node) for stem, one in _choices_of(key.rpartition(".")[2]).items()}
        best = min(distances, key=lambda stem: (distances[stem], stem))
        if distances[best] < _distance(usual, node):
            yield key, best
            for name, value in _choices_of(key.rpartition(".")[2])[best].items():
                if value == "???":
                    yield f"{key}.{name}", typed(node[name])
    if isinstance(protocols := config["probe"].get("protocols"), Mapping):
        usual_protocols = {name.split(".")[2] for name in default if name.startswith("probe.protocols.")}
        if set(protocols) != usual_protocols:
            yield "probe.protocols", f"[{','.join(protocols)}]"


def _distance(node: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """How many values of two nodes differ; infinite for another component."""
    if node.get("_target_") != other.get("_target_"):
        return math.inf
    keys = {*node, *other} - {"alpha"}  # which follows the root value
    return sum(node.get(key, keys) != other.get(key, keys) for key in keys)


@cache
def _choices_of(group: str) -> dict[str, dict[str, Any]]:
    """The nodes of a group by choice, as its files have them: flat, with ``???`` where the user gives a value."""
    stems = [path.stem for path in (conf_dir() / group).glob("*.yaml")]
    return {stem: _node(group, stem) for stem in sorted(stems) if not stem.startswith("_")}


def _node(group: str, stem: str) -> dict[str, Any]:
    node = yaml.safe_load((conf_dir() / group / f"{stem}.yaml").read_text())
    start: dict[str, Any] = {}
    for name in node.pop("defaults", []):
        start |= {} if name == "_self_" else _node(group, name)
    return {**start, **node}


@cache
def _composed(words: tuple[str, ...]) -> dict[str, Any]:
    """The leaves of the configuration that words compose."""
    (point,) = plan(parse(list(words))).points
    return leaves(asdict(point.config))


def typed(value: object) -> str:
    """A value in Hydra's grammar."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{typed(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(typed, value))}]"
    text = str(value)
    quoted = "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return text if BARE.fullmatch(text) else quoted


def command(words: Words, seeds: Sequence[int] = ()) -> str:
    """The command line of words, with ``-m`` for several seeds."""
    swept = {**words, "seed": ",".join(map(str, seeds))} if seeds else words
    line = shlex.join(f"{key}={value}" for key, value in swept.items())
    return f"scclr train {'-m ' if len(seeds) > 1 else ''}{line}".rstrip()


def sweep(parts: Sequence[tuple[Words, Sequence[int]]]) -> str | None:
    """The one command that makes all configurations with all their seeds; None if they are no grid.

    Args:
        parts: the words of each configuration, without the seed, and its seeds.
    """
    known = list(dict.fromkeys(key for words, _ in parts for key in words))
    values = {key: list(dict.fromkeys(words.get(key, "") for words, _ in parts)) for key in known}
    same_seeds = len({tuple(sorted(seeds)) for _, seeds in parts}) == 1
    default = {key.lstrip("+"): typed(value) for key, value in _composed(()).items()}
    for key, found in values.items():
        if "" in found and key not in default:
            return None
        values[key] = [value or default[key] for value in found]
    points = {tuple(words.get(key) or default.get(key, "") for key in known) for words, _ in parts}
    if not same_seeds or points != set(product(*values.values())) or len(points) != len(parts):
        return None
    seeds = sorted(parts[0][1])
    swept = {key: ",".join(found) for key, found in values.items()} | {"seed": ",".join(map(str, seeds))}
    several = len(parts) > 1 or len(seeds) > 1
    return f"scclr train {'-m ' if several else ''}{shlex.join(f'{key}={value}' for key, value in swept.items())}"
