"""A study as a table: for the terminal, for Markdown, and with full precision as CSV and JSON."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lape import __version__
from lape.files import writing
from lape.files.characters import in_markdown, visible
from lape.report import words
from lape.report.table import Table
from lape.studies import paper
from lape.studies.claims import FACTS, Finding
from lape.studies.statistics import BASELINE, Difference, SummaryRow, Verdict, Way
from lape.studies.study import VARIED, Study

if TYPE_CHECKING:
    from rich.console import Group

    from lape.studies.study import Numbers, RunAnalysis


REACHED = f"epochs to {BASELINE}’s score"
POSITIONS = "positions"  # heading: tables, and what tells positions otherwise
NOT_TAKEN = "not taken"  # in the place of a number: a size of images
Columns = dict[str, Callable[[SummaryRow], str]]


def columns(study: Study) -> Columns:
    """Return what a table for people shows of a row, by heading: names, the numbers that matter most, others."""
    return {
        "join": lambda row: str(row.way),
        POSITIONS: lambda row: row.pe,
        f"{study.measure}, %": lambda row: words.percent(row.score),
        f"minus {BASELINE}": _difference,
        "95 % interval": lambda row: words.interval(row.difference) if row.difference else "–",
        "p (Holm)": lambda row: words.probabilities(row.difference),
        "seeds": lambda row: str(row.score.count),
        f"at {words.third_epoch(study)}, %": lambda row: words.percent(row.third),
        REACHED: words.reached,
        "parameters": lambda row: f"{row.parameters:,}",
        "time per step": lambda row: words.duration(row.seconds_per_step),
    }


def _difference(row: SummaryRow) -> str:
    if row.difference is not None:
        return words.signed(row.difference.mean)
    return "–" if row.way == BASELINE else "no pair"


OF_RECIPE, OTHER_MODEL = "paper, %", "paper’s DeiT-Ti, %"


def beside_the_paper(study: Study) -> Columns:
    """Return the paper's numbers for the same ways and tables: of the recipe that was run, else of Tables 7 and 8."""
    of_recipe = paper.of_recipe(study)
    if not of_recipe and study.measure != "accuracy":
        return {}
    expected = of_recipe or paper.joining()

    def number(row: SummaryRow) -> str:
        here, base = expected.get((row.way, row.pe)), expected.get((BASELINE, row.pe))
        if here is None:
            return "–"
        return f"{here:g}" if base is None or row.way == BASELINE else f"{here:g} ({words.signed(here - base)})"

    if all(number(row) == "–" for row in study.rows):
        return {}
    return {OF_RECIPE if of_recipe else OTHER_MODEL: number}


def scores(study: Study) -> Table:
    """Return what the runs reached, for each way and table; the paper's numbers stand behind the runs'."""
    *names, parameters, time = columns(study).items()
    shown = dict([*names, *beside_the_paper(study).items(), parameters, time])
    return _table(study, shown, names=2)


def _table(study: Study, shown: Columns, names: int) -> Table:
    return Table(list(shown), [[cell(row) for cell in shown.values()] for row in study.rows], names)


def positions(study: Study) -> Table:
    """Return all positions beside the reference, the best first; nothing where joins alone are compared."""
    if not study.compares_positions:
        return Table(["join", POSITIONS], [], 2)

    def paired(row: SummaryRow) -> list[str]:
        if row.beside is None:
            return ["–", "–", "–"]
        return [words.signed(row.beside.mean), words.interval(row.beside), words.probabilities(row.beside)]

    rows = [
        [
            *(str(row.way), row.pe, words.percent(row.score), *paired(row)),
            *(f"{row.parameters:,}", words.duration(row.seconds_per_step)),
        ]
        for row in sorted(study.rows, key=lambda row: -row.score.mean)
    ]
    beside = f"minus {words.beside(study)}"
    score = f"{study.measure}, %"
    return Table(
        ["join", POSITIONS, score, beside, "95 % interval", "p (Holm)", "parameters", "time per step"], rows, 2
    )


