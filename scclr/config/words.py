"""The words of a command line, ``key=value`` and ``group=choice``, before Hydra reads them."""

import re
from collections.abc import Iterable

from scclr.config.errors import did_you_mean, require

TEXT_KEYS = ("name", "experiment")  # their values are names, though Hydra would read 2025 or true otherwise


def for_hydra(override: str) -> list[str]:
    """An override in Hydra's terms.

    ``name=2025,true`` is ``name='2025','true'``, which Hydra takes as text; ``probe.protocols=[knn]`` is a choice of
    the group ``protocol``, and ``probe.dataset=mnist`` one of the group ``dataset``. ``probe.transfer=[mnist,svhn]`` is
    two of them, each at a key of its own.

    Raises:
        UserError: ``probe.protocols`` or ``probe.transfer`` without a name, or several lists of the latter.
    """
    key, _, value = override.partition("=")
    if key == "probe.protocols":
        names = re.fullmatch(r"[\w\[\], -]*[a-z][\w\[\], -]*|\w+\(.*\)", value) is not None and value != "null"
        require(names, f"{override}: choose one or more, as in probe.protocols=[logreg,knn]")
        return [f"protocol={value}"]
    if key == "probe.transfer":
        listed = re.fullmatch(r"\[ *\w+( *, *\w+)* *\]", value) is not None
        require(listed, f"{override}: give one list of datasets, as in probe.transfer=[mnist,svhn]")
        return [f"+dataset@{key}.{name}={name}" for name in re.findall(r"\w+", value)]
    if key == "probe.dataset" and value != "null":  # a choice among the files of conf/dataset
        return [f"+dataset@{override}"]
    if key not in TEXT_KEYS or not re.fullmatch(r"[\w.+-]+(,[\w.+-]+)*", value):
        return [override]
    return [f"{key}=" + ",".join(name if name == "null" else f"'{name}'" for name in value.split(","))]


def take_joblib(words: list[str]) -> tuple[int | None, list[str]]:
    """(how many points ``hydra/launcher=joblib`` runs at once, the other words).

    Hydra's launcher of this name needs a package of its own, and its workers share the fate of the first one that is
    killed. scclr runs every point in a process of its own instead.
    """
    if "hydra/launcher=joblib" not in words:
        return None, words
    given = dict(word.split("=", 1) for word in words if word.startswith("hydra.launcher.") and "=" in word)
    other = [key for key in given if key != "hydra.launcher.n_jobs"]
    require(not other, f"{''.join(other[:1])}: hydra/launcher=joblib takes hydra.launcher.n_jobs only")
    jobs = given.get("hydra.launcher.n_jobs", "-1")
    known = re.fullmatch(r"-?[1-9]\d*", jobs) is not None
    require(known, f"hydra.launcher.n_jobs={jobs}: give a number of runs at once, or -1 for one on each core or GPU")
    rest = [word for word in words if word != "hydra/launcher=joblib" and not word.startswith("hydra.launcher.")]
    return int(jobs), rest


def short_float(word: str) -> str:
    """``alpha=0.30000000000000004``, which a range of floats makes, as ``alpha=0.3``."""
    return re.sub(r"\d+\.\d{14,}", lambda number: f"{float(number[0]):.12g}", word)


def dotted(override: str) -> str:
    """The key that an override of the command line sets."""
    return override.lstrip("+~").split("=")[0]


def root_key(override: str) -> str:
    """The first part of that key."""
    return dotted(override).split(".")[0]


def unknown_key(key: str, known: Iterable[str]) -> str:
    """What to say of a key that nobody reads."""
    if "accumul" in key:
        return f"{key}: adding up small batches adds no negatives; type pretrain.micro_batch=... for the whole gradient"
    known = list(known)
    namesakes = [name for name in known if name.split(".")[-1] == key.split(".")[-1]]
    close = f"; did you mean {namesakes[0]}?" if len(namesakes) == 1 else did_you_mean(key, known)
    return f"{key}: no such key{close or '; `scclr train --help` lists the keys'}"
