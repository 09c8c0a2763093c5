"""The libraries that each loader needs, whether they are installed, and how to get them."""

from importlib.util import find_spec

from repcon.runtime.errors import UserError

LIBRARIES = {
    "reference": ("PIL",),
    "torch": ("simplejpeg",),
    "dali": ("nvidia.dali",),
    "ffcv": ("ffcv",),
}
"""Every loader, and the modules that it imports."""
_HOW_TO_INSTALL = {
    "dali": "on Linux: pip install 'repcon[dali]'",
    "ffcv": "on Linux: run `make ffcv`, or tools/install-ffcv with the Python that runs repcon",
}


def installed(kind: str) -> bool:
    """Whether the loader's libraries are installed."""
    return not _missing(kind)


def require_installed(kind: str) -> None:
    """Raises UserError, with the command that installs it, where the loader is unknown or its libraries are missing."""
    if kind not in LIBRARIES:
        raise UserError(f"loader {kind}: unknown; choose auto, {', '.join(LIBRARIES)}")
    if missing := _missing(kind):
        how = _HOW_TO_INSTALL.get(kind, f"pip install {' '.join(missing)}")
        raise UserError(f"loader {kind}: {' and '.join(missing)} not installed; {how}")


def _missing(kind: str) -> list[str]:
    return [library for library in LIBRARIES[kind] if not _importable(library)]


def _importable(library: str) -> bool:
    try:
        return find_spec(library) is not None
    except ModuleNotFoundError:  # of the package around a submodule
        return False
