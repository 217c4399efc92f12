"""Configuration: what every key means, what it may be, and how a component is built from its node.

A run is its configuration. The composed YAML is resolved once, here, into ``TrainConfig``; nothing below ``train.py``
sees a ``DictConfig`` and nothing changes a value afterwards. A component node is ``_target_`` plus keyword arguments:
the constructor's signature is its schema. This module does not import torch.
"""

import difflib
import hashlib
import importlib
import inspect
import json
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, make_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

STAGES = ("pretrain", "probe", "theory")
COMPONENTS = ("dataset", "augment", "encoder", "loss", "optimizer")
# What a run without pretraining takes from the checkpoint that it evaluates; the theory's augmentation may be another.
ADOPTED = (
    "alpha",
    "alpha_schedule",
    "alpha_end",
    "seed",
    "augment",
    "encoder",
    "projector",
    "loss",
    "optimizer",
    "pretrain",
)
# What may differ between two invocations of the same experiment: where files lie, on what it runs, who watches.
VOLATILE = ("device", "nproc", "deterministic", "runs", "experiment", "overwrite", "checkpoint", "tracking")


class UserError(Exception):
    """Something the user typed or pointed at is wrong. The message is one line: what, and what to type instead."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """``"; did you mean X?"`` when a choice is close to ``word``, else an empty string."""
    close = difflib.get_close_matches(word, list(choices), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def unknown_key(key: str, known: Iterable[str]) -> str:
    """What to say of a key that nobody reads."""
    if "accumul" in key:
        return f"{key}: adding up small batches adds no negatives; type pretrain.micro_batch=... for the whole gradient"
    return f"{key}: no such key{did_you_mean(key, known) or '; `scclr train --help` lists the keys'}"


def require(condition: bool, message: str) -> None:
    """Raise ``UserError(message)`` unless ``condition``."""
    if not condition:
        raise UserError(message)


def require_least(group: str, config: object, **least: float) -> None:
    """Raise ``UserError`` for an attribute of ``config`` below its least value."""
    for name, low in least.items():
        value = getattr(config, name)
        require(value >= low, f"{group}.{name}={value}: give at least {low}")


def require_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise ``UserError`` unless ``value`` is one of ``choices``."""
    listed = ", ".join(choices)
    require(value in choices, f"{name}={value}: choose one of {listed}{did_you_mean(value, choices)}")


@dataclass
class ProjectorConfig:
    """MLP from ``h`` [B, D] to the embedding before normalisation [B, out_dim] (SimCLR, sec. 4.2)."""

    depth: int = MISSING  # linear layers; 0 is the identity
    hidden_dim: int = MISSING
    out_dim: int = MISSING
    batch_norm: bool = MISSING  # after every hidden layer
    normalize: bool = MISSING  # embeddings to unit length; false goes with loss.similarity=dot

    def __post_init__(self) -> None:
        require_least("projector", self, depth=0, hidden_dim=1, out_dim=1)


@dataclass
class PretrainConfig:
    """The pretraining loop's numbers."""

    epochs: int = MISSING
    batch_size: int = MISSING  # images in a step, of all processes together; each gives two views
    micro_batch: int | None = None  # at most this many images in the encoder at once, at the same gradient
    warmup_epochs: float = MISSING
    precision: str = MISSING  # auto | fp32 | bf16 | fp16; the loss is always computed in float32
    channels_last: bool = MISSING
    compile: bool = MISSING  # torch.compile of encoder and projector
    log_every: int = MISSING  # steps between two rows of metrics.jsonl
    knn_every: int = MISSING  # epochs between two kNN evaluations on the validation split; 0 = never
    knn_images: int = MISSING  # at most this many training images serve as neighbours

    def __post_init__(self) -> None:
        require_least("pretrain", self, epochs=1, batch_size=2, warmup_epochs=0)
        require_least("pretrain", self, log_every=1, knn_every=0, knn_images=1)
        if self.micro_batch is not None:
            require_least("pretrain", self, micro_batch=1)
        warmup, epochs = self.warmup_epochs, self.epochs
        require(warmup <= epochs, f"pretrain.warmup_epochs={warmup}: give at most pretrain.epochs={epochs}")
        require_choice("pretrain.precision", self.precision, ("auto", "fp32", "bf16", "fp16"))


@dataclass
class ProbeConfig:
    """The evaluation protocol of a frozen encoder."""

    l2: list[float] = MISSING  # L2 strengths tried on the validation split
    max_iter: int = MISSING  # L-BFGS iterations of one fit, at most
    knn_k: int = MISSING
    knn_temperature: float = MISSING
    batch_size: int = MISSING  # images in a forward pass

    def __post_init__(self) -> None:
        require(min(self.l2, default=0) > 0, f"probe.l2={self.l2}: give one or more positive strengths")
        require_least("probe", self, max_iter=1, knn_k=1, batch_size=1)
        require(self.knn_temperature > 0, f"probe.knn_temperature={self.knn_temperature}: give a positive number")


