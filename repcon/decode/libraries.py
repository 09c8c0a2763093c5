"""The library that each loader needs, whether it is installed, and how to get it."""

from importlib.util import find_spec

from repcon.runtime.errors import UserError

LIBRARIES = {"reference": "PIL", "torch": "simplejpeg", "dali": "nvidia.dali", "ffcv": "ffcv"}
"""Every loader, and the module that it imports."""
_HOW_TO_INSTALL = {
    "dali": "on Linux: pip install 'repcon[dali]'",
    "ffcv": "on Linux: run `make ffcv`, or tools/install-ffcv with the Python that runs repcon",
}


def installed(kind: str) -> bool:
    """Whether the loader's library is installed."""
    try:
        return find_spec(LIBRARIES[kind]) is not None
    except ModuleNotFoundError:  # of the package around a submodule
        return False


def require_installed(kind: str) -> None:
    """Raises UserError, with the command that installs it, where the loader is unknown or its library is missing."""
    if kind not in LIBRARIES:
        raise UserError(f"loader {kind}: unknown; choose auto, {', '.join(LIBRARIES)}")
    if not installed(kind):
        how = _HOW_TO_INSTALL.get(kind, f"pip install {LIBRARIES[kind]}")
        raise UserError(f"loader {kind}: {LIBRARIES[kind]} not installed; {how}")
