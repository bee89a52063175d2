"""The core needs torch, timm, numpy and pillow; what needs more says so before it begins, and how to get it."""

import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from lape.cli import command_line as cli
from lape.errors import RunError
from lape.extras import EXTRAS, require
from lape.training.curves import TENSORBOARD, Curves

CORE_ALONE = """
import copy, sys
from lape.extras import EXTRAS
from lape.__main__ import main
for package in (name for names in EXTRAS.values() for name in names):
    sys.modules[package] = None  # an import of it fails, and it is not found
import timm, torch, lape
model = lape.apply(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=32, num_heads=2)).eval()
image = torch.randn(1, 3, 32, 32)
output = model(image)
assert len(lape.ladder(model)) == 2
folder = sys.argv[1]
lape.save_pretrained(model, folder)
assert lape.from_pretrained(folder).eval()(image).equal(output)
assert not lape.load_weights(model, folder + "/model.safetensors").missing
lape.export(model, folder + "/model.pt2", fold=True)
torch.testing.assert_close(lape.fold(copy.deepcopy(model))(image), output)
lape.remove(model)
from lape.analysis import correlation, decomposition
assert main() == 1
"""


def test_the_core_works_without_any_extra(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", CORE_ALONE, str(tmp_path / "saved")], capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.splitlines()[-1] == (
        "lape: The command line needs jsonargparse, rich, not installed here. Install what is missing: "
        "pip install 'lape[train]'."
    )


def test_the_extras_bring_what_is_asked_for() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    # Of trackers neither is installed for the tests, and each has the name that is imported.
    distributions = {name: [name] for name in ("wandb", "mlflow")} | packages_distributions()
    for extra, packages in EXTRAS.items():
        brought = {line.partition(">=")[0].partition("[")[0] for line in project["optional-dependencies"][extra]}
        for package in set(packages) - {"shtab"}:  # an extra of jsonargparse's own
            assert {name.lower() for name in distributions[package]} & brought, (extra, package)


@pytest.mark.parametrize(
    ("words", "missing", "extra"),
    [
        (["compare", "--epochs", "1"], "jinja2", "report"),
        (["train", "--out", "x"], "lightning_fabric", "train"),
        (["report", "runs"], "matplotlib", "report"),
    ],
)
def test_a_command_says_what_it_needs_before_it_begins(words, missing, extra, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    assert cli.main(words) == cli.FAILURE
    assert f"lape {words[0]} needs {missing}, not installed here." in capsys.readouterr().err
    with pytest.raises(RunError, match=rf"pip install 'lape\[{extra}\]'"):
        require("It", missing)


def test_without_tensorboard_a_run_has_its_curve_all_the_same(tmp_path, monkeypatch) -> None:
    rows = [{"epoch": 1, "step": 2, "loss": 0.5}]
    for name in ("with", "without"):
        (tmp_path / name).mkdir()
    Curves(tmp_path / "with", []).add(rows)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    Curves(tmp_path / "without", []).add(rows)
    assert (tmp_path / "with" / TENSORBOARD).exists()
    assert not (tmp_path / "without" / TENSORBOARD).exists()
    assert (tmp_path / "without/curve.csv").read_text() == (tmp_path / "with/curve.csv").read_text()
