"""Laws of saved models: what comes back is the same model to the last bit, and nothing in a file is run."""

import base64
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import timm
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_models import SMALL, images, small
from tiny_hosts import SCHEMES, TINY, shaken
from torch import nn

import lape
from lape.errors import RunError, UsageError
from lape.sharing import hub

NAME = "deit_tiny_patch16_224"
OTHERS = ("segmenter_nano_patch8", "mask_rcnn_vit_adapter_nano")
KNOWN = lape.Known(("cat", "dog", "fox", "hen", "owl"), (0.4, 0.4, 0.4), (0.2, 0.2, 0.2), {"accuracy, %": 97.5}, "pets")


def plain(**names: str) -> nn.Module:
    return small(NAME, **({"join": "lape"} | names))


def the_same(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", [*SMALL, *OTHERS])
def test_a_model_comes_back_from_a_folder_by_us_and_by_timm(name: str, tmp_path: Path) -> None:
    model = shaken(lape.create_model(name)) if name in OTHERS else small(name, "lape")
    folder = lape.save_pretrained(model, tmp_path / "saved")
    assert sorted(path.name for path in folder.iterdir()) == [hub.CARD, hub.CONFIG, hub.WEIGHTS]
    for again in (lape.from_pretrained(folder), timm.create_model(f"local-dir:{folder}", pretrained=True).eval()):
        assert the_same(again, model)
        if name not in OTHERS:
            assert torch.equal(again(images(name)), model(images(name)))


@pytest.mark.parametrize("names", SCHEMES, ids=lambda names: "-".join(names.values()))
def test_every_join_comes_back(names: dict[str, str], tmp_path: Path) -> None:
    model = lape.apply(timm.create_model(NAME, img_size=(32, 64), **TINY), **names)
    again = lape.from_pretrained(lape.save_pretrained(shaken(model), tmp_path))
    assert torch.equal(again(images(NAME)), model.eval()(images(NAME)))


def test_a_model_of_timm_comes_back_with_and_without_a_join(tmp_path: Path) -> None:
    for number, model in enumerate((timm.create_model("vit_tiny_patch16_224", img_size=32, **TINY), plain())):
        assert the_same(lape.from_pretrained(lape.save_pretrained(model, tmp_path / str(number))), model)
    model = lape.remove(plain())
    assert "join" not in hub.configuration(model)["model_args"]
    assert the_same(lape.from_pretrained(lape.save_pretrained(model, tmp_path / "removed")), model)


def test_one_file_holds_its_configuration(tmp_path: Path) -> None:
    model = plain()
    path = lape.save_pretrained(model, tmp_path / "deep" / "model.safetensors", KNOWN)
    assert list(path.parent.iterdir()) == [path]
    assert the_same(lape.from_pretrained(path), model)
    with safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()[hub.HEADER])
    assert config == hub.configuration(model, KNOWN)
    assert (config["label_names"], config["model_args"]["join"]) == (list(KNOWN.classes), "lape")


def test_a_card_is_one_table_whatever_classes_are_called() -> None:
    config = hub.configuration(plain(), hub.Known(classes=["a|b", "c\nd", "e\\"]))
    (row,) = (line for line in hub.card(config, "USER/pets").splitlines() if line.startswith("| classes"))
    assert row.endswith(r": a\|b, c\\nd, e\\ |")


def test_what_is_known_goes_with_the_model(tmp_path: Path) -> None:
    folder = lape.save_pretrained(plain(), tmp_path / "pets", KNOWN)
    for again in (lape.from_pretrained(folder), timm.create_model(f"local-dir:{folder}")):
        cfg = again.pretrained_cfg
        assert (tuple(cfg["label_names"]), tuple(cfg["mean"]), tuple(cfg["std"])) == (
            KNOWN.classes, KNOWN.mean, KNOWN.std,
        )  # fmt: skip
    card = (folder / hub.CARD).read_text()
    assert "| accuracy, % | 97.50 on pets |" in card
    data = yaml.safe_load(card.split("---")[1])
    assert data == {"library_name": "timm", "tags": ["timm", "lape", "vision-transformer"]}
    assert 'lape.from_pretrained("USER/pets")' in card
    again = lape.save_pretrained(lape.from_pretrained(folder), tmp_path / "again")
    assert json.loads((again / hub.CONFIG).read_text())["label_names"] == list(KNOWN.classes)


