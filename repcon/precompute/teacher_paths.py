"""Where teachers lie: a relative path counts from the working directory, then from the store's folder."""

from collections.abc import Mapping
from pathlib import Path

from repcon.runtime.errors import UserError

_PREFIX = "local-dir:"


def locate(models: Mapping[str, str], store: str, option: str) -> dict[str, str]:
    """{teacher: model} with each relative folder that is not here replaced by the one near the store.

    Raises UserError naming all teachers whose folder is in neither place, and the command's `option` that names it.
    Models that are no paths stay as they are.
    """
    found = {name: _locate(model, store) for name, model in models.items()}
    if missing := [name for name, model in found.items() if model is None]:
        listed = "; ".join(f"teacher {name}: model {models[name]}: no such folder" for name in missing)
        hint = " ".join(f"{option} {name}=MODEL" for name in missing)
        raise UserError(f"{listed}; neither here nor beside {store}; name where it lies: {hint}")
    return {name: model for name, model in found.items() if model is not None}


def _locate(model: str, store: str) -> str | None:
    """The model, with a relative path resolved; None where it is a path that does not exist."""
    prefix = _PREFIX if model.startswith(_PREFIX) else ""
    name = model.removeprefix(prefix)
    is_path = prefix or name.startswith((".", "/", "~")) or ("/" in name and ":" not in name)
    if ":" in name or Path(name).expanduser().exists():
        return model
    if "://" not in store and not name.startswith(("/", "~")):
        folder = Path(store).absolute()
        for place in (folder, folder.parent, folder.parent.parent):
            if (place / name).is_dir():
                return f"{prefix}{place / name}"
    return None if is_path else model
