"""The errors of finetune, each with its exit code.

0 done · 1 failed while running · 2 the user's input was wrong · 3 a file failed its integrity check ·
4 out of memory or disk, or another rank is gone · 130/143 stopped by SIGINT/SIGTERM with a checkpoint saved.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

# As safetensors and tokenizers write it.
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")
# A row can name a file by any text.
_LONGEST_NAME = 200


class FinetuneError(Exception):
    """A command failed; the message names the place, what was found and what to do."""

    exit_code = 1

    def _render_traceback_(self) -> list[str]:
        """Show only the message in a notebook (a hook of IPython)."""
        return [f"{type(self).__name__}: {self}"]


class InputError(FinetuneError):
    """Something the user wrote is wrong."""

    exit_code = 2


class ConfigError(InputError):
    """A config, an override or a combination of settings is wrong."""


class DataError(InputError):
    """A row or a file of rows is wrong."""


class MissingExtra(InputError):
    """An optional dependency is missing; the message names the command that installs it."""


class IntegrityError(FinetuneError):
    """A file is corrupt or was changed."""

    exit_code = 3


class ResourceError(FinetuneError):
    """Memory or disk ran out."""

    exit_code = 4


class OutOfMemory(ResourceError):
    """Memory ran out in a part of the work, which may fit in smaller parts."""


class RankLost(ResourceError):
    """Another rank of the run failed, was killed, hangs or cannot be reached."""


class Interrupted(FinetuneError):
    """A signal stopped the run after its checkpoint was saved."""

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + signal_number


def error_number(error: BaseException) -> int | None:
    """Return the number that the system gave an error; libraries in Rust write it into errors of their own."""
    if isinstance(error, OSError):
        return error.errno
    written = _RUST_ERROR.search(str(error))
    return int(written[1]) if written else None


def is_disk_full(error: BaseException) -> bool:
    """Return whether the disk, or the user's share of it, has no room."""
    return error_number(error) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def os_errors_as(kind: type[FinetuneError], problem: str, advice: str = "free space") -> Iterator[None]:
    """Turn an error of the system in the block into one of this kind, or into ResourceError if the disk is full.

    Args:
        problem: as `out=merged: cannot be written`.
        advice: what to do if the disk is full.
    """
    try:
        yield
    except FinetuneError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise ResourceError(f"{problem}: the disk is full\nhelp: {advice}") from error
        if isinstance(error, OSError):
            name = "" if error.filename is None else str(error.filename)
            file = f" ({name[:_LONGEST_NAME]})" if name and name not in problem else ""
            raise kind(f"{problem}: {error.strerror or error}{file}") from error
        if (number := error_number(error)) is not None:
            raise kind(f"{problem}: {os.strerror(number)}") from error
        raise
