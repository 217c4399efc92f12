"""Every file of conf/ composes, builds and is read to the last key; what nobody reads is refused; what a run is."""

import shlex
from dataclasses import asdict, field, make_dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import compose
from omegaconf import OmegaConf

import scclr
from scclr.components import check, prepare
from scclr.config import resolve as resolving
from scclr.config.build import build
from scclr.config.compose import conf_dir, parse, plan
from scclr.config.errors import UserError
from scclr.config.resolve import adopt, essence, identify, restore
from scclr.config.schema import TrainConfig

FILES = sorted(path for path in conf_dir().glob("*/*.yaml") if not path.stem.startswith("_"))
ROOT = Path(scclr.__file__).parent


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_file_composes_and_builds(path: Path, folder: Path) -> None:
    group, stem = path.parent.name, path.stem
    if stem in ("timm", "huggingface"):
        pytest.importorskip("timm" if stem == "timm" else "datasets")
    np.savez(folder / "a.npz", images=np.zeros((9, 8, 8), np.uint8), labels=np.arange(9))
    words = {"imagefolder": ["dataset.root=."], "huggingface": ["dataset.root=."], "arrays": ["dataset.root=a.npz"]}
    words |= {"timm": ["encoder.name=test_vit", "dataset=imagefolder", "dataset.root=.", "augment=simclr"]}
    needed = words.get(stem, ["augment=simclr"] if "imagenet" in stem else [])
    config = compose(f"{group}={stem}", *needed)
    check(config)
    if group in ("dataset", "encoder", "loss"):
        module = getattr(config, group)["_target_"].split(".")[-2]
        assert module == stem or (group != "loss" and stem.startswith(module)), "file stem = YAML stem"
        assert (ROOT / ("losses" if group == "loss" else f"{group}s") / f"{module}.py").exists()


def test_alpha_is_never_ignored() -> None:
    assert (compose().alpha, compose().loss["alpha"], compose("loss=ntxent").alpha) == (0.5, 0.5, None)
    assert compose("alpha=0.3").loss["alpha"] == 0.3
    with pytest.raises(UserError, match=r"loss=ntxent has no balance.*type loss=balanced alpha=0.5"):
        compose("loss=ntxent", "alpha=0.5")
    with pytest.raises(UserError, match="follows the root value"):
        compose("loss.alpha=0.3")


def test_any_text_is_a_name_and_a_preset_names_its_folder() -> None:
    assert compose().name == "default"
    assert compose("experiment=balance_grid").name == "balance_grid-cpu"
    assert compose("experiment=balance_grid", "size=smoke").name == "balance_grid-smoke"
    assert compose("experiment=balance_grid", "name=mine").name == "mine"
    for name in ("2025", "true", "1.0", "null-ish", "007"):
        assert compose(f"name={name}").name == name
    points = plan(parse(["-m", "experiment=fashion_mnist_cpu,cifar10_resnet18", "name=null,1e3"])).points
    assert [point.config.name for point in points] == ["fashion_mnist_cpu", "1e3", "cifar10_resnet18", "1e3"]
    assert points[2].config.pretrain.batch_size == 512


def test_a_preset_may_be_a_sweep_of_which_typed_axes_replace_its_own() -> None:
    command = ["experiment=balance_grid", "size=smoke", "loss.temperature=0.3"]
    planned = plan(parse(["-m", *command]))
    assert [point.config.alpha for point in planned.points] == [0.2, 0.35, 0.5, 0.6, 0.7, 0.8, 0.9]
    assert {(point.config.seed, point.config.loss["temperature"]) for point in planned.points} == {(0, 0.3)}
    assert len(plan(parse(["-m", *command, "alpha=0.1,0.3", "seed=3,4,5"])).points) == 6
    alone = plan(parse([*command, "seed=7"]))
    assert ([point.config.alpha for point in alone.points], alone.params) == (
        [0.5],
        ["alpha=0.2,0.35,0.5,0.6,0.7,0.8,0.9"],
    )
    with pytest.raises(UserError, match="one such preset at a time"):
        plan(parse(["-m", "experiment=balance_grid,low_alpha", "size=smoke"]))


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("alpha=range(0.1,0.35,0.1)", [0.1, 0.2, 0.3]),
        ("alpha=choice(0.2,0.7)", [0.2, 0.7]),
        ("alpha=0.3,0.6", [0.3, 0.6]),
    ],
)
def test_sweeps_are_hydras(words: str, found: list[float]) -> None:
    assert [point.config.alpha for point in plan(parse(["-m", words])).points] == found


