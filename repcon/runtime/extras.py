"""Optional packages, which an extra of repcon installs."""

from importlib.util import find_spec

from repcon.runtime.errors import UserError


def require_extra(extra: str, modules: tuple[str, ...], what: str) -> None:
    """Raises UserError with the pip command where one of the modules is not installed; imports none of them.

    what: what needs them, as it was asked for: `--to onnx`. It begins the message.
    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise UserError(f"{what} needs {', '.join(missing)}: pip install 'repcon[{extra}]'")
