"""Our models' names in timm's registry: at once where timm is loaded, otherwise as soon as it is.

`import lape` must not take the seconds that importing timm takes, and `timm.create_model("cct_7_3x1_32", join="lape")`
must work after it, in whichever order the two are imported.
"""

import sys
from importlib.util import find_spec
from typing import Any


def register() -> None:
    """Add the names to timm's registry, now or when timm has been imported."""
    if "timm" in sys.modules:
        import lape.models  # noqa: F401  registers them
    else:
        sys.meta_path.insert(0, _WhenTimmIsImported())


class _WhenTimmIsImported:
    """Finds timm as everybody does, and has our models imported behind it."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> Any:
        if fullname != "timm":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def execute_and_register(module: object) -> None:
                execute(module)
                import lape.models  # noqa: F401

            loader.exec_module = execute_and_register
        return spec
