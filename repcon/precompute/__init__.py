"""From crops to stored labels: teachers, batches, units of work and the processes that share them.

`repcon.precompute(...)` is the command of the same name, so this package can be called.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, **settings: Any) -> dict[str, Any]:
        """See `repcon.commands.functions.precompute`."""
        return import_module("repcon.commands.functions").precompute(**settings)


sys.modules[__name__].__class__ = _Callable
