"""What each command does and tells: the parameters of its function are its options."""

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lape.cli.terminal import console, say
from lape.errors import RunError, UsageError
from lape.experiment import SECTIONS, Experiment
from lape.files.characters import plural

if TYPE_CHECKING:
    from lape.data.sizes import Size
    from lape.studies.analysis import Kept
    from lape.studies.study import Study
    from lape.training.start import Start


def train(experiment: Experiment, out: Path | None = None, resume: bool = False, tracker: str | None = None) -> None:
    """Train one model.

    Args:
        out: Folder of the run; default: runs/DATA/JOIN-PE-seedSEED, for the recipe of a set
            runs/RECIPE/JOIN-PE-seedSEED.
        resume: Go on with the run in that folder, with its settings; the result is as if it had never stopped. More
            --epochs may be asked for, where that makes the run that asking at once would have made. Settings typed
            beside it begin a run where there is none.
        tracker: Tell another program of the run: wandb (Weights & Biases) or mlflow; default: none.
    """
    from lape.training.trackers import tracker_of

    chosen = tracker_of(tracker)  # refused before what takes longer is imported
    from lape.report.run import Bar
    from lape.report.start import lines
    from lape.training.checkpoints import SETTINGS
    from lape.training.loop import train

    folder = out or folder_of(experiment)
    if resume and first_process() and not (folder / SETTINGS).exists():
        say(f"{folder} holds no run to go on with, so a new one begins.", error=True)

    def begun(start: "Start") -> None:
        for line in lines(start):
            say(line)

    with Bar(console(stderr=True), experiment.compile) as bar:
        result = train(experiment, folder, resume=resume, report=bar, checked=bar.check, begun=begun, tracker=chosen)
    if first_process():
        say(f"Done: {result}")


def folder_of(experiment: Experiment) -> Path:
    """Return where a run is kept, unless another folder is asked for."""
    return Path("runs") / _row(experiment) / f"{experiment.join}-{experiment.pe}-seed{experiment.seed}"


def _row(experiment: Experiment) -> str:
    """Return what a run is filed under: its recipe, or the set where the recipe is for any."""
    from lape import recipes

    recipe = experiment.recipe
    if recipe is None or "data" not in recipes.load(recipe).settings:
        return Path(experiment.data).resolve().name
    return Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else recipe


def evaluate(
    checkpoint: Path,
    split: str = "val",
    data: str | None = None,
    data_dir: Path | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    accelerator: str | None = None,
    stride: int | None = None,
    test_scales: tuple[float, ...] | None = None,
    test_flip: bool | None = None,
    sizes: list[str] | None = None,
    out: Path | None = None,
) -> None:
    """Measure a checkpoint on validation images, or on those of another split: all of them, and class by class.

    Args:
        checkpoint: A run's best.pt or last.pt, or its folder.
        split: Which images: train, val, or test where the set has one.
        data: Another set of the same classes, or a folder that holds a folder for each class, of which all pictures
            are judged; default: the set that the run validated on.
        data_dir: Folder of a named set; default: that of the run.
        batch_size: Images at once; default: as in training.
        workers: Processes that prepare images; default: none for sets held in memory, else one per core, at most 24.
        accelerator: What computes: auto, cpu, cuda, gpu, mps; default: auto.
        stride: Segmentation: distance from one window to the next; default: that of the run.
        test_scales: Segmentation: factors by which an image is resized, predictions are averaged; default: the run's.
        test_flip: Segmentation: average the predictions for an image and its mirror image; default: as in the run.
        sizes: Classification: sizes of the images, as 28,42,28x56 (height x width), at which the same weights are
            measured one after another; default: the size of the run alone.
        out: Folder for evaluation.json, and of a classifier for every prediction (CSV, JSON), the table of its classes
            and the confusion matrix (CSV, picture) and a sheet of the worst mistakes; with sizes: for sizes.json and
            sizes.csv; default: no file, what is printed alone.
    """
    from lape.data.sizes import sizes_of

    asked = None if sizes is None else sizes_of(sizes)
    changed: dict[str, Any] = {
        "split": split,
        "data": data,
        "data_dir": data_dir,
        "batch_size": batch_size,
        "workers": workers,
        "accelerator": accelerator,
        "stride": stride,
        "test_scales": test_scales,
        "test_flip": test_flip,
    }
    if asked is not None:
        _evaluate_at_sizes(checkpoint, asked, out, changed)
        return
    from lape.files import writing

    if out:
        from lape.extras import require

        require("lape eval --out", "matplotlib")
    from lape.report import evaluation as report

    writing.refuse_others(report.places(out) if out else [])
    from lape.training.evaluation import evaluate_checkpoint

    evaluation = evaluate_checkpoint(checkpoint, **changed)
    if not first_process():
        return
    say(report.line(evaluation))
    console().print(report.terminal(evaluation), end="")
    if out:
        first, *others = report.write(evaluation, out)
        say("")
        say(f"Written: {', '.join([str(first), *(path.name for path in others)])}")