@dataclass
class TheoryConfig:
    """How much of the data the theory is measured on."""

    images: int = MISSING  # at most this many training images
    views: int = MISSING
    temperatures: list[float] = MISSING  # at which the bound is evaluated, besides the training's

    def __post_init__(self) -> None:
        require_least("theory", self, images=4)
        require(self.views >= 2, f"theory.views={self.views}: the mean over augmentations needs two views or more")
        message = f"theory.temperatures={list(self.temperatures)}: give one or more positive numbers"
        require(min(self.temperatures, default=0) > 0, message)


@dataclass
class CheckpointConfig:
    """When ``last.pt`` is written besides after the last step and on a signal."""

    every: str = MISSING  # steps, as in 500, or time, as in 30s, 10min, 1h

    def __post_init__(self) -> None:
        known = re.fullmatch(r"[1-9]\d*|\d+(\.\d+)?(s|min|h)", self.every)
        require(known is not None, f"checkpoint.every={self.every}: give steps, as in 500, or time, as in 10min")

    @property
    def steps(self) -> int | None:
        """Steps between two checkpoints; None where time counts."""
        return int(self.every) if self.every.isdecimal() else None

    @property
    def seconds(self) -> float | None:
        """Seconds between two checkpoints; None where steps count."""
        units = {"s": 1, "min": 60, "h": 3600}
        unit = self.every.lstrip("0123456789.")
        return float(self.every.removesuffix(unit)) * units[unit] if unit else None


@dataclass
class TrackingConfig:
    """Weights & Biases. The run folder's own files are always written."""

    mode: str = MISSING  # offline | online | disabled
    project: str = MISSING
    entity: str | None = None

    def __post_init__(self) -> None:
        require_choice("tracking.mode", self.mode, ("offline", "online", "disabled"))


