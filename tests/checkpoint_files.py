"""What a checkpoint of a run holds, in small."""

from dataclasses import asdict
from typing import Any

from conftest import TINY, compose, training


def state(*words: str, **changes: Any) -> dict[str, Any]:
    """All entries of the checkpoint that a run of ``TINY`` and ``words`` begins from, with ``changes``."""
    config = compose(*TINY, *words)
    first, _ = training(config)
    described = {"image_size": 8, "config": asdict(config), "seconds": 20.0}
    return {**first.state_dict(), **described, **changes}