def test_the_number_format_and_the_size_stay(tmp_path: Path) -> None:
    model = plain().double()
    model.set_input_size((48, 48))
    again = lape.from_pretrained(lape.save_pretrained(model, tmp_path))
    x = torch.randn(1, 3, 48, 48, dtype=torch.float64)
    assert torch.equal(again(x), model(x))


def test_timm_fine_tunes_and_resizes_what_was_saved(tmp_path: Path) -> None:
    model = small(NAME, "lape", img_size=(48, 48))
    folder = lape.save_pretrained(model, tmp_path)
    other = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=3, img_size=(64, 64))
    assert other.head.weight.shape[0] == 3
    assert torch.equal(other.blocks[0].pe_norm.weight, model.blocks[0].pe_norm.weight)
    assert other.pos_embed.shape[1] == 1 + 4 * 4
    with pytest.raises(UsageError, match="trained with join='lape', pe='learnable', pe_norm='layernorm'"):
        timm.create_model(f"local-dir:{folder}", pretrained=True, join="shared", num_classes=3)
    getter = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True).eval()
    x = images(NAME, size=(48, 48))
    assert torch.equal(getter(x)[-1], model.forward_intermediates(x, intermediates_only=True)[-1])


def test_more_keywords_may_be_given_on_loading(tmp_path: Path) -> None:
    again = lape.from_pretrained(lape.save_pretrained(plain(), tmp_path), dynamic_img_size=True)
    assert again(torch.randn(1, 3, 48, 80)).shape == (1, 5)


# --- What cannot come back is not written


def test_a_model_that_its_name_does_not_make_is_refused(tmp_path: Path) -> None:
    wider = plain()
    wider.blocks[1].mlp.fc1 = nn.Linear(32, 64)
    wider.blocks[1].mlp.fc2 = nn.Linear(64, 32)
    with pytest.raises(UsageError, match=r"cannot be made again.*blocks\.1\.mlp\.fc1\.weight is \(64, 32\)"):
        lape.save_pretrained(wider, tmp_path / "wider")
    otherwise = plain()
    for block in otherwise.blocks:
        block.mlp.act = nn.ReLU()
    with pytest.raises(UsageError, match="computes something else"):
        lape.save_pretrained(otherwise, tmp_path / "otherwise")
    with pytest.raises(UsageError, match=r"was not made by one.*lape\.create_model"):
        lape.save_pretrained(timm.models.VisionTransformer(img_size=32, **TINY), tmp_path / "by_hand")
    with pytest.raises(UsageError, match=r"Save it as it was before"):
        lape.save_pretrained(lape.fold(plain()), tmp_path / "folded")
    with pytest.raises(UsageError, match=r"norm_layer=.*JSON cannot hold"):
        lape.save_pretrained(timm.create_model(NAME, img_size=32, norm_layer=nn.LayerNorm, **TINY), tmp_path / "norm")
    assert not list(tmp_path.iterdir())


def test_keywords_that_timm_did_not_record_can_be_given(tmp_path: Path) -> None:
    model = timm.create_model(NAME, img_size=32, act_layer=nn.ReLU, **TINY)
    again = lape.from_pretrained(lape.save_pretrained(model, tmp_path, act_layer="relu"))
    assert isinstance(again.blocks[0].mlp.act, nn.ReLU)


# --- Files of others


class Harmful:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("harm"),)


