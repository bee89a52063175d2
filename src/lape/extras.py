"""What the extras of this package bring, beside torch and timm: asked for before work begins that would end without."""

from importlib.util import find_spec

from lape.errors import RunError

# As in pyproject.toml, by the names that are imported.
EXTRAS = {
    "train": ("lightning_fabric", "jsonargparse", "shtab", "torchmetrics", "rich", "sklearn", "scipy"),
    "report": ("matplotlib", "jinja2", "scipy"),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "dense": ("transformers", "faster_coco_eval", "skimage"),
    "export": ("onnx", "onnxscript", "onnxruntime"),
}


def installed(package: str) -> bool:
    """Return whether a package can be imported, without importing it."""
    return find_spec(package) is not None


def require(what: str, *packages: str) -> None:
    """Raise RunError naming the extras of those packages that are not installed; `what` needs them all."""
    if missing := [package for package in dict.fromkeys(packages) if not installed(package)]:
        extras = dict.fromkeys(next(name for name, held in EXTRAS.items() if package in held) for package in missing)
        raise RunError(
            f"{what} needs {', '.join(missing)}, not installed here. Install what is missing: "
            f"pip install 'lape[{','.join(extras)}]'."
        )
