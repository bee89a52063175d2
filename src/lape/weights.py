"""Weights from files: the authors', timm's, transformers' and ours. The only room that opens weight files."""

import argparse
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from os import SEEK_END
from pathlib import Path
from pickle import UnpicklingError
from pickletools import genops
from typing import Any, BinaryIO
from zipfile import ZIP_STORED, ZipFile

import torch
from torch import Tensor, nn

from lape.errors import RunError, UsageError, first_line
from lape.experiment import Experiment
from lape.fetching import refuse_unreachable, timm_weights
from lape.files import reading
from lape.files.characters import plural
from lape.hosts import Host, as_rows, blocks_path, find, grid_of, value_at
from lape.hosts.registry import RECORD
from lape.method import POSITION_EMBEDDINGS, TABLES, Grid, Table
from lape.names import SchemeNames
from lape.surgery.hooks import GENERATOR
from lape.surgery.operation import apply
from lape.surgery.positions import BIAS_TABLE, FOURIER, FREQUENCIES, Positions, resized_bias_table
from lape.surgery.proxy import Proxies
from lape.surgery.saving import is_of_transformers

Weights = dict[str, Tensor]
Many = list | tuple | set

_RECOMPUTED = re.compile(r"\.(relative_position_index|attn_mask)$")
# What PyTorch puts into the names of modules that it compiles, shards or recomputes; no module is called so.
_WRAPPED = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Where training programs keep weights, as timm looks for them: their running average first.
_AVERAGES = ("state_dict_ema", "model_ema")
_KEPT = (*_AVERAGES, "state_dict", "model")
# What a start may lack in patch embedding, blocks and tables; layer scales start where they change nothing, at 1.
_BROUGHT = rf"pe_norm\.\w+|{BIAS_TABLE}|{FREQUENCIES}|{GENERATOR}\.\w+|{FOURIER}\.[\w.]+"  # by a join, beside its table
_MAY_BE_NEW = re.compile(rf"(^|\.)({_BROUGHT}|absolute_pos_embed|ls\d\.gamma)$")
_PREFIX_TOKENS = ("cls_token", "dist_token", "reg_token")
_PATCHES = "patch_embed.proj.weight"


@dataclass(frozen=True)
class Loaded:
    """What a file did not bring: the model's own initial values stand there.

    `average` is where the file keeps the running average of its weights, if that was taken.
    """

    missing: tuple[str, ...]
    average: str | None = None

    def __str__(self) -> str:
        taken = f"{_of_an_average(self.average)} " if self.average else ""
        if not self.missing:
            return f"{taken}Every parameter was loaded."
        return (
            f"{taken}{_named(self.missing)} not in the file: they keep their initial values, so the model does not "
            "compute what the file's did. Train it before use."
        )


@dataclass(frozen=True)
class Started:
    """What a start took from `source`; `missing` kept the model's initial values, `left` stayed behind.

    `average` is where the source keeps the running average of its weights, if that was taken.
    """

    source: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    left: tuple[str, ...]
    average: str | None = None

    def __str__(self) -> str:
        lines = [f"{self.source}: {plural(len(self.loaded), 'tensor')} loaded."]
        if self.average:
            lines.append(_of_an_average(self.average))
        if self.missing:
            lines.append(f"Not in it, initial values stay: {_grouped(self.missing, self.loaded)}.")
        if self.left:
            lines.append(f"In it, and not taken: {_grouped(self.left, self.loaded)}.")
        return "\n".join(lines)


def read(path: str | Path) -> Weights:
    """Return the tensors of a .safetensors file or of a checkpoint that torch.save wrote, without running its code.

    Of a checkpoint with a running average these are the average; of a run of ours, what the run validates. Raises
    RunError, naming the file, where it cannot be read, holds code, or holds no weights.
    """
    return _state(opened(Path(path)), path).weights


