"""The command line as a person types it: what it says, where, and the status that it ends with."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lape import Block, Host, UsageError, apply, create_model, fold, remove
from lape.cli import command_line as cli
from lape.cli.parsing import parser_of
from lape.training import checkpoints
from lape.training.loop import TrainingRun

SMALL = ["--model-args", '{"depth": 2, "embed_dim": 16, "num_heads": 2}', "--batch-size", "400", "--accelerator", "cpu"]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def lape(capsys):
    """Run a command in this process; returns status, standard output and standard error."""

    def run(*words):
        status = cli.main(words)
        told = capsys.readouterr()
        return status, told.out, told.err

    return run


def refused(told, status=cli.USAGE):
    """One line, no traceback, on standard error alone; returns it."""
    ended, out, err = told
    assert ended == status, told
    lines = [line for line in err.splitlines() if not line.startswith("epoch ")]
    assert len(lines) == 1, err
    assert lines[0].startswith("lape: ")
    assert "Traceback" not in err + out
    return lines[0]


def a_folder(root, size=16):
    for part in ("train", "val"):
        for number, name in enumerate(("cat", "dog")):
            (root / part / name).mkdir(parents=True)
            for i in range(4):
                pixels = np.full((size, size, 3), 40 * i + 100 * number, np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


OF_FOLDER = ["--data", "pets", "--img-size", "16", "--batch-size", "4", "--epochs", "1", "--workers", "0"]


# Help


def test_help_teaches_every_command_without_torch():
    script = (
        "import sys; from lape.cli.command_line import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print(sorted({'torch', 'timm', 'lightning_fabric', 'jsonargparse'} & set(sys.modules)))"
    )
    helps = ["--help"], ["train", "--help"], ["help", "compare"], ["--version"]
    misspelt = (
        ["trian"],
        ["train", "--join", "lapee"],
        ["train", "--precision", "bf16"],
        ["compare", "--pe", "none,lernable"],
        ["eval", "x", "--split", "v"],
    )
    for words in (*helps, *misspelt, ["models", "cct"], ["recipes"]):
        told = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
        loaded = [] if words in misspelt else ["jsonargparse"]  # its import alone takes the time that a refusal may
        assert told.stdout.splitlines()[-1] == str(loaded), (words, told.stderr)


def test_the_names_that_are_known_without_torch_are_those_of_the_tables():
    from lightning_fabric.connector import _PRECISION_INPUT_STR
    from timm.data.transforms import _str_to_pil_interpolation

    from lape import names
    from lape.analysis.subjects import ANALYSES
    from lape.data.erasing import FILLINGS
    from lape.data.sources import SPLITS
    from lape.method import JOINS, POSITION_EMBEDDINGS, POSITION_NORMS, STARTS
    from lape.tasks.classification import BALANCES, LOSSES, NORMALISATIONS
    from lape.training.assembly import SCHEDULES
    from lape.training.trackers import TRACKERS

    tables = {
        **dict.fromkeys(("join", "joins"), JOINS),
        **{"pe": POSITION_EMBEDDINGS, "pe_norm": POSITION_NORMS, "start": STARTS, "schedule": SCHEDULES},
        **{"loss": LOSSES, "split": SPLITS, "what": ANALYSES, "balance": BALANCES, "normalisation": NORMALISATIONS},
        **{"remode": FILLINGS, "tracker": TRACKERS, "precision": get_args(_PRECISION_INPUT_STR)},
        "interpolation": [*_str_to_pil_interpolation, "random"],
    }
    told = {option: sorted(choice.names) for option, choice in names.CHOICES.items() if option != "accelerator"}
    assert told == {option: sorted(table) for option, table in tables.items()}
    assert tuple(JOINS) == names.JOINS
    for table in (JOINS, POSITION_EMBEDDINGS, POSITION_NORMS, STARTS):
        for name in table:
            assert f'"{name}"' in str(apply.__doc__)


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", None, torch.nn.Linear])
def test_what_is_no_model_is_refused_in_words(model):
    for call in (apply, remove, fold, partial(apply, host=Host(name="own", table="pos", block=Block("norm")))):
        with pytest.raises(UsageError, match=r"timm\.create_model\(.*lape\.create_model\("):
            call(model)
    with pytest.raises(UsageError, match=r"lape\.create_model takes a name"):
        create_model(model if model is None else torch.nn.Identity())


def test_a_card_that_is_not_there_is_said_plainly(lape, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for accelerator in ("cuda", "gpu"):
        line = refused(lape("train", "--accelerator", accelerator, "--out", "x"), cli.FAILURE)
        assert line.startswith(f"lape: --accelerator {accelerator} needs a")
        assert "finds none here" in line
        assert "--accelerator cpu" in line


def test_help_shows_what_each_command_does_and_an_example(lape):
    status, out, err = lape("--help")
    assert (status, err) == (0, "")
    for name, command in cli.COMMANDS.items():
        assert command.does[1:].removesuffix(".") in " ".join(out.split())
        assert command.example in out
        status, own, _ = lape(name, "--help")
        assert status == 0
        assert command.example in own
        assert lape("help", name)[:2] == (0, own)
    assert lape()[:2] == lape("help")[:2] == (0, out)
    assert "print_completion" in out


def test_every_option_of_every_command_is_explained():
    for name, command in cli.COMMANDS.items():
        own = parser_of(cli.COMMANDS)._subparsers._group_actions[0].choices[name]
        for action in own._actions:
            assert action.help, f"{name} {action.option_strings}"
        assert {group.title for group in own._action_groups} >= {"This command"}
        assert set(cli._hints(command)) <= {action.dest for action in own._actions}


def test_a_command_is_one_function_and_one_entry(tmp_path):
    """Also where `lape` has a name like the function's: that loads torch as soon as it is looked up."""
    (tmp_path / "more.py").write_text(
        "import sys\n"
        "from lape.cli import commands\n"
        "from lape.cli.command_line import main\n"
        "def fold(rounds: int = 1) -> None:\n"
        '    """Fold something.\\n\\n    Args:\\n        rounds: How often.\\n    """\n'
        "fold.__module__, commands.fold = commands.__name__, fold\n"
        "commands.COMMANDS['fold'] = commands.Command(fold, 'lape fold --rounds 2')\n"
        "try: main(['fold', '--help'])\n"
        "finally: print('torch' in sys.modules)\n"
    )
    out = subprocess.run([sys.executable, tmp_path / "more.py"], capture_output=True, text=True, check=True).stdout
    assert "Fold something." in out
    assert "How often. (type: int, default: 1)" in out
    assert "lape fold --rounds 2" in out
    assert out.endswith("False\n")


