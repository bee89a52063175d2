"""A model as one file for other programs: ONNX, or torch.export's .pt2; each is run again beside the model itself."""

import copy
import io
import json
import logging
import math
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from lape import __version__
from lape.data.pictures import MODES
from lape.errors import RunError, UsageError, first_line, lacking
from lape.extras import require
from lape.files import writing
from lape.models.mask_rcnn import MaskRCNN
from lape.sharing import hub
from lape.surgery.operation import fold as folded
from lape.weights import fill

# The largest difference of an output that a file may have, beside the model's largest: other kernels round otherwise,
# by some 1e-6; another function differs by more than this.
BOUND = 1e-4

Runner = Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Exported:
    """A file that was written and run: how far its outputs are from the model's, and for which images that was seen."""

    path: Path
    difference: float  # the largest, beside the model's largest output
    shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Format:
    """One kind of file: its bytes, from a program and what is known of the model, and how they run; what that needs.

    `dump` is told the version of ONNX's operators too, where one is asked for.
    """

    dump: Callable[[ExportedProgram, str, int | None], bytes]
    load: Callable[[bytes], Runner]
    needs: tuple[str, ...] = ()


def _dump_onnx(program: ExportedProgram, config: str, opset: int | None) -> bytes:
    for name in ("onnxscript", "onnx_ir", "torch.onnx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    count = len(program.graph_signature.user_outputs)
    names = ["output"] if count == 1 else [f"output_{number}" for number in range(count)]
    written: Any = torch.onnx.export(
        program, dynamo=True, input_names=["images"], output_names=names, verbose=False, external_data=False,
        opset_version=opset,
    )  # fmt: skip
    if opset not in (None, version := written.model.opset_imports[""]):  # torch writes what it can, and goes on
        raise UsageError(
            f"opset is a version of ONNX's operators that torch can write; {opset} was received, and it wrote "
            f"{version}. Give --opset {version}, or leave it out."
        )
    written.rename_axes({written.model.graph.inputs[0].shape[0]: "batch"})
    written.model.metadata_props[hub.HEADER] = config
    return written.model_proto.SerializeToString()


def _load_onnx(content: bytes) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(value) for value in session.run(None, {"images": images.numpy()})]


def _dump_program(program: ExportedProgram, config: str, opset: int | None) -> bytes:
    if opset is not None:
        raise UsageError(f"opset {opset} is a version of ONNX's operators, and a .pt2 has none. Leave it out.")
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={hub.CONFIG: config})
    return content.getvalue()


def _load_program(content: bytes) -> Runner:
    module = torch.export.load(io.BytesIO(content)).module()
    return lambda images: hub.outputs(module, images)


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        ".onnx": Format(_dump_onnx, _load_onnx, ("onnx", "onnxscript", "onnxruntime")),
        ".pt2": Format(_dump_program, _load_program),
    }
)


