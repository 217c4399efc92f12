"""The files that a loss of one's own starts from: ``scclr new loss NAME`` writes them."""

import importlib.util
import re
from pathlib import Path

from scclr.config.errors import require

FOLDER = Path("my_conf")
CODE = '''\
"""A loss in which every positive attracts, and only negatives within a margin repel."""

from scclr.losses import Anchors, Loss, LossTerms, balance


class {title}Loss(Loss):
    """A = mean 1 - s_ip;  R = mean max(0, s_ik - margin)^2 over the views k of other images."""

    def __init__(self, *, alpha: float, margin: float) -> None:
        super().__init__(alpha)
        self.margin = margin

    def terms(self, anchors: Anchors) -> LossTerms:
        s = anchors.z @ anchors.keys.T  # the views of this process with those of all processes
        other = anchors.image[anchors.anchor_rows, None] != anchors.image
        repel = (s[other] - self.margin).relu().square().mean()
        return balance(self.alpha, 1 - anchors.positives().mean(), repel)
'''
CONFIGURATION = """\
# Squared hinge on the similarity of negatives.
_target_: {name}.{title}Loss
alpha: ${{alpha}}
margin: 0.2
"""
TEST = '''\
"""The loss against its formula, written out for every pair; and computed in two parts, as two processes do."""

import torch
from torch.nn.functional import normalize

from {name} import {title}Loss
from scclr.losses import GlobalBatch

LOSS = {title}Loss(alpha=0.3, margin=0.2)


def views() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    z1, z2 = (normalize(torch.randn(6, 3, dtype=torch.float64, generator=random), dim=1) for _ in range(2))
    return z1, z2


def test_it_is_its_formula() -> None:
    z1, z2 = views()
    z = torch.cat([z1, z2])
    attract = [1 - z[i] @ z[(i + 6) % 12] for i in range(12)]
    repel = [(z[i] @ z[k] - 0.2).clamp(min=0) ** 2 for i in range(12) for k in range(12) if i % 6 != k % 6]
    terms = LOSS(z1, z2)
    torch.testing.assert_close(terms.attract, torch.stack(attract).mean())
    torch.testing.assert_close(terms.repel, torch.stack(repel).mean())
    torch.testing.assert_close(terms.total, 2 * (0.3 * terms.attract + 0.7 * terms.repel))


def test_processes_share_the_anchors() -> None:
    z1, z2 = views()
    parts = [LOSS(z1[s : s + 3], z2[s : s + 3], global_batch=GlobalBatch((z1, z2), None, s)) for s in (0, 3)]
    torch.testing.assert_close((parts[0].total + parts[1].total) / 2, LOSS(z1, z2).total)
'''


def write_loss(name: str) -> str:
    """Write ``<name>.py``, its YAML and a test into the current folder; returns what to type next.

    Raises:
        UserError: ``name`` is no name for a module, another module has it, or a file is there already.
    """
    require(re.fullmatch(r"[a-z][a-z0-9_]*", name) is not None, f"{name}: give a name such as margin or my_loss")
    files = {
        Path(f"{name}.py"): CODE,
        FOLDER / "loss" / f"{name}.yaml": CONFIGURATION,
        Path(f"test_{name}.py"): TEST,
    }
    for path in files:
        require(not path.exists(), f"{path}: there is such a file already; give another name")
    taken = importlib.util.find_spec(name) is not None
    require(not taken, f"{name}: Python has a module of this name, which would hide yours; give another name")
    (FOLDER / "loss").mkdir(parents=True, exist_ok=True)
    title = "".join(part.capitalize() for part in name.split("_"))
    for path, text in files.items():
        path.write_text(text.format(name=name, title=title))
    written = ", ".join(map(str, files))
    return f"wrote {written}\nnext  scclr train --config-dir {FOLDER} loss={name} alpha=0.4"