def _evaluate_at_sizes(checkpoint: Path, sizes: "Sequence[Size]", out: Path | None, changed: Mapping[str, Any]) -> None:
    from lape.files import writing
    from lape.report.sizes import as_csv, as_json, terminal

    places = [out / "sizes.json", out / "sizes.csv"] if out else []
    writing.refuse_others(places)
    from lape.training.evaluation import evaluate_at_sizes

    evaluation = evaluate_at_sizes(checkpoint, sizes, **changed)
    if not first_process():
        return
    console().print(terminal(evaluation))
    if places:
        writing.write_marked(dict(zip(places, (as_json(evaluation), as_csv(evaluation)), strict=True)))


def predict(
    checkpoint: Path,
    pictures: list[Path],
    out: Path = Path("predictions"),
    csv: Path | None = None,
    json: Path | None = None,
    no_draw: bool = False,
    batch_size: int | None = None,
    threshold: float = 0.5,
    test_scales: tuple[float, ...] | None = None,
    test_flip: bool | None = None,
    accelerator: str | None = None,
) -> None:
    """Say and draw what a checkpoint finds in pictures: classes, boxes and masks, or a segmentation map.

    A picture that cannot be read is reported, the others are told all the same, and the exit status is 1.

    Args:
        checkpoint: A run's best.pt or last.pt, or its folder.
        pictures: Pictures, or folders of them; of a folder all that are in it, at any depth.
        out: Folder for the pictures with what was found drawn on them.
        csv: File for a table of what was found; default: none.
        json: File for what was found, with all numbers; default: none.
        no_draw: Draw nothing, and write nothing to the folder.
        batch_size: Pictures at once; default: 32, and 1 in detection and segmentation.
        threshold: Detection: lowest score of an object that is told.
        test_scales: Segmentation: factors by which an image is resized, predictions are averaged; default: the run's.
        test_flip: Segmentation: average the predictions for an image and its mirror image; default: as in the run.
        accelerator: What computes: auto, cpu, cuda, gpu, mps; default: auto.
    """
    from rich.progress import track

    from lape.files import writing
    from lape.report.prediction import Listing, line, png
    from lape.training.prediction import Predicted, Unread, files_of
    from lape.training.prediction import predict as answers

    files = files_of(pictures)
    digits = len(str(len(files)))
    targets = [out / f"{number:0{digits}d}-{path.stem}.png" for number, path in enumerate(files, start=1)]
    writing.refuse_others([*filter(None, (csv, json)), *(() if no_draw else targets)])
    changed = {"test_scales": test_scales, "test_flip": test_flip, "accelerator": accelerator}
    predictions = answers(checkpoint, files, threshold, batch_size, **changed)
    shown = track(predictions, "looking", len(files), console=console(stderr=True), transient=True)
    listing, unread = Listing(), 0

    def drawn(one: Predicted) -> bytes | Unread:
        try:
            return png(one)
        except RunError as error:  # it was there a moment ago
            return Unread(one.path, str(error))

    for one, target in zip(shown, targets, strict=True):
        picture = drawn(one) if isinstance(one, Predicted) and not no_draw else None
        outcome = picture if isinstance(picture, Unread) else one
        listing.add(outcome)
        if isinstance(outcome, Unread):
            unread += 1
            say(f"lape: {outcome.reason}", error=True)
            continue
        if isinstance(picture, bytes):
            writing.write_marked({target: picture})
        say(line(outcome) if no_draw else f"{line(outcome)} -> {target}")
    writing.write_marked(
        ({csv: listing.as_csv()} if csv else {}) | ({json: listing.as_json(checkpoint)} if json else {})
    )
    if unread:
        raise RunError(f"{unread} of {plural(len(files), 'picture')} could not be read, and are named above.")


