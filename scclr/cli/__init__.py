"""The ``scclr`` command: its subcommands, help, exit codes, and one line for whatever the user can mend.

This is the edge at which the terminal is told about errors. Exit codes: 0 done, 1 an error, 2 an unknown command, 75
stopped by a signal (the same command goes on), 130 interrupted. A module is imported only when it is needed: help needs
nothing, and a command line that does not compose is refused without importing torch.
"""

import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from scclr import __version__
from scclr.cli.errors import guarded
from scclr.cli.finished import EMBED_HELP, EVALUATE_HELP, EXPORT_HELP, embed, evaluate, export
from scclr.cli.reporting import REPORT_HELP, SYNC_HELP, report, sync
from scclr.cli.training import EXAMPLES, SHOW_HELP, STATUS_HELP, show, sweep_status, train, train_help
from scclr.config.errors import did_you_mean, require

NEW_HELP = """\
usage: scclr new loss <name>

Write <name>.py, my_conf/loss/<name>.yaml and test_<name>.py into the current folder: a loss of your own to start from.

example
  scclr new loss margin
  scclr train --config-dir my_conf loss=margin alpha=0.4"""


def main() -> NoReturn:
    """Run ``sys.argv`` and exit. Modules of the user's own are found in the current folder, after all others."""
    from scclr.run.output import survive_closed_output

    survive_closed_output()
    with suppress(OSError):  # the folder was deleted
        sys.path += [folder for folder in (os.getcwd(),) if folder not in sys.path]
    sys.exit(dispatch(sys.argv[1:]))


def dispatch(argv: list[str]) -> int:
    """Run one command line; returns the exit code."""
    if argv and argv[0] in ("-sc", "--shell-completion"):  # the shell's completion knows no subcommands
        os.environ["COMP_LINE"] = re.sub(r"^(\S+) +train\b", r"\1", os.environ.get("COMP_LINE", ""))
        argv = ["train", *argv]
    if not argv or argv[0] in ("-h", "--help"):
        print(overview())
        return 0
    if "--version" in argv:
        print(f"scclr {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        hint = did_you_mean(argv[0], COMMANDS) or "; `scclr --help` lists the commands"
        print(f"scclr: error: no such command: {argv[0]}{hint}", file=sys.stderr)
        return 2
    command, _, help_text = COMMANDS[argv[0]]
    words = [word for word in argv[1:] if word not in ("-h", "--help")]
    if len(words) < len(argv) - 1:
        return guarded(argv[0], lambda words: print(help_text(words)), words)
    return guarded(argv[0], command, words)


def overview() -> str:
    """``scclr --help``."""
    commands = "\n".join(f"  {name:<13} {summary}" for name, (_, summary, _) in COMMANDS.items())
    return (
        "scclr: self-supervised contrastive learning with a balance between attraction and repulsion\n\n"
        f"usage: scclr <command> ...\n\ncommands\n{commands}\n\n`scclr <command> --help` says more.\n\n{EXAMPLES}"
    )


def new(argv: list[str]) -> None:
    """``scclr new loss NAME``: write the files that a loss of one's own starts from."""
    from scclr.losses.new import write_loss

    require(len(argv) == 2 and argv[0] == "loss", "type scclr new loss <name>, such as scclr new loss margin")
    print(write_loss(argv[1]))


COMMANDS: dict[str, tuple[Callable[[list[str]], None], str, Callable[[list[str]], str]]] = {
    "train": (train, "pretrain an encoder and evaluate it frozen", train_help),
    "sweep-status": (sweep_status, "count what is done, running, failed, stopped or missing", lambda _: STATUS_HELP),
    "report": (report, "write a page of tables, statistics and figures about finished runs", lambda _: REPORT_HELP),
    "sync": (sync, "upload the W&B runs that were logged offline", lambda _: SYNC_HELP),
    "evaluate": (evaluate, "evaluate a finished run by other protocols or on other data", lambda _: EVALUATE_HELP),
    "export": (export, "write a finished encoder for torchvision, timm or ONNX", lambda _: EXPORT_HELP),
    "embed": (embed, "write the features of a folder of images", lambda _: EMBED_HELP),
    "show": (show, "draw the views that pretraining will see", lambda _: SHOW_HELP),
    "new": (new, "write the files that a loss of your own starts from", lambda _: NEW_HELP),
}
