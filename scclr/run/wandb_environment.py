"""What Weights & Biases finds around it: environment variables, a home folder, a key and a server."""

import functools
import http.client
import io
import os
import ssl
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path

from scclr.config.errors import UserError, require

# Variables that the configuration and the log read themselves.
READ = ("DISABLED", "MODE", "PROJECT", "ENTITY", "DIR", "NAME", "RUN_GROUP", "JOB_TYPE", "NOTES", "TAGS")
# Variables that choose another W&B run than that of the run folder, or print what it prints a second time.
IGNORED = (
    *("RUN_ID", "RESUME", "RESUME_FROM", "FORK_FROM"),
    *("SWEEP_ID", "SWEEP_PARAM_PATH", "CONFIG_PATHS", "LAUNCH", "CONSOLE"),
)
CONNECT_SECONDS = 5  # for the server to answer at all
ONLINE = "tracking.mode=online: "
OFFLINE = "or type tracking.mode=offline, and `scclr sync` uploads the run later"


def variable(name: str) -> str | None:
    """The environment variable ``WANDB_<name>``; None if it is absent or empty."""
    return os.environ.get(f"WANDB_{name}") or None


@contextmanager
def wandb_environment(spare: Path | None = None) -> Iterator[None]:
    """Show W&B an environment without empty variables, ``READ`` and ``IGNORED``, and drop what it prints.

    Args:
        spare: a folder for the files of W&B's service, which would print its log if it could not write them.
    """
    unseen = [f"WANDB_{name}" for name in (*READ, *IGNORED)]
    hidden = {k: v for k, v in os.environ.items() if k.startswith("WANDB_") and (k in unseen or v == "")}
    added = {"WANDB_SILENT": "true"} if variable("SILENT") is None else {}
    if spare is not None and not _has_cache():
        added["WANDB_CACHE_DIR"] = str(spare / "cache")
    for name in hidden:
        del os.environ[name]
    os.environ.update(added)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        for name in added:
            os.environ.pop(name, None)
        for name, value in hidden.items():
            os.environ.setdefault(name, value)


def _has_cache() -> bool:
    """Whether W&B's service has a folder of the user's to write into."""
    if variable("CACHE_DIR") is not None:
        return True
    home = os.environ.get("HOME")
    base = os.environ.get("XDG_CACHE_HOME") or (f"{home}/.cache" if home else None)
    with suppress(OSError):
        if base is not None:
            (folder := Path(base, "wandb")).mkdir(parents=True, exist_ok=True)
            return os.access(folder, os.W_OK)
    return False


@functools.cache
def say_ignored() -> None:
    """Say once in a process which variables have no effect."""
    if names := ", ".join(f"WANDB_{name}" for name in IGNORED if variable(name) is not None):
        print(f"{names}: no effect, since every run folder has a W&B run of its own and goes on in it", file=sys.stderr)


def require_key(before: str = ONLINE, after: str = OFFLINE) -> None:
    """Raise ``UserError`` if there is certainly no key: none in the environment, and no file that may hold one.

    Args:
        before, after: what the message begins and ends with.
    """
    config = os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb"
    logins = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    files = [os.path.expanduser(path) for path in (*logins, f"{config}/settings")]
    known = variable("API_KEY") or variable("IDENTITY_TOKEN_FILE") or any(map(os.path.exists, files))
    require(bool(known), _sentence(before, "W&B has no key; type `wandb login`", after))


@functools.cache
def require_server(url: str, proxies: tuple[tuple[str, str], ...], before: str = ONLINE, after: str = OFFLINE) -> None:
    """Raise ``UserError`` unless something answers at ``url``, whatever it says. W&B itself tries for 90 seconds.

    Args:
        proxies: pairs of a scheme and a proxy, besides those of the environment.
        before, after: what the message begins and ends with.
    """
    answers: list[object] = []

    def ask() -> None:
        proxy = urllib.request.ProxyHandler({**urllib.request.getproxies(), **dict(proxies)})
        try:
            urllib.request.build_opener(proxy).open(url, timeout=CONNECT_SECONDS).close()
            answers.append(None)
        except urllib.error.HTTPError:
            answers.append(None)
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            answers.append(None if isinstance(reason, ssl.SSLError) else reason)  # W&B has certificates of its own

    thread = threading.Thread(target=ask, daemon=True)  # because resolving a name may take longer than any timeout
    thread.start()
    thread.join(CONNECT_SECONDS)
    problem = answers[0] if answers else f"no answer within {CONNECT_SECONDS} s"
    message = f"W&B's server at {url} cannot be reached ({problem}); check the network"
    require(problem is None, _sentence(before, message, after))


def _sentence(before: str, message: str, after: str) -> str:
    return f"{before}{message}{f', {after}' if after else ''}"


def make_folder(folder: Path) -> None:
    """Make a folder for W&B's files. Raises ``UserError`` if it cannot be written."""
    reason = "no permission"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError as error:
        writable, reason = False, error.strerror or reason
    if not writable:
        raise UserError(f"{folder}: W&B's files cannot be written there ({reason}); type tracking.dir=<another folder>")
