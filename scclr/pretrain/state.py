"""Everything that a training step changes, which is everything that a checkpoint must hold."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from scclr.config.errors import UserError, one_line
from scclr.encoders.model import Model
from scclr.losses import Loss, LossTerms
from scclr.pretrain.online import OnlineProbe
from scclr.run import distributed

NEAR_COLLAPSE, MOST_REPELLED = 0.01, 0.5  # beyond which ``Watch`` warns
LEAST_RANK = 0.25  # of its first value; the rank of a sound run on the digits, as classes form, falls to a half


class NotFiniteError(UserError):
    """The loss or a weight is infinite or not a number after ``step``.

    Args:
        repelled: false if nothing repelled in the batch, since a loss that reads labels found one class in it.
    """

    def __init__(self, step: int, repelled: bool = True) -> None:
        cause = f"the loss is not finite at step {step}"
        advice = "lower optimizer.lr, raise loss.temperature or type pretrain.precision=fp32"
        if not repelled:
            cause += ", where no image of the batch is of another class"
            advice = "type a larger pretrain.batch_size, or another loss"
        super().__init__(f"{cause}: {advice}; crash.pt holds the weights and the batch")
        self.step = step


class LossWindow:
    """The loss terms of the steps since the last logged row. They stay on the device until a row or a checkpoint."""

    def __init__(self, begin: int = 0) -> None:
        self.parts: list[Tensor] = []  # each [steps, 3]
        self.begin = self.timed_from = begin
        self.clock = time.perf_counter()

    def add(self, terms: LossTerms) -> None:
        """Remember the terms of one more step."""
        self.parts.append(torch.stack(terms).unsqueeze(0))

    def state_dict(self) -> dict[str, Any]:
        """The terms as means over processes, float64 [steps, 3]. The host waits for the device here.

        Raises:
            NotFiniteError: the terms of a step are not finite in some process.
        """
        terms = torch.cat(self.parts).double() if self.parts else torch.zeros(0, 3, dtype=torch.float64)
        terms = (distributed.all_reduce_sum(terms) / distributed.world_size()).cpu()
        bad = terms.isfinite().all(1).logical_not().nonzero()
        if len(bad) > 0:
            first = int(bad[0])
            raise NotFiniteError(self.begin + first, repelled=terms[first, 2].item() != -math.inf)
        return {"terms": terms, "begin": self.begin}

    def load_state_dict(self, saved: dict[str, Any], device: torch.device) -> None:
        """Go on with the terms of a checkpoint."""
        self.parts, self.begin = [saved["terms"].to(device)], saved["begin"]

    def means(self, step: int, batch_size: int) -> dict[str, float]:
        """Means over the window, which ends after ``step`` steps.

        Raises:
            NotFiniteError: as ``state_dict``.
        """
        total, attract, repel = self.state_dict()["terms"].mean(0).tolist()
        speed = (step - self.timed_from) * batch_size / (time.perf_counter() - self.clock)
        return {"loss": total, "attract": attract, "repel": repel, "images_per_second": speed}


class Watch:
    """What looks wrong in a training, as the rows of its log tell: a sentence for each kind, said once."""

    def __init__(self) -> None:
        self.first_rank = math.nan
        self.said: dict[str, str] = {}

    def note(self, row: Mapping[str, float]) -> None:
        """Remember the first effective rank that was logged."""
        if math.isnan(self.first_rank):
            self.first_rank = row.get("effective_rank", math.nan)

    def judge(self, row: Mapping[str, float], collapsed: float | None) -> list[str]:
        """The sentences about ``row`` that have not been said yet.

        Args:
            collapsed: A + R where all embeddings coincide; None if that is not known of the loss.
        """
        found, rank = {}, row.get("effective_rank", math.nan)
        both, repelled = row["attract"] + row["repel"], row.get("admission/repelled", 0.0)
        if collapsed is not None and abs(both - collapsed) <= NEAR_COLLAPSE * collapsed:
            found["collapsed"] = (
                f"A + R is {both:.4g}, within 1 % of {collapsed:.4g}, its value where all embeddings coincide: views "
                "of an image are no more alike than others; lower alpha or optimizer.lr, or weaken the augmentation"
            )
        if rank < LEAST_RANK * self.first_rank:
            found["rank"] = (
                f"the effective rank of the embeddings fell from {self.first_rank:.3g} to {rank:.3g}: they use ever "
                "fewer dimensions; lower alpha, or see spectrum.json"
            )
        if repelled > MOST_REPELLED:
            found["repelled"] = (
                f"{repelled:.0%} of the positives are pushed apart: alpha is too low for this temperature and batch "
                "size; raise alpha or loss.temperature"
            )
        new = {kind: text for kind, text in found.items() if kind not in self.said}
        self.said |= new
        return list(new.values())

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"first_rank": self.first_rank, "said": dict(self.said)}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.first_rank, self.said = float(saved["first_rank"]), {str(k): str(v) for k, v in saved["said"].items()}


@dataclass
class TrainState:
    """The model and all that is needed to train it further."""

    model: Model
    loss: Loss
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0  # steps that are finished
    window: LossWindow = field(default_factory=LossWindow)
    watch: Watch = field(default_factory=Watch)
    online: OnlineProbe | None = None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds. Every process of a group must call this.

        Raises:
            NotFiniteError: a loss term of the window or a weight is not finite.
        """
        window = self.window.state_dict()
        if not all(bool(x.isfinite().all()) for x in self.model.state_dict().values()):
            raise NotFiniteError(self.step)
        online = {} if self.online is None else {"online": self.online.state_dict()}
        return {**self.weights(), "window": window, "watch": self.watch.state_dict(), **online}

    def weights(self) -> dict[str, Any]:
        """``state_dict`` without the window, and without a check."""
        return {
            "model": self.model.state_dict(),
            "loss": self.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take everything from a checkpoint.

        Raises:
            UserError: it is of another model, loss or optimizer.
        """
        parts: dict[str, Any] = {name: getattr(self, name) for name in ("model", "loss", "optimizer", "scaler")}
        try:
            for name, part in parts.items():
                part.load_state_dict(saved[name])
            moments = [(p, value) for p, kept in self.optimizer.state.items() for value in kept.values()]
            if any(isinstance(value, Tensor) and value.ndim > 0 and value.shape != p.shape for p, value in moments):
                raise ValueError("moments of another shape than their weights")
            self.step = saved["step"]
            self.window = LossWindow(self.step)
            self.window.load_state_dict(saved["window"], next(self.model.parameters()).device)
            if "watch" in saved:  # an older checkpoint has none
                self.watch.load_state_dict(saved["watch"])
            if self.online is not None:
                self.online.load_state_dict(saved["online"])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            detail = one_line(error).rstrip(": ")
            message = f"the checkpoint does not fit this run ({detail}): type overwrite=true to begin anew"
            raise UserError(message) from error
