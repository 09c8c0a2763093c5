"""The one exception that users see."""

from collections.abc import Mapping
from typing import Any


class UserError(Exception):
    """Something that the user can mend: the command line prints it as one line and exits with 1.

    The message names the file, the field and the remedy. `figures` are what the command had already
    established; `--json` still writes them, so that a failed check can be read by machines.
    """

    def __init__(self, message: str, *, figures: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.figures = dict(figures or {})