def terminal(study: Study) -> "Group":
    """Return question, table, findings and remarks for rich; joins stand below the name of their positions."""
    from rich.console import Group
    from rich.text import Text

    numbers = columns(study)
    for heading in ("join", POSITIONS, "seeds", "p (Holm)", REACHED):  # the findings say p
        del numbers[heading]
    narrow: Columns = {
        heading: lambda row, cell=cell: cell(row).replace(" ± ", "±") for heading, cell in numbers.items()
    }
    table = _table(study, {"": lambda row: str(row.way), **narrow}, names=1).terminal([row.pe for row in study.rows])
    findings = words.findings(study)
    shown = [Text(), Text(words.question(study)), Text(), table, Text()]
    if (ranked := positions(study)).rows:
        tight = Table(ranked.headings, [[cell.replace(" ± ", "±") for cell in row] for row in ranked.rows], 2)
        shown += [tight.without("p (Holm)", "parameters", "time per step").terminal(), Text()]
    shown += [*map(Text, [*findings.all, *findings.remarks]), Text()]
    if study.sizes:
        shown += [Text(words.ABOUT_SIZES), *_terminal_of_sizes(study), Text()]
        shown += [*map(Text, words.not_taken(study)), Text()]
    return Group(*shown)


def _terminal_of_sizes(study: Study) -> list[Any]:
    from rich.text import Text

    if (across := across_sizes(study)).rows:
        return [Text(words.about_marks(study)), Text(), across.terminal()]
    at_sizes = sizes(study)
    tight = Table(at_sizes.headings, [[cell.replace(" ± ", "±") for cell in row] for row in at_sizes.rows], 3)
    return [Text(), tight.without(POSITIONS, "seeds", "p (Holm)").terminal([row[2] for row in at_sizes.rows])]


def shapes(study: Study) -> Table:
    """Return the position correlation in numbers: the means over seeds, for each way and table that has them."""
    headings = ["join", POSITIONS, "two-dimensionality", "half distance", "layer difference", "seeds"]
    groups: dict[tuple[Way, str], list[RunAnalysis]] = {}
    for (way, pe, _), analysis in study.analyses.items():
        groups.setdefault((way, pe), []).append(analysis)
    rows = [
        [
            *(str(way), pe),
            words.number(fmean(one.shape.two_dimensionality for one in some), 2),
            words.number(fmean(one.shape.half_distance for one in some), 1),
            words.number(fmean(one.shape.layer_difference for one in some), 3),
            str(len(some)),
        ]
        for (way, pe), some in groups.items()
    ]
    return Table(headings, rows, names=2)


def weights(study: Study) -> Table:
    """Return λ1, λ2, λ3 by layer, the means over seeds, for each table with the default join."""
    by_table: dict[str, list[tuple[Numbers, ...]]] = {}
    for (way, pe, _), analysis in study.analyses.items():
        if way == BASELINE and analysis.weights is not None:
            by_table.setdefault(pe, []).append(analysis.weights)
    layers = max((len(one[0]) for some in by_table.values() for one in some), default=0)
    rows = [
        [pe, name, *(words.number(fmean(values), 3) for values in zip(*of_seeds, strict=True))]
        for pe, seeds in by_table.items()
        for name, of_seeds in zip(("λ1", "λ2", "λ3"), zip(*seeds, strict=True), strict=True)
    ]
    return Table([POSITIONS, "weight", *(f"layer {layer}" for layer in range(1, layers + 1))], rows, names=2)


def sizes(study: Study) -> Table:
    """Return what the runs reach on images of each size, for each table, size and way; nothing where none was asked."""
    measure, margin = f"{study.measure}, %", f"minus {BASELINE}"
    rows: list[list[str]] = []
    for pe in study.pes:
        for size in study.sizes:
            here = f"{size} (trained)" if size in study.trained else str(size)
            by_way = {row.way: row for row in study.rows_at(size) if row.pe == pe}
            for way in [row.way for row in study.rows if row.pe == pe]:
                numbers = _at_a_size(by_way[way]) if way in by_way else [NOT_TAKEN, "–", "–", "–", "0"]
                rows.append([here, str(way), pe, *numbers])
    return Table(["size", "join", POSITIONS, measure, margin, "95 % interval", "p (Holm)", "seeds"], rows, names=3)


