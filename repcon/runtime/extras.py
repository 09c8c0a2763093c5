"""Optional packages, which an extra of repcon installs."""

from importlib.util import find_spec

from repcon.runtime.errors import UserError


def require_extra(extra: str, modules: tuple[str, ...], what: str) -> None:
    """Raises UserError with the pip command where one of the modules is not installed; imports none of them.

    what: the feature that needs them, with which the message begins, for example `--to onnx`.
    """
    missing = [name for name in modules if not _is_installed(name)]
    if missing:
        raise UserError(f"{what} needs {', '.join(missing)}: pip install 'repcon[{extra}]'")


def _is_installed(name: str) -> bool:
    """Whether the module is there; a folder of that name in the working folder is none."""
    spec = find_spec(name)
    return spec is not None and spec.origin is not None