def test_no_pickle_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = lape.save_pretrained(plain(), tmp_path / "saved")
    (folder / hub.WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(RunError, match=r"has no model\.safetensors"):
        lape.from_pretrained(folder)
    (folder / hub.WEIGHTS).write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(RunError, match=r"model\.safetensors cannot be read"):
        lape.from_pretrained(folder)
    with pytest.raises(RunError, match=r"is no \.safetensors file"):
        lape.from_pretrained(folder / "pytorch_model.bin")
    assert not Path("harm").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architecture": "deit_tiny_patch16_242"}, "is not a model that timm knows. Did you mean"),
        ({"architecture": "local-dir:/elsewhere"}, "is not a model that timm knows"),
        ({"architecture": None}, "describes a model that cannot be made here"),
        (
            {"model_args": {"checkpoint_path": "elsewhere.pth"}},
            "checkpoint_path in model_args would fetch or open other files",
        ),
        ({"model_args": {"pretrained": True}}, "pretrained in model_args would fetch or open other files"),
        ({"model_args": {"join": "lap", "pe": "learnable", "pe_norm": "layernorm"}}, "'lap' is not a join"),
        ({"model_args": {"wings": 2}}, "wings"),
        ({"num_classes": 7, "model_args": {"img_size": 32}}, "of another model"),
    ],
    ids=str,
)
def test_a_configuration_that_makes_no_such_model_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = lape.save_pretrained(plain(), tmp_path)
    config = json.loads((folder / hub.CONFIG).read_text())
    (folder / hub.CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(RunError, match=said):
        lape.from_pretrained(folder)


def test_what_is_not_there_or_has_no_configuration_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"does not exist\. Name a folder"):
        lape.from_pretrained(tmp_path / "nowhere" / "at" / "all")
    save_file(plain().state_dict(), tmp_path / "bare.safetensors")
    with pytest.raises(RunError, match=r"no configuration.*lape\.load_weights"):
        lape.from_pretrained(tmp_path / "bare.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=r"has no config\.json"):
        lape.from_pretrained(tmp_path / "empty")


# --- The Hub: a stand-in on this machine answers what huggingface_hub asks


class StandIn(BaseHTTPRequestHandler):
    """A Hub that knows: create, file_exists, validate-yaml, preupload, commit, and downloads by HEAD and GET."""

    folder: Path
    asked: list[str]

    def do_POST(self) -> None:
        path = urlsplit(self.path).path
        self.asked.append(f"{path} {self.headers['Authorization']}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        base = f"http://127.0.0.1:{self.server.server_address[1]}"
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization', 'user')}/{asked['name']}"
            refused = repo.startswith("refused")
            (self.folder / repo).mkdir(parents=True, exist_ok=True)
            self.answer({} if refused else {"url": f"{base}/{repo}"}, 403 if refused else 200)
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif "/commit/" in path:
            repo = "/".join(path.split("/")[3:5])
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    (self.folder / repo / line["value"]["path"]).write_bytes(content)
            self.answer({"commitUrl": f"{base}/{repo}/commit/{'0' * 40}", "commitOid": "0" * 40})
        else:
            self.answer({}, 404)

    def do_GET(self) -> None:
        self.asked.append(self.path)
        user, name, resolve, revision, *rest = [*unquote(urlsplit(self.path).path).split("/")[1:], *[""] * 4][:6]
        file = self.folder / user / name / "/".join(rest).rstrip("/")
        if resolve != "resolve" or revision not in ("main", "0" * 40) or not file.is_file():
            missing = "EntryNotFound" if file.parent.is_dir() else "RepoNotFound"
            return self.answer({}, 404, {"X-Error-Code": missing})
        return self.answer(file.read_bytes(), 200, {"ETag": f'"{file.stat().st_mtime_ns}"', "X-Repo-Commit": "0" * 40})

    do_HEAD = do_GET

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def stand_in(tmp_path: Path) -> Iterator[tuple[str, Path, list[str]]]:
    folder = tmp_path / "of_the_hub"
    handler = type("Here", (StandIn,), {"folder": folder, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", folder, handler.asked
    server.shutdown()
    server.server_close()


ON_THE_HUB = """
import sys, timm, torch, lape, huggingface_hub
from lape.cli import command_line as cli
folder, x = sys.argv[1], torch.load(sys.argv[2])
model = lape.from_pretrained(folder)
print(lape.push_to_hub(model, "user/pets", token="hf_stand_in"))
print(lape.push_to_hub(folder, "user/pets", token="hf_stand_in"))
for again in (lape.from_pretrained("user/pets"), lape.from_pretrained("user/pets@main"),
              timm.create_model("hf-hub:user/pets", pretrained=True).eval()):
    print(torch.equal(again(x), model(x)))
for missing in ("user/dogs", "user/pets@v2"):
    try:
        lape.from_pretrained(missing)
    except lape.RunError as error:
        print(error)
print(cli.main(["export", folder, "--push", "user/typed", "--license", "mit"]))
print(cli.main(["export", folder, "--push", "refused/typed", "--license", "mit"]))
huggingface_hub.constants.ENDPOINT = "http://127.0.0.1:9"  # nobody there
print(cli.main(["export", folder, "--push", "user/unreached", "--license", "mit"]))
huggingface_hub.constants.HF_HUB_OFFLINE = True
print(cli.main(["export", folder, "--out", folder + ".safetensors", "--push", "user/offline", "--license", "mit"]))
"""


def test_a_model_goes_to_the_hub_and_comes_back_by_us_and_by_timm(
    stand_in: tuple[str, Path, list[str]], tmp_path: Path
) -> None:
    address, kept, asked = stand_in
    saved = lape.save_pretrained(plain(), tmp_path / "pets", KNOWN)
    torch.save(images(NAME), tmp_path / "x.pt")
    (kept / "user/pets").mkdir(parents=True)
    (kept / "user/pets" / hub.CARD).write_text("Written by hand.")
    surroundings = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    told = subprocess.run(
        [sys.executable, "-c", ON_THE_HUB, str(saved), str(tmp_path / "x.pt")],
        env=surroundings
        | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), "NO_PROXY": "127.0.0.1", "HF_TOKEN": "hf_typed"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert told.returncode == 0, told.stderr
    lines = told.stdout.splitlines()
    assert lines[:5] == [f"{address}/user/pets", f"{address}/user/pets", "True", "True", "True"]
    for line, source in zip(lines[5:7], ("user/dogs", "user/pets@v2"), strict=True):
        assert line.startswith(f"{source} is not a folder here, and could not be downloaded from the Hub")
    typed = [line.partition(": ")[0] for line in lines[7:]]
    assert typed == [f"{address}/user/typed", "0", "1", "1", f"{saved}.safetensors", "1"], told.stderr
    refused, unreached, offline = (line for line in told.stderr.splitlines() if line.startswith("lape: "))
    assert refused.startswith("lape: The Hub did not take refused/typed (")
    assert refused.endswith("`hf auth login`, or HF_TOKEN.")
    assert unreached.startswith("lape: The Hub did not take user/unreached (")
    assert "offline" in offline.partition("did not take user/offline (")[2]
    assert "Traceback" not in told.stderr
    creations = [line.rpartition(" ")[2] for line in asked if line.startswith("/api/repos/create")]
    assert creations == ["hf_stand_in", "hf_stand_in", "hf_typed", "hf_typed"]
    assert the_same(lape.from_pretrained(kept / "user/typed"), plain())
    assert 'lape.from_pretrained("user/typed")' in (kept / "user/typed" / hub.CARD).read_text()
    assert not (tmp_path / "model.onnx").exists()
    assert load_file(kept / "user/pets" / hub.WEIGHTS).keys() == plain().state_dict().keys()
    assert (kept / "user/pets" / hub.CARD).read_text() == "Written by hand."


@pytest.mark.parametrize("name", ["a/b/c", "user/my pets", "", "user/"])
def test_what_is_no_name_of_a_repository_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="is no name of a repository on the Hub"):
        lape.push_to_hub(plain(), name)


def test_a_timm_that_records_nothing_saves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(timm.models, "get_model_args")  # as before 1.0.31
    with pytest.raises(RunError, match=r"does not record what a model was made with.*timm 1\.0\.31 or newer"):
        lape.save_pretrained(small("deit_tiny_patch16_224", "lape"), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