def opened(path: Path) -> Any:
    """Return what a file of tensors and plain values holds, on the CPU; raises RunError, naming it, where it cannot."""
    try:
        with reading.opened(path) as file:
            if path.suffix == ".safetensors":
                from safetensors.torch import load_file

                return load_file(path)
            # The authors' and DeiT's checkpoints hold their arguments, a plain namespace, beside the weights.
            with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Detected pickle protocol")
                _refuse_packed(file)
                stored = torch.load(file, map_location="cpu", weights_only=True)
                _refuse_swollen(stored, file.seek(0, SEEK_END))
                return stored
    except RunError:
        raise
    except UnpicklingError as error:
        raise RunError(
            f"{path} holds more than tensors and plain values, and reading it could run code; it was not read. "
            "Give a file that holds nothing else, best a .safetensors."
        ) from error
    except FileNotFoundError as error:
        raise RunError(f"{path} does not exist. Check the path.") from error
    except Exception as error:  # torch and safetensors raise many kinds for a damaged file
        raise RunError(f"{path} cannot be read as a checkpoint ({first_line(error)}). Is it complete?") from error


def _refuse_packed(file: BinaryIO) -> None:
    """Raise ValueError for a zip that unpacks to more than it is: torch.save packs nothing, and all of it once."""
    begins = file.read(4)
    if begins == b"PK\x03\x04":  # torch reads everything else as a pickle
        with ZipFile(file) as archive:
            entries = archive.infolist()
            moved = archive.comment or min((entry.header_offset for entry in entries), default=0)
        if moved:  # torch may find another directory than Python does
            raise ValueError("something stands before or behind its parts")
        packed = next((entry.filename for entry in entries if entry.compress_type != ZIP_STORED), None)
        if packed:
            raise ValueError(f"{packed} is packed in it, and torch.save packs nothing")
        if sum(entry.file_size for entry in entries) > file.seek(0, SEEK_END):
            raise ValueError("its parts are larger than the whole")
        with ZipFile(file) as archive:
            pickled = next((archive.read(entry) for entry in entries if entry.filename.endswith("data.pkl")), b"N.")
        if any(code.name == "GLOBAL" and str(of).endswith(" bytearray") for code, of, _ in genops(pickled)):
            raise ValueError("it asks for memory by a number, bytearray(...), and torch.save writes none")
    file.seek(0)


def _refuse_swollen(stored: Any, size: int) -> None:
    """Raise ValueError for tensors that say more than a file of that size holds, as one number seen a million times."""
    told, waiting, seen = 0, [stored], set[int]()
    while waiting:
        part = waiting.pop()
        if isinstance(part, Tensor):
            told += part.numel() * part.element_size()
        elif id(part) not in seen:
            seen.add(id(part))
            inside = vars(part) if isinstance(part, argparse.Namespace) else part
            waiting += inside.values() if isinstance(inside, Mapping) else inside if isinstance(inside, Many) else ()
    if told > 4 * size + (1 << 20):  # some tensors have several names, and little ones many
        raise ValueError(f"its tensors say that they take {told} bytes, and it has {size}")


@dataclass(frozen=True)
class _Source:
    """Weights, what to call them, and where they were kept if they are an average."""

    weights: Weights
    where: str
    average: str | None


def _state(stored: Any, where: str | Path) -> _Source:
    average = None
    settings = stored.get("experiment") if isinstance(stored, Mapping) else None
    if isinstance(settings, Mapping) and "ema_evaluated" in settings and "model" in stored:  # of a run of ours
        judged = judged_weights(stored)
        stored, average = judged, "ema" if judged is stored.get("ema") else None
    while isinstance(stored, Mapping):
        kept = next((name for name in _KEPT if isinstance(stored.get(name), Mapping)), None)
        if kept is None:
            break
        stored, average = stored[kept], average or (kept if kept in _AVERAGES else None)
    if not _full_of_tensors(stored):
        inside = (
            [repr(name) for name, value in stored.items() if _full_of_tensors(value)]
            if isinstance(stored, Mapping)
            else []
        )
        edit = f" It has some under {' and '.join(inside)}: give the state dict there." if inside else ""
        raise RunError(
            f"{where} holds no weights: a mapping of names to tensors is expected, or one under 'model'.{edit}"
        )
    named = {_WRAPPED.sub("", name).removeprefix("module."): value for name, value in stored.items()}
    return _Source(named, str(where), average)


def _full_of_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(part, Tensor) for part in value.values())


