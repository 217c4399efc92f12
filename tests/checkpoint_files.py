"""What a checkpoint of a run holds, in small."""

from dataclasses import asdict
from typing import Any

from conftest import TINY, compose, training

from scclr.pretrain.state import LossWindow


def state(step: int = 0, **changes: Any) -> dict[str, Any]:
    """All entries of a checkpoint of a run of ``TINY`` that has untrained weights, with ``changes``."""
    config = compose(*TINY)
    first, _ = training(config)
    first.step, first.window = step, LossWindow(step)
    return {**first.state_dict(), "image_size": 8, "config": asdict(config), "seconds": 20.0, **changes}
