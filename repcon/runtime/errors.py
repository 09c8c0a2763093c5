"""The exception for problems that users can fix."""

from collections.abc import Mapping
from typing import Any


class UserError(Exception):
    """A problem that the user can fix: the command line prints it as one line and exits with 1.

    The message names the file, the field and the remedy. figures: results up to the error, which `--json` still writes,
    so that a failed check can be read by programs.
    """

    def __init__(self, message: str, *, figures: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.figures = dict(figures or {})
