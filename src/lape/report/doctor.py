"""The doctor: does a join hold on a model that somebody brings? What a row says, and what it leads to, in one table."""

import copy
import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from lape.errors import RunError, UsageError, first_line
from lape.files.characters import plural
from lape.hosts import Host, block_row, find, pair, parts, table_of, value_at
from lape.hosts.registry import RECORD
from lape.method import Grid, Rung
from lape.report.table import Table
from lape.surgery.forwards import Forward
from lape.surgery.hooks import called
from lape.surgery.layers import grid_text
from lape.surgery.operation import apply, fold, positions, remove
from lape.surgery.positions import Positions
from lape.surgery.probing import PatchGrid, cut_by, norm_elsewhere, reaches_others

PASSED, FAILED, NOT_CHECKED = "passed", "failed", "not checked"


@dataclass(frozen=True)
class Finding:
    """What came of one check."""

    check: str
    """What was checked."""

    result: str
    """"passed", "failed" or "not checked"."""

    says: str
    """What was seen, or why it failed, or why it could not be checked."""


@dataclass(frozen=True)
class Examination:
    """What `lape.check` found; printed, it is a table."""

    subject: str
    """The class of the model."""

    findings: tuple[Finding, ...]
    """In the order of the checks."""

    @property
    def failed(self) -> tuple[Finding, ...]:
        """Those that failed."""
        return tuple(finding for finding in self.findings if finding.result == FAILED)

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return not self.failed

    @property
    def table(self) -> Table:
        """All findings as a table."""
        rows = [(finding.check, finding.result, finding.says) for finding in self.findings]
        return Table([self.subject, "result", "what was seen"], rows, names=3)

    def __str__(self) -> str:
        return self.table.markdown()


class _NotChecked(Exception):
    """Why a check means nothing for this model."""


class _Failed(Exception):
    """What a check saw that must not be."""


def check(
    model: nn.Module,
    *,
    host: Host | None = None,
    grid: Grid | None = None,
    pe: str | None = None,
    inputs: Any = None,
) -> Examination:
    """Examine whether a join holds on a model: its row, its positions in every layer, and what is done with it later.

    All is tried on copies: the model stays as it was. Weights may be random. A model with a join is examined without.

    Args:
        model: As for `lape.apply`.
        host: Describes a model of a class of your own.
        grid: (rows, columns) of tokens, for a model that does not say it.
        pe: The position embedding; None keeps the model's own, and gives one that has none a learnt table.
        inputs: What the model is called with: a tensor, a tuple, or keywords; None stands for an image or a sequence
            made for the transformer inside.

    Returns:
        The findings; `print` shows them as a table.

    Raises:
        UsageError: For a folded model, and for one whose inputs cannot be guessed.

    Example:
        >>> import lape
        >>> found = lape.check(lape.create_model("vit_nano_patch2_8", join="default", depth=2))
        >>> found.passed
        True
        >>> found.findings[0].says
        'timm VisionTransformer: 2 layers, 4x4 patches, 1 token before them with a row, width 48, table pos_embed'
    """
    subject = type(model).__name__
    devices = {parameter.device.index or 0 for parameter in model.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices):  # new tables take random numbers
        try:
            patient = _Patient.of(model, host, grid, pe, inputs)
        except _Refused as refused:
            return Examination(subject, (Finding("host row", FAILED, str(refused)),))
        return Examination(subject, tuple(_finding(name, run, patient) for name, run in CHECKS.items()))


def _finding(name: str, run: "Callable[[_Patient], str]", patient: "_Patient") -> Finding:
    try:
        return Finding(name, PASSED, run(patient))
    except _NotChecked as error:
        return Finding(name, NOT_CHECKED, str(error))
    except (UsageError, RunError, _Failed) as error:
        return Finding(name, FAILED, str(error))
    except Exception as error:  # a model of somebody's may fail in any way, and the other checks are still of use
        return Finding(name, FAILED, f"{type(error).__name__}: {first_line(error)}")


