"""Optional packages, which an extra of repcon installs."""

from importlib.util import find_spec

from repcon.runtime.errors import UserError


def require_extra(extra: str, modules: tuple[str, ...], what: str) -> None:
    """Raises UserError with the pip command where one of the modules is not installed; imports none of them.

    what: the feature that needs them, with which the message begins, for example `--to onnx`.
    """
    specs = {name: find_spec(name) for name in modules}
    # A folder of that name in the working folder has no origin.
    missing = [name for name, spec in specs.items() if spec is None or spec.origin is None]
    if missing:
        raise UserError(f"{what} needs {', '.join(missing)}: pip install 'repcon[{extra}]'")
