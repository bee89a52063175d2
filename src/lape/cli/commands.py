"""What each command does and tells: the parameters of its function are its options."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lape.cli.terminal import console, say
from lape.errors import RunError, UsageError
from lape.experiment import Experiment

if TYPE_CHECKING:
    from lape.studies.analysis import Kept
    from lape.studies.study import Study


def train(experiment: Experiment, out: Path | None = None, resume: bool = False) -> None:
    """This command

    Args:
        out: Folder of the run; nothing: runs/DATA/JOIN-PE-seedSEED, under a recipe runs/RECIPE/...
        resume: Go on with the run in that folder, with its settings; the result is as if it had never stopped.
    """
    from lape.report.run import Bar
    from lape.training.loop import train

    recipe = experiment.recipe or Path(experiment.data).name
    row = Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else recipe
    folder = out or Path("runs") / row / f"{experiment.join}-{experiment.pe}-seed{experiment.seed}"
    with Bar(console(stderr=True)) as bar:
        result = train(experiment, folder, resume=resume, report=bar, checked=bar.check)
    if first_process():
        say(f"Done: {result}")


def evaluate(
    checkpoint: Path,
    data: str | None = None,
    data_dir: Path | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    accelerator: str | None = None,
    stride: int | None = None,
    test_scales: tuple[float, ...] | None = None,
    test_flip: bool | None = None,
) -> None:
    """This command

    Args:
        checkpoint: A run's best.pt or last.pt, or its folder.
        data: Another set of the same classes; nothing: the one that the run validated on.
        data_dir: Where a named set lies.
        batch_size: Images at once.
        workers: Processes that prepare images.
        accelerator: What computes: auto, cpu, cuda, gpu, mps.
        stride: Segmentation: distance from one window to the next.
        test_scales: Segmentation: factors by which an image is resized; predictions are averaged.
        test_flip: Segmentation: average the predictions for an image and its mirror image.
    """
    from lape.tasks.measures import TITLES
    from lape.training.evaluation import evaluate_checkpoint

    judged = evaluate_checkpoint(
        checkpoint,
        data=data,
        data_dir=data_dir,
        batch_size=batch_size,
        workers=workers,
        accelerator=accelerator,
        stride=stride,
        test_scales=test_scales,
        test_flip=test_flip,
    )
    found = ", ".join(f"{TITLES[name]} {value:.2f} %" for name, value in judged.metrics.items() if name in TITLES)
    say(f"{found} on {judged.images} validation images of {judged.data} ({judged.checkpoint})")


def predict(
    checkpoint: Path,
    pictures: list[Path],
    out: Path = Path("predictions"),
    threshold: float = 0.5,
    test_scales: tuple[float, ...] | None = None,
    test_flip: bool | None = None,
    accelerator: str | None = None,
) -> None:
    """This command

    Args:
        checkpoint: A run's best.pt or last.pt, or its folder.
        pictures: Pictures, or folders of them.
        out: Folder for the pictures with what was found drawn on them.
        threshold: Detection: least score of what is drawn.
        test_scales: Segmentation: factors by which an image is resized; predictions are averaged.
        test_flip: Segmentation: average the predictions for an image and its mirror image.
        accelerator: What computes: auto, cpu, cuda, gpu, mps.
    """
    from rich.progress import track

    from lape import writing
    from lape.report.prediction import line, png
    from lape.training.prediction import files_of
    from lape.training.prediction import predict as answers

    files = files_of(pictures)
    digits = len(str(len(files)))
    targets = [out / f"{number:0{digits}d}-{path.stem}.png" for number, path in enumerate(files, start=1)]
    writing.refuse_others(targets)
    asked = {"test_scales": test_scales, "test_flip": test_flip, "accelerator": accelerator}
    found = answers(checkpoint, files, threshold, **asked)
    shown = track(found, "looking", len(files), console=console(stderr=True), transient=True)
    for predicted, target in zip(shown, targets, strict=True):
        writing.write_marked({target: png(predicted)})
        say(f"{line(predicted)} -> {target}")


def compare(
    experiment: Experiment,
    joins: list[str] = ["default", "lape"],  # noqa: B006 (only read)
    pe: list[str] = ["learnable", "sinusoidal-1d"],  # noqa: B006
    pe_norm: list[str] = ["layernorm"],  # noqa: B006
    start: list[str] = ["fresh"],  # noqa: B006
    seeds: list[int] = [3],  # noqa: B006
    out: Path = Path("runs/compare"),
    jobs: int | None = None,
) -> None:
    """This command

    Args:
        joins: Ways of joining, among default, shared, unshared, lape-sharing, lape.
        pe: Position tables, among learnable, sinusoidal-1d, sinusoidal-2d, none, relative, relative-layernorm.
        pe_norm: What normalises positions in the joins that do: layernorm, and its stand-ins (Table 8).
        start: Starts of the joins that normalise positions, among fresh, preserve.
        seeds: How many seeds (3 is 0, 1, 2), or two and more seeds themselves.
        out: Folder of the report and the runs; finished runs in it are kept.
        jobs: Runs at once; nothing: one a core, or one on a GPU.
    """
    from lape import report, writing
    from lape.report import tables
    from lape.report.progress import Display
    from lape.studies.analysis import Kept
    from lape.studies.comparison import Asked, compare, seeds_of

    writing.refuse_others(report.places(out))
    kept = Kept(out / report.PAGE)
    with Display(console(stderr=True)) as display:
        found = compare(experiment, Asked(joins, pe, seeds_of(seeds), pe_norm, start), out, jobs, display)
    if found.results:
        (found,) = _analysed([found], kept)
        page = report.write(found, report.maps(found), out)
        console().print(tables.terminal(found))
        say(f"Report: {page}")
    found.raise_failures()


def gather(runs: list[Path] = [Path("runs")], out: Path | None = None) -> None:  # noqa: B006 (only read)
    """This command

    Args:
        runs: Folders to look for finished runs in, and for what lape cost has filed.
        out: The page, beside which its tables stand as .md and what was computed for it as .analysis.json; nothing:
            report.html in the first folder.
    """
    from lape import report, writing
    from lape.report import tables
    from lape.studies.analysis import Kept
    from lape.studies.study import gather

    page = out or runs[0] / "report.html"
    if page.suffix != ".html":
        raise UsageError(f"The page is HTML, and {page} is no such name. Give --out {page.with_suffix('.html')}.")
    writing.refuse_others([page, page.with_suffix(".md")])
    kept = Kept(page)
    found = gather(runs)
    _tell(found.left_out, others=found.studies)
    studies = _analysed(found.studies, kept)
    costs = sorted({file for folder in runs for file in folder.rglob("cost.json")})
    report.write_page(studies, found.left_out, costs, page)
    console().print(tables.claims(studies))
    say(f"Report: {page}")


def _tell(left_out: Mapping[Path, str], others: "Sequence[object]") -> None:
    """Say which runs are left out, and why; raise RunError where there are no others."""
    for folder, reason in left_out.items():
        say(f"left out: {folder}: {reason}", error=True)
    if not others:
        first = next(iter(left_out.values()))
        raise RunError(
            f"Of {len(left_out)} runs none can be read. Mend one, or name another folder. The first: {first}"
        )


def _analysed(studies: "Sequence[Study]", kept: "Kept") -> "list[Study]":
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from lape.studies.analysis import analysed

    shown = (TextColumn("analysing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*shown, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=sum(len(study.results) for study in studies))
        return [analysed(study, kept, lambda: bar.advance(task)) for study in studies]


def cost(
    model: str = "deit_tiny_patch16_224",
    joins: list[str] | None = None,
    batch_size: int = 16,
    rounds: int = 12,
    threads: int | None = None,
    device: str = "cpu",
    precision: str = "32-true",
    compile: bool = False,
    out: Path | None = None,
) -> None:
    """This command

    Args:
        model: A timm VisionTransformer, or one that lape models lists.
        joins: Ways of joining; nothing: all that mean something with the model's table. The untouched model, timed
            twice, and folded LaPE stand beside them.
        batch_size: Images in a step.
        rounds: How often each contender takes its turn.
        threads: Threads of torch; nothing: one a core.
        device: What computes: cpu, cuda.
        precision: Fabric's name of a number format: 32-true, bf16-mixed, 16-mixed (times alone).
        compile: Compile each contender with torch.compile (times alone).
        out: Folder for cost.md and cost.json, which holds every single time.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from lape import writing
    from lape.analysis.cost import measure
    from lape.report.cost import as_json, explanation, markdown, terminal

    if threads is not None:
        import torch

        if threads < 1:
            raise UsageError(f"threads must be at least 1, not {threads}.")
        torch.set_num_threads(threads)
    if out:
        writing.refuse_others([out / "cost.md", out / "cost.json"])
    shown = (TextColumn("measuring"), BarColumn(), TimeRemainingColumn())
    with Progress(*shown, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1)
        costs = measure(
            model, joins, batch_size, rounds, device, precision, compile, lambda done: bar.update(task, completed=done)
        )
    said = explanation(model, batch_size, rounds, precision, compile)
    console().print(terminal(costs, said))
    if out:
        writing.write_marked({out / "cost.md": markdown(costs, said), out / "cost.json": as_json(costs, said)})