def across_sizes(study: Study) -> Table:
    """Return the mean score of every position at every size, a column for each; nothing where joins alone are compared.

    What is significantly above or below the reference at that size, with Holm's correction, has a + or −.
    """
    sizes = study.sizes if study.compares_positions else ()
    by_size = [{(row.way, row.pe): row for row in study.rows_at(size)} for size in sizes]

    def cell(row: SummaryRow | None) -> str:
        if row is None:
            return NOT_TAKEN
        return marked(row.score.mean, row.beside)

    rows = [
        [str(row.way), row.pe, *(cell(some.get((row.way, row.pe))) for some in by_size)]
        for row in sorted(study.rows, key=lambda row: -row.score.mean)
    ]
    trained = [f"{size} (trained)" if size in study.trained else str(size) for size in sizes]
    return Table(["join", POSITIONS, *trained], rows if sizes else [], 2)


def marked(mean: float, beside: Difference | None) -> str:
    """Return a mean with + or − where it is significantly above or below what it is held against, after correction."""
    marks = {Verdict.ABOVE: " +", Verdict.BELOW: " −"}
    return f"{mean:.2f}" + (marks.get(beside.corrected, "") if beside else "")


def _at_a_size(row: SummaryRow) -> list[str]:
    spread = words.interval(row.difference) if row.difference else "–"
    paired = _difference(row), spread, words.probabilities(row.difference)
    return [words.percent(row.score), *paired, str(row.score.count)]


def claims(judgement: words.Judgement) -> Table:
    """Return the claims that a study tests, and what its runs say of them."""
    cells = [words.claim_cells(finding, judgement) for finding in judgement.tested]
    return Table(words.claim_headings(judgement), cells, names=len(words.CLAIM_NAMES))


def terminal_of_claims(studies: Sequence[Study]) -> "Group":
    """Return for each study what it is, the claims that it tests and how they went, for rich."""
    from rich.console import Group
    from rich.text import Text

    shown: list[Any] = []
    for study, judgement in zip(studies, words.judgements(studies), strict=True):
        shown += [Text(), Text(words.question(study)), Text()]
        if judgement.tested:
            wide = ("p (Holm)", "in", "pairs", "seeds to decide", *judgement.published, words.PLACE)
            shown += [claims(judgement).without(*wide).terminal(), Text()]
        shown += map(Text, (judgement.summary, *judgement.reasons, *judgement.counted))
    return Group(*shown, Text())


def markdown(studies: Sequence[Study]) -> str:
    """Return of each study question, findings, remarks and every table: scores, claims, and what the analysis found."""
    return "\n".join(map(_markdown, studies, words.judgements(studies)))


def _markdown(study: Study, judgement: words.Judgement) -> str:
    findings = words.findings(study)
    facts = "\n".join(f"- {in_markdown(sentence)}" for sentence in (*findings.all, *findings.remarks))
    parts = [in_markdown(words.question(study)), facts, scores(study).markdown()]
    if (ranked := positions(study)).rows:
        parts.append(ranked.markdown())
    if judgement.tested:
        parts += [claims(judgement).markdown(), *map(in_markdown, (judgement.summary, words.ABOUT_CLAIMS))]
    if listed := (*judgement.reasons, *judgement.counted):
        parts.append("\n".join(f"- {in_markdown(sentence)}" for sentence in listed))
    if study.sizes:
        if (across := across_sizes(study)).rows:
            parts += [across.markdown(), in_markdown(words.about_marks(study))]
        parts += [in_markdown(words.ABOUT_SIZES), sizes(study).markdown(), *map(in_markdown, words.not_taken(study))]
    parts += [table.markdown() for table in (shapes(study), weights(study)) if table.rows]
    command = "\n".join(f"    {visible(line)}" for line in study.command.split("\n"))
    return "\n\n".join([*parts, command]) + "\n"


LATEX = f"% {writing.MARK}; without this line the file is not replaced. Needs \\usepackage{{booktabs,graphicx}}.\n"


def latex(studies: Sequence[Study]) -> str:
    """Return the tables of scores, claims, sizes and shapes of each study for LaTeX."""
    return "\n".join([LATEX, *map(_latex, studies, words.judgements(studies))])