def compare(
    experiment: Experiment,
    joins: list[str] = ["default", "lape"],  # noqa: B006 (only read)
    pe: list[str] = ["learnable"],  # noqa: B006
    pe_norm: list[str] = ["layernorm"],  # noqa: B006
    start: list[str] = ["fresh"],  # noqa: B006
    seeds: list[int] | None = None,
    seed_list: list[int] | None = None,
    out: Path = Path("runs/compare"),
    jobs: int | None = None,
    sizes: list[str] | None = None,
    plan: Path | None = None,
    prune: bool | None = None,
    figures: list[str] = [],  # noqa: B006
    tracker: str | None = None,
) -> None:
    """Train several ways of joining side by side and report how they differ.

    Args:
        joins: Ways of joining, among default, shared, unshared, lape-sharing, lape, pvg, mpvg.
        pe: Position embeddings, as lape train --pe takes them: learnable, rope-mixed, learnable+alibi-2d.
        pe_norm: PE norms of the joins that have them: layernorm, and what stands in its place in Table 8.
        start: Starts of the joins that have PE norms, among fresh, preserve.
        seeds: How many seeds (3 is 0, 1, 2), or two and more seeds themselves; default: 8.
        seed_list: The seeds themselves, as 7 for this one alone; default: as seeds says.
        out: Folder of the report and the runs; finished runs in it are kept, and those of the same settings are on the
            page. Several calls may share it, also from several machines: each run is trained by one of them.
        jobs: Runs at once; default: one per core, or on each GPU as many as its memory and the cores allow.
        sizes: Classification: sizes of images, as 28,42,28x56 (height x width), at which every trained model is judged
            too; default: the size of training alone.
        plan: Train nothing, and write the commands of all runs that are not finished to this file, one a line; default:
            train them.
        prune: Remove last.pt of all finished runs when the page is written (best.pt stays; what is not analysed by then
            cannot be analysed later). false: keep it whole, so that a run can be trained longer; default: keep of it
            what evaluation needs.
        figures: Formats of files in which figures are written beside PNG, among svg, pdf.
        tracker: Tell another program of every run that is trained: wandb (Weights & Biases) or mlflow; default: none.
    """
    from lape.data.sizes import sizes_of
    from lape.training.trackers import tracker_of

    asked = () if sizes is None else sizes_of(sizes)
    tracker_of(tracker)  # refused before what takes longer is imported
    from lape import report
    from lape.files import writing
    from lape.files.locks import in_turn
    from lape.report import tables
    from lape.report.figures import formats as formats_of
    from lape.report.progress import Display
    from lape.studies import comparison
    from lape.studies.analysis import Kept
    from lape.studies.comparison import Factors, compare, seeds_of

    formats = formats_of(["png", *figures])
    factors = Factors(joins, pe, seeds_of(seeds, seed_list), pe_norm, start)
    if plan:
        count = comparison.write_plan(experiment, factors, out, plan, tracker)
        say(f"{plural(count, 'run')} to train. Commands: {plan}")
        return
    if asked:
        from lape.studies.sizes import refuse_dense

        refuse_dense(experiment)
    writing.refuse_others(report.places(out, bool(asked), formats))
    Kept(out / report.PAGE)  # refuses another's file, before anything is trained
    with Display(console(stderr=True)) as display:
        study = compare(experiment, factors, out, jobs, display, lean=prune is not False, tracker=tracker)
    if study.results:
        with in_turn(out, lambda there: say(f"The page waits. {there}", error=True)):
            whole, left_out = comparison.with_others(study, out)
            _name_left_out(left_out, others=[whole])
            (whole,) = _analysed([whole], Kept(out / report.PAGE))
            if asked:
                whole = _judged_at(whole, asked, experiment)
            page = report.write(whole, report.maps(whole), out, left_out, formats)
            if prune:
                comparison.prune(study)
        console().print(tables.terminal(whole))
        say(f"Report: {page}")
    study.raise_missing()