@dataclass
class TrainConfig:
    """Everything that ``scclr train`` reads."""

    alpha: float | None = field(
        default=None, metadata={"help": "balance in [0, 1]: total = 2 (alpha attraction + (1 - alpha) repulsion)"}
    )
    alpha_schedule: str = field(
        default=MISSING, metadata={"help": "constant | linear | cosine: from alpha to alpha_end over the training"}
    )
    alpha_end: float | None = field(default=None, metadata={"help": "balance at the end of an alpha_schedule"})
    seed: int = field(default=MISSING, metadata={"help": "initialisation, order of images and augmentation"})
    device: str = field(default=MISSING, metadata={"help": "auto | cpu | cuda"})
    nproc: int = field(default=MISSING, metadata={"help": "processes of the run on this machine; one per GPU"})
    deterministic: bool | None = field(
        default=None, metadata={"help": "only kernels that repeat bit by bit; null: true on a CPU, false on CUDA"}
    )
    stages: list[str] = field(default=MISSING, metadata={"help": "[pretrain,probe,theory], or a part of it"})
    runs: str = field(default=MISSING, metadata={"help": "folder of all run folders"})
    experiment: str = field(default=MISSING, metadata={"help": "sub-folder of runs; +experiment=NAME loads a preset"})
    init_from: str | None = field(default=None, metadata={"help": "run folder or checkpoint to start from"})
    overwrite: bool = field(default=MISSING, metadata={"help": "redo a finished run"})
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

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, f"seed={self.seed}: give a whole number from 0")
        require_choice("device", self.device, ("auto", "cpu", "cuda"))
        require(self.nproc >= 1, f"nproc={self.nproc}: give at least 1")
        require(
            len(self.stages) > 0 and list(self.stages) == [s for s in STAGES if s in self.stages],
            f"stages=[{','.join(self.stages)}]: choose from [{','.join(STAGES)}], in this order",
        )
        require(
            "pretrain" in self.stages or self.init_from is not None,
            f"stages=[{','.join(self.stages)}] needs an encoder: add init_from=<run folder or checkpoint>",
        )
        require(
            self.experiment not in ("", ".", "..") and "/" not in self.experiment,
            f"experiment={self.experiment}: give a plain folder name",
        )
        self._check_alpha()
        advice = "type loss=balanced loss.similarity=dot alpha=0.5"
        dot = self.loss.get("similarity") == "dot"
        require(
            self.projector.normalize or dot, f"projector.normalize=false needs a loss for rows of any length: {advice}"
        )

    def _check_alpha(self) -> None:
        loss = self.loss_name
        if "alpha" not in self.loss:
            given = {"alpha": self.alpha, "alpha_end": self.alpha_end}
            for name, value in given.items():
                message = (
                    f"loss={loss} has no balance, so {name}={value} would be ignored: drop it, or type loss=balanced"
                )
                require(value is None, f"{message} alpha={value}" if name == "alpha" else message)
            require(self.alpha_schedule == "constant", f"loss={loss} has no balance: drop alpha_schedule")
            return
        require(self.alpha is not None, f"loss={loss} needs a balance: type alpha=0.5, or another number in [0, 1]")
        assert self.alpha is not None
        require(0 <= self.alpha <= 1, f"alpha={self.alpha}: the balance is a number in [0, 1]; alpha=0.5 is NT-Xent")
        require(self.loss["alpha"] == self.alpha, "loss.alpha follows the root value: type alpha=... instead")
        require_choice("alpha_schedule", self.alpha_schedule, ("constant", "linear", "cosine"))
        if self.alpha_schedule == "constant":
            require(self.alpha_end is None, f"alpha_end={self.alpha_end} would be ignored: add alpha_schedule=linear")
        else:
            end = self.alpha_end
            require(
                end is not None and 0 <= end <= 1, f"alpha_schedule={self.alpha_schedule}: add alpha_end=<in [0, 1]>"
            )

    @property
    def alphas(self) -> list[float]:
        """The balance at the beginning and at the end; 0.5 of a loss without one."""
        end = self.alpha if self.alpha_end is None else self.alpha_end
        return [0.5 if alpha is None else alpha for alpha in (self.alpha, end)]

    @property
    def loss_name(self) -> str:
        """The word after ``loss=``: the module of its target."""
        return str(self.loss.get("_target_", "?")).rsplit(".", 2)[-2]

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What identifies the run: the configuration without its volatile keys (paths, device, tracking)."""
        plain = _identity(asdict(self))
        if self.init_from is not None:  # what is in the file, wherever it lies
            plain["init_from"] = hashlib.sha256(checkpoint_path(self.init_from).read_bytes()).hexdigest()
        return plain

    @property
    def directory(self) -> Path:
        """``runs/<experiment>/<loss>-alpha<alpha>-seed<seed>-<hash8>``: the same configuration, the same folder."""
        name = f"{self._title}-seed{self.seed}-{_digest(self.fingerprint)}"
        return Path(self.runs) / self.experiment / name

    @property
    def group(self) -> str:
        """The name that the seeds of one configuration share."""
        plain = {key: value for key, value in self.fingerprint.items() if key != "seed"}
        return f"{self._title}-{_digest(plain)}"

    @property
    def _title(self) -> str:
        balance = "" if self.alpha is None else f"-alpha{self.alpha:g}"
        return f"{self.loss_name}{balance}" + ("" if self.alpha_end is None else f"to{self.alpha_end:g}")


def conf_dir() -> Path:
    """The folder of YAML files: inside an installed package, beside it in a source tree."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "conf"


def checkpoint_path(source: str | Path) -> Path:
    """The checkpoint file meant by a run folder or a file.

    Raises:
        UserError: nothing there.
    """
    path = Path(source)
    if path.is_dir():
        require((path / "last.pt").is_file(), f"{path}: no last.pt in this folder; give a run folder or a checkpoint")
        return path / "last.pt"
    require(path.is_file(), f"{path}: no such file or folder; give a run folder or a checkpoint")
    return path


def _digest(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:8]


def resolve(config: DictConfig) -> TrainConfig:
    """The composed YAML as a typed, checked, plain ``TrainConfig``.

    Raises:
        UserError: a key nobody reads, a missing or ill-typed value, a value out of range, or an ``alpha`` that the loss
            would ignore.
    """
    _refuse_unknown(config, TrainConfig, "")
    try:
        typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TrainConfig), config))
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key} is missing: type {error.full_key}=...") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key or error.key}: {one_line(error)}") from error
    assert isinstance(typed, TrainConfig)
    return typed


def adopt(config: TrainConfig, saved: Mapping[str, Any], typed: Iterable[str] = ()) -> TrainConfig:
    """``config`` with what defines the encoder taken from ``saved``, the configuration inside a checkpoint.

    Args:
        typed: overrides of the command line; where the theory reads them, those of ``augment`` stay.
    """
    missing = [key for key in ADOPTED if key not in saved]
    require(not missing, f"init_from={config.init_from}: an older scclr wrote it, without {', '.join(missing)}")
    taken = {key: saved[key] for key in ADOPTED}
    if "theory" in config.stages:
        words = [dotted(override) for override in typed if root_key(override) == "augment"]
        changed = [word.split(".")[1] for word in words if "." in word]
        other = {key: value for key, value in config.augment.items() if key in changed}
        taken["augment"] = config.augment if "augment" in words else {**saved["augment"], **other}
    return resolve(OmegaConf.create({**asdict(config), **taken}))


