"""Files that are damaged or made to do harm: none runs code, hangs or ends in a traceback.

200 of them go through the command line's function. A file that is refused is named in one line with the reason, and
the status is 1 or 2. Some damage cannot be seen, as another colour of a pixel: only that may pass.
"""

import copy
import faulthandler
import gzip
import io
import json
import math
import os
import pickle
import random
import resource
import signal
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import dense_sets
import numpy as np
import pytest
import timm
import torch
from PIL import Image

import lape.training.evaluation
from lape.cli import command_line as cli
from lape.data.pipeline import InOrder
from lape.errors import UsageError
from lape.training.assembly import launch
from lape.training.loop import TrainingRun

SECONDS = 20  # in which a file is refused, on a slow machine
MEMORY = 1 << 30  # bytes that refusing it may take more than everything before

MODEL = {"depth": 1, "embed_dim": 8, "num_heads": 2}
SMALL = ["--model-args", json.dumps(MODEL), "--batch-size", "400", "--epochs", "1", "--accelerator", "cpu"]
PETS = ["--model", "vit_nano_patch4_32", "--model-args", json.dumps(MODEL), "--img-size", "16", "--batch-size", "2"]
PETS += ["--epochs", "1", "--workers", "0", "--accelerator", "cpu"]
SEGMENTER = [
    "--model",
    "segmenter_tiny_patch16",
    "--stride",
    "32",
    "--short-side",
    "32",
    "--model-args",
    '{"depth": 1}',
    "--crop",
    "32",
]
SEGMENTER += ["--batch-size", "2", "--epochs", "1", "--workers", "0", "--accelerator", "cpu"]


@dataclass(frozen=True)
class Sound:
    """What is damaged: files as the program and its users write them."""

    run: Path  # a folder
    weights: Path  # .safetensors with a configuration
    picture: Path
    pets: Path  # classes as folders
    coco: Path
    ade20k: Path


@dataclass(frozen=True)
class Case:
    """A damaged file and what is asked of it."""

    file: Path
    words: list[str]
    passes: bool = False  # it may do no harm
    named: str = ""  # what the line names; nothing: the file's name


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Sound:
    root = tmp_path_factory.mktemp("sound")
    assert cli.main(["train", *SMALL, "--ema", "0.9", "--out", str(root / "run")]) == 0
    assert cli.main(["export", str(root / "run"), "--out", str(root / "whole.safetensors")]) == 0
    for part in ("train", "val"):
        for number, name in enumerate(("cat", "dog")):
            (root / "pets" / part / name).mkdir(parents=True)
            for index in range(2):
                _noise(number + index, 16).save(root / "pets" / part / name / f"{index}.png")
    _noise(0, 64).save(root / "picture.jpg")
    return Sound(
        root / "run",
        root / "whole.safetensors",
        root / "picture.jpg",
        root / "pets",
        dense_sets.coco(root / "coco"),
        _named(dense_sets.ade20k(root / "ade20k")),
    )


def _named(root: Path) -> Path:
    (root / "classes.txt").write_text("floor\nred\nblue\n")
    return root


def _noise(seed: int, side: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8))


# Damage of bytes


def _cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def _flipped(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.choice([1, 8, 64])):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _zeroed(content: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(content))
    length = min(draw.randrange(1, 512), len(content) - start)
    return content[:start] + bytes(length) + content[start + length :]


def _inserted(content: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(content))
    return content[:place] + draw.randbytes(draw.randrange(1, 64)) + content[place:]


def _removed(content: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(content))
    return content[:start] + content[start + draw.randrange(1, 256) :]


def _headed(content: bytes, draw: random.Random) -> bytes:
    """Noise in the first bytes, where lengths and kinds are told."""
    return draw.randbytes(16) + content[16:]


DAMAGES = (_cut, _flipped, _zeroed, _inserted, _removed, _headed)


def damaged(path: Path, seed: int) -> bytes:
    """Return the file with damage that depends on its name's ending and the seed."""
    draw = random.Random(f"{path.suffix} {seed}")
    return DAMAGES[seed % len(DAMAGES)](path.read_bytes(), draw)


# Damage of contents

Change = Callable[[Any], Any]


def put(*place: Any) -> Change:
    """Set the last of these at the place that the others name."""
    *path, last, value = place

    def change(content: Any) -> Any:
        at = content
        for part in path:
            at = at[part]
        at[last] = value
        return content

    return change


def without(*path: Any) -> Change:
    def change(content: Any) -> Any:
        at = content
        for part in path[:-1]:
            at = at[part]
        del at[path[-1]]
        return content

    return change


def instead(value: Any) -> Change:
    return lambda _: value


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> Any:
        return self.reduced


BOMBS = {
    "os.system": Bomb(os.system, "touch exploded"),
    "eval": Bomb(eval, "open('exploded', 'w')"),
    "exec": Bomb(exec, "open('exploded', 'w')"),
    "open": Bomb(open, "exploded", "w"),
    "method": Bomb(getattr, Path("exploded"), "touch"),
    "torch.load": Bomb(torch.load, "exploded"),
}


def _folded(times: int) -> Any:
    """A list of two lists that are the same one, and so on: it is written in few bytes."""
    folded: list[Any] = []
    for _ in range(times):
        folded = [folded, folded]
    return folded


