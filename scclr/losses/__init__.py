"""Contrastive losses as a sum of attraction and repulsion. One loss per file; each is called as ``loss(z1, z2)``.

Dimensions: B images, V >= 2 views z1, z2, ... [B, P] with unit rows. s = z z^T are the cosine similarities of all
N = VB views, and tau is the temperature.

    A   = mean_i mean_p -s_{ip} / tau                  attraction to the other views p of the same image
    R   = mean_i log sum_{k != i} exp(s_{ik} / tau)    repulsion from all other views

These are the terms of NT-Xent; every other loss states its own. In all of them ``total = 2 (alpha A + (1 - alpha) R)``,
so alpha = 0.5 is the plain sum A + R.
"""

from scclr.losses.align_uniform import AlignUniformLoss
from scclr.losses.anchors import Anchors, GlobalBatch
from scclr.losses.balanced import BalancedLoss
from scclr.losses.base import (
    LogSumExpForm,
    Loss,
    LossTerms,
    TemperatureLoss,
    balance,
    check_positive,
    check_range,
)
from scclr.losses.debiased import DebiasedLoss
from scclr.losses.decoupled import DecoupledLoss
from scclr.losses.hard_negative import HardNegativeLoss
from scclr.losses.infonce import InfoNCELoss
from scclr.losses.nscl import NSCLLoss
from scclr.losses.ntxent import NTXentLoss
from scclr.losses.prototype import PrototypeLoss
from scclr.losses.sigmoid import SigmoidLoss
from scclr.losses.spectral import SpectralLoss
from scclr.losses.supcon import SupConLoss

__all__ = [
    "AlignUniformLoss",
    "Anchors",
    "BalancedLoss",
    "DebiasedLoss",
    "DecoupledLoss",
    "GlobalBatch",
    "HardNegativeLoss",
    "InfoNCELoss",
    "LogSumExpForm",
    "Loss",
    "LossTerms",
    "NSCLLoss",
    "NTXentLoss",
    "PrototypeLoss",
    "SigmoidLoss",
    "SpectralLoss",
    "SupConLoss",
    "TemperatureLoss",
    "balance",
    "check_positive",
    "check_range",
]