def gather(
    runs: list[Path] = [],  # noqa: B006 (only read)
    model: str | None = None,
    model_args: dict[str, Any] = {},  # noqa: B006
    weights: str | None = None,
    join: str = "default",
    out: Path | None = None,
    figures: list[str] = [],  # noqa: B006
) -> None:
    """Put finished runs beside one another and beside the paper's claims, as one page; or tell of models alone.

    What lape compare --sizes found of them at other sizes of images stands on it too.

    Args:
        runs: Folders in which finished runs, and measurements by lape cost, are looked for; and folders or .safetensors
            that lape export wrote, each of which is a model on the page; default: runs, and with a model none.
        model: A model of timm's, or one that lape models lists, to be told of on the page; default: none.
        model_args: More keywords for it, as {"depth": 6}.
        weights: Its weights: a file of lape's, timm's or the authors', or a name of timm's; default: none, and with a
            model they must be named.
        join: The join of these weights.
        out: The page; beside it are written its tables, as .md and .tex, a line for each run, as .runs.csv, a paragraph
            on methods, as .methods.txt, and what was computed for it, as .analysis.json; default: report.html in the
            first folder of runs, without runs in the folder where one is.
        figures: Formats of files in which the figures are written beside the page, among png, svg, pdf; default: they
            stand on the page alone.
    """
    from lape import report
    from lape.files import writing
    from lape.report import tables
    from lape.report.figures import formats as formats_of
    from lape.report.models import told_of, told_of_weights
    from lape.studies.analysis import Kept
    from lape.studies.sizes import with_kept
    from lape.studies.study import Gathered, gather

    if bool(model) != bool(weights):
        raise UsageError("A page tells of a trained model: give --model with the name and --weights with its file.")
    from lape.sharing.exporting import is_saved

    saved = [path for path in runs if is_saved(path)]
    folders = [path for path in runs if path not in saved] or ([] if saved or model else [Path("runs")])
    page = out or (folders[0] if folders else Path()) / "report.html"
    if page.suffix != ".html":
        raise UsageError(f"The page is HTML, and {page} is no such name. Give --out {page.with_suffix('.html')}.")
    formats = formats_of(figures)
    writing.refuse_others(report.places_beside(page, formats))
    kept = Kept(page)
    gathered = gather(folders) if folders else Gathered((), {})
    models = [*told_of(saved), *(told_of_weights(model, model_args, weights, join) if model and weights else ())]
    _name_left_out(gathered.left_out, others=(*gathered.studies, *models))
    studies = [with_kept(study) for study in _analysed(gathered.studies, kept)] if folders else []
    costs = sorted({file for folder in folders for file in folder.rglob("cost.json")})
    report.write_page(studies, gathered.left_out, costs, page, models, formats)
    for one in models:
        console().print(one.terminal())
    if studies:
        console().print(tables.terminal_of_claims(studies))
    say(f"Report: {page}")


