"""A trained model by itself, for people: what it is, and what positions bring to its attention."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lape.analysis import Correlation, correlation
from lape.analysis.subjects import ANALYSES, Request, Subject
from lape.errors import UsageError
from lape.files.characters import in_markdown
from lape.report.analysis import CORRELATION
from lape.report.table import Table
from lape.sharing import hub

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class ModelTold:
    """A model: its facts, its correlation by layer, or none and in `explanation` why."""

    name: str
    facts: Table
    correlation: Correlation | None
    layers: Table
    explanation: str

    def terminal(self) -> "Group":
        """Return all of it for rich."""
        from rich.console import Group
        from rich.text import Text

        shown = [self.layers.terminal(), Text()] if self.correlation is not None else []
        return Group(Text(self.name), Text(), self.facts.terminal(), Text(), *shown, Text(self.explanation), Text())

    def markdown(self) -> str:
        """Return all of it as Markdown."""
        shown = [self.layers.markdown()] if self.correlation is not None else []
        parts = [f"# {in_markdown(self.name)}", self.facts.markdown(), *shown, in_markdown(self.explanation)]
        return "\n\n".join(parts) + "\n"


def told_of(saved: Sequence[Path]) -> Iterator[ModelTold]:
    """Tell of models that `lape.save_pretrained` wrote; raises RunError for what is none."""
    for path in saved:
        (subject,) = ANALYSES["correlation"].subjects(Request(checkpoints=[path]))
        yield _told(Path(subject.name).name, subject, hub.known_of(path))


def told_of_weights(model: str, model_args: Mapping[str, Any], weights: str, join: str) -> Iterator[ModelTold]:
    """Tell of a model of timm's or of ours with weights; raises as `lape.create_model` and `lape.load_backbone` do."""
    request = Request(model=model, model_args=model_args, weights=weights, joins=[join])
    for subject in ANALYSES["correlation"].subjects(request):
        yield _told(f"{model}, {Path(weights).name}", subject, hub.Known())


def _told(name: str, subject: Subject, known: hub.Known) -> ModelTold:
    config = hub.configuration(subject.model, known)
    cfg, args = config["pretrained_cfg"], config["model_args"]
    count = sum(parameter.numel() for parameter in subject.model.parameters())
    metrics = {name: f"{value:.2f} on {known.data}" for name, value in (known.metrics or {}).items()}
    facts = {
        "architecture": config["architecture"],
        "join": args.get("join", "the model's own"),
        "position embedding": args.get("pe") or subject.settings.get("pe") or "the model's own",
        "parameters": f"{count / 1e6:.2f} million",
        "images": "×".join(map(str, cfg.get("input_size", ()))),
        "classes": ", ".join(config.get("label_names", [])) or str(config["num_classes"]),
        **metrics,
        **({"licence": known.license} if known.license else {}),
    }
    table = Table(["fact", "of this model"], list(facts.items()), names=2)
    try:
        found = correlation(subject.model)
    except UsageError as error:
        return ModelTold(name, table, None, Table(["layer"], []), f"Position correlation is not shown. {error}")
    layers = Table(
        ["layer", *CORRELATION.of_layers],
        [(str(number), *cells) for number, cells in enumerate(CORRELATION.layers(found), start=1)],
    )
    return ModelTold(name, table, found, layers, CORRELATION.legend)