class _Refused(Exception):
    """Why a model carries no join at all."""


@dataclass
class _Patient:
    """An untouched copy of a model, in evaluation and in double precision where it can be so."""

    model: nn.Module
    options: dict[str, Any]  # of `apply`
    has_table: bool
    sample: tuple[tuple[Any, ...], dict[str, Any]]  # what is called, with what
    whole: bool  # whether the whole model is called, and not the transformer inside
    zero_layers: set[int] = field(default_factory=set)  # whose attention changes nothing yet

    @classmethod
    def of(cls, model: nn.Module, host: Host | None, grid: Grid | None, pe: str | None, inputs: Any) -> "_Patient":
        """Copy a model; raise _Refused for one that carries no join."""
        twin = copy.deepcopy(model).eval()
        if host is None:
            try:
                vit, _ = find(twin)
            except UsageError as error:
                raise _Refused(str(error)) from error
            if RECORD in vit.__dict__:
                record = positions(twin)
                host = record.host if record.host.model is None else None
                grid = grid or (record.grid if record.host.grid is None else None)
                remove(twin)
        options: dict[str, Any] = {"host": host, "grid": grid, "pe": pe}
        joined = copy.deepcopy(twin)
        try:
            try:
                apply(joined, **options)
            except UsageError:
                if pe is not None:
                    raise
                options["pe"] = "learnable"
                apply(joined, **options)
        except UsageError as error:
            raise _Refused(str(error)) from error
        record = positions(joined)
        twins = twin if host is not None else find(twin)[0]
        table = table_of(twins, record.host)
        if table is not None and not table.any():  # a new one may be all zeros, which says nothing
            nn.init.normal_(table.detach(), std=0.02, generator=_numbers(table.device))
        sample = ((_sample(twins, record),), {}) if inputs is None else _as_call(inputs)
        patient = cls(twin, options, table is not None, sample, inputs is not None)
        return patient.in_double()

    def in_double(self) -> "_Patient":
        """Return the patient in double precision where its class computes in it."""
        arguments, keywords = self.sample
        double = _Patient(
            copy.deepcopy(self.model).double(),
            self.options,
            self.has_table,
            (tuple(map(_doubled, arguments)), {name: _doubled(value) for name, value in keywords.items()}),
            self.whole,
        )
        try:
            double.output(double.model)
        except Exception:
            return self
        return double

    def transformer(self, model: nn.Module) -> nn.Module:
        """Return the transformer in a copy of the model."""
        return model if self.options["host"] is not None else find(model)[0]

    def output(self, model: nn.Module, **others: Any) -> Tensor:
        """Return all numbers that a copy of the model gives for the sample."""
        arguments, keywords = self.sample
        run = model if self.whole else self.transformer(model)
        with torch.no_grad():
            numbers = [value.flatten() for value in _tensors(run(*others.get("arguments", arguments), **keywords))]
        if not numbers:
            raise _Failed(f"{type(run).__name__} gives no tensor of numbers.")
        return torch.cat([value.to(numbers[0].dtype) for value in numbers])

    @cached_property
    def untouched(self) -> Tensor:
        """What the model gives without a join."""
        return self.output(self.model)

    def joined(self, join: str = "lape", seed: int = 0) -> nn.Module:
        """Return a copy with a join, whose PE norms are away from where they begin."""
        pe = None if join == "default" else self.options["pe"]  # by default the model keeps what it has, or has not
        options = {"host": self.options["host"], "grid": self.options["grid"]}
        model = apply(copy.deepcopy(self.model), join, pe, **options)
        for name, parameter in model.named_parameters():
            if "pe_norm" in name:
                nn.init.normal_(parameter.detach(), generator=_numbers(parameter.device, seed))
        return model.eval()

    def same(self, one: Tensor, other: Tensor, what: str) -> str:
        """Return how far two outputs are apart; raise _Failed where that is more than rounding."""
        if one.shape != other.shape:
            raise _Failed(f"{what}: {len(one)} numbers, not {len(other)}.")
        if not torch.isfinite(one).all():
            raise _Failed(f"{what}: not all numbers are finite.")
        apart = ((one - other).abs().max() / other.abs().max().clamp_min(1e-30)).item()
        if apart > (1e-9 if one.dtype == torch.float64 else 1e-3):
            raise _Failed(f"{what}: the outputs are {apart:.1e} of the largest apart.")
        return f"{what}: the same outputs" + (f", to {apart:.0e}" if apart else " to the last bit")