OF_EVALUATION: dict[str, Change] = {
    "a list": instead([1, 2]),
    "a tensor": instead(torch.ones(2)),
    "nothing": instead(None),
    "no experiment": put("experiment", None),
    "experiment a list": put("experiment", [1]),
    "setting unknown": put("experiment", "exploded", 1),
    "setting of another type": put("experiment", "epochs", "many"),
    "setting below its least": put("experiment", "epochs", -1),
    "seed negative": put("experiment", "seed", -1),
    "model a number": put("experiment", "model", 3),
    "model unknown": put("experiment", "model", "../../exploded"),
    "keywords a list": put("experiment", "model_args", [1]),
    "keyword unknown": put("experiment", "model_args", "exploded", 1),
    "keyword of another type": put("experiment", "model_args", "depth", "deep"),
    "keywords of lists within lists": put("experiment", "model_args", "depth", _folded(40)),
    "keyword negative": put("experiment", "model_args", "embed_dim", -8),
    "width zero": put("experiment", "model_args", "embed_dim", 0),
    "width beyond memory": put("experiment", "model_args", "embed_dim", 10**13),
    "a file in the keywords": put("experiment", "model_args", "checkpoint_path", "exploded.pt"),
    "join a number": put("experiment", "join", 7),
    "data a number": put("experiment", "data", 5),
    "data a folder that is not there": put("experiment", "data", "/nowhere/at/all"),
    "precision unknown": put("experiment", "precision", "7-wrong"),
    "no set": put("set", None),
    "set a list": put("set", []),
    "kind unknown": put("set", "kind", "exploded"),
    "no kind": without("set", "kind"),
    "classes a number": put("set", "classes", 5),
    "too few classes": put("set", "classes", ("0", "1")),
    "channels a text": put("set", "channels", "three"),
    "size a text": put("set", "size", "big"),
    "augmentation unknown": put("set", "augmentation", {"exploded": 1}),
    "no weights": put("model", None),
    "weights a list": put("model", [1]),
    "weights without tensors": put("model", {"a": 1}),
    "weights of text": put("model", "head.bias", "heavy"),
    "weights of another size": put("model", "head.bias", torch.zeros(3)),
    "weights missing": without("model", "head.bias"),
    "weights too many": put("model", "exploded", torch.zeros(3)),
    "weights sparse": put("model", "head.bias", torch.zeros(10).to_sparse()),
    "weights not finite": put("model", "head.bias", torch.full((10,), math.nan)),
    "weights as large as can be said": put("model", "head.bias", torch.zeros(1).expand(10**12)),
    "names no texts": put("model", {1: torch.zeros(1)}),
}
OF_RESUMING: dict[str, Change] = {
    "no state": without("state"),
    "state a list": put("state", [1]),
    "state unknown": put("state", "exploded", 1),
    "step a text": put("state", "step", "first"),
    "step negative": put("state", "step", -5),
    "step behind the end": put("state", "step", 10**9),
    "losses a text": put("state", "losses", "x"),
    "curve of numbers": put("state", "curve", [1]),
    "no optimiser": without("optimizer"),
    "optimiser empty": put("optimizer", {}),
    "optimiser a list": put("optimizer", [1]),
    "optimiser of another model": put("optimizer", "param_groups", []),
    "no average": put("ema", None),
    "average a list": put("ema", [1]),
    "another experiment": put("experiment", "seed", 77),
    "weights not finite": put("model", "head.bias", torch.full((10,), math.nan)),
}
OF_CONFIGURATIONS: dict[str, bytes] = {
    "no JSON": b"exploded",
    "a list": b"[1, 2]",
    "a number": b"7",
    "nested": b"[" * 100_000,
    "no name": b"{}",
    "name unknown": b'{"architecture": "exploded"}',
    "name a list": b'{"architecture": [1]}',
    "keywords a list": b'{"architecture": "vit_nano_patch2_8", "model_args": [1]}',
    "another file": b'{"architecture": "vit_nano_patch2_8", "model_args": {"checkpoint_path": "exploded.pt"}}',
    "weights from elsewhere": b'{"architecture": "vit_nano_patch2_8", "model_args": {"pretrained": true}}',
    "a file in the description": b'{"architecture": "vit_nano_patch2_8", "pretrained_cfg": {"file": "exploded.pt"}}',
    "description a list": b'{"architecture": "vit_nano_patch2_8", "pretrained_cfg": [1]}',
    "classes beyond memory": b'{"architecture": "vit_nano_patch2_8", "num_classes": 1000000000000}',
    "classes a text": b'{"architecture": "vit_nano_patch2_8", "num_classes": "many"}',
    "labels a number": b'{"architecture": "vit_nano_patch2_8", "label_names": 5}',
    "join unknown": b'{"architecture": "vit_nano_patch2_8", "model_args": {"join": "exploded"}}',
}
LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefghij", "bcdefghijk", strict=True)
)
OF_RECIPES: dict[str, str] = {
    "runs code": "!!python/object/apply:os.system ['touch exploded']",
    "runs code in a setting": "settings: {model: !!python/object/apply:os.system ['touch exploded']}",
    "a module": "settings: {model: !!python/module:os }",
    "unknown tag": "settings: !exploded {model: x}",
    "a billion": LAUGHS + "settings: {model_args: {x: *k}}",
    "a billion open choices": LAUGHS + "open: *k",
    "a billion in the settings": "settings:\n  model_args:\n"
    + "".join(f"    {line}\n" for line in LAUGHS.splitlines()),
    "itself inside": "settings: &a {model_args: *a}",
    "itself inside a list": "open: &a [*a]",
    "nested": "settings: {model_args: " + "[" * 3000 + "]" * 3000 + "}",
    "nested and open": "[" * 100_000,
    "a number": "7",
    "nothing": "",
    "two documents": "settings: {}\n---\nsettings: {}",
    "zeros": "settings: {}\0",
    "tabs": "settings:\n\tepochs: 3",
    "setting unknown": "settings: {exploded: 1}",
    "setting no text": "settings: {1: 2}",
    "setting of another type": "settings: {epochs: many}",
    "setting a mapping": "settings: {epochs: {a: 1}}",
    "setting not a number": "settings: {lr: .nan}",
    "setting infinite": "settings: {lr: .inf}",
    "setting a date": "settings: {model: 2026-11-23}",
    "setting bytes": "settings: {model: !!binary aGVsbG8=}",
    "keywords a text": "settings: {model_args: deep}",
    "settings nothing": "settings:",
    "part unknown": "exploded: 1",
    "part no text": "1: 2",
    "extends itself": "extends: own.yaml",
    "extends what is not there": "extends: exploded.yaml",
    "extends another kind": "extends: /etc/passwd",
    "extends above": "extends: ../../etc/passwd",
    "extends a list": "extends: [1]",
    "extends a long name": f"extends: {'x' * 5000}.yaml",
    "table a text": "paper: {table: first}",
    "expected a text": "expected: {accuracy: {lape: high}}",
    "expected a list": "expected: {accuracy: {lape: [1]}}",
    "open a mapping": "open: [{a: 1}]",
    "at epoch 100 a text": "at_epoch_100: {lape: high}",
}
OF_RESULTS: dict[str, Change] = {
    "a list": instead([1]),
    "a number": instead(7),
    "no experiment": without("experiment"),
    "experiment a list": put("experiment", [1]),
    "setting unknown": put("experiment", "exploded", 1),
    "setting of another type": put("experiment", "epochs", "many"),
    "seed a text": put("experiment", "seed", "first"),
    "recipe a number": put("experiment", "recipe", 5),
    "recipe unknown": put("experiment", "recipe", "exploded"),
    "score unknown": put("score", "luck"),
    "score a list": put("score", [1]),
    "final without the score": put("final", {}),
    "final a list": put("final", [1]),
    "final a text": put("final", "val_accuracy", "high"),
    "no curve": without("curve"),
    "curve of numbers": put("curve", [1]),
    "row without its score": without("curve", 0, "val_accuracy"),
}
OF_SETTINGS: dict[str, Change] = {
    "a list": instead([1]),
    "a number": instead(7),
    "setting unknown": put("exploded", 1),
    "setting of another type": put("epochs", "many"),
    "setting nothing": put("epochs", None),
    "model a number": put("model", 3),
    "model a list": put("model", [1]),
    "keywords a list": put("model_args", [1]),
    "scale of one": put("scale", [1]),
}
HOSTILE_VALUES: list[Any] = [
    None, math.nan, math.inf, -1, 0, 1e308, 10**400, 2**63, "", "../../exploded", "a\0b", "\ud800", [], {}, [[[[]]]],
    [math.nan] * 8, True, "x" * 10_000, {"counts": [1]}, {"size": [10**9, 10**9], "counts": [10**18]}, -(10**9),
]  # fmt: skip


