"""Models as files that anybody can load: weights in safetensors, and in words all that rebuilds the model from them.

A folder is laid out as timm's are: config.json, model.safetensors and README.md. The weight file alone is enough: the
same configuration stands in its header. No pickle is written or read.
"""

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from lape import __version__
from lape.errors import RunError, UsageError, choose, first_line
from lape.experiment import FETCHING, refuse_fetching
from lape.fetching import Wanted, refuse_unreachable
from lape.files import reading, writing
from lape.files.characters import as_code, in_markdown, visible
from lape.hosts.registry import RECORD
from lape.models.rebuilding import Build, LikeItsFile, as_asked
from lape.models.registry import create_model
from lape.names import SchemeNames
from lape.surgery.operation import apply, positions
from lape.surgery.positions import Positions
from lape.surgery.saving import Applied, is_of_transformers
from lape.weights import fill, opened

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
BUILT_BY = "built_by"  # in a configuration: which code of its user made the model
HEADER = "lape"  # the key of the configuration in the header of a weight file
# What timm's description of a model says of where weights can be downloaded: a configuration chooses none of it.
_SOURCES = {"url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load"}
_ABOUT_THEM = ("license", "description", "origin_url", "paper_name", "paper_ids", "notes")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
Make = Callable[[], nn.Module]


@dataclass(frozen=True)
class Known:
    """What the users of a saved model should know beside its weights.

    Args:
        classes: What its outputs are called.
        mean: Mean of the colours that images are normalised by.
        std: Their standard deviation.
        metrics: What it was measured to reach, as in {"accuracy, %": 98.66}.
        data: What it was measured on.
        license: What others may do with it, by the Hub's name for that, as apache-2.0, mit or other; None: not said.

    Raises:
        UsageError: For a licence that is no such name.

    Example:
        >>> import lape
        >>> lape.Known(classes=["cat", "dog"], metrics={"accuracy, %": 98.66}, data="my pets").classes
        ['cat', 'dog']
    """

    classes: Sequence[str] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    metrics: Mapping[str, float] | None = None
    data: str | None = None
    license: str | None = None

    def __post_init__(self) -> None:
        if self.license is not None and not _LICENSE.fullmatch(self.license):
            raise UsageError(
                "license is a name of the Hub's for a licence, as apache-2.0, mit, cc-by-4.0 or other; "
                f"{self.license!r} was received."
            )


# --- A model in words


def configuration(model: nn.Module, known: Known = Known(), **model_args: Any) -> dict[str, Any]:
    """Return the configuration of a model, in timm's layout: its name, keywords and join, and what its images are like.

    The keywords are those that timm recorded when it made the model, and `model_args`. Raises UsageError for a model
    that timm did not make, and for a keyword that JSON cannot hold.
    """
    from timm.models import filter_pretrained_cfg

    get_model_args, get_model_input_config = _timms_records()
    cfg: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    if "architecture" not in cfg:
        kind = type(model).__name__
        if is_of_transformers(type(model)):
            raise UsageError(
                f"A {kind} is saved as all models of transformers, join and all: model.save_pretrained(folder), then "
                f"lape.joined(transformers.{kind}).from_pretrained(folder)."
            )
        raise UsageError(
            f"A saved model is made again by its name, and this {kind} was not made by one. Create it with "
            "lape.create_model or timm.create_model, then load its weights; or give what makes it, and a batch to try "
            "it with: lape.save_pretrained(model, folder, build=make, example=images)."
        )
    classes = {"num_classes": model_args.pop("num_classes")} if "num_classes" in model_args else {}
    try:
        # timm reads them from an attribute, which a head that was put in the place of another leaves as it is.
        args = get_model_args(model, model_args) | classes
    except ValueError as error:
        raise UsageError(f"{error} Give the keywords that the model was made with, or leave them out.") from error
    left_out = SchemeNames._fields  # what is applied now says them
    args = {name: value for name, value in args.items() if name not in left_out and not name.startswith(FETCHING)}
    args |= _joined(model)
    shown = filter_pretrained_cfg({**cfg}, remove_source=True)
    shown |= get_model_input_config(model)
    shown |= {name: tuple(value) for name in ("mean", "std") if (value := getattr(known, name)) is not None}
    # These told of the weights that timm offers, not of the model's.
    of_theirs = ("architecture", "tag", "state_dict", "label_offset", "test_input_size", "pool_size", "custom_load")
    for name in (*of_theirs, *_ABOUT_THEM):
        shown.pop(name, None)
    names = known.classes or shown.pop("label_names", None)
    config = {"architecture": cfg["architecture"], "num_classes": args.get("num_classes", shown.get("num_classes"))}
    if hasattr(model, "num_features"):
        config["num_features"] = model.num_features
    shown["num_classes"] = config["num_classes"]
    config |= {"model_args": args, "pretrained_cfg": shown}
    if names:
        config["label_names"] = list(names)
    config[writing.MARK] = __version__
    return _in_words(config | _measured_and_licensed(known))