def test_an_option_that_may_be_left_out_says_what_happens_then():
    for name in cli.COMMANDS:
        subparser = parser_of(cli.COMMANDS)._subparsers._group_actions[0].choices[name]
        for group in subparser._action_groups:
            for action in group._group_actions:
                if action.default is None and not action.required and cli._hints(cli.COMMANDS[name]).get(action.dest):
                    assert "default: " in " ".join(f"{group.title} {action.help}".split()), (name, action.dest)


def test_examples_of_the_help_are_read(lape):
    for command in cli.COMMANDS.values():
        assert lape(*command.example.split()[1:], "--print_config")[0] == 0


def test_version_and_completion(lape):
    assert lape("--version") == (0, "lape 0.1.0\n", "")
    status, script, _ = lape("--print_completion", "shtab-bash")
    assert status == 0
    assert "--checkpoint_seconds" in script


# Typing


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        (["--joins", "default", "lape"], "[default,lape]"),
        (["--joins", "default,lape"], "[default,lape]"),
        (["--joins", "default,", "lape"], "[default,lape]"),
        (["--joins=default,lape"], "[default,lape]"),
        (["--joins", "[default, lape]"], "[default,lape]"),
        (["--joins", "lape"], "[lape]"),
    ],
)
def test_lists_are_typed_with_spaces_or_commas(typed, read):
    assert cli._normal("compare", [*typed, "--epochs", "3"]) == [f"--joins={read}", "--epochs=3"]