def _latex(study: Study, judgement: words.Judgement) -> str:
    measure = f"{words.sentence(study.measure)}: mean ± standard deviation over the seeds."
    paired = f"Differences to {BASELINE} are paired by seed. p in brackets: with Holm’s correction."
    beside = ("in", "pairs", "seeds to decide", *judgement.published)
    on_the_way = (f"at {words.third_epoch(study)}, %", REACHED)  # has no room on a page of paper
    captions = {
        f"{words.question(study)} {measure} {paired}": scores(study).without("time per step", *on_the_way),
        f"All positions, the best first. {words.question(study)} {measure}": positions(study).without("time per step"),
        f"{judgement.summary} {words.question(study)}": claims(judgement).without(*beside),
        f"All positions at other sizes. {words.about_marks(study)} {words.question(study)}": across_sizes(study),
        f"At other sizes of images. {words.question(study)} {measure} {paired}": sizes(study),
        f"Position correlation: means over seeds. {words.question(study)}": shapes(study),
    }
    return "\n".join(table.latex(caption) for caption, table in captions.items() if table.rows)


def runs_as_csv(studies: Sequence[Study]) -> str:
    """Return one line for each run, numbers unrounded; `study` is the study's number on the page."""
    records = [
        {
            "study": number,
            "way": str(one.way),
            **one.way._asdict(),
            "pe": one.pe,
            "seed": one.seed,
            "measure": result.run.measure,
            "score": result.run.score,
            **{f"third_{name}": value for name, value in result.run.third._asdict().items()},
            "parameters": result.run.parameters,
            "seconds_per_step": result.run.seconds_per_step,
            "folder": str(result.folder),
            "commit": result.record.get("commit"),
            writing.MARK: __version__,
        }
        for number, study in enumerate(studies, start=1)
        for one, result in study.results.items()
    ]
    return Table(list(records[0]), [list(record.values()) for record in records]).csv()


def as_csv(study: Study) -> str:
    """Return one line for each join and table, numbers unrounded, empty where there is none."""
    records = [_record(row) | {writing.MARK: __version__} for row in study.rows]
    return Table(list(records[0]), [list(record.values()) for record in records]).csv()


def _record(row: SummaryRow) -> dict[str, Any]:
    difference, beside = row.difference, row.beside
    low, high = (difference.interval if difference else None) or (None, None)
    beside_low, beside_high = (beside.interval if beside else None) or (None, None)
    epochs = [epoch for epoch in row.reached if epoch is not None]
    return {
        "way": str(row.way),
        **row.way._asdict(),
        "pe": row.pe,
        "seeds": row.score.count,
        "measure": row.measure,
        "score_mean": row.score.mean,
        "score_std": row.score.std,
        "third_score_mean": row.third.mean,
        "third_score_std": row.third.std,
        "difference_mean": difference and difference.mean,
        "difference_low": low,
        "difference_high": high,
        "difference_pairs": len(difference.by_seed) if difference else 0,
        "p": difference and difference.p,
        "p_holm": difference and difference.p_holm,
        "verdict": difference and difference.verdict.value,
        "verdict_corrected": difference and difference.corrected.value,
        "no_verdict": difference and difference.no_verdict,
        "beside_mean": beside and beside.mean,
        "beside_low": beside_low,
        "beside_high": beside_high,
        "beside_pairs": len(beside.by_seed) if beside else 0,
        "beside_p": beside and beside.p,
        "beside_p_holm": beside and beside.p_holm,
        "beside_verdict_corrected": beside and beside.corrected.value,
        "epochs_to_baseline_mean": fmean(epochs) if epochs else None,
        "epochs_to_baseline_seeds": len(epochs),
        "parameters": row.parameters,
        "seconds_per_step": row.seconds_per_step,
    }


_OF_TRAINING = (  # alike at every size
    *("third_score_mean", "third_score_std", "epochs_to_baseline_mean", "epochs_to_baseline_seeds"),
    *("parameters", "seconds_per_step"),
)


