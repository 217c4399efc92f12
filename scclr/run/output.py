"""Standard output and error that never end a run, whatever becomes of the terminal or the pipe behind them."""

import io
import os
import sys
from typing import Any, TextIO


def survive_closed_output() -> None:
    """Let writing to ``sys.stdout`` and ``sys.stderr`` never fail; to be called at the start of a process.

    If a stream's reader goes away, as with ``| head -1`` or a closed terminal, or its disk is full, the rest of the
    output to it is discarded. The output to a stream that was closed from the start, as by ``2>&-``, is too.
    """
    sys.stdout = _lasting(sys.stdout, 1)
    sys.stderr = _lasting(sys.stderr, 2)


def _lasting(stream: TextIO | None, number: int) -> TextIO:
    if stream is None:  # closed from the start; the number would else be that of the next file opened
        _discard(number)
        return open(os.devnull, "w")
    try:
        raw = _LastingFile(stream.fileno(), "w", closefd=False)
    except OSError:  # it has no descriptor: a test records what is written
        return stream
    if isinstance(stream, _LastingText) or not isinstance(stream, io.TextIOWrapper):
        return stream
    try:
        stream.flush()
    except OSError:
        _discard(number)
    return _LastingText(
        raw if stream.write_through else io.BufferedWriter(raw),
        stream.encoding,
        "backslashreplace",  # characters that the encoding lacks do not end a run either
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _LastingText(io.TextIOWrapper):
    def close(self) -> None:
        """Only flush, so that no later write finds a closed file."""
        self.flush()


class _LastingFile(io.FileIO):
    def write(self, data: Any, /) -> int:
        try:
            written = super().write(data)
        except OSError:
            _discard(self.fileno())
            return len(data)
        return len(data) if written is None else written  # None: a pipe that does not wait is full, and this is lost


def _discard(number: int) -> None:
    """Let the descriptor ``number`` lead to ``/dev/null``."""
    null = os.open(os.devnull, os.O_WRONLY)
    if null == number:
        os.set_inheritable(number, True)
    else:
        os.dup2(null, number)
        os.close(null)