def test_numbers_lists_flags_and_dashes_are_read(lape):
    status, out, _ = lape(
        "train", "--betas", "0.9", "0.95", "--scale", "0.2,1", "--resume", "--batch-size=8", "--grad-checkpointing",
        "--print_config",
    )  # fmt: skip
    assert status == 0
    config = yaml.safe_load(out)
    assert config["betas"] == [0.9, 0.95]
    assert config["scale"] == [0.2, 1.0]
    assert config["resume"] is config["grad_checkpointing"] is True
    assert config["batch_size"] == 8


def test_compare_takes_the_settings_of_a_run_but_those_that_it_varies(lape):
    _, out, _ = lape("compare", "--epochs", "7", "--seeds", "5", "--pe", "none", "--print_config")
    config = yaml.safe_load(out)
    assert (config["epochs"], config["seeds"], config["pe"]) == (7, [5], ["none"])
    assert not {"join", "seed", "resume"} & config.keys()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["trian"], "did you mean train?"),
        (["train", "--eopchs", "3"], "did you mean --epochs?"),
        (
            ["train", "--epochs", "ten"],
            "lape: --epochs takes a whole number; ten was given (lape train --help says more)",
        ),
        (["train", "--epochs"], "--epochs takes a whole number; nothing was given"),
        (["train", "--steps", "1.5"], "--steps takes a whole number; 1.5 was given"),
        (["train", "--lr", "fast"], "--lr takes a number; fast was given"),
        (["train", "--betas", "0.9,x"], "--betas takes two numbers, as A,B; 0.9,x was given"),
        (["train", "--betas", "1"], "--betas takes two numbers, as A,B; 1 was given"),
        (["train", "--decay-milestones", "1", "a"], "--decay_milestones takes whole numbers, as A,B,C; 1,a was given"),
        (
            ["train", "--model-args", "depth"],
            "--model_args takes names with their values, as '{\"depth\": 6}'; depth was",
        ),
        (["train", "--compile", "maybe"], "--compile takes true or false; maybe was given"),
        (["train", "--epochs", "3", "--accelerator", "cuda", "more"], "'more' belongs to no option of lape train"),
        (["train", "--accelerator", "cdua"], "Did you mean 'cuda'?"),
        (["train", "--pe", "learnable+rope-mixd"], "'rope-mixed'"),
        (["train", "--schedule", "cosin"], "'cosine'"),
        (["analyze", "corelation"], "'correlation'"),
        (["help", "trian"], "did you mean train?"),
        (["train", "--epochs", "0"], "epochs must be at least 1, not 0"),
        (["train", "more"], "more"),
        (["train", "--join", "lapee"], "'lape'"),
        (["train", "--pe", "learnabel"], "'learnable'"),
        (["train", "--model", "vit_nano_patch2_9"], "'vit_nano_patch2_8'"),
        (["train", "--data", "digts"], "'digits'"),
        (["train", "--data", "no/folder"], "There is no folder no/folder"),
        (["train", "--img_size", "9"], "which do not divide 9x9 images"),
        (["train", "--config", "nothing.yaml"], "nothing.yaml"),
        (["train", "--recipe", "cifar10/cct_7"], "Did you mean 'cifar10/cct_7_3x1_32'?"),
        (["train", "--recipe", "nothing.yaml"], "nothing.yaml cannot be read as a recipe"),
        (["train", "--recipe", "imagenet/t2t_vit_7"], "Give --data the folder that holds train/ and val/"),
        (["recipes", "cct"], "is not a recipe"),
        (["models", "resnet"], "No model's name has resnet in it"),
        (["results", "no/runs"], "No finished run"),
        (["train", "--pe", "relative", "--join", "lape"], "relative"),
        (["compare", "--joins", "default", "lapee"], "'lape'"),
        (["compare", "--seeds", "0"], "seeds"),
        (["cost", "--threads", "0"], "threads must be at least 1, not 0"),
        (["eval"], "checkpoint"),
    ],
)
def test_a_wrong_request_is_one_line_and_status_2(lape, tmp_path, words, told):
    assert told in refused(lape(*words))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_is_refused_before_a_run_begins(lape, tmp_path):
    (tmp_path / "file").write_text("in the way")
    status, out, err = lape("compare", "--out", "file")
    assert (status, out, err) == (1, "", "lape: file: File exists.\n")


