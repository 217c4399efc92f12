"""How a command ends in an error: one line for whatever the user can mend, and the exit code."""

import os
import sys
import traceback
from collections.abc import Callable

from scclr.config.errors import UserError, one_line


def guarded(name: str, command: Callable[[list[str]], None], argv: list[str]) -> int:
    """Run a command. An error that the user can mend is one line on standard error, any other has a traceback."""
    full = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra would print tracebacks of its own: let exceptions come here
    try:
        command(argv)
    except KeyboardInterrupt:
        print(f"\nscclr {name}: interrupted; type the same command to go on from the last checkpoint", file=sys.stderr)
        return 130
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except Exception as error:
        if full:
            raise
        print(f"scclr {name}: error: {reported(error)}", file=sys.stderr)
        return 1
    finally:
        if not full:
            del os.environ["HYDRA_FULL_ERROR"]
    return 0


def reported(error: Exception) -> str:
    """One line about ``error``, after its traceback if it is not the user's. Under torchrun it names the process."""
    number = os.environ.get("RANK") if os.environ.get("WORLD_SIZE", "1") != "1" else None
    rank = f"rank {number}: " if number else ""
    if isinstance(error, UserError):
        return f"{rank}{error}"
    traceback.print_exception(error)
    return f"{rank}{type(error).__name__}: {one_line(error)}"
