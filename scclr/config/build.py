"""Construction of a component from its node of the configuration: ``_target_`` plus keyword arguments.

The signature of the constructor is the schema: names, types and defaults are checked against it.
"""

import importlib
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import field, make_dataclass
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from scclr.config.errors import UserError, did_you_mean, one_line, require


def build(name: str, node: Mapping[str, Any], **given: Any) -> Any:
    """Construct ``node["_target_"]`` from the node's other keys and those of ``given`` that it takes.

    Args:
        name: the configuration group, for messages, such as ``"loss"``.
        node: ``_target_`` and keyword arguments.
        given: arguments that the program supplies, such as the number of channels. The node cannot set them.

    Raises:
        UserError: as ``typed_arguments``; a missing argument; a value that the constructor refuses with ``ValueError``.
    """
    component = find_component(name, node)
    arguments = typed_arguments(name, node, *given)
    parameters = inspect.signature(component).parameters
    for key, parameter in parameters.items():
        missing = key not in arguments and key not in given and parameter.default is inspect.Parameter.empty
        require(not missing, f"{name}.{key} is missing: {component.__name__} needs it")
    try:
        return component(**arguments, **{key: value for key, value in given.items() if key in parameters})
    except ValueError as error:
        raise UserError(f"{name}: {one_line(error)}") from error


def find_component(name: str, node: Mapping[str, Any]) -> Callable[..., Any]:
    """The class or function that ``node["_target_"]`` names.

    Raises:
        UserError: it does not exist, or lies outside ``scclr``: a configuration that travelled inside a checkpoint must
            not run other code.
    """
    target = str(node.get("_target_", ""))
    require(target.startswith("scclr."), f"{name}._target_={target}: only components of scclr can be built")
    module, _, attribute = target.rpartition(".")
    try:
        component: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{name}._target_={target}: no such component ({error})") from error
    return component


def typed_arguments(name: str, node: Mapping[str, Any], *given: str) -> dict[str, Any]:
    """The node's keyword arguments, converted to the types of the constructor's annotations.

    Raises:
        UserError: as ``find_component``; an argument that the constructor does not take, that the program supplies
            (``given``), or that has another type.
    """
    component = find_component(name, node)
    parameters = [key for key in inspect.signature(component).parameters if key not in given]
    arguments = {str(key): value for key, value in node.items() if key != "_target_"}
    for key in arguments:
        takes = ", ".join(parameters) or "no arguments"
        require(key in parameters, f"{name}.{key}: {component.__name__} takes {takes}{did_you_mean(key, parameters)}")
    hints = typing.get_type_hints(component.__init__ if inspect.isclass(component) else component)
    schema = make_dataclass(component.__name__, [(key, hints[key], field(default=MISSING)) for key in arguments])
    try:
        typed = OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.create(arguments)))
    except OmegaConfBaseException as error:
        raise UserError(f"{name}.{error.full_key or error.key}: {one_line(error)}") from error
    assert isinstance(typed, dict)
    return {str(key): value for key, value in typed.items()}


def argument_defaults(name: str, node: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's own defaults, by argument."""
    parameters = inspect.signature(find_component(name, node)).parameters
    return {key: p.default for key, p in parameters.items() if p.default is not inspect.Parameter.empty}
