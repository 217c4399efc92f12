"""The configuration of a run as typed dataclasses: what every key means, and which values it may have.

A value without a default here gets one in ``conf/train.yaml``, with its source. A default *here* belongs to a key that
was added later: a value that equals it is not part of a run's identity (``resolve.identify``), so the key changes no
existing run. Such a default must therefore never change.
"""

import math
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

from omegaconf import MISSING

from scclr.config.errors import require, require_choice, require_range

STAGES = ("pretrain", "probe", "theory")
LARGEST = 1e9  # of all floats; the keys have narrower ranges of their own
LAYERS = ("h", "z")
COMPONENTS = ("dataset", "augment", "encoder", "loss", "optimizer")


def described(text: str, default: Any = MISSING) -> Any:
    """A field with a line for ``scclr train --help``."""
    return field(default=default, metadata={"help": text})


@dataclass
class ProjectorConfig:
    """The MLP from ``h`` [B, D] to the embedding before normalization [B, out_dim] (SimCLR, sec. 4.2)."""

    depth: int = described("number of linear layers; 0 uses h itself as the embedding")
    hidden_dim: int = described("width of the hidden layers")
    out_dim: int = described("dimensions of the embedding")
    batch_norm: bool = described("put batch normalization after every hidden layer")
    normalize: bool = described("scale embeddings to unit length; false needs loss.similarity=dot")

    def __post_init__(self) -> None:
        require_range("projector", self, depth=(0, 100), hidden_dim=(1, 10**6), out_dim=(1, 10**6))


@dataclass
class PretrainConfig:
    """The numbers of the pretraining loop."""

    epochs: int = described("passes over the training images")
    batch_size: int = described("images in a step, over all processes; each image gives two views or more")
    micro_batch: int | None = described("at most this many images in the encoder at once, with the same gradient", None)
    warmup: float = described("share of the steps over which the learning rate rises linearly")
    precision: str = described(
        "auto | fp32 | bf16 | fp16 of the forward pass; the loss is always in fp32. fp32 leaves cuDNN's TF32 on"
    )
    channels_last: bool = described("store images and activations with the channels last")
    compile: Any = described(
        "auto | true | false | graphs: compile augmentation and model; auto does on CUDA, graphs adds CUDA graphs"
    )
    log_every: int = described("steps between two rows of metrics.jsonl")
    knn_every: int = described("epochs between two kNN evaluations on the validation split; 0 never evaluates")
    knn_images: int = described("at most this many training images serve as neighbours in these evaluations")
    knn_k: int = described("number of nearest neighbours that vote in these evaluations", 20)
    knn_temperature: float = described("a neighbour's vote has the weight exp(cosine / knn_temperature)", 0.07)
    quality_every: int = described("epochs between two measurements of quality without labels; 0 never measures", 20)
    bound_every: int = described("epochs between two measurements of the theory's bound; it reads labels; 0 never", 0)
    online_probe: bool = described("train a linear classifier on h beside the encoder; it reads training labels", False)

    def __post_init__(self) -> None:
        require_range("pretrain", self, quality_every=(0, 10**9), bound_every=(0, 10**9))
        require_range("pretrain", self, knn_k=(1, 10**6), knn_temperature=(1e-6, 1e6))
        require_range("pretrain", self, epochs=(1, 10**9), batch_size=(2, 10**9), warmup=(0, 1))
        require_range("pretrain", self, log_every=(1, 10**12), knn_every=(0, 10**9), knn_images=(1, 10**12))
        if self.micro_batch is not None:
            require_range("pretrain", self, micro_batch=(1, 10**9))
        require_choice("pretrain.precision", self.precision, ("auto", "fp32", "bf16", "fp16"))
        words = dict.fromkeys(("true", "yes", "on", "y"), True) | dict.fromkeys(("false", "no", "off", "n"), False)
        self.compile = words.get(str(self.compile).lower(), self.compile)
        require_choice("pretrain.compile", str(self.compile).lower(), ("auto", "true", "false", "graphs"))