def _records_at_sizes(study: Study) -> list[dict[str, Any]]:
    """Return a record for each size, way and table that is taken, and one for each that is not, with the reason."""
    records: list[dict[str, Any]] = []
    for size in study.sizes:
        sides = {"size": str(size), **size._asdict(), "trained": size in study.trained}
        for row in study.rows_at(size):
            numbers = {name: value for name, value in _record(row).items() if name not in _OF_TRAINING}
            records.append(sides | numbers | {"refusal": None})
        for reason, pairs in study.refused_at(size).items():
            records += [sides | {"way": str(way), **way._asdict(), "pe": pe, "refusal": reason} for way, pe in pairs]
    return records


def sizes_as_csv(study: Study) -> str:
    """Return one line for each size, join and table, numbers unrounded, empty where there is none."""
    records = _records_at_sizes(study)
    headings = [*dict.fromkeys(name for record in records for name in record), writing.MARK]
    return Table(headings, [[*map((record | {writing.MARK: __version__}).get, headings)] for record in records]).csv()


def _runs_at_sizes(study: Study) -> list[dict[str, Any]]:
    return [
        {
            "size": str(size),
            "way": str(combination.way),
            **combination.way._asdict(),
            "pe": combination.pe,
            "seed": combination.seed,
            "score": study.at_sizes[combination].by_size[size].metrics.get(result.record["score"]),
            "refusal": study.at_sizes[combination].by_size[size].refusal,
        }
        for size in study.sizes
        for combination, result in study.results.items()
    ]


def settings(study: Study) -> dict[str, Any]:
    """Return what all runs have in common."""
    return {name: value for name, value in study.experiment.settings().items() if name not in VARIED}


def _claim(finding: Finding, judgement: words.Judgement) -> dict[str, Any]:
    difference = finding.difference
    return {
        "claim": finding.claim.sentence,
        "place": finding.claim.place,
        "outcome": finding.outcome.value,
        "outcome_corrected": finding.corrected.value,
        "no_verdict": difference and difference.no_verdict,
        "p": difference and difference.p,
        "p_holm": difference and difference.p_holm,
        "seeds_to_decide": difference and difference.seeds_to_decide,
        "published": {whose: finding.claim.published(scores) for whose, scores in judgement.published.items()},
        "unit": finding.claim.unit.name,
        "bound": difference and difference.bound,
        "difference_mean": difference and difference.mean,
        "difference_interval": difference and difference.interval,
        "difference_by_seed": difference and dict(difference.by_seed),
    }


def as_json(study: Study) -> str:
    """Return rows, gaps, single runs, settings and provenance as JSON, with full precision."""
    findings = words.findings(study)
    (judgement,) = words.judgements([study])
    content = {
        writing.MARK: __version__,
        "question": words.question(study),
        "findings": findings.all,
        "reference": study.reference and {"way": str(study.reference[0]), "pe": study.reference[1]},
        "remarks": findings.remarks,
        "rows": [
            _record(row) | {"difference_by_seed": row.difference and dict(row.difference.by_seed)} for row in study.rows
        ],
        "gaps": [{**asdict(gap), "way": str(gap.way)} for gap in study.gaps],
        "claims": [_claim(one, judgement) for one in judgement.findings],
        "facts": [{"fact": fact.sentence, "place": fact.place, "off_by_seed": dict(fact.off(study))} for fact in FACTS],
        "runs": [
            {
                "way": str(combination.way),
                **combination.way._asdict(),
                "pe": combination.pe,
                "seed": combination.seed,
                "score": result.run.score,
                "third": result.run.third._asdict(),
                "parameters": result.run.parameters,
                "seconds_per_step": result.run.seconds_per_step,
                "folder": result.folder.name,
            }
            for combination, result in study.results.items()
        ],
        "failures": {str(combination): str(error) for combination, error in study.failures.items()},
        "left_out": words.left_out(study.left_out, "Left out:"),
        "settings": settings(study),
        "command": study.command,
        "jobs": study.jobs,
        "provenance": study.provenances(),
    }
    if study.sizes:
        content["sizes"] = {"rows": _records_at_sizes(study), "runs": _runs_at_sizes(study)}
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