def _measured_and_licensed(known: Known) -> dict[str, Any]:
    """Return what a configuration says of results and licence."""
    measured = {"metrics": {"on": known.data, **known.metrics}} if known.metrics else {}
    return measured | ({"license": known.license} if known.license else {})


def known_of(source: str | Path) -> Known:
    """Return what `save_pretrained` was told of results and licence; raises RunError as `from_pretrained` does."""
    config, _ = _files(source)
    told = _config(config)
    if not isinstance(told, dict):
        return Known()
    metrics = dict(told["metrics"]) if isinstance(told.get("metrics"), dict) else {}
    on = metrics.pop("on", None)
    license = told.get("license")
    return Known(
        metrics={str(name): value for name, value in metrics.items() if isinstance(value, float | int)} or None,
        data=on if isinstance(on, str) else None,
        license=license if isinstance(license, str) and _LICENSE.fullmatch(license) else None,
    )


def _built_configuration(model: nn.Module, build: Make, known: Known) -> dict[str, Any]:
    """Return the configuration of a model that its user's own code makes; which code that is stands in it for people.

    Nothing in it is handed to that code: a stranger's could have it fetch or open what it names. Raises UsageError for
    a folded model.
    """
    shown = {name: list(value) for name in ("mean", "std") if (value := getattr(known, name)) is not None}
    record = _record(model)
    config = {
        BUILT_BY: f"{getattr(build, '__module__', '?')}.{getattr(build, '__qualname__', type(build).__name__)}",
        "join": None if record is None else Applied.of(record).values,
        "pretrained_cfg": shown,
        writing.MARK: __version__,
    }
    if known.classes:
        config["label_names"] = list(known.classes)
    return _in_words(config | _measured_and_licensed(known))


