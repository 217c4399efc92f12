"""Runs in Weights & Biases: what they need, how they start, and the one that a report is logged to.

Only this module imports wandb.
"""

import os
import re
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import wandb

from scclr.config.errors import UserError, one_line
from scclr.config.schema import TrackingConfig
from scclr.run.wandb_environment import (
    OFFLINE,
    ONLINE,
    make_folder,
    require_key,
    require_server,
    say_ignored,
    variable,
    wandb_environment,
)

LIMITS: dict[str, Any] = {"init_timeout": 10, "finish_timeout": 60}  # seconds for W&B to begin and to end a run


def check(config: TrackingConfig) -> None:
    """See ``scclr.run.tracking.check_tracking``."""
    say_ignored()
    with wandb_environment():
        for name, value in os.environ.items():
            if name.startswith("WANDB_"):
                _check_variable(name, value)
    if config.dir is not None:
        make_folder(Path(config.dir))
    if config.mode == "online":
        require_access()


def require_access(before: str = ONLINE, after: str = OFFLINE) -> str:
    """The address of W&B's server, which answers and for which there is a key.

    Args:
        before, after: what the message of an error begins and ends with.

    Raises:
        UserError: there is no key, or no server that answers within seconds.
    """
    require_key(before, after)
    with wandb_environment():
        session = wandb.sdk.wandb_setup.singleton()
        settings = None if session is None else session.settings
    url = variable("BASE_URL") or ("W&B's server" if settings is None else str(settings.base_url))
    if settings is not None:  # older versions learn of their server only when they start
        proxies = {"http": settings.http_proxy, "https": settings.https_proxy}
        given = tuple((scheme, proxy) for scheme, proxy in proxies.items() if proxy)
        require_server(url, given, before, after)
    return url


def _check_variable(name: str, value: str) -> None:
    try:
        wandb.Settings().update_from_env_vars({name: value})
    except (ValueError, wandb.errors.Error) as error:
        details = getattr(error, "errors", None)  # of pydantic, whose text has several lines
        reason = details()[0]["msg"].removeprefix("Value error, ") if details else one_line(error)
        shown = name if re.search("KEY|TOKEN|HEADER|PROX", name) else f"{name}={value}"
        raise UserError(f"{shown}: W&B refuses this value ({reason}); correct it, or type unset {name}") from error


def described(name: str, group: str, job_type: str, tags: Sequence[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """How a run is shown in W&B, as arguments of ``wandb.init``.

    The variables WANDB_NAME, WANDB_RUN_GROUP and WANDB_JOB_TYPE replace what is given here, WANDB_TAGS adds to it.
    """
    words = [*tags, *(variable("TAGS") or "").split(",")]
    return {
        "name": variable("NAME") or name,
        "group": variable("RUN_GROUP") or group,
        "job_type": variable("JOB_TYPE") or job_type,
        "notes": variable("NOTES"),
        "tags": list(dict.fromkeys(word.strip()[:64] for word in words if word.strip())),  # W&B's longest tag
        "config": dict(settings),
    }


def start_run(directory: Path, config: TrackingConfig, shown: Mapping[str, Any], *, resumed: bool) -> Any:
    """Start the W&B run of a folder.

    Args:
        directory: keeps the identity of the run, and its files unless ``config.dir`` names another folder.
        shown: what ``described`` returns.
        resumed: whether it is the same run as before.

    Raises:
        UserError: W&B cannot start, for want of a key or a network; the message names ``tracking.mode=offline``.
    """
    own = directory / "wandb"
    base = Path(config.dir or directory).resolve()  # W&B's service process has a working directory of its own
    make_folder(own)
    make_folder(base)
    limits = {k: v for k, v in LIMITS.items() if k in wandb.Settings.model_fields and variable(k.upper()) is None}
    try:
        with wandb_environment(spare=own):
            return wandb.init(
                mode=config.mode,  # type: ignore[arg-type]
                project=config.project,
                entity=config.entity,
                id=_identity(own, base / "wandb", resumed=resumed),
                resume="allow" if config.mode == "online" else None,
                dir=str(base),
                settings=wandb.Settings(silent=True, console="off", **limits),
                **shown,
            )
    except (wandb.errors.Error, ValueError, RuntimeError) as error:
        raise UserError(f"W&B does not start ({one_line(error)}); mend this, {OFFLINE}") from error


def _identity(own: Path, files: Path, *, resumed: bool) -> str:
    """The W&B run of a run folder: the same as before if ``resumed``. Its older offline files are deleted.

    Args:
        own: a folder inside the run folder.
        files: where W&B writes.
    """
    path = own / "run-id"
    known = path.read_text() if path.exists() else ""
    if not re.fullmatch("[0-9a-f]{8}", known):
        known, resumed = "", False
    for folder in {own, files} if known else ():
        for stale in folder.glob(f"offline-run-*-{known}"):  # its rows are sent again, or belong to no checkpoint
            shutil.rmtree(stale)
    if not resumed:
        path.write_text(known := secrets.token_hex(4))
    return known


def picture(path: Path, caption: str | None = None) -> Any:
    """An image file as a value to log."""
    return wandb.Image(str(path), caption=caption)


def log_page(
    directory: Path,
    config: TrackingConfig,
    shown: Mapping[str, Any],
    page: Path,
    pictures: Mapping[str, str],
    table: tuple[Sequence[str], Sequence[Sequence[Any]]],
) -> str:
    """Log a page, its figures and its table to the W&B run of ``directory``: the same run each time.

    The step is the time in seconds, so that a later page comes after an earlier one.

    Args:
        shown: what ``described`` returns.
        page: the HTML file; the figures lie beside it as PNG.
        pictures: captions by the names of the figures.
        table: names of the columns, and the rows.

    Returns:
        The address of the run, empty if it is offline.

    Raises:
        UserError: W&B cannot start, or stops.
    """
    run = start_run(directory, config, shown, resumed=True)
    try:
        with wandb_environment():
            figures = {
                f"figures/{name}": picture(page.with_name(f"{name}.png"), said) for name, said in pictures.items()
            }
            html = wandb.Html(str(page), inject=False)  # W&B's own style sheet would have to be fetched
            run.log({"report": html, "table": _table(*table), **figures}, step=int(time.time()))
            run.finish()
    except Exception as error:  # W&B raises errors of many kinds
        with suppress(Exception):
            run.finish(exit_code=1)
        raise UserError(f"{page} is written, but W&B stopped ({type(error).__name__}: {one_line(error)})") from error
    return "" if config.mode == "offline" else str(run.url or "")


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
    return wandb.Table(columns=list(columns), data=[list(row) for row in rows])


def teardown() -> None:
    """End W&B's service process, whatever state it is in."""
    with suppress(Exception):
        wandb.teardown()
