"""The errors of finetune, each with its exit code.

0 done · 1 failed while running · 2 the user's input was wrong · 3 a file failed its integrity check ·
4 out of memory or disk, or another rank is gone · 130/143 stopped by SIGINT/SIGTERM with a checkpoint saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


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


@contextmanager
def os_errors_as(kind: type[FinetuneError], problem: str) -> Iterator[None]:
    """Turn an OSError of the block into an error of this kind; problem: as `out=merged: cannot be written`."""
    try:
        yield
    except OSError as error:
        raise kind(f"{problem}: {error.strerror or error}") from error