def shaken(content: Any, draw: random.Random) -> Any:
    """Take something out of JSON, or put something foreign in its place, at random."""
    places: list[tuple[Any, Any]] = []

    def walk(part: Any) -> None:
        for key in range(len(part)) if isinstance(part, list) else part if isinstance(part, dict) else ():
            places.append((part, key))
            walk(part[key])

    walk(content)
    part, key = draw.choice(places)
    if draw.random() < 0.2:
        del part[key]
    else:
        part[key] = draw.choice(HOSTILE_VALUES)
    return content


def _png(width: int, height: int, data: bytes = b"", kind: int = 2, depth: int = 8, extra: bytes = b"") -> bytes:
    import zlib

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    )


def _saved(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


DETECTOR = ["--model", "mask_rcnn_vit_adapter_nano", "--batch-size", "2", "--epochs", "1", "--workers", "0"]
DETECTOR += ["--accelerator", "cpu"]
OF_PICTURES: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "text": lambda: b"no picture",
    "zeros": lambda: bytes(10_000),
    "wider than memory": lambda: _png(2**31 - 1, 2**31 - 1),
    "a bomb": lambda: _png(30_000, 30_000, bytes(1000)),
    "no pixels": lambda: _png(0, 0),
    "missing pixels": lambda: _png(64, 64),
    "kind unknown": lambda: _png(64, 64, bytes(64 * 193), kind=77),
    "PostScript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(exploded) (w) file closefile\nshowpage\n",
    "a page": lambda: b"%PDF-1.4\n",
    "another's header": lambda: b"\xff\xd8\xff\xe0" + bytes(100),
}
"""These are seen: a file that cannot be a picture."""

OF_STRANGE_PICTURES: dict[str, Callable[[], bytes]] = {
    "one pixel": lambda: _saved(Image.new("RGB", (1, 1)), "PNG"),
    "a line": lambda: _saved(Image.new("RGB", (65_000, 1)), "PNG"),
    "a line down": lambda: _saved(Image.new("L", (1, 65_000)), "PNG"),
    "16 bits": lambda: _saved(Image.new("I;16", (64, 64)), "PNG"),
    "32 bits": lambda: _saved(Image.new("F", (64, 64)), "TIFF"),
    "CMYK": lambda: _saved(Image.new("CMYK", (64, 64)), "JPEG"),
    "one bit": lambda: _saved(Image.new("1", (64, 64)), "PNG"),
    "transparent": lambda: _saved(Image.new("LA", (64, 64)), "PNG"),
}
"""These are pictures; any answer will do that comes in time."""


# Cases

Make = Callable[[Sound, Path], Case]
CASES: dict[str, Make] = {}


def cases(kind: str, names: Any, make: Callable[[Sound, Path, Any], Case]) -> None:
    """Add a case of a kind for every name."""
    for name in names:
        CASES[f"{kind}: {name}"] = lambda sound, room, name=name: make(sound, room, name)