@dataclass
class ProbeConfig:
    """How a frozen encoder is evaluated."""

    protocols: dict[str, Any] = described("what evaluates: some of the group protocol, as in [logreg,knn]")
    batch_size: int = described("images in a forward pass")
    dataset: dict[str, Any] | None = described("what the encoder is evaluated on; null is the data of the run", None)
    layers: list[str] = field(
        default_factory=lambda: ["h"], metadata={"help": "features to evaluate: [h], the projector's [z], or [h,z]"}
    )
    transfer: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "more datasets to evaluate on, as in [mnist,svhn]"}
    )

    def __post_init__(self) -> None:
        require_range("probe", self, batch_size=(1, 10**6))
        layers = [layer for layer in LAYERS if layer in self.layers]
        chosen = f"probe.layers=[{','.join(self.layers)}]"
        require(layers == list(self.layers) != [], f"{chosen}: choose [h], [z] or [h,z]")
        require(len(self.protocols) > 0, "probe.protocols=[]: choose one or more, as in probe.protocols=[logreg,knn]")
        for group in ("protocols", "transfer"):
            for name, node in (nodes := getattr(self, group)).items():
                plain = re.fullmatch(r"[a-z]\w{0,63}", str(name)) is not None
                require(plain, f"probe.{group}.{name}: give a name of letters, digits and _")
                known = isinstance(node, Mapping) and "_target_" in node
                advice = f"type probe.{group}=[{','.join(nodes)}], or drop probe.{group}.{name}"
                require(known, f"probe.{group}.{name}: not chosen, so nothing would read it; {advice}")


@dataclass
class TheoryConfig:
    """How many images and views the theory is estimated from."""

    images: int = described("at most this many training images")
    views: int = described("augmented views of each image")
    temperatures: list[float] = described("temperatures at which the bound is evaluated, besides that of the training")

    def __post_init__(self) -> None:
        require_range("theory", self, images=(4, 10**9), views=(2, 1000))
        require_each("theory.temperatures", self.temperatures, 1e-6, 1e6)


@dataclass
class CheckpointConfig:
    """When ``last.pt`` is written, besides after the last step and on a signal."""

    every: str = described("a number of steps, as in 500, or a time, as in 30s, 10min or 1h")

    def __post_init__(self) -> None:
        known = re.fullmatch(r"[1-9]\d{0,11}|(?=.*[1-9])\d{1,12}(\.\d{1,12})?(s|min|h)", self.every)
        require(known is not None, f"checkpoint.every={self.every}: give steps, as in 500, or time, as in 10min")

    @property
    def steps(self) -> int | None:
        """Steps between two checkpoints; None if ``every`` is a time."""
        return int(self.every) if self.every.isdecimal() else None

    @property
    def seconds(self) -> float | None:
        """Seconds between two checkpoints; None if ``every`` is a number of steps."""
        units = {"s": 1, "min": 60, "h": 3600}
        unit = self.every.lstrip("0123456789.")
        return float(self.every.removesuffix(unit)) * units[unit] if unit else None