def export(
    model: nn.Module,
    path: str | Path,
    fold: bool = False,
    dynamic_size: bool = False,
    input_size: tuple[int, int, int] | None = None,
    opset: int | None = None,
    known: hub.Known | None = None,
) -> Exported:
    """Write a model as a file for other programs: ONNX (.onnx) or torch.export (.pt2), by the suffix of `path`.

    The file takes float32 images (B, C, H, W), normalised, for any B. Before it is put in its place it is run beside
    the model. The model itself does not change. Its metadata, JSON under the key "lape", says what an image goes
    through before it is handed over, what the outputs are called, and that they are logits.

    Args:
        model: A classifier or segmenter, with or without a join.
        path: Where to write it; ends in .onnx (needs the extra `export`) or .pt2.
        fold: Replace positions by constants first; the file is then for one size of images.
        dynamic_size: Leave H and W open too; not together with `fold`.
        input_size: (C, H, W) of the images; None stands for the model's own.
        opset: Version of ONNX's operators; None stands for the one that torch writes by itself.
        known: What else the file is to say (classes, normalisation, results, licence); None stands for nothing.

    Returns:
        The path, the largest difference of an output (relative to the largest output), and the shapes that were tried.

    Raises:
        UsageError: For a suffix, a model or a combination that cannot be exported, and where a file that lape did not
                write is in the way.
        RunError: Where the file computes something else than the model (a difference above 1e-4).

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import lape
        >>> model = lape.create_model("vit_nano_patch2_8", num_classes=3, depth=1)
        >>> written = lape.export(model, Path(tempfile.mkdtemp()) / "model.pt2", fold=True)
        >>> written.path.name, written.difference < 1e-4
        ('model.pt2', True)
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise UsageError(
            f"{path.name}: the suffix says what is written, {' or '.join(FORMATS)}; for weights there is "
            "lape.save_pretrained."
        )
    form = FORMATS[path.suffix]
    require(f"A file {path.suffix}", *form.needs)
    if isinstance(model, MaskRCNN):
        raise UsageError(
            "A detector is not exported: how many regions it looks at depends on the picture, which torch.export "
            "cannot follow through torchvision's detector. Save it with lape.save_pretrained."
        )
    if fold and dynamic_size:
        raise UsageError(
            "A folded model has its positions for one size of images, and dynamic_size asks for all. Leave out one of "
            "the two; for a few sizes, export one folded file for each (set_input_size)."
        )
    writing.refuse_others([path])
    original = copy.deepcopy(model).cpu().float().eval()
    batches = [hub.random_images(original, count, input_size) for count in (2, 1, 3)]
    if dynamic_size:
        step = _step(original)
        batches += [_larger(batches[1], 2 * step, step), _larger(batches[2], 0, 3 * step)]
        _refuse_one_size(original, batches[-1])
    program = _program(folded(copy.deepcopy(original)) if fold else original, batches[0], dynamic_size)
    with _following(original, path.suffix, dynamic_size):
        content = form.dump(program, _config(model, known or hub.Known(), tuple(batches[1].shape[1:])), opset)
        answer = form.load(content)
        answers = [answer(images) for images in batches]  # a program refuses what it was not traced for
    difference = _difference(answers, [hub.outputs(original, images) for images in batches])
    if not difference <= BOUND:  # NaN is not
        raise RunError(
            f"{path} was not written: its outputs differ from the model's by {difference:.1e} of the largest, and "
            f"{BOUND:.0e} is allowed."
        )
    writing.write_marked({path: content})
    return Exported(path, difference, tuple(tuple(images.shape) for images in batches))


def is_saved(source: Path) -> bool:
    """Whether a path is what `lape.save_pretrained` writes, and not a run."""
    return source.suffix == ".safetensors" or (source / hub.CONFIG).exists()


def load_model(source: Path, **model_args: Any) -> tuple[nn.Module, hub.Known]:
    """Return the model of a run, of its checkpoint or of what `lape.save_pretrained` wrote, and what is known of it.

    `model_args` are more keywords for the model. Raises RunError as `load_run` and `from_pretrained` do.
    """
    if is_saved(source):
        return hub.from_pretrained(source, **model_args), hub.known_of(source)
    from lape.tasks.measures import TITLES
    from lape.training.evaluation import load_run

    here = {"accelerator": "cpu", "devices": 1, "nodes": 1, "precision": "32-true"}
    run = load_run(source, lambda _, stored: stored, **here)
    model: Any = run.work.module
    stored = run.work.source
    if model_args:
        model, weights = (
            hub.build_model(hub.configuration(model), str(run.path), **model_args).eval(),
            model.state_dict(),
        )
        fill(model, weights, run.path)
    model.pretrained_cfg = model.pretrained_cfg | run.work.input_config() | {"label_names": stored.classes}
    metrics = {f"{TITLES[name]}, %": value for name, value in run.metrics.items() if name in TITLES}
    return model, hub.Known(metrics=metrics, data=stored.name)


def _config(model: nn.Module, known: hub.Known, shape: tuple[int, ...]) -> str:
    """Return what a model's user must know, as far as the model tells, and who wrote it; `shape` is of an image."""
    cfg = {**(getattr(model, "pretrained_cfg", None) or {})}
    cfg |= {name: value for name, value in (("mean", known.mean), ("std", known.std)) if value is not None}
    cfg |= {"label_names": known.classes} if known.classes else {}
    shown: dict[str, Any] = {name: list(cfg[name]) for name in ("mean", "std", "label_names") if cfg.get(name)}
    if cfg.get("architecture"):
        shown["architecture"] = cfg["architecture"]
    if {"mean", "std", "crop_pct", "interpolation"} <= cfg.keys():
        try:
            shown["preprocessing"] = preprocessing(cfg, shape)
        except (TypeError, ValueError, ArithmeticError) as error:
            raise RunError(
                f"The model's configuration says of its images what cannot be ({error}). Mend crop_pct, mean or std in "
                "it."
            ) from error
    told = {"license": known.license, "metrics": known.metrics and {"on": known.data, **known.metrics}}
    return json.dumps(
        {**shown, "softmax": False, **{name: value for name, value in told.items() if value}, writing.MARK: __version__}
    )