# Train and eval


def test_train_then_eval(lape, tmp_path):
    status, out, err = lape("train", *SMALL, "--epochs", "2", "--out", "runs/x")
    assert (status, out.splitlines()[-1]) == (0, "Done: runs/x/result.json")
    lines = err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    assert "images/s" in lines[0]
    assert "left" in lines[0]
    assert "arning" not in err
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    best = json.loads((tmp_path / "runs/x/result.json").read_text())["best"]["val_accuracy"]
    for given in ("runs/x/best.pt", "runs/x"):
        status, out, err = lape("eval", "--checkpoint", given)
        assert (status, err) == (0, "")
        assert out.startswith(f"accuracy {best:.2f} % on 599 validation images of digits")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_run_has_a_folder_by_default(lape, tmp_path):
    assert lape("train", *SMALL, "--epochs", "1", "--join", "default", "--seed", "7")[0] == 0
    assert (tmp_path / "runs" / "digits" / "default-learnable-seed7" / "result.json").exists()


def test_a_used_folder(lape):
    """Nothing of a run is overwritten; --resume takes its settings from the folder."""
    assert lape("train", *SMALL, "--epochs", "1", "--out", "x")[0] == 0
    assert "holds a finished run" in refused(lape("train", *SMALL, "--epochs", "1", "--out", "x"))
    assert "epochs is 1 there, 2 here" in refused(lape("train", *SMALL, "--epochs", "2", "--out", "x"))
    assert lape("train", "--resume", "--out", "x")[:2] == (0, "Done: x/result.json\n")
    assert "lr is" in refused(lape("train", "--resume", "--out", "x", "--lr", "0.5"))


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        (["--out", "typo"], "typo"),
        (["--out", "typo", "--epochs", "60", "--accelerator", "cpu", "--weights", "vit.pt"], "typo"),
        ([], "runs/digits/lape-learnable-seed0"),
        (["--seed", "7"], "runs/digits/lape-learnable-seed7"),
    ],
)
def test_where_there_is_nothing_to_go_on_with_resume_alone_is_refused(lape, tmp_path, words, folder):
    line = refused(lape("train", "--resume", *words))
    assert f"{folder} holds no run to go on with (no experiment.json)" in line
    assert not list(tmp_path.iterdir())


def test_resume_beside_what_is_to_be_trained_begins_and_says_so(lape):
    status, out, err = lape("train", "--resume", *SMALL, "--epochs", "1", "--out", "x")
    assert (status, out.splitlines()[-1]) == (0, "Done: x/result.json")
    assert "x holds no run to go on with, so a new one begins." in err.splitlines()
    assert "a new one begins" not in lape("train", "--resume", "--out", "x")[2]


def test_a_configuration_that_was_printed_is_read(lape, tmp_path):
    _, out, _ = lape("train", *SMALL, "--epochs", "1", "--betas", "0.8,0.9", "--out", "x", "--print_config")
    (tmp_path / "run.yaml").write_text(out)
    assert lape("train", "--config", "run.yaml", "--seed", "3")[0] == 0
    stored = json.loads((tmp_path / "x/experiment.json").read_text())
    assert (stored["betas"], stored["seed"], stored["epochs"]) == ([0.8, 0.9], 3, 1)


def test_a_folder_of_images(lape, tmp_path):
    a_folder(tmp_path / "pets")
    model = ["--model", "vit_nano_patch2_8", "--model-args", '{"depth": 1, "embed_dim": 16, "num_heads": 2}']
    assert lape("train", *OF_FOLDER, *model, "--out", "x")[0] == 0
    assert lape("eval", "--checkpoint", "x", "--workers", "0")[0] == 0


# Failures