def test_a_glob_sweeps_over_files() -> None:
    points = plan(parse(["-m", "loss=glob(n*)"])).points
    assert [point.config.loss_name for point in points] == ["nscl", "ntxent"]


def test_flags_may_stand_anywhere_and_change_check_and_job_alike(folder: Path) -> None:
    (folder / "mine" / "loss").mkdir(parents=True)
    (folder / "mine" / "experiment").mkdir()
    swept = "# @package _global_\nhydra:\n  sweeper:\n    params:\n      alpha: 0.1,0.9\n"
    (folder / "mine" / "experiment" / "grid.yaml").write_text(swept)
    text = (conf_dir() / "loss" / "balanced.yaml").read_text().replace("0.5 # Lee", "0.07 # Lee")
    (folder / "mine" / "loss" / "sharp.yaml").write_text(text)
    command = parse(["loss=sharp", "--config-dir", "mine", "-m", "seed=0,1"])
    assert command.argv == ["--multirun", "--config-dir", "mine", "loss=sharp", "seed=0,1"]
    assert [point.config.loss["temperature"] for point in plan(command).points] == [0.07, 0.07]
    points = plan(parse(["-m", "experiment=grid", "-cd", "mine"])).points
    assert [(point.config.alpha, point.config.name) for point in points] == [(0.1, "grid"), (0.9, "grid")]
    (point,) = plan(parse(["hydra.searchpath=[file://mine]", "loss=sharp"])).points
    assert point.config.loss["temperature"] == 0.07
    for argv in (["--config-dir"], ["--bogus"], ["--config-dir", "nowhere"]):
        with pytest.raises(UserError, match=r"--config-dir|--bogus"):
            plan(parse(argv))


# What a run is --------------------------------------------------------------------------------------------------------


def folder_of(*words: str, data: str = "") -> Path:
    return identify(compose(*words), data).directory


def test_the_same_configuration_has_the_same_folder() -> None:
    base = folder_of()
    for same in (
        "alpha=0.50",
        "seed=0",
        "device=cpu",
        "tracking.mode=online",
        "overwrite=true",
        "loss.temperature=5e-1",
    ):
        assert folder_of(same) == base, same
    for other in (
        "alpha=0.51",
        "seed=1",
        "pretrain.epochs=99",
        "dataset.limit=500",
        "augment=none",
        "pretrain.knn_k=5",
    ):
        assert folder_of(other) != base, other
    assert folder_of(data="other images") != base
    group = identify(compose("seed=7"), "").group
    assert identify(compose(), "").group == group != identify(compose("alpha=0.4"), "").group
    assert base.name.startswith("balanced-alpha0.5-seed0-")
    assert folder_of("loss=ntxent").name.startswith("ntxent-seed0-")
    assert folder_of("alpha_schedule=linear", "alpha_end=0.7").name.startswith("balanced-alpha0.5to0.7-seed0-")


# If one of these changes, every finished run is done again: a new key needs a default in the schema or in the
# constructor's signature, and a default must never change.
GOLDEN = {
    "": "af9aaef7",
    "loss=ntxent loss.temperature=0.2 seed=3": "3dc395bc",
    "experiment=fashion_mnist_cpu alpha=0.4": "7dd03db1",
    "experiment=cifar10_resnet18 optimizer=lars": "8b71bfd2",
    "dataset=imagenet dataset.cache=there loss=supcon stages=[pretrain,probe,theory]": "ac3a61be",
}


@pytest.mark.parametrize("line", GOLDEN)
def test_the_hash_of_a_run_does_not_change(line: str) -> None:
    assert folder_of(*shlex.split(line)).name[-8:] == GOLDEN[line]


def test_a_new_key_with_a_default_changes_no_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    config, before = asdict(compose()), essence(asdict(compose()))
    longer = make_dataclass("TrainConfig", [("clip", float, field(default=0.0))], bases=(TrainConfig,))
    monkeypatch.setattr(resolving, "TrainConfig", longer)
    assert essence({**config, "clip": 0.0}) == before
    assert essence({**config, "clip": 1.0}) == {**before, "clip": 1.0}