def _in_words(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration as JSON holds it; raise UsageError for a keyword of the model that it cannot hold."""
    for name, value in config.get("model_args", {}).items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise UsageError(
                f"{name}={value!r} was given when the model was made, and JSON cannot hold it. Give what stands for it "
                f"in words: lape.save_pretrained(model, folder, {name}=...)."
            ) from error
    return json.loads(json.dumps(config))


def _timms_records() -> tuple[Callable[..., dict[str, Any]], Callable[..., dict[str, Any]]]:
    """Return what reads the keywords that timm made a model with, and its images' size; raises RunError without them.

    Older versions record neither, and another model would be made of what is saved.
    """
    import timm

    try:
        from timm.models import get_model_args, get_model_input_config
    except ImportError as error:
        raise RunError(
            f"timm {timm.__version__} does not record what a model was made with, so it cannot be made again. Install "
            "timm 1.0.31 or newer (pip install --upgrade timm), or save model.state_dict()."
        ) from error
    return get_model_args, get_model_input_config


def _joined(model: nn.Module) -> dict[str, str]:
    """Return the join that is applied to a model, by name; nothing where none is."""
    record = _record(model)
    return {} if record is None else record.scheme.names._asdict()


def _record(model: nn.Module) -> Positions | None:
    """Return the record of the join that is applied to a model, if one is; raise UsageError where it is folded."""
    records = [part.__dict__[RECORD] for part in model.modules() if RECORD in part.__dict__]
    if not records:
        return None
    (record,) = records
    if record.folded_for:
        raise UsageError(
            "A folded model is for inference and has no table any more. Save it as it was before, and fold what is "
            "loaded: lape.fold(lape.from_pretrained(...)); or export it to .onnx or .pt2."
        )
    return record


def build_model(config: Mapping[str, Any], where: str, build: Build = as_asked, **model_args: Any) -> nn.Module:
    """Make the model that a configuration tells of, and more keywords, with initial weights, built so."""
    import timm
    from timm.models import PretrainedCfg

    try:
        name, args = str(config["architecture"]), {**(config.get("model_args") or {}), **model_args}
        choose(dict.fromkeys(timm.list_models()), name, "a model that timm knows")
        refuse_fetching(name, args)
        if config.get("num_classes") is not None:
            args.setdefault("num_classes", config["num_classes"])
        known = {field.name for field in fields(PretrainedCfg)} - _SOURCES
        cfg = {key: value for key, value in (config.get("pretrained_cfg") or {}).items() if key in known}
        if config.get("label_names"):
            cfg["label_names"] = tuple(config["label_names"])
        args["pretrained_cfg"] = cfg | {"architecture": name}
        make = create_model if "join" in args else timm.create_model
        return build(lambda: make(name, **args), args)
    except RunError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, AssertionError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise RunError(f"{where} describes a model that cannot be made here: {reason}") from error


def _build_own(config: Mapping[str, Any], where: str, own: Make, build: Build) -> nn.Module:
    """Make a model by its user's own code, with the join that a configuration tells of.

    The user's code may apply the join itself, as for a class with a row of its own. Raises RunError where the join is
    another, or cannot be applied.
    """
    join = config.get("join")
    expected = None if join is None else Applied.read(join, where)

    def make() -> nn.Module:
        model = own()
        if not isinstance(model, nn.Module):
            raise UsageError(f"build= makes a model, and it returned a {type(model).__name__}. Have it return a model.")
        record = _record(model)
        if record is None and expected is not None:
            try:
                record = positions(apply(model, *expected.names, grid=expected.grid))
            except UsageError as error:
                raise RunError(f"{where} tells of a join that build= makes no model for: {error}") from error
        applied = None if record is None else Applied.of(record)
        if applied != expected:
            raise RunError(
                f"{where} tells of a model with {expected or 'no join'}, and build= makes one with "
                f"{applied or 'no join'}."
            )
        return model

    return build(make, {})


# --- Saving and loading


def save_pretrained(
    model: nn.Module,
    path: str | Path,
    known: Known = Known(),
    *,
    build: Make | None = None,
    example: Tensor | tuple[Any, ...] | None = None,
    **model_args: Any,
) -> Path:
    """Write a model as a folder (config.json, model.safetensors, README.md), or as one .safetensors file.

    Before the files are put in their place they are loaded again, and must give the same outputs for random images, to
    the last bit. No pickle is written.

    A model that no name makes, as torchvision's, one of a class of your own, or one with another head, is saved with
    what makes it: `build`. It is called again when the model is loaded, `lape.from_pretrained(path, build=...)`; the
    files tell no more of it than its name, and never choose what is called.

    Args:
        model: A model that was created by its name (`lape.create_model`, `timm.create_model`) or by `build`, and is
            not folded.
        path: A folder, or a file that ends in .safetensors.
        known: Classes, normalisation and measured results, for the configuration and the README.md.
        build: A function without arguments that makes such a model, with the join or without.
        example: Inputs that both are tried with, a batch or a tuple of all inputs; with `build` alone.
        model_args: Keywords that the model was created with, where timm did not record them; not with `build`.

    Returns:
        The path.

    Raises:
        UsageError: For a model that cannot be loaded again from what is saved (the message names the parameter); where
            a file that lape did not write is in the way.

    Example:
        >>> import tempfile
        >>> import lape
        >>> model = lape.create_model("vit_nano_patch2_8", num_classes=2, depth=1)
        >>> folder = lape.save_pretrained(model, tempfile.mkdtemp(), lape.Known(classes=["cat", "dog"]))
        >>> sorted(file.name for file in folder.iterdir())
        ['README.md', 'config.json', 'model.safetensors']
    """
    path = Path(path)
    single = path.suffix == ".safetensors"
    places = {WEIGHTS: path} if single else {name: path / name for name in (CONFIG, WEIGHTS, CARD)}
    writing.refuse_others(places.values())
    with TemporaryDirectory() as room:
        _written(model, Path(room), f"USER/{path.name}", known, build, example, model_args)
        writing.write_marked({place: (Path(room) / name).read_bytes() for name, place in places.items()})
    return path


def _written(
    model: nn.Module,
    folder: Path,
    repo_id: str,
    known: Known,
    build: Make | None,
    example: Tensor | tuple[Any, ...] | None,
    args: Mapping[str, Any],
) -> None:
    """Write a model into an empty folder, load it from there and compare."""
    from safetensors.torch import save

    if (build is None) != (example is None):
        raise UsageError(
            "A model that build= makes is tried with inputs before it is saved, and any other with random images. Give "
            "both or neither: lape.save_pretrained(model, folder, build=make, example=images)."
        )
    _refuse_keywords(build, args)
    config = configuration(model, known, **args) if build is None else _built_configuration(model, build, known)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    text = json.dumps(config, indent=1)
    weights = save(tensors, {"format": "pt", HEADER: text})
    writing.write_marked(
        {folder / CONFIG: text + "\n", folder / WEIGHTS: weights, folder / CARD: card(config, repo_id)}
    )
    try:
        again = from_pretrained(folder, build=build)
    except RunError as error:
        reason = str(error).replace(f"{folder / WEIGHTS}", "What was to be saved").replace(f"{folder / CONFIG}", "It")
        raise UsageError(f"This model cannot be made again {_edit(model, build, config, reason)}") from error
    original = copy.deepcopy(model).cpu().eval()
    images = random_images(original, 2) if example is None else example
    for ours, theirs in zip(outputs(original, images), outputs(again, images), strict=True):
        if not torch.equal(ours, theirs):
            raise UsageError(
                "This model has the parameters that its name and keywords say, and computes something else with them "
                "than they do. Something was changed after it was made; give the keyword that does it: "
                "lape.save_pretrained(model, folder, act_layer=...)."
                if build is None
                else "This model has the parameters of what build= makes, and computes something else with them. "
                "Something was changed after it was made; have build= change it too."
            )


def _edit(model: nn.Module, build: Make | None, config: Mapping[str, Any], reason: str) -> str:
    """Return how a model is saved that is another than what makes it."""
    if build is not None:
        return f"by build=: {reason} Have it make the model as it is now."
    named = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    parts = dict(model.named_modules())
    heads = [parts.get(name) for name in ([named] if isinstance(named, str) else named)]
    classes = {head.out_features if isinstance(head, nn.Linear) else None for head in heads}
    if len(classes) == 1 and classes.isdisjoint({None, config["num_classes"]}):
        (count,) = classes
        return (
            f"from its name and keywords: {reason} Its classifier was replaced by one of {count} classes; say so: "
            f"lape.save_pretrained(model, folder, num_classes={count})."
        )
    return (
        f"from its name and keywords: {reason} If it was made with keywords that are not recorded, give them: "
        "lape.save_pretrained(model, folder, depth=...). If a part of it was replaced, give a function that makes it, "
        "and a batch to try it with: lape.save_pretrained(model, folder, build=make, example=images)."
    )


def from_pretrained(source: str | Path, *, build: Make | None = None, **model_args: Any) -> nn.Module:
    """Return the model of a folder, of a .safetensors file or of a Hub repository, with its join and its weights.

    No code in the files is run. A folder of transformers' own is loaded by `lape.joined`.

    Args:
        source: A path, or "user/name" or "user/name@revision" on the Hub.
        build: What makes the model, for one that was saved with `build`.
        model_args: More keywords for the model, as dynamic_img_size=True.

    Returns:
        The model, in evaluation mode and in the number format of its weights.

    Raises:
        RunError: For a source that does not exist, is incomplete, or holds another model than it says, or than `build`
            makes.
        UsageError: Where `build` is missing, or is given for a model that was made by its name.

    Example:
        >>> import tempfile
        >>> import lape
        >>> model = lape.create_model("vit_nano_patch2_8", num_classes=2, depth=1)
        >>> again = lape.from_pretrained(lape.save_pretrained(model, tempfile.mkdtemp()))
        >>> again.blocks[0].pe_norm.weight.equal(model.blocks[0].pe_norm.weight)
        True
    """
    config, weights = _files(source)
    if weights.suffix != ".safetensors":
        raise RunError(f"{weights} is no .safetensors file. For weights alone there is lape.load_weights.")
    _refuse_keywords(build, model_args)
    tensors = opened(weights)
    told = _config(config)
    _refuse_maker(told, config, build)
    like = LikeItsFile(tensors, weights)
    if build is None:
        model = build_model(told, str(config), like, **model_args)
    else:
        model = _build_own(told, str(config), build, like)
    floating = (tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
    model = model.to(next(floating, torch.float32))
    fill(model, tensors, weights)
    return model.eval()


def _refuse_keywords(build: Make | None, keywords: Mapping[str, Any]) -> None:
    if build is not None and keywords:
        raise UsageError(
            f"build= is called without arguments; received {', '.join(keywords)}. Put them into it: build=lambda: make("
            f"{next(iter(keywords))}=...)."
        )


def _refuse_maker(config: Any, path: Path, build: Make | None) -> None:
    """Raise where a configuration is of another kind than what is to make its model."""
    if not isinstance(config, dict):
        raise RunError(f"{path} describes no model. Is it complete?")
    if BUILT_BY in config and build is None:
        raise UsageError(
            f"{path} was saved with the code that made its model, {visible(str(config[BUILT_BY]))}. Give that: "
            "lape.from_pretrained(path, build=...)."
        )
    if BUILT_BY not in config and build is not None:
        raise UsageError(f"{path} was not saved with build=: its model is made by its name. Leave build out.")
    if "model_type" in config and "architecture" not in config:
        kinds = config.get("architectures")
        kind = visible(str(kinds[0])) if isinstance(kinds, list) and kinds else "ViTModel"
        raise RunError(
            f"{path} is of transformers. Load it by the class that saved it: "
            f"lape.joined(transformers.{kind}).from_pretrained(folder)."
        )


def _files(source: str | Path) -> tuple[Path, Path]:
    """Return the paths of configuration and weights, fetched if need be."""
    path = Path(source)
    if path.is_file():
        return path, path
    if path.is_dir():
        for name in (CONFIG, WEIGHTS):
            if not (path / name).exists():
                raise RunError(f"{path} has no {name}. Name a folder that lape.save_pretrained or timm wrote.")
        return path / CONFIG, path / WEIGHTS
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", str(source)):
        raise RunError(f"{source} does not exist. Name a folder, a .safetensors file, or a repository as user/name.")
    repo, _, revision = str(source).partition("@")
    hub: Any = import_module("huggingface_hub")
    refuse_unreachable(Wanted(repo, (WEIGHTS,), revision or None), f"{source} is no folder here; it", "its folder")
    try:
        config, weights = (hub.hf_hub_download(repo, name, revision=revision or None) for name in (CONFIG, WEIGHTS))
    except Exception as error:  # the Hub's client and its network library raise kinds of their own
        raise RunError(
            f"{source} is not a folder here, and could not be downloaded from the Hub ({first_line(error)})."
        ) from error
    return Path(config), Path(weights)


def _config(path: Path) -> Any:
    """Read a configuration from its own file, or from the header of a weight file."""
    try:
        if path.suffix != ".safetensors":
            return reading.values(path, reading.RECORD)
        if HEADER in (told := header(path)):
            return json.loads(told[HEADER])
    except RunError:
        raise
    except Exception as error:  # of the disk, of JSON, of safetensors
        raise RunError(f"{path} cannot be read ({first_line(error)}). Is it complete?") from error
    raise RunError(f"{path} holds weights and no configuration. Create the model, then lape.load_weights(model, path).")


def header(path: Path) -> Mapping[str, str]:
    """Return what stands in the header of a .safetensors file; raise RunError, naming it, where it cannot be read."""
    from safetensors import safe_open

    try:
        with reading.opened(path), safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except RunError:
        raise
    except Exception as error:  # of the disk, of safetensors
        raise RunError(f"{path} cannot be read ({first_line(error)}). Is it complete?") from error


def push_to_hub(
    model: nn.Module | str | Path,
    repo_id: str,
    known: Known = Known(),
    private: bool = False,
    token: str | None = None,
    message: str = "Add model",
    *,
    build: Make | None = None,
    example: Tensor | tuple[Any, ...] | None = None,
    **model_args: Any,
) -> str:
    """Upload a model, or a folder that `lape.save_pretrained` wrote, to a repository of the Hugging Face Hub.

    The repository is created if it does not exist, and a README.md that it has stays.

    Args:
        model: A model, or the path of such a folder.
        repo_id: "user/name", or "name" alone for your own account.
        known: As `lape.save_pretrained` takes it; for a model alone.
        private: Create the repository as a private one.
        token: Of the account; None stands for the one of `hf auth login` or of HF_TOKEN.
        message: Of the commit.
        build: As `lape.save_pretrained` takes it.
        example: As `lape.save_pretrained` takes it.
        model_args: As `lape.save_pretrained` takes them.

    Returns:
        The address of the repository.

    Raises:
        UsageError: For a `repo_id` that is not a repository's name, and as `lape.save_pretrained` does.
        RunError: Where the Hub refuses the upload.

    Example:
        >>> import lape
        >>> model = lape.create_model("vit_nano_patch2_8", depth=1)
        >>> address = lape.push_to_hub(model, "user/pets")
        >>> address.endswith("/user/pets")
        True
    """
    if not re.fullmatch(r"([\w.-]+/)?[\w.-]+", repo_id):
        raise UsageError(f"{repo_id!r} is no name of a repository on the Hub. Give it as user/name.")
    hub: Any = import_module("huggingface_hub")
    with TemporaryDirectory() as room:
        folder = Path(room)
        if isinstance(model, nn.Module):
            name = repo_id if "/" in repo_id else f"USER/{repo_id}"
            _written(model, folder, name, known, build, example, model_args)
        else:
            from_pretrained(folder := Path(model), build=build)  # refuses what would not come back
        api = hub.HfApi(token=token, library_name="lape")
        try:
            address = api.create_repo(repo_id, private=private, exist_ok=True)
            kept = [CARD] if api.file_exists(address.repo_id, CARD) else []
            api.upload_folder(
                repo_id=address.repo_id,
                folder_path=folder,
                allow_patterns=[CONFIG, WEIGHTS, CARD],
                ignore_patterns=kept,
                commit_message=message,
            )
        except Exception as error:  # the Hub's client and its network library raise kinds of their own
            raise RunError(
                f"The Hub did not take {repo_id} ({first_line(error)}). See that it can be reached, and that you may "
                "write there: `hf auth login`, or HF_TOKEN."
            ) from error
    return str(address)


def card(config: Mapping[str, Any], repo_id: str) -> str:
    """Return the README.md of a saved model: what it is, what it reaches, how to load it from its repository."""
    cfg, built = config["pretrained_cfg"], BUILT_BY in config
    join = (config["join"] or {}) if built else config["model_args"]
    size = f"{'×'.join(map(str, cfg['input_size']))}, " if "input_size" in cfg else ""
    names = config.get("label_names", [])
    facts = {
        "architecture": as_code(config[BUILT_BY if built else "architecture"]),
        "position embedding": " · ".join(f"{name}={join[name]}" for name in SchemeNames._fields if name in join)
        or "the model's own",
        "images": f"{size}mean {cfg.get('mean')}, deviation {cfg.get('std')}",
        "classes": str(config.get("num_classes", len(names) or "")),
    }
    if names:
        facts["classes"] += in_markdown(f": {', '.join(names[:10])}{' ...' if len(names) > 10 else ''}")
    metrics = dict(config.get("metrics", {}))
    on = metrics.pop("on", None)
    where = in_markdown(f" on {on}") if on else ""
    facts |= {in_markdown(name): f"{value:.2f} {where}".strip() for name, value in metrics.items()}
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    hub: Any = import_module("huggingface_hub")
    library = "pytorch" if built else "timm"
    tags = [library, "lape", "vision-transformer"]
    data = hub.ModelCardData(library_name=library, tags=tags, license=config.get("license"))
    more = ", build=...)  # what makes the model, as above; or this folder" if built else ")  # or this folder"
    timms = (
        ""
        if built
        else f"""
After `import lape` timm knows the names that `lape models` lists, and loads them too:
`timm.create_model("hf-hub:{repo_id}", pretrained=True)`.
"""
    )
    return f"""---
{data.to_yaml()}
---
# {in_markdown(repo_id.rpartition("/")[2])}

A vision transformer whose position embedding is joined with its tokens as below; `lape` is layer-adaptive position
embedding ([Yu et al., ICCV 2023](https://doi.org/10.1109/ICCV51070.2023.00541)).

| | |
| --- | --- |
{rows}

```python
import lape

model = lape.from_pretrained("{repo_id}"{more}
```
{timms}{writing.COMMENT}"""


# --- Asking a model


def random_images(model: nn.Module, count: int, size: tuple[int, int, int] | None = None) -> Tensor:
    """Return images (count, C, H, W) of normal values from a fixed seed; nothing else said, of the model's size.

    Raises UsageError for a model that does not tell its size.
    """
    shape: Any = size
    if shape is None:
        if not getattr(model, "pretrained_cfg", None):
            raise UsageError(f"{type(model).__name__} does not tell the size of its images. Give input_size=(C, H, W).")
        _, get_model_input_config = _timms_records()
        shape = get_model_input_config(model)["input_size"]
    some = next(model.parameters())
    images = torch.randn(count, *shape, generator=torch.Generator().manual_seed(count))
    return images.to(some.device, some.dtype)


def outputs(model: nn.Module, images: Tensor | tuple[Any, ...]) -> list[Tensor]:
    """Return every tensor of a model's output for images (B, C, H, W), or for a tuple of other inputs."""
    from lape.models.mask_rcnn import MaskRCNN

    with torch.no_grad():
        if isinstance(images, tuple):
            return list(_tensors(model(*images)))
        return list(_tensors(model(list(images) if isinstance(model, MaskRCNN) else images)))


def _tensors(output: Any) -> Iterator[Tensor]:
    """Yield the tensors in an output of any form."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from _tensors(list(output.values()))
    elif isinstance(output, list | tuple):
        for part in output:
            yield from _tensors(part)