def refuse_other(config: TrainConfig, saved: Mapping[str, Any]) -> None:
    """Raise ``UserError`` if ``saved``, the configuration in a run folder, is of another run than ``config``."""
    here, there = ({**_leaves(_identity(plain)), "init_from": None} for plain in (asdict(config), saved))
    others = [key for key in sorted({*here, *there}) if here.get(key) != there.get(key)]
    shown = ", ".join(f"{key}={there.get(key)} there, {here.get(key)} here" for key in others)
    advice = "type experiment=<another folder>, or overwrite=true to discard what is there"
    require(not others, f"{config.directory} holds another run ({shown}): {advice}")


def _identity(plain: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in plain.items() if key not in VOLATILE}
    dataset = {key: value for key, value in kept["dataset"].items() if key not in ("root", "workers")}
    if "cache" in dataset:  # crops come from what it holds, wherever it lies
        dataset["cache"] = dataset["cache"] is not None
    return {**kept, "dataset": dataset}


def _leaves(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in node.items():
        found |= _leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def dotted(override: str) -> str:
    """The key that an override of the command line sets."""
    return override.lstrip("+~").split("=")[0]


def root_key(override: str) -> str:
    """The first part of that key."""
    return dotted(override).split(".")[0]


def refuse_ignored(config: TrainConfig, overrides: Iterable[str]) -> None:
    """Raise ``UserError`` for an override that a run without pretraining would ignore: the checkpoint decides it."""
    if "pretrain" not in config.stages:
        stages = f"stages=[{','.join(config.stages)}]"
        for override in overrides:
            key = root_key(override)
            read = key not in ADOPTED or (key == "augment" and "theory" in config.stages)
            require(read, f"{override}: {stages} takes {key} from init_from; drop it")


def _refuse_unknown(config: DictConfig, schema: type, prefix: str) -> None:
    """OmegaConf accepts ``+typo=1`` beside a schema; nothing would read it."""
    known = {f.name: f.type for f in fields(schema)}
    for key in map(str, config):
        require(key in known, f"{prefix}{unknown_key(key, known)}")
        if is_dataclass(nested := known[key]) and isinstance(value := config[key], DictConfig):
            _refuse_unknown(value, typing.cast(type, nested), f"{prefix}{key}.")


def build(name: str, node: Mapping[str, Any], **given: Any) -> Any:
    """Construct ``node["_target_"]`` from the node's other keys and what it names of ``given``.

    Args:
        name: the group, for messages, such as ``"loss"``.
        node: ``_target_`` and keyword arguments; types are checked against the constructor's annotations.
        given: what the program supplies, such as the number of channels; not settable from the configuration.

    Raises:
        UserError: a target outside ``scclr`` (a configuration inside a checkpoint must not run arbitrary code), an
            unknown, missing or ill-typed argument, or a value that the constructor refuses with ``ValueError``.
    """
    target = str(node.get("_target_", ""))
    require(target.startswith("scclr."), f"{name}._target_={target}: only components of scclr can be built")
    module, _, attribute = target.rpartition(".")
    try:
        component = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{name}._target_={target}: no such component ({error})") from error
    hints = typing.get_type_hints(component.__init__ if inspect.isclass(component) else component)
    parameters = inspect.signature(component).parameters
    schema = {key: p for key, p in parameters.items() if key not in given}
    arguments = {key: value for key, value in node.items() if key != "_target_"}
    for key in arguments:
        takes = ", ".join(schema) or "no arguments"
        require(key in schema, f"{name}.{key}: {attribute} takes {takes}{did_you_mean(str(key), schema)}")
    for key, parameter in schema.items():
        missing = key not in arguments and parameter.default is inspect.Parameter.empty
        require(not missing, f"{name}.{key} is missing: {attribute} needs it")
    typed = make_dataclass(attribute, [(key, hints[key], field(default=MISSING)) for key in arguments])
    try:
        checked = OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(typed), OmegaConf.create(arguments)))
    except OmegaConfBaseException as error:
        raise UserError(f"{name}.{error.full_key or error.key}: {one_line(error)}") from error
    assert isinstance(checked, dict)
    try:
        supplied = {key: value for key, value in given.items() if key in parameters}
        return component(**{str(key): value for key, value in checked.items()}, **supplied)
    except ValueError as error:
        raise UserError(f"{name}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """The first line of an error's text."""
    return str(error).strip().split("\n", 1)[0]


ConfigStore.instance().store(name="schema", node=TrainConfig)