def _name_left_out(left_out: Mapping[Path, str], others: "Sequence[object]") -> None:
    """Say which runs are left out, and why, a line a reason; raise RunError where there are no others."""
    folders: dict[str, list[Path]] = {}
    for folder, reason in left_out.items():
        folders.setdefault(reason, []).append(folder)
    for reason, (first, *more) in folders.items():
        rest = f" and {len(more)} more" if more else ""
        say(f"left out: {first}{rest}: {reason}", error=True)
    if not others:
        first = next(iter(left_out.values()))
        raise RunError(
            f"{plural(len(left_out), 'run')} found, and none can be read. Mend one, or name another folder. The first: "
            f"{first}"
        )


def _analysed(studies: "Sequence[Study]", kept: "Kept") -> "list[Study]":
    from lape.studies.analysis import analysed

    with _counting("analysing", sum(len(study.results) for study in studies)) as tell:
        return [analysed(study, kept, tell) for study in studies]


def _judged_at(study: "Study", sizes: "Sequence[Size]", experiment: Experiment) -> "Study":
    from lape.studies.sizes import judged_at

    with _counting("judging at other sizes", len(study.results)) as tell:
        return judged_at(study, sizes, experiment, tell)


@contextmanager
def _counting(what: str, total: int) -> Iterator[Callable[[], None]]:
    """Show how much of a total is done; yields what tells that one more is."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    shown = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*shown, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)


def cost(
    model: str = "deit_tiny_patch16_224",
    joins: list[str] | None = None,
    pe: list[str] | None = None,
    batch_size: int = 16,
    rounds: int = 12,
    threads: int | None = None,
    device: str = "cpu",
    precision: str = "32-true",
    compile: bool = False,
    out: Path | None = None,
) -> None:
    """Measure parameters, FLOPs, memory and time of each join beside the untouched model.

    Args:
        model: A timm VisionTransformer, or one that lape models lists.
        joins: Ways of joining; default: all that can be had with the model's table. The untouched model, timed twice,
            and folded LaPE stand beside them.
        pe: Position embeddings, each with the joins default and lape or with those given; default: the model's own.
        batch_size: Images in a step.
        rounds: How often each model is timed; they take turns.
        threads: Threads of torch; default: one per core.
        device: What computes: cpu, cuda.
        precision: Fabric's name of a number format: 32-true, bf16-mixed, 16-mixed (times alone).
        compile: Compile each model with torch.compile (times alone).
        out: Folder for cost.md, and cost.json with every single time; default: they are only printed.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from lape.analysis.cost import measure
    from lape.files import writing
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
            model,
            joins,
            batch_size,
            rounds,
            device,
            precision,
            compile,
            lambda done: bar.update(task, completed=done),
            pe,
        )
    legend = explanation(model, batch_size, rounds, precision, compile)
    console().print(terminal(costs, legend))
    if out:
        writing.write_marked({out / "cost.md": markdown(costs, legend), out / "cost.json": as_json(costs, legend)})