def test_an_unreadable_image_is_named(lape, tmp_path):
    (a_folder(tmp_path / "pets") / "train" / "dog" / "1.png").write_bytes(b"GIF8")
    line = refused(lape("train", *OF_FOLDER, "--workers", "1", "--out", "x"), cli.FAILURE)
    assert "pets/train/dog/1.png cannot be read as an image" in line


def test_folders_that_are_no_dataset(lape, tmp_path):
    root = a_folder(tmp_path / "pets")
    (root / "train" / "emu").mkdir()
    assert "pets/train/emu holds no image" in refused(lape("train", *OF_FOLDER))
    (root / "train" / "emu").rename(root / "val" / "emu")
    assert "pets/val/emu is a class that pets/train does not have" in refused(lape("train", *OF_FOLDER))


def test_a_loss_that_is_not_finite(lape, tmp_path):
    line = refused(lape("train", *SMALL, "--optimizer", "sgd", "--lr", "1e30", "--warmup-epochs", "0", "--out", "x"), 1)
    assert "in epoch 1, step" in line
    assert "training image" in line
    assert not (tmp_path / "x" / "result.json").exists()


def test_a_full_disk(lape, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    line = refused(lape("train", *SMALL, "--epochs", "1", "--out", "x"), cli.FAILURE)
    assert "x/experiment.json could not be written (No space left on device)" in line


def test_a_place_that_cannot_be_written(lape, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file/x" in refused(lape("train", *SMALL, "--epochs", "1", "--out", "file/x"), cli.FAILURE)


def test_a_checkpoint_with_code_and_one_of_another_model(lape, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.system, ("touch exploded",)

    torch.save({"experiment": {}, "model": Bomb()}, "bomb.pt")
    assert "could run code; it was not read" in refused(lape("eval", "--checkpoint", "bomb.pt"), cli.FAILURE)
    assert not (tmp_path / "exploded").exists()
    assert "nowhere.pt does not exist" in refused(lape("eval", "--checkpoint", "nowhere.pt"), cli.FAILURE)
    assert lape("train", *SMALL, "--epochs", "1", "--out", "x")[0] == 0
    saved = checkpoints.read(tmp_path / "x/best.pt")
    saved["experiment"]["model_args"] = {"depth": 1, "embed_dim": 16, "num_heads": 2}
    checkpoints.save(tmp_path / "other.pt", saved)
    assert "other.pt is of another model: blocks.1." in refused(lape("eval", "--checkpoint", "other.pt"), cli.FAILURE)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, "2"), (signal.SIGTERM, "0")])