def _written(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def _copied(folder: Path, room: Path) -> Path:
    import shutil

    return Path(shutil.copytree(folder, room / folder.name))


def _tensors(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def _loaded(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def _evaluated(file: Path, **of: Any) -> Case:
    return Case(file, ["eval", str(file), "--accelerator", "cpu"], **of)


def _resumed(run: Path, name: str, **of: Any) -> Case:
    (run / "result.json").unlink(missing_ok=True)
    return Case(run / name, ["train", "--resume", "--out", str(run)], **of)


def _begun(file: Path, **of: Any) -> Case:
    return Case(file, ["train", *SMALL, "--weights", str(file), "--out", "out"], **of)


def _exported(file: Path, **of: Any) -> Case:
    return Case(file, ["export", str(file), "--out", "out.safetensors"], **of)


def _predicted(sound: Sound, file: Path, **of: Any) -> Case:
    return Case(file, ["predict", str(sound.run), str(file), "--out", "out", "--accelerator", "cpu"], **of)


def _trained(file: Path, root: Path, options: list[str], **of: Any) -> Case:
    return Case(file, ["train", *options, "--data", str(root), "--out", "out"], **of)


def _told(file: Path, **of: Any) -> Case:
    return Case(file, ["train", *SMALL, "--recipe", str(file), "--out", "out"], **of)


def _resulted(file: Path, **of: Any) -> Case:
    return Case(file, ["results", str(file.parent)], **of)


def _coco(sound: Sound, room: Path, change: Callable[[bytes], bytes], **of: Any) -> Case:
    root = _copied(sound.coco, room)
    file = root / "annotations" / "instances_train2017.json"
    file.write_bytes(change(file.read_bytes()))
    return _trained(file, root, DETECTOR, **of)


def _safetensors(path: Path, config: bytes, room: Path) -> Path:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    head = json.loads(content[8 : 8 + length])
    head["__metadata__"]["lape"] = config.decode()
    told = json.dumps(head).encode()
    return _written(room / path.name, struct.pack("<Q", len(told)) + told + content[8 + length :])


cases(
    "checkpoint to evaluate",
    range(20),
    lambda sound, room, seed: _evaluated(_written(room / "x.pt", damaged(sound.run / "best.pt", seed)), passes=True),
)
cases(
    "checkpoint to evaluate",
    OF_EVALUATION,
    lambda sound, room, name: _evaluated(
        _written(room / "x.pt", _tensors(OF_EVALUATION[name](_loaded(sound.run / "best.pt"))))
    ),
)
cases(
    "checkpoint that runs code",
    BOMBS,
    lambda sound, room, name: _evaluated(
        _written(room / "x.pt", _tensors({**_loaded(sound.run / "best.pt"), "metrics": BOMBS[name]}))
    ),
)
cases(
    "pickle that runs code",
    BOMBS,
    lambda sound, room, name: _begun(_written(room / "x.pth", pickle.dumps(BOMBS[name]))),
)


def _of_resuming(sound: Sound, room: Path, change: Callable[[Path], bytes], **of: Any) -> Case:
    run = _copied(sound.run, room)
    (run / "last.pt").write_bytes(change(run / "last.pt"))
    return _resumed(run, "last.pt", **of)


cases(
    "checkpoint to go on from",
    range(10),
    lambda sound, room, seed: _of_resuming(sound, room, lambda path: damaged(path, seed), passes=True),
)
cases(
    "checkpoint to go on from",
    OF_RESUMING,
    lambda sound, room, name: _of_resuming(sound, room, lambda path: _tensors(OF_RESUMING[name](_loaded(path)))),
)
cases(
    "weights to begin with",
    range(6),
    lambda sound, room, seed: _begun(_written(room / "x.pt", damaged(sound.run / "last.pt", seed)), passes=True),
)
cases(
    "safetensors to begin with",
    range(6),
    lambda sound, room, seed: _begun(_written(room / "x.safetensors", damaged(sound.weights, seed)), passes=True),
)
cases(
    "safetensors to export",
    range(6),
    lambda sound, room, seed: _exported(_written(room / "x.safetensors", damaged(sound.weights, seed)), passes=True),
)
cases(
    "safetensors to export",
    OF_CONFIGURATIONS,
    lambda sound, room, name: _exported(_safetensors(sound.weights, OF_CONFIGURATIONS[name], room)),
)


RECIPE = b"settings:\n  data: digits\n  model: vit_nano_patch2_8\n  epochs: 1\n  betas: [0.9, 0.95]\n  lr: 0.003\n"
MONSTERS = [name for name in OF_RECIPES if name.startswith(("runs code", "a billion", "itself", "nested"))]


def _shown(room: Path, text: str) -> Case:
    file = _written(room / "own.yaml", text.encode())
    return Case(file, ["recipes", str(file)])


def _configured(room: Path, text: str) -> Case:
    file = _written(room / "own.yaml", text.encode())
    return Case(file, ["train", *SMALL, "--config", str(file), "--out", "out"])


cases(
    "recipe",
    range(12),  # what is refused may be a setting's value, which is told without its file
    lambda sound, room, seed: _told(
        _written(room / "own.yaml", DAMAGES[seed % 6](RECIPE, random.Random(seed))), passes=True, named="lape"
    ),
)
cases("recipe", OF_RECIPES, lambda sound, room, name: _told(_written(room / "own.yaml", OF_RECIPES[name].encode())))
cases("recipe to show", MONSTERS, lambda sound, room, name: _shown(room, OF_RECIPES[name]))
cases("configuration", MONSTERS, lambda sound, room, name: _configured(room, OF_RECIPES[name]))


def _of_results(sound: Sound, room: Path, change: Callable[[bytes], bytes], **of: Any) -> Case:
    record = json.loads((sound.run / "result.json").read_text())
    record["experiment"]["recipe"] = "cifar100/cct_7_3x1_32"
    return _resulted(_written(room / "run" / "result.json", change(json.dumps(record).encode())), **of)


def _of_settings(sound: Sound, room: Path, change: Callable[[bytes], bytes], resume: bool, **of: Any) -> Case:
    run = _copied(sound.run, room)
    file = run / "experiment.json"
    file.write_bytes(change(file.read_bytes()))
    return Case(file, ["train", *(["--resume"] if resume else SMALL), "--out", str(run)], **of)


def _as_json(change: Change) -> Callable[[bytes], bytes]:
    return lambda content: json.dumps(change(json.loads(content))).encode()


def _at_random(seed: int) -> Callable[[bytes], bytes]:
    return _as_json(lambda content: shaken(content, random.Random(seed)))


cases("result", OF_RESULTS, lambda sound, room, name: _of_results(sound, room, _as_json(OF_RESULTS[name])))
cases("result", range(10), lambda sound, room, seed: _of_results(sound, room, _at_random(seed), passes=True))
for resume in (False, True):
    cases(
        f"settings, resume {resume}",
        OF_SETTINGS,
        lambda sound, room, name, resume=resume: _of_settings(sound, room, _as_json(OF_SETTINGS[name]), resume),
    )
    cases(
        f"settings, resume {resume}",
        range(8),
        lambda sound, room, seed, resume=resume: _of_settings(sound, room, _at_random(seed), resume, passes=True),
    )

cases("annotations", range(40), lambda sound, room, seed: _coco(sound, room, _at_random(seed), passes=True))
cases(
    "annotations, bytes",
    range(12),
    lambda sound, room, seed: _coco(
        sound, room, lambda content: DAMAGES[seed % 6](content, random.Random(seed)), passes=True
    ),
)

cases(
    "picture to predict",
    OF_PICTURES,
    lambda sound, room, name: _predicted(sound, _written(room / "x.png", OF_PICTURES[name]())),
)
cases(
    "picture to predict",
    OF_STRANGE_PICTURES,
    lambda sound, room, name: _predicted(sound, _written(room / "x.png", OF_STRANGE_PICTURES[name]()), passes=True),
)
cases(
    "picture to predict",
    range(12),
    lambda sound, room, seed: _predicted(sound, _written(room / "x.jpg", damaged(sound.picture, seed)), passes=True),
)


def _of_pets(sound: Sound, room: Path, content: bytes, **of: Any) -> Case:
    root = _copied(sound.pets, room)
    return _trained(_written(root / "train" / "cat" / "0.png", content), root, PETS, **of)


def _of_maps(sound: Sound, room: Path, content: bytes, kind: str, **of: Any) -> Case:
    root = _copied(sound.ade20k, room)
    name = "0.png" if kind == "annotations" else "0.jpg"
    return _trained(_written(root / kind / "training" / name, content), root, SEGMENTER, **of)


cases("picture to train on", OF_PICTURES, lambda sound, room, name: _of_pets(sound, room, OF_PICTURES[name]()))
cases("picture with a map", OF_PICTURES, lambda sound, room, name: _of_maps(sound, room, OF_PICTURES[name](), "images"))
cases("map", OF_PICTURES, lambda sound, room, name: _of_maps(sound, room, OF_PICTURES[name](), "annotations"))
cases(
    "map of another kind",
    OF_STRANGE_PICTURES,
    lambda sound, room, name: _of_maps(sound, room, OF_STRANGE_PICTURES[name](), "annotations"),
)


# Settings that would have something imported, called, fetched or opened

SPECS: dict[str, Any] = {
    "os.system": {"class_path": "os.system", "init_args": {"command": "touch exploded"}},
    "subprocess.Popen": {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "exploded"]}},
    "builtins.eval": {"class_path": "builtins.eval", "init_args": {"source": "open('exploded', 'w')"}},
    "a module beside the file": {"class_path": "besides.Class"},
    "a module in init_args": {
        "class_path": "torch.nn.Linear",
        "init_args": {"in_features": {"class_path": "besides.Class"}},
    },
}
WRAPPED: dict[str, Callable[[Any], Any]] = {
    "": lambda spec: {"depth": spec},
    " nested": lambda spec: {"depth": {"deeper": spec}},
    " in a list": lambda spec: {"depth": [spec]},
    " as the whole": lambda spec: spec,
}
SPELLED = {f"{name}{place}": wrap(spec) for name, spec in SPECS.items() for place, wrap in WRAPPED.items()}
FETCHING: dict[str, Change] = {
    "pretrained": put("model_args", "pretrained", True),
    "a configuration with an address": put("model_args", "pretrained_cfg", {"url": "http://127.0.0.1:9/exploded"}),
    "a configuration with a file": put("model_args", "pretrained_cfg", {"file": "exploded.pt"}),
    "a configuration of the Hub": put("model_args", "pretrained_cfg", {"hf_hub_id": "exploded/exploded"}),
    "a configuration over another": put("model_args", "pretrained_cfg_overlay", {"file": "exploded.pt"}),
    "a checkpoint's path": put("model_args", "checkpoint_path", "exploded.pt"),
    "a cache": put("model_args", "cache_dir", "exploded"),
    "a name of the Hub": put("model", "hf-hub:exploded/exploded"),
    "a name of a folder": put("model", "local-dir:exploded"),
}


def _with_module(room: Path) -> Path:
    _written(room / "besides.py", b"open('exploded', 'w')\n\nclass Class:\n    pass\n")
    return room


def _set_model_args(value: Any) -> Change:
    return put("model_args", value)


def _of_experiment(sound: Sound, room: Path, change: Change) -> Path:
    """Return a run folder whose settings, results and checkpoints all tell of a changed experiment."""
    run = _with_module(_copied(sound.run, room))
    for name in ("best.pt", "last.pt"):
        state = _loaded(run / name)
        state["experiment"] = change(state["experiment"])
        (run / name).write_bytes(_tensors(state))
    (run / "experiment.json").write_text(json.dumps(change(json.loads((run / "experiment.json").read_text()))))
    record = json.loads((run / "result.json").read_text())
    record["experiment"] = change(record["experiment"])
    (run / "result.json").write_text(json.dumps(record))
    return run


USES: dict[str, Callable[[Sound, Path], list[str]]] = {
    "eval": lambda sound, run: ["eval", str(run), "--accelerator", "cpu"],
    "predict": lambda sound, run: ["predict", str(run), str(sound.picture), "--out", "out"],
    "export": lambda sound, run: ["export", str(run), "--out", "out.safetensors"],
    "correlation": lambda sound, run: ["analyze", "correlation", str(run), "--out", "out"],
    "decomposition": lambda sound, run: ["analyze", "decomposition", str(run), "--out", "out"],
    "resume": lambda sound, run: ["train", "--resume", "--out", str(run)],
    "report": lambda sound, run: ["report", str(run), "--out", "out.html"],
    "results": lambda sound, run: ["results", str(run)],
}


def _used(sound: Sound, room: Path, use: str, change: Change) -> Case:
    run = _of_experiment(sound, room, change)
    if use == "resume":
        (run / "result.json").unlink()
    return Case(run, USES[use](sound, run), named="lape", passes=use in ("report", "results"))  # which make no model


for use in USES:
    cases(
        f"settings of a run that run code, {use}",
        ["os.system", *(SPECS if use == "resume" else ())],
        lambda sound, room, name, use=use: _used(sound, room, use, _set_model_args({"depth": SPECS[name]})),
    )
    cases(
        f"settings of a run that fetch, {use}",
        FETCHING if use in ("eval", "resume") else ["pretrained", "a name of the Hub"],
        lambda sound, room, name, use=use: _used(sound, room, use, FETCHING[name]),
    )


def _spelled(room: Path, name: str, command: str) -> Case:
    file = _written(_with_module(room) / "own.json", json.dumps({"model_args": SPELLED[name]}).encode())
    return Case(file, [*command.split(), "--config", str(file), "--out", "out"], named="lape")


for command in ("train", "export x.pt", "analyze correlation x.pt"):
    cases(
        f"configuration that runs code, {command.split()[0]}",
        SPELLED if command == "train" else [name for name in SPELLED if name.startswith("os.system")],
        lambda sound, room, name, command=command: _spelled(room, name, command),
    )


def _extending(room: Path, name: str, extended: bool) -> Case:
    recipe = _written(_with_module(room) / "own.yaml", json.dumps({"settings": {"model_args": SPELLED[name]}}).encode())
    if extended:
        recipe = _written(room / "over.yaml", json.dumps({"extends": str(recipe)}).encode())
    return Case(recipe, ["train", "--recipe", str(recipe), "--out", "out", "--accelerator", "cpu"], named="lape")


for extended in (False, True):
    cases(
        "recipe that extends what runs code" if extended else "recipe that runs code",
        SPECS,
        lambda sound, room, name, extended=extended: _extending(room, name, extended),
    )


def _of_configuration(sound: Sound, room: Path, config: dict[str, Any]) -> Case:
    return _exported(_safetensors(sound.weights, json.dumps(config).encode(), _with_module(room)))


cases(
    "configuration of the Hub that runs code",
    SPECS,
    lambda sound, room, name: _of_configuration(
        sound, room, {"architecture": "vit_nano_patch2_8", "model_args": {"depth": SPECS[name]}}
    ),
)
cases(
    "configuration of the Hub that fetches",
    FETCHING,
    lambda sound, room, name: _of_configuration(
        sound,
        room,
        {
            "architecture" if part == "model" else part: value
            for part, value in FETCHING[name]({"model": "vit_nano_patch2_8", "model_args": {}}).items()
        },
    ),
)


# Files without end, and small ones of much content


def _pipe(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


def _zeros(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")
    return path


def _in_copy(folder: Path, room: Path, name: str, end: Callable[[Path], Path]) -> Path:
    """Return a file of a copied folder, which is put in the place of the sound one."""
    return end(_copied(folder, room) / name)


def _exported_folder(sound: Sound, room: Path, end: Callable[[Path], Path], name: str) -> Case:
    import shutil

    for part in ("config.json", "model.safetensors"):
        (room / "whole").mkdir(parents=True, exist_ok=True)
        shutil.copy(sound.weights, room / "whole" / part)
    file = end(room / "whole" / name)
    return Case(file, ["export", str(file.parent), "--out", "out.safetensors"])


End = Callable[[Path], Path]
ENDLESS: dict[str, Callable[[Sound, Path, End], Case]] = {
    "checkpoint": lambda sound, room, end: _evaluated(end(room / "x.pt")),
    "weights": lambda sound, room, end: _begun(end(room / "x.pt")),
    "safetensors": lambda sound, room, end: _exported(end(room / "x.safetensors")),
    "checkpoint to go on from": lambda sound, room, end: _resumed(
        _in_copy(sound.run, room, "last.pt", end).parent, "last.pt"
    ),
    "configuration": lambda sound, room, end: Case(
        end(room / "own.yaml"), ["train", *SMALL, "--config", str(room / "own.yaml"), "--out", "out"]
    ),
    "configuration before another": lambda sound, room, end: Case(
        end(room / "own.yaml"),
        [
            *("train", *SMALL, "--config", str(room / "own.yaml")),
            *("--config", str(_written(room / "empty.yaml", b"{}")), "--out", "out"),
        ],
    ),
    "recipe": lambda sound, room, end: _told(end(room / "own.yaml")),
    "settings": lambda sound, room, end: Case(
        file := _in_copy(sound.run, room, "experiment.json", end), ["train", "--resume", "--out", str(file.parent)]
    ),
    "result": lambda sound, room, end: _resulted(_in_copy(sound.run, room, "result.json", end)),
    "configuration of the Hub": lambda sound, room, end: _exported_folder(sound, room, end, "config.json"),
    "weights of the Hub": lambda sound, room, end: _exported_folder(sound, room, end, "model.safetensors"),
    "picture to predict": lambda sound, room, end: _predicted(sound, end(room / "x.png")),
    "picture to train on": lambda sound, room, end: _trained(
        _in_copy(sound.pets, room, "train/cat/0.png", end), room / "pets", PETS
    ),
    "map": lambda sound, room, end: _trained(
        _in_copy(sound.ade20k, room, "annotations/training/0.png", end), room / "ade20k", SEGMENTER
    ),
    "classes": lambda sound, room, end: _trained(
        _in_copy(sound.ade20k, room, "classes.txt", end), room / "ade20k", SEGMENTER
    ),
    "annotations": lambda sound, room, end: _trained(
        _in_copy(sound.coco, room, "annotations/instances_train2017.json", end), room / "coco", DETECTOR
    ),
}
for end in (_pipe, _zeros):
    cases(
        "pipe" if end is _pipe else "device",
        ENDLESS,
        lambda sound, room, name, end=end: ENDLESS[name](sound, room, end),
    )


def _reported(sound: Sound, room: Path, end: End) -> Case:
    """A report leaves out what it cannot read, and says so."""
    file = _in_copy(sound.run, room, "result.json", end)
    return Case(file, ["report", str(file.parent), str(sound.run), "--out", "out.html"], passes=True)


cases("result in a report", ["pipe"], lambda sound, room, _: _reported(sound, room, _pipe))
cases("result in a report", ["device"], lambda sound, room, _: _reported(sound, room, _zeros))


def _packed(path: Path, sound: Path) -> Path:
    """Write a checkpoint again with its parts packed, the largest with zeros behind it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(sound) as stored, zipfile.ZipFile(path, "w") as archive:
        largest = max(stored.infolist(), key=lambda entry: (".pkl" not in entry.filename, entry.file_size))
        for entry in stored.infolist():
            made = zipfile.ZipInfo(entry.filename)
            made.compress_type, made._compresslevel = zipfile.ZIP_DEFLATED, 1
            with archive.open(made, "w") as part:
                part.write(stored.read(entry))
                for _ in range(24 if entry is largest else 0):
                    part.write(bytes(1 << 26))
    return path


def _overlapping(path: Path) -> Path:
    """Write a zip of a thousand names for one content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data/0", bytes(1 << 20))
        (first,) = archive.infolist()
        for number in range(1, 1000):
            entry = copy.copy(first)
            entry.filename = f"archive/data/{number}"
            archive.filelist.append(entry)
    return path


cases("packed", ["checkpoint"], lambda sound, room, _: _evaluated(_packed(room / "x.pt", sound.run / "best.pt")))
cases("packed", ["weights"], lambda sound, room, _: _begun(_packed(room / "x.pt", sound.run / "best.pt")))


def _asking(path: Path) -> Path:
    """Write a checkpoint whose pickle asks for memory by a number."""
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02c__builtin__\nbytearray\n(J\x00\x00\x00\x70tR.")
        archive.writestr("x/version", "3\n")
        archive.writestr("x/byteorder", "little")
    return path


def _shifted(path: Path, sound: Path) -> Path:
    """Write a checkpoint with something before its parts: whoever reads it from behind finds another directory."""
    path.parent.mkdir()
    path.write_bytes(sound.read_bytes())
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"behind"
    return path


cases("packed", ["memory by a number"], lambda sound, room, _: _evaluated(_asking(room / "x.pt")))
cases("packed", ["a comment"], lambda sound, room, _: _evaluated(_shifted(room / "x.pt", sound.run / "best.pt")))
cases("packed", ["a thousand names"], lambda sound, room, _: _evaluated(_overlapping(room / "x.pt")))


def _garments(room: Path, head: bytes, zeros: int) -> Case:
    file = room / "garments" / "train-images-idx3-ubyte.gz"
    file.parent.mkdir(parents=True, exist_ok=True)
    part = gzip.compress(bytes(1 << 26))
    file.write_bytes(gzip.compress(head) + part * (zeros >> 26))  # members of a file are unpacked one after the other
    words = ["train", *SMALL, "--data", "fashion-mnist", "--data-dir", str(file.parent), "--out", "out"]
    return Case(file, words, named=file.stem)


OF_IDX: dict[str, tuple[bytes, int]] = {
    "more than it says": (struct.pack(">4B3I", 0, 0, 8, 3, 6, 28, 28), 2 << 30),
    "says too much": (struct.pack(">4B3I", 0, 0, 8, 3, 2**31, 28, 28), 2 << 30),
    "axes without end": (b"\0\0\x08\xff", 2 << 30),
}
cases("packed garments", OF_IDX, lambda sound, room, name: _garments(room, *OF_IDX[name]))


# Small files of large models

MONSTROUS: dict[str, Change] = {
    "deep": put("model_args", "depth", 10**7),
    "deeper than a list": put("model_args", "depth", 10**9),
    "just too deep": put("model_args", "depth", 60_000),
    "wide": put("model_args", "embed_dim", 20_000),
    "of many patches": put("model_args", "img_size", 60_000),
}


def _monstrous(sound: Sound, room: Path, use: str, change: Change) -> Case:
    run = _of_experiment(sound, room, change)
    if use == "resume":
        (run / "result.json").unlink()
    named = "last.pt" if use == "resume" else "best.pt"
    return Case(run, USES[use](sound, run), named=named)


MADE = [use for use in USES if use not in ("report", "results")]  # which make no model
for use in MADE:
    cases(
        f"run of a monster, {use}",
        [name for name in MONSTROUS if name != "of many patches" and (name == "deep" or use in ("eval", "resume"))],
        lambda sound, room, name, use=use: _monstrous(sound, room, use, MONSTROUS[name]),
    )
cases(
    "configuration of a monster",
    MONSTROUS,
    lambda sound, room, name: _exported(
        _safetensors(
            sound.weights,
            json.dumps(MONSTROUS[name]({"architecture": "vit_nano_patch2_8", "model_args": dict(MODEL)})).encode(),
            room,
        )
    ),
)
cases(
    "configuration of a monster",
    ["stages"],
    lambda sound, room, _: _exported(
        _safetensors(
            sound.weights,
            json.dumps(
                {"architecture": "swin_tiny_patch4_window7_224", "model_args": {"depths": [60_000] * 10_000}}
            ).encode(),
            room,
        )
    ),
)


def _swollen(sound: Sound, room: Path, name: str) -> Case:
    state = _loaded(sound.run / "best.pt")
    one = torch.zeros(1)
    state |= {
        "weights": {"model": {"x": one.expand(1 << 32)}},
        "a thousand": {"model": {str(number): one.expand(1 << 20) for number in range(4000)}},
        "elsewhere": {"optimizer": {"state": [{"x": one.expand(1 << 32)}]}},
        "the widest": {
            "model": {"head.weight": one.expand(10, 10**9)},
            "experiment": put("model_args", "embed_dim", 10**9)(state["experiment"]),
        },
    }[name]
    return _evaluated(_written(room / "x.pt", _tensors(state)))


cases("one number for many", ["weights", "a thousand", "elsewhere", "the widest"], _swollen)


# The law


class Late(BaseException):
    """No error of the system, which a command would tell as the file's."""


@pytest.fixture
def here(tmp_path, monkeypatch) -> Iterator[Path]:
    """An empty folder to be in, in which no run is trained and nothing lasts."""
    monkeypatch.chdir(tmp_path)

    def some(self: TrainingRun, *_: Any) -> None:
        """See one batch of each kind."""
        for batches in (self._training_batches(), self._load(self.work.validation(), InOrder(4, 2))):
            next(batches, None)
            batches.close()

    monkeypatch.setattr(TrainingRun, "fit", some)
    monkeypatch.syspath_prepend(tmp_path / "files")  # where a module may lie beside a file

    def fetched(*_: Any, **__: Any) -> None:
        (tmp_path / "exploded").touch()
        raise OSError("fetched")

    monkeypatch.setattr(timm.models._builder, "load_pretrained", fetched)
    monkeypatch.setattr(timm.models._factory, "load_checkpoint", fetched)
    monkeypatch.setattr(timm.models._factory, "load_model_config_from_hf", fetched)
    monkeypatch.setattr(timm.models._factory, "load_model_config_from_path", fetched)
    tool = _written(tmp_path / "bin" / "gs", b"#!/bin/sh\ntouch exploded\n")  # Ghostscript, of which Pillow makes use
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)

    def late(*_: Any) -> None:
        raise Late(f"not refused in {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    faulthandler.dump_traceback_later(2 * SECONDS, exit=True)  # where no signal is heard
    yield tmp_path
    faulthandler.cancel_dump_traceback_later()
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", CASES)
def test_no_file_runs_code_or_hangs_or_ends_in_a_traceback(name, sound, here, capfd):
    case = CASES[name](sound, here / "files")
    with suppress(OSError):  # where the system is no Linux
        Path("/proc/self/clear_refs").write_text("5")  # forget the most memory so far, which making the case took
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = cli.main(case.words)
    out, err = capfd.readouterr()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY
    assert not list(here.rglob("exploded"))
    if status == 0:
        assert case.passes
        return
    assert status in (cli.USAGE, cli.FAILURE)
    told = [line for line in err.splitlines() if line.startswith("lape: ")]
    first, *more = told
    assert [line.endswith("could not be read, and are named above.") for line in more] in ([], [True]), err
    assert (case.named or case.file.name) in first, first
    assert "Traceback" not in out + err


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_no_option_of_any_command_is_made_an_object_of_by_a_file(command, tmp_path, monkeypatch):
    monkeypatch.chdir(_with_module(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    for option, name in product(cli._hints(cli.COMMANDS[command]), ("os.system", "a module beside the file")):
        value = {"depth": SPECS[name]} if option == "model_args" else SPECS[name]
        (tmp_path / "own.json").write_text(json.dumps({option: value}))
        with suppress(UsageError):
            cli.parsed([command, "--config", "own.json"])
    assert not list(tmp_path.rglob("exploded"))
    assert "besides" not in sys.modules


def test_nothing_is_downloaded_to_where_a_checkpoint_says(sound, here, capfd):
    def elsewhere(experiment: dict[str, Any]) -> dict[str, Any]:
        return experiment | {"data": "fashion-mnist", "data_dir": str(here / "home")}

    (here / "home").mkdir()
    run = _of_experiment(sound, here / "files", elsewhere)
    for words in (USES["eval"](sound, run), USES["decomposition"](sound, run)):
        assert cli.main(words) != 0
        assert "lape: " in capfd.readouterr().err
    assert not list((here / "home").rglob("*"))


def test_a_run_is_evaluated_with_the_processes_of_this_machine(sound, here, monkeypatch):
    asked = []
    monkeypatch.setattr(
        lape.training.evaluation, "launch", lambda experiment: asked.append(experiment) or launch(experiment)
    )
    run = _of_experiment(sound, here / "files", lambda experiment: experiment | {"devices": 7, "workers": 900})
    assert cli.main(["eval", str(run)]) == 0
    assert [(experiment.devices, experiment.workers) for experiment in asked] == [(1, None)]


@pytest.mark.parametrize("setting", ["teacher", "teacher_weights", "weights"])
def test_what_a_resumed_folder_would_have_opened_is_said_again(setting, sound, here, capfd):
    run = _of_experiment(sound, here / "files", lambda experiment: experiment | {setting: "exploded.pt"})
    (run / "result.json").unlink()
    (run / "last.pt").unlink()
    assert cli.main(["train", "--resume", "--out", str(run)]) == cli.USAGE
    assert f"add --{setting} exploded.pt" in capfd.readouterr().err
    assert cli.main(["train", "--resume", "--out", str(run), f"--{setting}", "exploded.pt"]) != 0
    assert f"add --{setting} exploded.pt" not in capfd.readouterr().err


def test_a_run_that_goes_on_does_not_open_what_it_began_with(sound, here):
    run = _of_experiment(sound, here / "files", lambda experiment: experiment | {"weights": "exploded.pt"})
    (run / "result.json").unlink()
    assert cli.main(["train", "--resume", "--out", str(run)]) == 0