def take_out(  # not `export`: jsonargparse would look up lape.export, and load torch for it
    checkpoint: Path,
    out: Path | None = None,
    fold: bool = False,
    dynamic_size: bool = False,
    push: str | None = None,
    model_args: dict[str, Any] = {},  # noqa: B006 (only read)
) -> None:
    """This command

    Args:
        checkpoint: A run's best.pt or last.pt, its folder, or what this command wrote as .safetensors or folder.
        out: What is written, by its suffix: .onnx, .pt2 (torch.export), .safetensors (weights with their
            configuration); without a suffix a folder for the Hub; nothing: model.onnx, with push no file.
        fold: Turn positions into constants first (.onnx and .pt2).
        dynamic_size: Leave height and width open (.onnx and .pt2).
        push: Put weights and configuration into this repository of the Hub, as user/name, by the account of `hf auth
            login` or of HF_TOKEN.
        model_args: More keywords for the model, as {"dynamic_img_size": true}, which dynamic_size needs in timm's
            ViTs.
    """
    from lape.sharing.exporting import brought_back, export
    from lape.sharing.hub import push_to_hub, save_pretrained

    out = out or (None if push else Path("model.onnx"))
    weights = out is None or out.suffix in ("", ".safetensors")
    if weights and (fold or dynamic_size):
        raise UsageError(
            f"fold and dynamic_size mean nothing for {out or push}, which holds weights. Give --out a .onnx or .pt2."
        )
    model, known = brought_back(checkpoint, **model_args)
    if out and weights:
        say(f"{save_pretrained(model, out, known)}: loaded again, the same outputs to the last bit")
    elif out:
        found = export(model, out, fold, dynamic_size)
        seen = ", ".join("x".join(map(str, shape)) for shape in found.shapes)
        say(f"{found.path}: largest difference from the model {found.difference:.1e} of its output, for images {seen}")
    if push:
        say(f"{push_to_hub(model, push, known)}: loaded again before, the same outputs to the last bit")