def test_where_files_lie_is_not_part_of_the_identity() -> None:
    a, b = (folder_of("dataset=cifar10", f"dataset.root={root}") for root in ("x", "y"))
    assert a == b
    a, b, c = (
        folder_of("dataset=imagenet", *words)
        for words in (["dataset.cache=x"], ["dataset.cache=y", "dataset.workers=3"], [])
    )
    assert a == b != c


def test_two_folders_of_images_are_two_runs(folder: Path) -> None:
    from image_files import write_photographs

    for name, size in (("a", (20, 20)), ("b", (22, 22)), ("c", (20, 20))):
        write_photographs(folder / name, per_class=8, size=size)
    words = ["dataset=imagefolder", "dataset.image_size=8", "augment=crop", "pretrain.batch_size=4"]
    a, b, c = (prepare(compose(*words, f"dataset.root={root}"), [])[1] for root in "abc")
    assert a.directory == c.directory != b.directory
    assert a.group == c.group != b.group


def test_the_theory_may_use_another_augmentation() -> None:
    run = asdict(compose("augment.rotation=20", "encoder.widths=[8]"))

    def augment(*typed: str) -> dict:
        config = adopt(compose("stages=[theory]", "init_from=x", *typed), run, typed)
        assert config.encoder["widths"] == [8]
        return config.augment

    assert augment() == run["augment"]
    assert augment("augment.flip=0.5") == {**run["augment"], "flip": 0.5}
    assert augment("augment=none") == compose("augment=none").augment
    assert augment("augment=none", "augment.flip=1") == compose("augment=none", "augment.flip=1").augment


def test_a_saved_configuration_is_plain_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    saved = asdict(compose())
    saved["augment"]["_target_"] = "${oc.env:WANDB_API_KEY}"
    with pytest.raises(UserError, match="holds an interpolation"):
        adopt(compose("stages=[probe]", "init_from=x"), saved)


def test_a_configuration_of_the_older_form_of_the_probe_is_read() -> None:
    saved = asdict(compose("probe.batch_size=64"))
    saved["probe"] = {"l2": [0.5], "max_iter": 9, "knn_k": 7, "knn_temperature": 0.2, "batch_size": 64, "dataset": None}
    for key in ("knn_k", "knn_temperature"):
        del saved["pretrain"][key]
    words = ["logreg.l2=[0.5]", "logreg.max_iter=9", "knn.k=[7]", "knn.temperature=[0.2]"]
    same = ["probe.batch_size=64", "pretrain.knn_k=7", "pretrain.knn_temperature=0.2"]
    assert restore(saved, "run") == compose(*same, *(f"probe.protocols.{word}" for word in words))


# What is refused ------------------------------------------------------------------------------------------------------


def test_every_number_is_finite() -> None:
    """For every float of the configuration, wherever it stands."""

    def floats(node: object, key: str = "") -> list[str]:
        if isinstance(node, dict):
            return [found for name, value in node.items() for found in floats(value, f"{key}.{name}".strip("."))]
        return [key] if isinstance(node, float) else []

    found = {*floats(OmegaConf.to_container(OmegaConf.create(asdict(compose("dataset=cifar10_lt")))))}
    assert {"optimizer.lr", "loss.temperature", "pretrain.knn_temperature"} <= found
    for key in {*found, "augment.rotation", "augment.blur", "dataset.imbalance", "alpha"} - {"loss.alpha"}:
        for value in ("nan", "inf"):
            with pytest.raises(UserError, match=rf"{key.split('.')[-1]}=|{key}"):
                check(compose("dataset=cifar10_lt", f"{key}={value}"))
    for words in ("probe.protocols.logreg.l2=[0.1,inf]", "theory.temperatures=[inf]", "augment.crop_scale=[0.1,nan]"):
        with pytest.raises(UserError):
            check(compose(words))


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"temperature": 0.5}, "loss.alpha is missing"),
        ({"temperature": "warm", "alpha": 0.5}, "loss.temperature=warm: give a number"),
        ({"temperature": 0.5, "alpha": 0.5, "tau": 1}, "loss.tau: BalancedLoss takes"),
        ({"temperature": 0, "alpha": 0.5}, "loss: temperature=0"),
        ({"temperature": 0.5, "alpha": 2}, "loss: alpha=2"),
    ],
)
def test_a_constructor_is_the_schema(node: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build("loss", {"_target_": "scclr.losses.balanced.BalancedLoss", **node})