def export(
    checkpoint: Path,
    out: Path | None = None,
    fold: bool = False,
    dynamic_size: bool = False,
    opset: int | None = None,
    license: str | None = None,
    push: str | None = None,
    model_args: dict[str, Any] = {},  # noqa: B006 (only read)
) -> None:
    """Write a trained model for other programs (ONNX, torch.export), or with its configuration for the Hub.

    Args:
        checkpoint: A run's best.pt or last.pt, its folder, or what this command wrote as .safetensors or folder.
        out: File to write; the suffix chooses its kind: .onnx, .pt2 (torch.export), .safetensors (weights with their
            configuration); without a suffix it is a folder for the Hub; default: model.onnx, and with push no file.
        fold: Turn positions into constants first (.onnx and .pt2).
        dynamic_size: Leave height and width open (.onnx and .pt2).
        opset: Version of ONNX's operators (.onnx); default: the one that torch writes by itself.
        license: What others may do with the model, by the Hub's name for that, as apache-2.0, mit or other; needed with
            push; default: the one of a folder that has one, else it is not said.
        push: Upload weights and configuration to this repository of the Hub, as user/name, with the account of `hf
            auth login` or of HF_TOKEN; default: nothing is uploaded.
        model_args: More keywords for the model, as {"dynamic_img_size": true}, which dynamic_size needs in timm's
            ViTs.
    """
    from lape.sharing.exporting import export, load_model
    from lape.sharing.hub import Known, push_to_hub, save_pretrained

    out = out or (None if push else Path("model.onnx"))
    weights = out is None or out.suffix in ("", ".safetensors")
    if weights and (fold or dynamic_size or opset):
        raise UsageError(
            f"fold, dynamic_size and opset mean nothing for {out or push}, which holds weights. Give --out a .onnx or "
            ".pt2."
        )
    Known(license=license)  # a wrong name is refused before the model is made
    model, known = load_model(checkpoint, **model_args)
    known = replace(known, license=license or known.license)
    if push and known.license is None:
        raise UsageError(
            f"{push} is for others, and its license says what they may do with it. Give --license with the Hub's name "
            "of one, as apache-2.0, mit or other."
        )
    if out and weights:
        say(f"{save_pretrained(model, out, known)}: loaded again, the same outputs to the last bit")
        if known.license is None:
            say("No license is said in it: others may not use it. To name one, add --license, as in --license mit")
    elif out:
        exported = export(model, out, fold, dynamic_size, opset=opset, known=known)
        shapes = ", ".join("x".join(map(str, shape)) for shape in exported.shapes)
        difference = f"largest difference from the model {exported.difference:.1e} of its output"
        say(f"{exported.path}: {difference}, for images {shapes}")
    if push:
        say(f"{push_to_hub(model, push, known)}: loaded again before, the same outputs to the last bit")


def models(name: list[str] = []) -> None:  # noqa: B006 (only read)
    """List the models of the paper: parameters, FLOPs, input size, joins.

    Args:
        name: Parts of the names to list, as in cct or deit_tiny; default: all.
    """
    from lape.catalogue import named
    from lape.report.catalogue import models

    console().print(models(named(name)))


def check(name: str, pe: str | None = None, model_args: dict[str, Any] = {}, pretrained: bool = False) -> None:  # noqa: B006 (only read)
    """Examine whether a join holds on a model of timm's: its row, every layer, fold, remove, files, sizes, compile.

    Args:
        name: A model that lape models lists, or one of timm's.
        pe: The position embedding; default: the model's own, or a learnt table where it has none.
        model_args: More keywords of the model, as {"depth": 2}.
        pretrained: Take the model's published weights; default: random ones.
    """
    from lape.models.registry import build
    from lape.report.doctor import check as examine

    found = examine(build(name, pretrained=pretrained, **model_args), pe=pe)
    console().print(found.table.terminal())
    if not found.passed:
        raise RunError(
            f"{len(found.failed)} of {plural(len(found.findings), 'check')} failed for {name}. The table says why."
        )