def preprocessing(cfg: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
    """Say what becomes of a picture before a model takes it as an image of that shape (C, H, W), step by step.

    `cfg` is what timm's models say of their images. A picture is turned upright as EXIF says, and brought to the
    colours of `mode`. With the crop mode "center" its shorter side is resized to `resize`, or where that is two numbers
    it covers that height and width; then `crop` (height, width) is cut from its centre. Values are divided by `scale`;
    `mean` is subtracted, and what is left divided by `std`.
    """
    channels, *sides = shape
    larger = [math.floor(side / cfg["crop_pct"]) for side in sides]
    return {
        "upright": True,
        "mode": MODES.get(channels),
        "crop_mode": cfg.get("crop_mode", "center"),
        "resize": larger if len({*larger}) > 1 else larger[0],
        "interpolation": cfg["interpolation"],
        "crop": sides,
        "scale": 255,
        "mean": list(cfg["mean"]),
        "std": list(cfg["std"]),
    }


def _step(model: nn.Module) -> int:
    """Return what the sides of images are multiples of, as far as the parts of a model tell."""
    multiples = [getattr(part, "multiple_of", getattr(part, "patch_size", None)) for part in model.modules()]
    sides = [side for sizes in multiples for side in (sizes if isinstance(sizes, tuple) else (sizes,))]
    return math.lcm(*(side for side in sides if isinstance(side, int)), getattr(model, "multiple", 1))


def _larger(images: Tensor, down: int, right: int) -> Tensor:
    """Return images with more pixels on their sides."""
    return F.pad(images, (0, right, 0, down), mode="replicate")


def _refuse_one_size(model: nn.Module, images: Tensor) -> None:
    """Raise UsageError for a model that refuses images of another size, and for one of windows."""
    if any(hasattr(part, "window_size") for part in model.modules()):  # the tracer takes minutes, and then fails
        raise UsageError(
            f"A {type(model).__name__} cuts windows out of images of one size, and a file with dynamic_size would take "
            "all. Leave dynamic_size out; for a few sizes, export one file for each (set_input_size)."
        )
    try:
        hub.outputs(model, images)
    except Exception as error:  # every model refuses in its own way
        raise UsageError(
            f"dynamic_size needs a model that takes images of every size, and {type(model).__name__} refused another "
            f"({first_line(error)}) Make it with dynamic_img_size=True, or leave dynamic_size out."
        ) from error


def _program(model: nn.Module, images: Tensor, dynamic_size: bool) -> ExportedProgram:
    """Trace a model for every number of images, and with `dynamic_size` for all sides that it takes."""
    sides = {2: Dim.DYNAMIC, 3: Dim.DYNAMIC} if dynamic_size else {}
    with _following(model, "torch.export", dynamic_size), torch.no_grad():
        return torch.export.export(model, (images,), dynamic_shapes=({0: Dim("batch"), **sides},))


@contextmanager
def _following(model: nn.Module, tool: str, dynamic_size: bool) -> Generator[None, None, None]:
    """Turn what a tracer raises, of many kinds, into a UsageError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or lacking(error):
            raise
        what = "for images of every size" if dynamic_size else "as it is"
        way = " Leave dynamic_size out; for a few sizes, export one file for each." if dynamic_size else ""
        reason = first_line(error.__cause__ if isinstance(error.__cause__, Exception) else error)
        raise UsageError(f"{tool} cannot follow {type(model).__name__} {what} ({reason}).{way}") from error


def _difference(answers: list[list[Tensor]], expected: list[list[Tensor]]) -> float:
    """Return the largest difference of any output of any batch, beside the model's largest; NaN where there is one."""
    pairs = [pair for batches in zip(answers, expected, strict=True) for pair in zip(*batches, strict=True)]
    ratios = [(ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30) for ours, theirs in pairs]
    return float(torch.stack(ratios).max())  # Python's max could lose a NaN