@dataclass
class TrackingConfig:
    """Weights & Biases. The files of the run folder are written in any case.

    A value that is null is taken from W&B's environment variable of that name, such as WANDB_MODE.
    """

    mode: str | None = described("offline | online | disabled; null takes WANDB_MODE, or else offline")
    project: str | None = described("the W&B project; null takes WANDB_PROJECT, or else scclr")
    entity: str | None = described("the W&B user or team; null takes WANDB_ENTITY, or else that of your login")
    dir: str | None = described("folder for W&B's files; null takes WANDB_DIR, or else the run folder", None)

    def __post_init__(self) -> None:
        if self.mode is None and os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on"):
            self.mode = "disabled"
        origin = {}  # what the user has set, for messages
        for key, default in {"mode": "offline", "project": "scclr", "entity": None, "dir": None}.items():
            origin[key] = f"WANDB_{key.upper()}" if getattr(self, key) is None else f"tracking.{key}"
            if getattr(self, key) is None:
                setattr(self, key, os.environ.get(origin[key]) or default)
            require(getattr(self, key) != "", f"tracking.{key} is empty: type tracking.{key}=<name>")
        self.mode = {"dryrun": "offline", "run": "online"}.get(str(self.mode), self.mode)  # W&B's older words
        require_choice(origin["mode"], str(self.mode), ("offline", "online", "disabled"))
        allowed = re.sub(r"[/\\#?%:]+", "-", str(self.project))[:128]
        rule = "the name of a W&B project has at most 128 characters, and none of / \\ # ? % :"
        shown = f"{origin['project']}={self.project}"
        require(self.project == allowed, f"{shown}: {rule}; type {origin['project']}={shlex.quote(allowed)}")


@dataclass
class TrainConfig:
    """Everything that ``scclr train`` reads."""

    alpha: float | None = described("balance in [0, 1]: total = 2 (alpha attraction + (1 - alpha) repulsion)")
    alpha_schedule: str = described("constant | linear | cosine: how alpha goes to alpha_end over the training")
    alpha_end: float | None = described("balance at the end of an alpha_schedule")
    seed: int = described("seed of the initial weights, the order of the images and the augmentations")
    device: str = described("auto | cpu | cuda; auto takes CUDA if there is any")
    nproc: int = described("number of processes on this machine that train together; one for each GPU")
    deterministic: bool | None = described("use only kernels that repeat bit by bit; null: yes on a CPU, no on CUDA")
    stages: list[str] = described("what to do: [pretrain,probe,theory], or some of these in this order")
    runs: str = described("folder of all runs")
    name: str | None = described("folder of this run inside runs; null takes the experiment and its size, or default")
    init_from: str | None = described("run folder or checkpoint whose weights the run starts from or evaluates")
    overwrite: bool = described("discard a run with this configuration, and begin it anew")
    dataset: dict[str, Any] = MISSING
    augment: dict[str, Any] = MISSING
    encoder: dict[str, Any] = MISSING
    projector: ProjectorConfig = MISSING
    loss: dict[str, Any] = MISSING
    optimizer: dict[str, Any] = MISSING
    pretrain: PretrainConfig = MISSING
    probe: ProbeConfig = MISSING
    theory: TheoryConfig = MISSING
    checkpoint: CheckpointConfig = MISSING
    tracking: TrackingConfig = MISSING
    init_mean: list[float] | None = described("mean of pixels for weights from elsewhere; null is ImageNet's", None)
    init_std: list[float] | None = described("their std, one number a channel as init_mean", None)
    trust: list[str] = field(
        default_factory=list, metadata={"help": "packages whose code a checkpoint may name, besides scclr's own"}
    )

    def __post_init__(self) -> None:
        refuse_unusable(asdict(self))
        require_range("", self, seed=(0, 2**63 - 1), nproc=(1, 1024))
        require_choice("device", self.device, ("auto", "cpu", "cuda"))
        require(self.runs != "", "runs is empty: type runs=<folder>")
        chosen = ",".join(self.stages)
        in_order = len(self.stages) > 0 and list(self.stages) == [s for s in STAGES if s in self.stages]
        require(in_order, f"stages=[{chosen}]: choose from [{','.join(STAGES)}], in this order")
        encoder = "pretrain" in self.stages or self.init_from is not None
        require(encoder, f"stages=[{chosen}] needs an encoder: add init_from=<run folder or checkpoint>")
        plain = self.name is None or (self.name not in ("", ".", "..") and "/" not in self.name)
        require(plain, f"name={self.name}: give a plain folder name")
        require(len((self.name or "").encode()) <= 255, f"name={self.name}: give a name of at most 255 bytes")
        self._check_alpha()
        unit = self.projector.normalize or self.loss.get("similarity") == "dot"
        advice = "type loss=balanced loss.similarity=dot alpha=0.5"
        require(unit, f"projector.normalize=false needs a loss for embeddings of any length: {advice}")

    def _check_alpha(self) -> None:
        loss = self.loss_name
        if "alpha" not in self.loss:
            for name, value in {"alpha": self.alpha, "alpha_end": self.alpha_end}.items():
                advice = f"drop it, or type loss=balanced {f'alpha={value}' if name == 'alpha' else ''}".strip()
                require(value is None, f"loss={loss} has no balance, so {name}={value} would be ignored: {advice}")
            require(self.alpha_schedule == "constant", f"loss={loss} has no balance: drop alpha_schedule")
            return
        require(self.alpha is not None, f"loss={loss} needs a balance: type alpha=0.5, or another number in [0, 1]")
        assert self.alpha is not None
        require(0 <= self.alpha <= 1, f"alpha={self.alpha}: the balance is a number in [0, 1]; alpha=0.5 is NT-Xent")
        require(self.loss["alpha"] == self.alpha, "loss.alpha follows the root value: type alpha=... instead")
        require_choice("alpha_schedule", self.alpha_schedule, ("constant", "linear", "cosine"))
        if self.alpha_schedule == "constant":
            require(self.alpha_end is None, f"alpha_end={self.alpha_end} would be ignored: add alpha_schedule=linear")
            return
        ends = self.alpha_end is not None and 0 <= self.alpha_end <= 1
        require(ends, f"alpha_schedule={self.alpha_schedule}: add alpha_end=<a number in [0, 1]>")

    @property
    def last_alpha(self) -> float:
        """The balance at the end of the training; 0.5 for a loss without one."""
        ends = (self.alpha_end, self.alpha, 0.5)
        return next(alpha for alpha in ends if alpha is not None)

    @property
    def loss_name(self) -> str:
        """The word after ``loss=``, which is the module of the target; the class, if that is not in scclr."""
        target = str(self.loss.get("_target_", "?.?"))
        return target.rsplit(".", 2)[-2 if target.startswith("scclr.") else -1]