def recipes(name: str | None = None) -> None:
    """List the paper's experiments, or show one: command, expected number, open choices, settings.

    Args:
        name: A recipe to show in full; default: a table of all.
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
    """Set finished runs of recipes beside the paper's numbers.

    Args:
        runs: Folders in which finished runs are looked for.
        out: A Markdown file for the table; default: it is only printed.
    """
    from lape.files import writing
    from lape.report.results import markdown, terminal
    from lape.studies.results import find_results

    if out:
        writing.refuse_others([out])
    gathered = find_results(runs)
    _name_left_out(gathered.left_out, others=(*gathered.rows, *gathered.others))
    console().print(terminal(gathered))
    if out:
        writing.write_marked({out: markdown(gathered)})


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
    """Show what positions bring to the attention of each layer (correlation), and how much (decomposition).

    Args:
        what: correlation, or decomposition.
        checkpoints: Runs' best.pt or last.pt, or their folders; or folders and .safetensors that lape export wrote.
        model: In place of checkpoints: a new model that lape models lists, or a VisionTransformer of timm's; default:
            the checkpoints' models.
        model_args: More keywords for the new model, as {"depth": 6}.
        weights: Its weights: a file of lape's, timm's or the authors', or a name of timm's; default: random ones.
        joins: Its ways of joining; default: default and lape for correlation, default for decomposition and weights.
        pe: Its position embedding; default: the one that it was designed with.
        grid: Correlation: rows and columns of patches; default: those of the model.
        data: Decomposition: a set, or a folder of images; default: the one that the run validated on, and digits for a
            new model without weights.
        data_dir: Folder of a named set; default: that of the run, or the user's cache.
        img_size: Decomposition: side of the images for a new model; default: that of the set, or of the model.
        images: Decomposition: how many validation images; default: 64.
        seed: Decides the random weights of a new model.
        out: Folder for a picture, a table and all numbers.
    """
    from lape.analysis.subjects import ANALYSES, Request
    from lape.errors import choose
    from lape.files import writing
    from lape.report.analysis import SHEETS

    analysis, sheet = choose(ANALYSES, what, "an analysis"), SHEETS[what]
    request = Request(checkpoints, model, model_args, weights, joins, pe, grid, data, data_dir, img_size, images, seed)
    writing.refuse_others(sheet.places(out))
    results = list(analysis.analyse(request))
    picture = sheet.write(results, out)
    console().print(sheet.terminal(results))
    say("")
    say(f"Written: {picture}, .md, .json")


@dataclass(frozen=True)
class Command:
    """A function whose parameters are the options and whose docstring is the help, with an example of its use.

    A first parameter `experiment` stands for all settings of a run but those in `without` and the function's own.
    """

    run: Callable[..., None]
    example: str
    without: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()  # the options that leading words without dashes are for; the last takes all the rest
    extras: tuple[str, ...] = ("train",)  # whose packages it needs

    @property
    def does(self) -> str:
        """The first sentence of the function's docstring."""
        return " ".join((inspect.getdoc(self.run) or "").partition("\n\n")[0].split())

    @property
    def sections(self) -> list[tuple[type, set[str | int]]]:
        """The dataclasses whose fields are options too, and the fields to leave out of each."""
        parameters = inspect.signature(self.run).parameters
        if "experiment" not in parameters:
            return []
        skipped: set[str | int] = {*parameters, *self.without}
        return [(section, skipped & {f.name for f in fields(section)}) for section in SECTIONS]


COMMANDS: Mapping[str, Command] = {
    "compare": Command(
        compare,
        "lape compare --data digits --joins default,lape --pe learnable,sinusoidal-1d --seeds 3",
        without=("join", "seed"),
        extras=("train", "report"),
    ),
    "report": Command(
        gather,
        "lape report runs --out report.html",
        bare=("runs",),
        extras=("train", "report"),
    ),
    "train": Command(
        train,
        "lape train --data digits --join lape --pe learnable --epochs 3 --out runs/first",
    ),
    "eval": Command(
        evaluate,
        "lape eval runs/first/best.pt",
        bare=("checkpoint",),
    ),
    "predict": Command(
        predict,
        "lape predict runs/first holiday.jpg more_pictures/ --csv found.csv",
        bare=("checkpoint", "pictures"),
    ),
    "export": Command(
        export,
        "lape export runs/first --out model.onnx --fold",
        bare=("checkpoint",),
    ),
    "analyze": Command(
        analyze,
        "lape analyze correlation runs/default runs/lape --grid 14 14",
        bare=("what", "checkpoints"),
        extras=("train", "report"),
    ),
    "models": Command(
        models,
        "lape models cct",
        bare=("name",),
    ),
    "check": Command(
        check,
        "lape check cait_xxs24_224",
        bare=("name",),
    ),
    "recipes": Command(
        recipes,
        "lape recipes cifar100/cct_7_3x1_32",
        bare=("name",),
    ),
    "results": Command(
        results,
        "lape results runs --out results.md",
        bare=("runs",),
    ),
    "cost": Command(
        cost,
        "lape cost --model deit_tiny_patch16_224 --joins default,lape",
    ),
}


def first_process() -> bool:
    """Whether this process speaks for all of a launch."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"
