"""Every file of conf/ composes, builds and is read to the last key; what nobody reads is refused."""

from dataclasses import asdict
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

from scclr.components import check
from scclr.config import COMPONENTS, TrainConfig, UserError, adopt, build, conf_dir, resolve

FILES = sorted(conf_dir().glob("*/*.yaml"))
SHARED = {"__init__", "anchors", "cache", "decode", "files", "longtail", "pairs", "reading"}  # not components


def compose(*overrides: str) -> TrainConfig:
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return resolve(hydra.compose("train", overrides=list(overrides)))


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_file_composes_and_builds(path: Path, folder: Path) -> None:
    group, stem = path.parent.name, path.stem
    override = f"{'+' if group == 'experiment' else ''}{group}={stem}"
    extra = ["dataset.root=."] if stem == "imagefolder" else []
    config = compose(override, *extra)
    check(config)
    if group in COMPONENTS and group not in ("augment", "optimizer"):
        module = getattr(config, group)["_target_"].split(".")[-2]
        assert module == stem or (group != "loss" and stem.startswith(module)), "file stem = YAML stem"


def test_every_component_file_is_named_by_a_yaml() -> None:
    package = Path(build.__code__.co_filename).parent
    for group, folder_name in {"dataset": "datasets", "encoder": "encoders", "loss": "losses"}.items():
        nodes = [OmegaConf.load(p) for p in (conf_dir() / group).glob("*.yaml")]
        named = {node.get(group, node).get("_target_") for node in nodes} - {None}  # which vary another
        stems = {target.split(".")[-2] for target in named}
        files = {p.stem for p in (package / folder_name).glob("*.py")} - SHARED
        assert stems == files


def test_defaults_are_the_promised_ones() -> None:
    config = compose()
    assert (config.loss_name, config.alpha, config.dataset["_target_"]) == (
        "balanced",
        0.5,
        "scclr.datasets.digits.Digits",
    )


def test_alpha_is_never_ignored() -> None:
    assert compose("loss=ntxent").alpha is None
    assert compose("alpha=0.3").loss["alpha"] == 0.3
    with pytest.raises(UserError, match=r"loss=ntxent has no balance.*type loss=balanced alpha=0.5"):
        compose("loss=ntxent", "alpha=0.5")
    with pytest.raises(UserError, match=r"type alpha=0\.5"):
        compose("alpha=null")
    with pytest.raises(UserError, match="follows the root value"):
        compose("loss.alpha=0.3")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+typo=1", "typo: no such key"),
        ("+pretrain.epoch=1", r"pretrain\.epoch: no such key; did you mean epochs"),
        ("pretrain.warmup_epochs=101", "at most pretrain.epochs=100"),
        ("pretrain.batch_size=1", "at least 2"),
        ("seed=-1", "seed=-1"),
        ("stages=[probe,pretrain]", "in this order"),
        ("stages=[probe]", "init_from"),
    ],
)
def test_values_are_checked(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        compose(override)


def test_identity_is_the_configuration() -> None:
    base = compose()
    assert base.directory == compose("alpha=0.50", "seed=0").directory
    for same in ("device=cpu", "tracking.mode=disabled", "overwrite=true"):
        assert base.directory == compose(same).directory
    for other in ("alpha=0.51", "seed=1", "pretrain.epochs=99", "dataset.limit=500", "augment=none", "probe.knn_k=5"):
        assert base.directory != compose(other).directory, other
    assert base.group == compose("seed=7").group != compose("alpha=0.4").group
    assert base.directory.name.startswith("balanced-alpha0.5-seed0-")
    assert compose("loss=ntxent").directory.name.startswith("ntxent-seed0-")


def test_the_theory_may_look_through_another_augmentation() -> None:
    run = asdict(compose("augment.rotation=20", "encoder.widths=[8]"))

    def augment(*typed: str) -> dict:
        config = adopt(compose("stages=[theory]", "init_from=x", *typed), run, typed)
        assert config.encoder["widths"] == [8]
        return config.augment

    assert augment() == run["augment"]
    assert augment("augment.flip=0.5") == {**run["augment"], "flip": 0.5}
    assert augment("augment=none") == compose("augment=none").augment
    assert augment("augment=none", "augment.flip=1") == compose("augment=none", "augment.flip=1").augment


def test_data_root_is_not_part_of_the_identity() -> None:
    a, b = (compose("dataset=cifar10", f"dataset.root={root}") for root in ("x", "y"))
    assert a.directory == b.directory
    a, b, c = (
        compose("dataset=imagenet", *words)
        for words in (["dataset.cache=x"], ["dataset.cache=y", "dataset.workers=3"], [])
    )
    assert a.directory == b.directory != c.directory


def test_build_runs_nothing_from_outside() -> None:
    with pytest.raises(UserError, match="only components of scclr"):
        build("loss", {"_target_": "os.system", "command": "true"})
    with pytest.raises(UserError, match="no such component"):
        build("loss", {"_target_": "scclr.losses.nothing.Loss"})


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"temperature": 0.5}, "loss.alpha is missing"),
        ({"temperature": "warm", "alpha": 0.5}, "loss.temperature: .*warm"),
        ({"temperature": 0.5, "alpha": 0.5, "tau": 1}, "loss.tau: BalancedLoss takes"),
        ({"temperature": 0, "alpha": 0.5}, "loss: temperature=0"),
        ({"temperature": 0.5, "alpha": 2}, "loss: alpha=2"),
    ],
)
def test_a_constructor_is_the_schema(node: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build("loss", {"_target_": "scclr.losses.balanced.BalancedLoss", **node})