# --- The checks


def _row(patient: _Patient) -> str:
    model = patient.joined()
    record = positions(model)
    host, prefix, rows = record.host, record.prefix, record.prefix_rows
    before = f"{plural(prefix, 'token')} before them" if prefix else "no token before them"
    if prefix:
        before += " with a row" if rows == prefix else f", {rows} of them with a row" if rows else " without a row"
    given = f"no table of its own: pe={record.scheme.embedding.name!r}"
    table = f"table {host.table}" if patient.has_table else given
    layers = plural(len(record.blocks), "layer")
    return f"{host.name}: {layers}, {grid_text(record.grid)} patches, {before}, width {record.width}, {table}"


def _grid(patient: _Patient) -> str:
    model = patient.joined("default")
    record = positions(model)
    patches = cut_by(record)
    if patches is None or record.host.sequence:
        raise _NotChecked("No convolution cuts an image into patches without overlap.")
    seen: list[str] = []
    patches.register_forward_hook(PatchGrid(record))
    patches.register_forward_hook(lambda _, __, output: seen.append(grid_text(tuple(output.shape[-2:]))))
    patient.output(model)
    if not seen:
        raise _NotChecked("The convolution that cuts the image into patches was not called as a module.")
    return f"The image is cut into {seen[0]} patches"


def _norm(patient: _Patient) -> str:
    model, joined = copy.deepcopy(patient.model), patient.joined()
    record = positions(joined)
    vit, calls = patient.transformer(model), {}
    blocks = [vit.get_submodule(_path(record.model, block)) for block in record.blocks]
    for number, block in enumerate(blocks):
        unit = called(block, block_row(record.host, block))
        unit.register_forward_pre_hook(partial(_note, calls, number), with_kwargs=True)
    patient.output(model)
    for number, block in enumerate(blocks):
        if number not in calls:
            kind = type(block).__name__
            raise _Failed(f"Block {number} ({kind}) is not called. Call block(x), not block.forward(x).")
        row = block_row(record.host, block)
        unit, (arguments, keywords) = called(block, row), calls[number]
        reaches = reaches_others(partial(unit, *arguments, **keywords), parts(block, row.norms), row)
        if reaches is False:
            raise _Failed(norm_elsewhere(record.host, block, row))
        if reaches is None:
            patient.zero_layers.add(number)
    if patient.zero_layers:
        still = _numbered(patient.zero_layers)
        raise _NotChecked(f"In layers {still} attention changes nothing yet: weights are zero.")
    return f"In each of {plural(len(blocks), 'layer')} its output at one token reaches others"


def _default(patient: _Patient) -> str:
    return patient.same(patient.output(patient.joined("default")), patient.untouched, "beside the untouched model")