def has_parts(saved: object) -> bool:
    """Whether ``saved``, which was read from a file, has the form of a configuration: components and sections."""
    if not isinstance(saved, Mapping):
        return False
    nodes = [saved.get(group) for group in COMPONENTS]
    sections = [saved[field.name] for field in fields(TrainConfig) if is_dataclass(field.type) and field.name in saved]
    targets = [node.get("_target_") if isinstance(node, Mapping) else None for node in nodes]
    return all(isinstance(target, str) for target in targets) and all(isinstance(x, Mapping) for x in sections)


def require_each(key: str, values: list[float], least: float, greatest: float) -> None:
    """Raise ``UserError`` unless ``values`` has one number or more, all of them in [least, greatest]."""
    message = f"{key}={list(values)}: give one or more positive numbers, from {least:g} to {greatest:g}"
    require(len(values) > 0 and least <= min(values) and max(values) <= greatest, message)


def refuse_unusable(node: object, key: str = "") -> None:
    """Raise ``UserError`` for the first value of a configuration that no component could use, wherever it stands.

    Numbers are finite and no larger than ``LARGEST``; whole numbers fit into 64 bits; text can be written in UTF-8.
    """
    if isinstance(node, Mapping):
        for name, value in node.items():
            refuse_unusable(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list | tuple):
        for value in node:
            refuse_unusable(value, key)
    elif isinstance(node, float):
        require(math.isfinite(node), f"{key}={node}: give a finite number")
        require(abs(node) <= LARGEST, f"{key}={node}: give a number from {-LARGEST:g} to {LARGEST:g}")
    elif isinstance(node, int):
        require(-(2**63) <= node < 2**63, f"{key}={node}: give a smaller number")
    elif isinstance(node, str):
        shown = node.encode(errors="backslashreplace").decode()
        require(shown == node, f"{key}={shown}: its characters are not UTF-8; give a name in UTF-8")
