"""Errors that the user can mend, and the checks that raise them. Nothing here imports torch or Hydra."""

import difflib
import math
from collections.abc import Iterable
from importlib import import_module
from typing import Any


class UserError(Exception):
    """The user typed or pointed at something wrong. The message is one line: what is wrong, what to type instead."""


def require(condition: bool, message: str) -> None:
    """Raise ``UserError(message)`` unless ``condition``."""
    if not condition:
        raise UserError(message)


def require_range(group: str, config: object, **ranges: tuple[float, float]) -> None:
    """Raise ``UserError`` for the first attribute of ``config`` outside its (least, greatest) value.

    Args:
        group: the configuration group, for the message; empty for a root value.
    """
    for name, (least, greatest) in ranges.items():
        value = getattr(config, name)
        bounds = f"at least {least:g}" if greatest == math.inf else f"a value from {least:g} to {greatest:g}"
        require(least <= value <= greatest, f"{group}{'.' if group else ''}{name}={value}: give {bounds}")


def require_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise ``UserError`` unless ``value`` is one of ``choices``."""
    choices = list(choices)
    require(value in choices, f"{name}={value}: choose one of {', '.join(choices)}{did_you_mean(value, choices)}")


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """``"; did you mean X?"`` if a choice is close to ``word``, else an empty string."""
    close = difflib.get_close_matches(word, list(choices), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def optional_library(name: str, user: str) -> Any:
    """The library ``name``, which an extra of the same name installs, for the part of scclr that ``user`` names.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise ValueError(f"{user} needs the library {name}: pip install 'scclr[{name}]'") from error


def one_line(error: BaseException) -> str:
    """The first line of an error's text."""
    return str(error).strip().split("\n", 1)[0]