def _heard(patient: _Patient) -> str:
    model = patient.joined()
    record = positions(model)
    whole: dict[int, Tensor] = {}
    units = [called(block, block_row(record.host, block)) for block in record.blocks]
    for layer, unit in enumerate(units):
        unit.register_forward_hook(partial(_keep, whole, layer))
    patient.output(model)
    with torch.no_grad():
        ladder = record.ladder(record.own_grid())
    silent: set[int] = set()
    for layer, rung in enumerate(ladder):
        for part in [part for part, value in rung._asdict().items() if value is not None]:
            stop = units[layer].register_forward_hook(partial(_enough, whole[layer]))
            try:
                with _without(record, layer, part):
                    patient.output(model)
            except _Enough as enough:
                if not enough.changed:
                    silent.add(layer)
            finally:
                stop.remove()
    if deaf := silent - patient.zero_layers:
        raise _Failed(f"What layers {_numbered(deaf)} are told of positions changes nothing.")
    if silent:
        raise _NotChecked(f"What layers {_numbered(silent)} are told changes nothing yet: weights are zero.")
    return f"What each of {plural(len(ladder), 'layer')} is told of positions changes its output"


def _removed(patient: _Patient) -> str:
    model = patient.joined()
    if torch.equal(patient.output(model), patient.untouched):
        raise _Failed("join='lape' gives the outputs of the untouched model.")
    names, before = list(remove(model).state_dict()), list(patient.model.state_dict())
    if names != before:
        raise _Failed(f"After lape.remove the model has other parameters: {sorted({*names} ^ {*before})}.")
    return patient.same(patient.output(model), patient.untouched, "beside the untouched model")


def _folded(patient: _Patient) -> str:
    model = patient.joined()
    before = patient.output(model)
    return patient.same(patient.output(fold(model)), before, "beside the model that was folded")


def _copied(patient: _Patient) -> str:
    model = patient.joined()
    return patient.same(patient.output(copy.deepcopy(model)), patient.output(model), "beside the original")


def _saved(patient: _Patient) -> str:
    model, other, file = patient.joined(), patient.joined(seed=1), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    return patient.same(patient.output(other), patient.output(model), "beside the model that was saved")


def _other_sizes(patient: _Patient) -> str:
    joined = patient.joined()
    record = positions(joined)
    (image, *others), _ = patient.sample if patient.sample[0] else ((None,), {})
    if not isinstance(image, Tensor) or image.ndim != 4 or record.host.sequence:
        raise _NotChecked("Its input is no image.")
    rows, columns = record.own_grid()
    height, width = image.shape[2] // rows * (rows + 1), image.shape[3] // columns * (columns + 2)
    larger = torch.randn(
        *image.shape[:2], height, width, dtype=image.dtype, device=image.device, generator=_numbers(image.device)
    )
    size = f"{height}x{width} images"

    def run(model: nn.Module) -> Tensor:
        if hasattr(type(patient.transformer(model)), "set_input_size"):
            resized: Any = patient.transformer(model)
            resized.set_input_size((height, width))
        return patient.output(model, arguments=(larger, *others))

    try:
        expected = run(copy.deepcopy(patient.model))
    except Exception as error:
        raise _NotChecked(f"The untouched model refuses {size}: {first_line(error)}") from error
    said = patient.same(run(patient.joined("default")), expected, f"{size}, beside the untouched model")
    if not torch.isfinite(run(joined)).all():
        raise _Failed(f"join='lape' gives numbers that are not finite for {size}.")
    return said


def _compiled(patient: _Patient) -> str:
    def whole(model: nn.Module) -> Any:
        return torch.compile(model if patient.whole else patient.transformer(model), fullgraph=True, backend="eager")

    arguments, keywords = patient.sample
    with torch.no_grad():
        try:
            whole(copy.deepcopy(patient.model))(*arguments, **keywords)
        except Exception as error:
            raise _NotChecked(f"The untouched model does not compile to one graph: {first_line(error)}") from error
        model = patient.joined()
        output = torch.cat([*map(_flat, _tensors(whole(model)(*arguments, **keywords)))])
    return patient.same(output, patient.output(model), "one graph, and beside the model that was compiled")


CHECKS: Mapping[str, Callable[[_Patient], str]] = {
    "host row": _row,
    "grid of patches": _grid,
    "norm before attention": _norm,
    "join='default'": _default,
    "every rung is heard": _heard,
    "lape.remove": _removed,
    "lape.fold": _folded,
    "copy.deepcopy": _copied,
    "save and load": _saved,
    "other sizes": _other_sizes,
    "torch.compile": _compiled,
}