def refuse_another(own: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Raise RunError, naming the file and the first difference, where its weights are another model's."""
    for name in [*own, *weights]:
        here, there = (tuple(side[name].shape) if name in side else None for side in (own, weights))
        if here != there:
            told = f"{name} is {there or 'missing'} in the file and {here or 'missing'} in the model"
            raise RunError(f"{path} is of another model: {told}. Name the model that it was saved from.")


def fill(module: nn.Module, weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Fill a model; raises RunError naming the file and the first difference where it is of another model."""
    refuse_another(module.state_dict(), weights, path)
    try:
        broken = next((name for name, value in weights.items() if not value.isfinite().all()), None)
        module.load_state_dict(weights)
    except RuntimeError as error:  # tensors of another kind, as sparse ones
        raise RunError(f"{path} does not fit the model ({first_line(error)}). Give another file.") from error
    if broken:
        raise RunError(f"{path} is damaged: {broken} is not finite in it. Give another file.")


def judged_weights(saved: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """Return those weights of a checkpoint that its run validates: their average (EMA), or the weights themselves."""
    averaged = saved.get("ema") if Experiment.of(saved["experiment"]).ema_evaluated else None
    return averaged or saved["model"]


def convert(weights: Mapping[str, Tensor], model: nn.Module) -> Weights:
    """Return weights under a model's own names and sizes, from its family's first authors', LaPE's authors' or timm's.

    Tables are resized to the model's grid by its host's rule; one of as many patches is taken as it is. Raises RunError
    where a file's table cannot be made the model's, and UsageError for a model of another library.
    """
    vit, host = _of_timm(model)
    assert host.files is not None
    path = _path(model, vit)
    if path and any(name.startswith(path) for name in weights):  # of the whole that the transformer is a part of
        inside = {name.removeprefix(path): value for name, value in weights.items() if name.startswith(path)}
        around = {name: value for name, value in weights.items() if not name.startswith(path)}
        converted = {f"{path}{name}": value for name, value in convert(inside, vit).items()}
        return converted | renamed(around, getattr(model, "names", ()))
    named = {name: value for name, value in renamed(weights, host.files.names).items() if not _RECOMPUTED.search(name)}
    named = _frequencies_by_block(named, vit)
    # timm's filter would resample patches of another size, which are another model's, and tables by a rule of its own:
    # also relative ones that fit, where a window is no square.
    own = vit.state_dict()
    tables = [name for name in named if name.endswith(BIAS_TABLE) and name in own and _alike(named[name], own[name])]
    patches = [name for name in (_PATCHES,) if name in named and named[name].ndim == 4]
    around = {name: named.pop(name) for name in (*patches, *tables)}
    given = import_module(host.files.filter).checkpoint_filter_fn
    options = {"adapt_layer_scale": True} if "adapt_layer_scale" in signature(given).parameters else {}
    fitting = {host.table: named.get(host.table)}  # to the filter the model's table has the file's size
    found = given(named, Proxies(type(vit), [host.table]).of(vit, fitting)[0], **options) | around
    return found | dict(_fitted_tables(found, vit, host))


def _frequencies_by_block(named: Weights, vit: nn.Module) -> Weights:
    """Return weights with learnt rotations, one tensor (2, depth, ...) of rope-vit's or timm's, cut by block."""
    record: Positions | None = vit.__dict__.get(RECORD)
    whole = next((name for name in ("freqs", "rope.freqs") if name in named), None)
    places = {part: name for name, part in vit.named_modules()}
    own = {
        f"{places[block]}.{FREQUENCIES}": block.get_parameter(FREQUENCIES)
        for block in (record.blocks if record else ())
        if FREQUENCIES in block._parameters
    }
    if whole is None or not own:
        return named
    values = named[whole]
    if values.ndim < 3 or values.shape[1] != len(own) or values.numel() != sum(part.numel() for part in own.values()):
        return named
    cut = {name: values[:, layer].reshape(part.shape) for layer, (name, part) in enumerate(own.items())}
    return {name: value for name, value in named.items() if name != whole} | cut


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape


def _of_timm(model: nn.Module) -> tuple[nn.Module, Host]:
    vit, host = find(model)
    if host.files is None:
        raise UsageError(
            f"Parts of files go into timm's VisionTransformer, Eva and SwinTransformer and models of this project, and "
            f"this is a {host.name}. Load the whole: "
            "lape.load_weights(model, path), or its own library's loader before lape.apply."
        )
    return vit, host


def _path(model: nn.Module, vit: nn.Module) -> str:
    """Return what the names of a transformer's parameters begin with in a model."""
    (path,) = (name for name, part in model.named_modules() if part is vit)
    return f"{path}." if path else ""


def renamed(weights: Mapping[str, Tensor], patterns: Iterable[tuple[str, str]]) -> Weights:
    """Return weights with each pattern replaced in their names, one after the other."""
    found: Weights = {}
    for name, value in weights.items():
        for pattern, ours in patterns:
            name = re.sub(pattern, ours, name)
        found[name] = value
    return found


def _fitted_tables(found: Weights, vit: nn.Module, host: Host) -> Iterator[tuple[str, Tensor]]:
    """Yield those of a file's tables that the model has too, as it has them."""
    record: Positions | None = vit.__dict__.get(RECORD)
    grid = grid_of(vit, host)
    assert grid is not None
    places = {part: name for name, part in vit.named_modules()}
    grids = {places[layer.block]: layer.grid for layer in record.layers(grid)} if record else {}
    brought = sum(found[name].numel() for name in _PREFIX_TOKENS if name in found) // value_at(vit, host.width)
    for name, own in vit.named_parameters():
        place, _, kind = name.rpartition(".")
        if name in found and kind == host.table:
            yield name, _fitted(name, found[name], own, grids.get(place, grid), brought, vit, host)
        elif name in found and kind == BIAS_TABLE and place in grids and found[name].ndim == 2:
            if len(found[name]) == len(own):
                continue
            side = (_side(name, len(found[name]), 0) + 1) // 2
            yield name, resized_bias_table(found[name].to(own), (side, side), grid)


def _fitted(
    name: str, table: Tensor, own: nn.Parameter, grid: Grid, brought: int, vit: nn.Module, host: Host
) -> Tensor:
    """Return a file's table as the model's kind of table; `brought` counts the prefix tokens in the file."""
    if table.ndim == 2:  # the authors' 1-D sinusoid has no batch axis
        table = table[None]
    if table.ndim != 3 or table.shape[2] != own.shape[2]:
        return table
    patches, rows = grid[0] * grid[1], table.shape[1]
    kept = own.shape[1] - patches  # rows of the model's prefix tokens
    record: Positions | None = vit.__dict__.get(RECORD)
    embedding = host.embedding.own if record is None else record.scheme.embedding.name
    kind = POSITION_EMBEDDINGS[embedding].table
    if isinstance(kind, Table) and not kind.learns:
        if rows == own.shape[1] and kind.holds(table, grid, kept):
            return table
        if not _of_some_grid(kind, table, {kept, brought, 0, 1}):
            raise _learnt(embedding)
        return own.detach()  # a fixed table is made for the grid, not resized
    tokens = value_at(vit, host.prefix)
    if rows == own.shape[1] and brought in (0, tokens):
        return table
    # A table may leave the prefix tokens out, and a file that brings none may still have the class token's row.
    possible = (brought, 0) if brought else (kept, 0, 1)
    prefix = next((p for p in possible if rows - p == patches or _square(rows - p)), kept)
    old = grid if rows - prefix == patches else (_side(name, rows, prefix), _side(name, rows, prefix))
    if prefix < kept or (prefix > kept and kept < tokens):
        raise RunError(
            f"{name} has rows for {prefix} tokens before the patches in the file, and for {kept} in the model. "
            "Create the model with the class and other prefix tokens of the file."
        )
    if prefix > kept:  # the class token's row is the first
        table = torch.cat([table[:, :kept], table[:, prefix:]], dim=1) if kept else table[:, prefix:]
    return table if old == grid else host.resize(table.to(own), grid, old, kept)


def _of_some_grid(kind: Table, table: Tensor, prefixes: Iterable[int]) -> bool:
    """Return whether a fixed table is that of a grid of any sides, behind one of these numbers of prefix tokens."""
    patches = {prefix: table.shape[1] - prefix for prefix in prefixes}
    grids = ((p, (height, n // height)) for p, n in patches.items() for height in range(1, n + 1) if n % height == 0)
    return any(kind.holds(table, grid, prefix) for prefix, grid in grids)


def _learnt(embedding: str) -> RunError:
    return RunError(
        f"The file's position table was learnt, and this model's is fixed (pe={embedding!r}). Use pe='learnable'."
    )


def _side(name: str, rows: int, prefix: int) -> int:
    if not _square(rows - prefix):
        raise RunError(
            f"{name} has {rows} rows, no square, so its grid is not known and it is not resized. "
            "Create the model with the img_size of the file, load it, then call set_input_size."
        )
    return math.isqrt(rows - prefix)


def _square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count


def load_weights(model: nn.Module, source: str | Path | Mapping[str, Tensor]) -> Loaded:
    """Load a file, or a state dict, into a vision transformer, in place: of the authors, of its library, or of ours.

    A file of timm or of the authors is that of the transformer alone; one of transformers goes through its conversion
    of names, into the model of its classes around the transformer; any other has the names of `model`. A running
    average that the file keeps is taken, as timm does.

    Args:
        model: A vision transformer of any library, with or without a join.
        source: A .safetensors file, a checkpoint of torch.save's (opened without running its code), or a state dict.

    Returns:
        The names of the parameters that the file lacks, as `missing`: PE norms and tables of a join alone may be
        missing.

    Raises:
        RunError: For a file that cannot be read, and for a parameter that does not fit; the message names it, and the
            model is unchanged.

    Warns:
        UserWarning: Where something is missing, since the model then does not compute what the file's model did.

    Example:
        >>> import lape
        >>> trained, model = (lape.create_model("vit_nano_patch2_8", depth=2) for _ in range(2))
        >>> print(lape.load_weights(model, trained.state_dict()))
        Every parameter was loaded.
    """
    vit, host = find(model)
    stored = _read(source)
    target = vit
    if host.files is None:
        as_it_is = stored.weights.keys() <= model.state_dict().keys()
        target = model if as_it_is else _of_transformers(model, vit) or model
    weights = _fitted_to(target, stored, vit, host)
    missing = _compared(weights, target.state_dict(), _of_a_join(host), _of_a_join(host), stored.where)
    target.load_state_dict(weights, strict=False)
    loaded = Loaded(tuple(missing), stored.average)
    if missing:
        warnings.warn(f"{stored.where}: {loaded}", stacklevel=2)
    return loaded


def load_backbone(model: nn.Module, source: str | Path | Mapping[str, Any]) -> Started:
    """Start the vision transformer inside a model from a pretrained one, in place, and all else as far as it fits.

    Patch embedding, blocks and table are loaded, and the table is resized to the model's grid. Initial values stay in
    PE norms and layer scales that the file lacks, in a head of other classes, and in all other parameters that it
    lacks.

    Args:
        model: A classifier, detector or segmenter.
        source: A file as `lape.load_weights` takes it, a state dict, or a name of timm's, whose weights are downloaded.

    Returns:
        The names of what was `loaded`, of what was `missing` in the file, and of what was `left` in it.

    Raises:
        RunError: For a file that cannot be read or does not fit; the model is then unchanged.

    Example:
        >>> import lape
        >>> classifier = lape.create_model("vit_nano_patch2_8", depth=2, num_classes=10)
        >>> model = lape.create_model("vit_nano_patch2_8", depth=2, num_classes=3)
        >>> lape.load_backbone(model, classifier.state_dict()).missing
        ('head.weight', 'head.bias')
    """
    vit, host = _of_timm(model)
    stored = _read(source, fetch=_fetched)
    path, own = _path(model, vit), model.state_dict()
    weights = _fitted_to(model, stored, vit, host)
    alone = "" if any(name.startswith(path) for name in weights) else path  # of the transformer alone
    weights = {f"{alone}{name}": value for name, value in weights.items()}
    roots = {str(place).partition(".")[0] for place in (host.grid, blocks_path(host))}

    def core(tensors: Mapping[str, Tensor]) -> Weights:
        inside = {name.removeprefix(path): value for name, value in tensors.items() if name.startswith(path)}
        return {name: value for name, value in inside.items() if name.partition(".")[0] in {*roots, host.table}}

    _compared(core(weights), core(own), _of_a_join(host), _MAY_BE_NEW, stored.where)
    taken = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
    model.load_state_dict(taken, strict=False)
    missing = tuple(name for name in own if name not in taken)
    left = tuple(name.removeprefix(alone) for name in weights if name not in taken)
    return Started(stored.where, tuple(taken), missing, left, stored.average)


def _of_a_join(host: Host) -> re.Pattern[str]:
    """Return a pattern of the names that a join adds to a model or takes from it."""
    tables = {"pos_embed", "absolute_pos_embed", host.table_name, host.table.removeprefix(f"{host.holder}.")}
    return re.compile(rf"(^|\.)({_BROUGHT}|{'|'.join(map(re.escape, sorted(tables)))})$")


def _read(source: str | Path | Mapping[str, Any], fetch: Callable[[str], _Source] | None = None) -> _Source:
    """Return the weights that are named, or given; `fetch` has those of a name that is no file's."""
    if isinstance(source, Mapping):
        return _state(source, "The state dict")
    path = Path(source)
    if fetch is not None and not path.exists():
        return fetch(str(source))
    return _state(opened(path), path)


def _fitted_to(target: nn.Module, stored: _Source, vit: nn.Module, host: Host) -> Weights:
    """Return weights under a model's names and in its sizes; a prefix goes whose removal makes those of its blocks fit.

    A program that trained the model as a part of another puts one before them: `model.`, `backbone.`, `net.`. Raises
    RunError where several parts fit, as a student and its teacher.
    """
    weights, root = stored.weights, (blocks_path(host)).partition(".")[0]
    blocks = {name for name in vit.state_dict() if name.startswith(f"{root}.") and not _MAY_BE_NEW.search(name)}
    wanted = blocks | {f"{_path(target, vit)}{name}" for name in blocks}

    def fit(names: Iterable[str]) -> bool:
        return 2 * len(wanted.intersection(names)) >= len(blocks)

    found = _converted(weights, target, vit, host, stored.where)
    if fit(found):
        return found
    before = {match[1] for name in weights if (match := re.match(rf"(.+?\.){re.escape(root)}\.", name))}
    before |= {whole[: dot.end()] for whole in before for dot in re.finditer(r"\.", whole)}
    without = {prefix: {name.removeprefix(prefix): weights[name] for name in weights} for prefix in before}
    fitting = [
        prefix
        for prefix, named in sorted(without.items())
        if fit(renamed(named, host.files.names if host.files else ()))
    ]
    if len(fitting) > 1:
        raise RunError(
            f"{stored.where} holds {len(fitting)} such models: their names begin with "
            f"{' and '.join(map(repr, fitting))}. Give a state dict of one, without what its names begin with."
        )
    return _converted(without[fitting[0]], target, vit, host, stored.where) if fitting else found


def _fetched(source: str) -> _Source:
    import timm

    name = source.removeprefix("timm/")
    if not timm.is_model(name):
        raise RunError(f"{source} does not exist, and timm knows no model of that name. Check the path or the name.")
    refuse_unreachable(timm_weights(name), f"timm's weights of {name}", "its path in place of the name")
    try:
        return _Source(timm.create_model(name, pretrained=True).state_dict(), source, None)
    except Exception as error:  # the Hub's client and its network library raise kinds of their own
        raise RunError(
            f"timm's weights of {name} could not be downloaded ({error}). Give the file that holds them, or another "
            "name."
        ) from error


def _converted(weights: Weights, target: nn.Module, vit: nn.Module, host: Host, where: str) -> Weights:
    """Return weights under the names of a model and in its sizes, by the rules of its library."""
    try:
        if host.files is not None:
            return convert(weights, target)
        if _their_class(target) is not None:
            weights = _as_transformers_loads(weights, target, vit)
        record: Positions | None = vit.__dict__.get(RECORD)
        kind = None if record is None else record.scheme.embedding.table
        table = f"{_path(target, vit)}{host.table}"
        own = target.state_dict().get(table)
        values = weights.get(table)
        if not isinstance(kind, Table) or record is None or own is None or values is None or not _alike(own, values):
            return weights
        if not kind.holds(as_rows(values), record.grid, record.prefix_rows):
            raise _learnt(record.scheme.embedding.name)
        return weights
    except RunError as error:
        raise RunError(f"{where} does not fit: {error}") from error


def _of_transformers(model: nn.Module, vit: nn.Module) -> nn.Module | None:
    """Return the outermost model of transformers' classes around a transformer: files are of that."""
    around = (part for part in model.modules() if any(inner is vit for inner in part.modules()))
    return next((part for part in around if _their_class(part) is not None), None)


def _their_class(model: nn.Module) -> Any:
    """Return the class of transformers that a model is of, whose files its library knows."""
    known = is_of_transformers(type(model))
    return next(
        (kind for kind in type(model).__mro__ if known and kind.__module__.startswith("transformers.models.")), None
    )


def _as_transformers_loads(weights: Weights, model: nn.Module, vit: nn.Module) -> Weights:
    """Return weights under the names of a model of transformers, whose files have other names than its parameters.

    Its library loads them into a model of that class with the same join, and says which had no place.
    """
    kind, record = _their_class(model), vit.__dict__.get(RECORD)

    def begin(self: Any, config: Any) -> None:
        kind.__init__(self, config)
        if record is not None:
            apply(self, *_names(record))

    # By its module transformers tells a class whose names it converts from a user's.
    twin: Any = type(kind.__name__, (kind,), {"__init__": begin, "__module__": kind.__module__})
    with _silence():
        filled, told = twin.from_pretrained(
            None,
            config=deepcopy(model.config),
            state_dict=dict(weights),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    others = {name: torch.empty(shape, device="meta") for name, shape, _ in told["mismatched_keys"]}
    foreign = {name: weights.get(name, torch.empty(0, device="meta")) for name in told["unexpected_keys"]}
    loaded = {name: value for name, value in filled.state_dict().items() if name not in told["missing_keys"]}
    whole = {name.partition(".")[0] for name in weights}
    if not loaded and len(whole) == 1 and all("." in name for name in weights):  # in something that is none of theirs
        return _as_transformers_loads({name.partition(".")[2]: weights[name] for name in weights}, model, vit)
    return loaded | foreign | others


def _names(record: Positions) -> SchemeNames:
    """Return what `apply` calls the scheme of a model, with a learnt table for a fixed one: any file's goes in."""
    names = record.scheme.names
    table, plus, bias = str(names.pe).partition("+")
    fixed = table in TABLES and not TABLES[table].learns
    return names._replace(pe=f"learnable{plus}{bias}" if fixed else names.pe)


@contextmanager
def _silence() -> Generator[None, None, None]:
    """Keep transformers from its report and its bar: what is missing is said here."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _compared(
    weights: Weights, own: Mapping[str, Tensor], of_a_join: re.Pattern[str], optional: re.Pattern[str], where: str
) -> list[str]:
    """Return the names that a model has and weights lack; raise RunError unless those alone are missing."""
    foreign = [name for name in weights if name not in own]
    missing = [name for name in own if name not in weights]
    lacking = [name for name in missing if not optional.search(name)]
    if foreign and all(of_a_join.search(name) for name in (*foreign, *lacking)):
        raise RunError(
            f"{where} was trained with another join or table than this model's: {_named(foreign)} not in the model. "
            "Apply that join first: lape.apply(model, join=..., pe=...)."
        )
    if foreign or lacking:
        parts = [
            f"{_named(names)} not in the {place}" for names, place in ((foreign, "model"), (lacking, "file")) if names
        ]
        raise RunError(
            f"{where} is of another model: {'; '.join(parts)}. Create the model that it was saved from (--model)."
        )
    for name, parameter in own.items():
        if name in weights and weights[name].shape != parameter.shape:
            raise RunError(
                f"{where} is of another model: {name} is {tuple(weights[name].shape)} there and "
                f"{tuple(parameter.shape)} here. Create the model with the same sizes and number of classes (--model)."
            )
    return missing


def _of_an_average(kept: str) -> str:
    return f"Of the weights that it holds, their running average was taken ({kept!r})."


def _named(names: list[str] | tuple[str, ...]) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{shown} {'is' if len(names) == 1 else 'are'}"


def _grouped(names: Iterable[str], loaded: Iterable[str]) -> str:
    """Name the largest parts of which nothing was loaded, with the number of their tensors; layers stand as *."""
    entered = {name[: dot.start()] for name in loaded for dot in re.finditer(r"\.", name)}

    def part(name: str) -> str:
        ends = (dot.start() for dot in re.finditer(r"\.", name))
        closed = next((name[:end] for end in ends if name[:end] not in entered), None)
        return re.sub(r"\.\d+(?=\.)", ".*", name if closed is None else f"{closed}.*")

    counts = Counter(part(name) for name in names)
    return ", ".join(f"{group} ({count})" if count > 1 else group for group, count in counts.items())