def models(name: list[str] = []) -> None:  # noqa: B006 (only read)
    """This command

    Args:
        name: Parts of the names to list, as in cct or deit_tiny; nothing: all.
    """
    from rich.progress import track

    from lape.models.catalogue import entries, names
    from lape.report.catalogue import models

    chosen = names(name)
    counted = track(entries(chosen), "counting", len(chosen), console=console(stderr=True), transient=True)
    console().print(models(counted))


def recipes(name: str | None = None) -> None:
    """This command

    Args:
        name: A recipe to show as a whole; nothing: all in a table.
    """
    from lape import recipes
    from lape.report.catalogue import note
    from lape.report.catalogue import recipes as table

    if name:
        from rich.console import Group
        from rich.text import Text

        console().print(Group(*map(Text, note(recipes.load(name)))))
    else:
        console().print(table([recipes.load(each) for each in recipes.names()]))


def results(runs: list[Path] = [Path("runs")], out: Path | None = None) -> None:  # noqa: B006 (only read)
    """This command

    Args:
        runs: Folders to look for finished runs in.
        out: A Markdown file for the table.
    """
    from lape import writing
    from lape.report.results import markdown, terminal
    from lape.studies.results import find

    if out:
        writing.refuse_others([out])
    found = find(runs)
    _tell(found.left_out, others=(*found.rows, *found.others))
    console().print(terminal(found))
    if out:
        writing.write_marked({out: markdown(found)})