class _Enough(Exception):
    """The layer that is looked at has run, so the forward need not go on."""

    def __init__(self, changed: bool) -> None:
        super().__init__()
        self.changed = changed


def _enough(whole: Tensor, block: nn.Module, inputs: Any, output: Any) -> None:
    raise _Enough(not torch.equal(torch.cat([*map(_flat, _tensors(output))]), whole))


def _keep(outputs: dict[int, Tensor], layer: int, block: nn.Module, inputs: Any, output: Any) -> None:
    outputs[layer] = torch.cat([*map(_flat, _tensors(output))])


@contextmanager
def _without(record: Positions, layer: int, part: str) -> Iterator[None]:
    """Have one part of one layer's rung be zeros."""
    told = record.for_the_block

    def silenced(forward: Forward, number: int, again: bool = False) -> Rung:
        rung = told(forward, number, again)
        value = getattr(rung, part)
        return rung if number != layer or value is None else rung._replace(**{part: torch.zeros_like(value)})

    vars(record)["for_the_block"] = silenced
    try:
        yield
    finally:
        del vars(record)["for_the_block"]


# --- What the model is called with


def _as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,), {}


def _sample(vit: nn.Module, record: Positions) -> Tensor:
    """Return an image, or a sequence of tokens, for a transformer; raise UsageError where none can be guessed."""
    host, some = record.host, next(vit.parameters())
    rows, columns = record.grid
    if host.sequence and host.before is None:
        raise UsageError(
            f"What a {host.name} is called with cannot be guessed. Give it: lape.check(model, inputs=...)."
        )
    if host.sequence:
        batch_first = value_at(vit, host.batch_first)
        shape = (1, rows * columns, record.width) if batch_first else (rows * columns, 1, record.width)
    else:
        channels = next((part.in_channels for part in vit.modules() if isinstance(part, nn.Conv2d)), 3)
        shape = (1, channels, *_image_size(vit, host, record.grid))
    return torch.randn(shape, generator=_numbers(some.device), device=some.device).to(some.dtype)


def _image_size(vit: nn.Module, host: Host, grid: Grid) -> Grid:
    if isinstance(host.grid, tuple):
        return pair(value_at(vit, host.grid[0]))
    named = [(part, name) for name in ("img_size", "image_size", "patch_size") for part in vit.modules()]
    for part, name in named:
        size = getattr(part, name, None)
        if isinstance(size, int | tuple | list):
            height, width = pair(size)
            return (height, width) if name != "patch_size" else (grid[0] * height, grid[1] * width)
    config = getattr(vit, "pretrained_cfg", None) or {}
    if "input_size" in config:
        return pair(config["input_size"][1:])
    strides = [part.stride for part in vit.modules() if isinstance(part, nn.Conv2d)]
    if strides and all(isinstance(side, int) for side in strides[0]):
        return grid[0] * int(strides[0][0]), grid[1] * int(strides[0][1])
    raise UsageError(
        f"The size of the images of a {host.name} cannot be guessed. Give some: lape.check(model, inputs=...)."
    )


def _numbers(device: torch.device, seed: int = 0) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def _doubled(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _tensors(output: Any) -> Iterator[Tensor]:
    """Yield the tensors of numbers in what a model gives."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _tensors(value)


def _flat(value: Tensor) -> Tensor:
    return value.flatten()


def _note(calls: dict[int, Any], number: int, block: nn.Module, arguments: Any, keywords: Any) -> None:
    calls[number] = arguments, keywords


def _path(model: nn.Module, block: nn.Module) -> str:
    return next(name for name, part in model.named_modules() if part is block)


def _numbered(layers: set[int]) -> str:
    return ", ".join(map(str, sorted(layers)))