def test_a_signal_ends_a_run_with_a_message(tmp_path, number, workers):
    """To the whole group of processes, as Ctrl-C in a terminal does."""
    options = ["train", *SMALL, "--epochs", "500", "--workers", workers, "--out", "x"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lape", *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    while not (tmp_path / "x" / "last.pt").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    told = process.returncode, out, err
    line = refused(told, 128 + number)
    kept = checkpoints.read(tmp_path / "x/last.pt")["state"]["step"]
    assert f"step {kept} of 1000 is kept in x/last.pt. Go on with --resume." in line


def test_a_bug_is_not_hidden(lape, monkeypatch):
    """Only what was foreseen becomes a sentence: a mistake of ours keeps its traceback."""

    def break_step(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(TrainingRun, "_step", break_step)
    with pytest.raises(ZeroDivisionError):
        lape("train", *SMALL, "--epochs", "1", "--out", "x")


def test_a_flag_is_switched_off_by_false() -> None:
    assert cli._normal("train", ["--batched", "false", "--compile", "--epochs", "3"]) == [
        "--batched=false",
        "--compile=true",
        "--epochs=3",
    ]


# --- The two commands that a newcomer types first


def test_cost_prints_a_table_that_fits_and_files_every_time(lape):
    typed = ["--model", "vit_nano_patch2_8", "--joins", "default,lape", "--batch-size", "1", "--rounds", "2"]
    status, out, _ = lape("cost", *typed, "--threads", str(torch.get_num_threads()), "--out", "filed")
    assert status == 0
    assert max(map(len, out.splitlines())) <= 80
    filed = json.loads(Path("filed/cost.json").read_text())
    names = ["untouched", "and again", "default", "lape", "lape, folded"]
    assert [cost["name"] for cost in filed["costs"]] == names
    assert all(len(cost["inference"]) == 2 for cost in filed["costs"])
    rows = [line for line in Path("filed/cost.md").read_text().splitlines() if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in rows[2:]] == names
    for cost in filed["costs"]:
        assert f"{cost['parameters']:,}" in out


def test_compare_trains_draws_its_page_and_says_where_it_is(lape):
    status, out, _ = lape("compare", *SMALL, "--epochs", "1", "--pe", "learnable", "--seeds", "1", "--out", "x")
    assert status == 0
    assert "Report: x/index.html" in out
    assert max(map(len, out.splitlines())) <= 80
    table = json.loads(Path("x/table.json").read_text())
    assert sorted(run["join"] for run in table["runs"]) == ["default", "lape"]
    assert "<table" in Path("x/index.html").read_text()
    lasts = {path: path.stat().st_size for path in Path("x/runs").rglob("last.pt")}
    assert len(lasts) == 2
    assert all("optimizer" not in checkpoints.read(path) for path in lasts)  # what evaluation needs is kept
    analysis = Path("x/index.analysis.json").read_text()
    for _ in range(2):  # the second time there is no last.pt to look at
        words = ("--joins", "lape", "--seed-list", "0", "--prune")
        status, out, err = lape("compare", *SMALL, "--epochs", "1", "--pe", "learnable", *words, "--out", "x")
        assert (status, "Report: x/index.html" in out, err.strip()) == (0, True, "1 finished run kept.")
        table = json.loads(Path("x/table.json").read_text())
        assert sorted(run["join"] for run in table["runs"]) == ["default", "lape"]  # the other one stays on the page
        assert Path("x/index.analysis.json").read_text() == analysis
        (left,) = Path("x/runs").rglob("last.pt")
        assert left.parent.name.startswith("default-")
    words = ("--joins", "default", "--pe", "none", "--seeds", "2", "--plan", "x/plan.txt", "--out", "x")
    status, out, _ = lape("compare", *SMALL, "--epochs", "1", *words)
    assert (status, out) == (0, "2 runs to train. Commands: x/plan.txt\n")
    command, *_ = Path("x/plan.txt").read_text().splitlines()
    assert lape(*command.split()[1:])[0] == 0
    assert len(list(Path("x/runs").rglob("result.json"))) == 3


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "There is not enough memory (MemoryError). Give a lower --batch_size"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nAnd more"),
            "(CUDA out of memory. Tried",
        ),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes"),
            "enough memory (",
        ),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "There is not enough memory ("),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is\n"),
            "A process that prepares images was",
        ),
    ],
    ids=["python", "graphics", "torch", "fork", "worker"],
)
def test_what_a_machine_lacks_is_one_line(lape, monkeypatch, error, words):
    def lacks(*_, **__):
        raise error

    monkeypatch.setattr("lape.training.loop.train", lacks)
    assert words in refused(lape("train"), cli.FAILURE)


def test_an_error_of_our_own_making_is_not_taken_for_one_of_the_machine(lape, monkeypatch):
    def wrong(*_, **__):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr("lape.training.loop.train", wrong)
    with pytest.raises(RuntimeError, match="mat1"):
        lape("train")


def test_a_worker_that_is_killed_ends_a_run_in_one_line(lape, monkeypatch):
    from lape.data import classes

    a_folder(Path("pets"))
    whole, main = classes.Split.picture, os.getpid()

    def killed(self, index, channels):
        if os.getpid() != main:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, index, channels)

    monkeypatch.setattr(classes.Split, "picture", killed)
    line = refused(lape("train", *SMALL, *OF_FOLDER[:-2], "--workers", "1", "--out", "run"), cli.FAILURE)
    assert "A process that prepares images was ended from outside" in line
    assert "--resume" in line
