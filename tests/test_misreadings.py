"""Law: settings are read as they look, or refused in a line: numbers in eights and sixties, keys that stand twice."""

from pathlib import Path

import pytest

from lape import recipes
from lape.cli.command_line import main, parsed
from lape.errors import UsageError

OTHERWISE = {
    "epochs: 010": "010 would be read as 8",
    "epochs: 1:30": "1:30 would be read as 90",
    "lr: 1:30.5": "1:30.5 would be read as 90.5",
    "short_side: [480, 0640]": "0640 would be read as 416",
    "model_args: {depth: 010}": "010 would be read as 8",
    "epochs: 3\nseed: 1\nepochs: 4": "epochs is set twice",
    "model_args: {depth: 3, depth: 4}": "depth is set twice",
}


@pytest.mark.parametrize("text", OTHERWISE)
def test_a_file_of_settings_that_would_be_read_otherwise_is_refused(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.yaml").write_text(text)
    assert main(["train", "--config", str(tmp_path / "own.yaml"), "--out", str(tmp_path / "run")]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert OTHERWISE[text] in told
    assert str(tmp_path / "own.yaml") in told


@pytest.mark.parametrize("text", OTHERWISE)
def test_a_recipe_that_would_be_read_otherwise_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("settings:\n" + "".join(f"  {row}\n" for row in text.splitlines()))
    with pytest.raises(UsageError, match=OTHERWISE[text]) as refused:
        recipes.load(str(path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--epochs", "010"], "--epochs 010: 010 would be read as 8"),
        (["--epochs=1:30"], "1:30 would be read as 90"),
        (["--short_side", "0640"], "0640 would be read as 416"),
        (["--model_args", '{"depth": 010}'], "010 would be read as 8"),
        (["--model_args", '{"depth": 3, "depth": 4}'], "depth is set twice"),
    ],
    ids=str,
)
def test_what_is_typed_is_read_as_it_looks_or_refused(words: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parsed(["train", *words])


def test_what_looks_like_what_it_is_is_read(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("epochs: 07\nlr: 1e-3\ndata: '010'\nweights: \"1:30\"\n")
    _, given = parsed(["train", "--config", str(tmp_path / "own.yaml"), "--out", "1:30"])
    experiment = given["experiment"]
    assert (experiment.epochs, experiment.lr, experiment.data, experiment.weights) == (7, 1e-3, "010", "1:30")