def analyze(
    what: str,
    checkpoints: list[Path] = [],  # noqa: B006 (only read)
    model: str | None = None,
    model_args: dict[str, Any] = {},  # noqa: B006
    weights: str | None = None,
    joins: list[str] | None = None,
    pe: str | None = None,
    grid: tuple[int, int] | None = None,
    data: str | None = None,
    data_dir: Path | None = None,
    img_size: int | None = None,
    images: int | None = None,
    seed: int = 0,
    out: Path = Path("analysis"),
) -> None:
    """This command

    Args:
        what: correlation, or decomposition.
        checkpoints: Runs' best.pt or last.pt, or their folders.
        model: A fresh model instead: one that lape models lists, or a VisionTransformer of timm's.
        model_args: More keywords for it, as {"depth": 6}.
        weights: What it starts from: a file of ours, timm's or the authors', or a name of timm's; default: nothing.
        joins: Ways of joining; nothing: default and lape for correlation, default for decomposition.
        pe: Its position embedding; nothing: its own.
        grid: Correlation: rows and columns of patches; nothing: the model's own.
        data: Decomposition: a set, or a folder of images; nothing: the one that the run validated on, or digits.
        data_dir: Where a named set lies.
        img_size: Decomposition: side of the images as a fresh model sees them; nothing: the set's own, or the model's.
        images: Decomposition: how many validation images; nothing: 64.
        seed: Decides the weights of a fresh model.
        out: Folder for a picture, a table and all numbers.
    """
    from lape import writing
    from lape.analysis.subjects import ANALYSES, Request
    from lape.errors import choose
    from lape.report.analysis import SHEETS

    analysis, sheet = choose(ANALYSES, what, "an analysis"), SHEETS[what]
    asked = Request(checkpoints, model, model_args, weights, joins, pe, grid, data, data_dir, img_size, images, seed)
    writing.refuse_others(sheet.places(out))
    found = list(analysis.find(asked))
    picture = sheet.write(found, out)
    console().print(sheet.terminal(found))
    say("")
    say(f"Written: {picture}, .md, .json")


@dataclass(frozen=True)
class Command:
    """One row of the help, and the function whose parameters are the options.

    A first parameter `experiment` stands for all settings of a run but those in `without` and the function's own.
    """

    run: Callable[..., None]
    does: str
    example: str
    without: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()  # the options that leading words without dashes are for; the last takes all the rest


COMMANDS: Mapping[str, Command] = {
    "compare": Command(
        compare,
        "train several ways of joining side by side and report how they differ",
        "lape compare --data digits --joins default,lape --pe learnable,sinusoidal-1d --seeds 3",
        without=("join", "seed"),
    ),
    "report": Command(
        gather,
        "put finished runs beside one another and beside the paper's claims, as one page",
        "lape report runs --out report.html",
        bare=("runs",),
    ),
    "train": Command(
        train,
        "train one model",
        "lape train --data digits --join lape --pe learnable --epochs 3 --out runs/first",
    ),
    "eval": Command(
        evaluate,
        "measure a checkpoint on validation images",
        "lape eval runs/first/best.pt",
        bare=("checkpoint",),
    ),
    "predict": Command(
        predict,
        "draw what a checkpoint finds in pictures: classes, boxes and masks, or a segmentation map",
        "lape predict runs/first holiday.jpg more_pictures/",
        bare=("checkpoint", "pictures"),
    ),
    "export": Command(
        take_out,
        "write a trained model for other programs (ONNX, torch.export), or with its configuration for the Hub",
        "lape export runs/first --out model.onnx --fold",
        bare=("checkpoint",),
    ),
    "analyze": Command(
        analyze,
        "show in numbers and pictures what each layer is told of positions (correlation), or how much (decomposition)",
        "lape analyze correlation runs/default runs/lape --grid 14 14",
        bare=("what", "checkpoints"),
    ),
    "models": Command(
        models,
        "list the models of the paper: parameters, FLOPs, input size, joins",
        "lape models cct",
        bare=("name",),
    ),
    "recipes": Command(
        recipes,
        "list the paper's experiments, or show one: command, expected number, open choices, settings",
        "lape recipes cifar100/cct_7_3x1_32",
        bare=("name",),
    ),
    "results": Command(
        results,
        "set finished runs of recipes beside the paper's numbers",
        "lape results runs --out results.md",
        bare=("runs",),
    ),
    "cost": Command(
        cost,
        "measure parameters, FLOPs, memory and time of each join beside the untouched model",
        "lape cost --model deit_tiny_patch16_224 --joins default,lape",
    ),
}


def first_process() -> bool:
    """Whether this process speaks for all of a launch."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"
