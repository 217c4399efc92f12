"""Construction of a component from its node of the configuration: ``_target_`` plus keyword arguments.

The signature of the constructor is the schema: names, types and defaults are checked against it. A target may lie
anywhere on Python's path. Where a configuration comes from elsewhere, ``resolve.adopt`` asks for trust first.
"""

import importlib
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from scclr.config.errors import UserError, did_you_mean, one_line, require

OWN = {
    "dataset": "scclr.datasets",
    "augment": "scclr.augment",
    "encoder": "scclr.encoders",
    "loss": "scclr.losses",
    "optimizer": "scclr.pretrain.optim",
    "protocol": "scclr.evaluate",
}  # where scclr's components of each group lie
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
LISTS: dict[Any, str] = {int: "[1, 2]", float: "[0.1, 0.5]", str: "[a, b]"}
SEARCHED = "modules are found from the current folder and on PYTHONPATH"


def build(name: str, node: Mapping[str, Any], **given: Any) -> Any:
    """Construct ``node["_target_"]`` from the node's other keys and those of ``given`` that it takes.

    Args:
        name: the configuration group, such as ``"loss"``, or the key of one of several components of a group, such as
            ``"probe.protocols.knn"``. Messages begin with it.
        node: ``_target_`` and keyword arguments.
        given: arguments that the program supplies, such as the number of channels. The node cannot set them.

    Raises:
        UserError: as ``typed_arguments``; a missing argument; a value that the constructor refuses with ``ValueError``.
    """
    component = find_component(name, node)
    arguments = typed_arguments(name, node, *given)
    named = _named_parameters(component)
    for key, parameter in named.items():
        missing = key not in arguments and key not in given and parameter.default is inspect.Parameter.empty
        require(not missing, f"{name}.{key} is missing: {component.__name__} needs it")
    try:
        return component(**arguments, **{key: value for key, value in given.items() if key in named})
    except ValueError as error:
        raise UserError(f"{name}: {one_line(error)}") from error


def group_of(name: str) -> str:
    """The configuration group of the component at a key, as of ``loss``, ``probe.dataset``, ``probe.protocols.knn``."""
    inside = {"probe.protocols": "protocol", "probe.transfer": "dataset"}
    parent, _, own = name.rpartition(".")
    return inside.get(parent, own)


def is_own(name: str, node: Mapping[str, Any]) -> bool:
    """Whether ``node["_target_"]`` is one of scclr's components of the group of ``name``."""
    target = str(node.get("_target_", ""))
    return f"{target}.".startswith(f"{OWN[group_of(name)]}.")


def find_component(name: str, node: Mapping[str, Any]) -> Callable[..., Any]:
    """The class or function that ``node["_target_"]`` names. Its module is imported, which runs the module's code.

    Raises:
        UserError: it does not exist, or is a part of scclr that is no component of this group.
    """
    target = str(node.get("_target_", ""))
    module_name, _, attribute = target.rpartition(".")
    word, own = f"{name}._target_={target}", is_own(name, node)
    foreign = not f"{target}.".startswith("scclr.")
    require(own or foreign, f"{word}: no component of this group; those of scclr lie in {OWN[group_of(name)]}")
    require(module_name != "", f"{word}: give module.Class, such as my_losses.MyLoss")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"{word}: {one_line(error)}" + (f"; {SEARCHED}" if foreign else "")) from error
    except SyntaxError as error:
        raise UserError(f"{word}: {error.filename}, line {error.lineno}: {error.msg}") from error
    component = getattr(module, attribute, None)
    known = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module_name]
    found = callable(component) and (foreign or attribute in known)
    require(found, f"{word}: {module_name} has no {attribute}{did_you_mean(attribute, known)}")
    try:
        inspect.signature(typing.cast(Callable[..., Any], component))
    except ValueError as error:  # some functions that are built into Python
        raise UserError(f"{word}: its arguments are not known; give a class or a function written in Python") from error
    return typing.cast(Callable[..., Any], component)


def source_file(name: str, node: Mapping[str, Any]) -> Path | None:
    """The Python file of a component that is not scclr's own; None for one of scclr, or if it has no such file."""
    if is_own(name, node):
        return None
    component = inspect.unwrap(find_component(name, node))
    try:
        file = inspect.getsourcefile(component)
    except TypeError:  # it is built into Python, or into an extension module
        return None
    return None if file is None else Path(file)


def typed_arguments(name: str, node: Mapping[str, Any], *given: str) -> dict[str, Any]:
    """The node's keyword arguments, converted to the types of the constructor's annotations.

    Raises:
        UserError: as ``find_component``; an argument that the constructor does not take, that the program supplies
            (``given``), or that has another type.
    """
    component = find_component(name, node)
    named = _named_parameters(component)
    parameters = [key for key in named if key not in given]
    arguments = {str(key): value for key, value in node.items() if key != "_target_"}
    for key in arguments:
        takes = ", ".join(parameters) or "no arguments"
        known = key in parameters or (_takes_any(component) and key not in named)
        require(known, f"{name}.{key}: {component.__name__} takes {takes}{did_you_mean(key, parameters)}")
    hints = _type_hints(component)
    return {key: _typed(f"{name}.{key}", value, hints.get(key, Any)) for key, value in arguments.items()}


def _typed(name: str, value: Any, hint: Any) -> Any:
    schema = make_dataclass("Argument", [("value", hint, field(default=MISSING))])
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.create({"value": value}))
        typed = typing.cast(dict[str, Any], OmegaConf.to_container(merged))["value"]
    except OmegaConfBaseException as error:
        raise UserError(f"{name}={value}: give {in_words(hint)}") from error
    flat = any(example in in_words(hint) for example in LISTS.values())
    nested = isinstance(typed, list) and any(isinstance(item, list | dict) for item in typed)
    number = hint is bool and not isinstance(value, bool)
    # OmegaConf takes [[1]] as list[int], and 2 as true.
    require(not (flat and nested) and not number, f"{name}={value}: give {in_words(hint)}")
    return typed


def in_words(hint: Any) -> str:
    """The values of a type, such as ``a whole number or null``."""
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is list:
        return f"a list such as {LISTS.get(inner[0], '[{}, {}]')}"
    if typing.get_origin(hint) is dict:
        return "keys and values such as {a: 1}"
    return " or ".join(map(in_words, inner)) if inner else WORDS.get(hint, "another value")


def argument_defaults(name: str, node: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's own defaults, by argument."""
    parameters = _named_parameters(find_component(name, node))
    return {key: p.default for key, p in parameters.items() if p.default is not inspect.Parameter.empty}


def _named_parameters(component: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {key: p for key, p in inspect.signature(component).parameters.items() if p.kind not in variable}


def _takes_any(component: Callable[..., Any]) -> bool:
    kinds = [parameter.kind for parameter in inspect.signature(component).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds


def _type_hints(component: Callable[..., Any]) -> dict[str, Any]:
    """The annotations that OmegaConf can check; ``Any`` for others, such as ``Sequence[int]``."""
    try:
        hints = typing.get_type_hints(component.__init__ if inspect.isclass(component) else component)
    except NameError:  # a name that is imported for type checkers only
        return {}
    return {key: hint if _is_checkable(hint) else Any for key, hint in hints.items()}


def _is_checkable(hint: Any) -> bool:
    try:
        OmegaConf.structured(make_dataclass("Checked", [("value", hint, field(default=MISSING))]))
    except OmegaConfBaseException:
        return False
    return True
