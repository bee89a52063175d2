"""What a study found, in sentences and cells; the same words whichever way a result goes."""

import json
import math
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from statistics import fmean
from typing import Any

from lape.experiment import Experiment
from lape.files.characters import plural
from lape.studies import paper
from lape.studies.claims import FACTS, MARGIN, Finding, Outcome, judged
from lape.studies.inference import FEWEST, MOST_SEEDS
from lape.studies.statistics import BASELINE, LAPE, Difference, FinishedRun, Sample, Side, SummaryRow, Verdict
from lape.studies.study import VARIED, LeftOut, Study


def listed(names: Iterable[object]) -> str:
    """Join names as prose does: "a", "a and b", "a, b and c"."""
    *others, last = map(str, names)
    return " and ".join(filter(None, [", ".join(others), last]))


def sentence(text: str) -> str:
    """Begin with a capital letter."""
    return text[:1].upper() + text[1:]


def percent(sample: Sample) -> str:
    """Write "97.12 ± 0.30", or "97.12" where one run gives no spread."""
    return f"{sample.mean:.2f}" if sample.std is None else f"{sample.mean:.2f} ± {sample.std:.2f}"


def signed(points: float, decimals: int = 2) -> str:
    """Write "+0.31", "−0.31" or "0.00"."""
    nothing = f"{0:.{decimals}f}"
    return nothing if f"{abs(points):.{decimals}f}" == nothing else f"{points:+.{decimals}f}".replace("-", "−")


def interval(difference: Difference, decimals: int = 2) -> str:
    """Write "+0.10 to +0.52", or "no interval" where nothing can be estimated."""
    if difference.interval is None:
        return "no interval"
    return " to ".join(signed(end, decimals) for end in difference.interval)


def probability(p: float) -> str:
    """Write a p-value: "0.035", or "<0.001"."""
    return "<0.001" if p < 0.0005 else f"{p:.3f}"


def probabilities(difference: Difference | None) -> str:
    """Write "0.012 (0.048)": p, and with Holm's correction over the table; "–" where there is no verdict."""
    if difference is None or difference.p is None:
        return "–"
    return " ".join([probability(difference.p), *(f"({probability(p)})" for p in [difference.p_holm] if p is not None)])


def seeds_to_decide(difference: Difference) -> str:
    """Write how many seeds would decide what is undecided: "9", "more than 1,000", or "–" for what is not."""
    if difference.verdict is not Verdict.UNDECIDED:
        return "–"
    count = difference.seeds_to_decide
    return f"more than {MOST_SEEDS:,}" if count is None else f"{count:,}"


def number(value: float, decimals: int) -> str:
    """Write a number; "∞" for one without bound, "–" for one that is not defined."""
    if math.isnan(value):
        return "–"
    return "∞" if math.isinf(value) else f"{value:.{decimals}f}".replace("-", "−")


def duration(seconds: float) -> str:
    """Write the time of a step: "12.3 ms", "1.23 s"."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def third_epoch(study: Study) -> str:
    """Name the epoch that stands for one third of training: "epoch 10 of 30"."""
    runs = [result.run for result in study.results.values()]
    return listed(dict.fromkeys(f"epoch {run.third.epoch} of {_epochs(run)}" for run in runs))


def _epochs(run: FinishedRun) -> int:
    return run.curve[-1].epoch


MANY = 6  # names that a sentence does not list


def question(study: Study) -> str:
    """Say in one sentence what was compared on what data."""
    base, seeds = study.experiment, len(study.seeds)
    ways, kinds = _counted("Join", study.ways, "ways of joining"), _counted("position embedding", study.pes)
    return (
        f"{ways} compared on {base.data}{images(study)}: {base.model} with the {kinds}, "
        f"{length(base)}, {plural(seeds, 'seed')}."
    )


def several(studies: int, runs: int) -> str:
    """Name a page of several studies."""
    return f"{plural(runs, 'finished run')} in {plural(studies, 'study', 'studies')}"


def images(study: Study) -> str:
    """Say how many images were trained on, where that is known, in brackets."""
    if study.images:
        training, validation = study.images
        return f" ({training:,} training and {plural(validation, 'validation image')})"
    some = study.experiment.train_images
    return f" ({plural(some, 'training image')})" if some else ""


def length(base: Experiment) -> str:
    """Say how long a run was."""
    return plural(base.steps, "step") if base.steps else plural(base.all_steps(1), "epoch")


def _counted(noun: str, names: Sequence[object], many: str = "") -> str:
    if many and len(names) > MANY:
        return f"{len(names)} {many}"
    return f"{noun}{'s' if len(names) > 1 else ''} {listed(names)}"


def apart(studies: Sequence[Study]) -> list[str]:
    """Say for each study what sets it apart: the settings that the studies do not have in common."""
    identities = [study.experiment.identity() for study in studies]
    differing = [
        name
        for name in (identities[0] if identities else ())
        if name not in VARIED and any(identity[name] != identities[0][name] for identity in identities)
    ]
    settings = [
        ", ".join(f"{name} {json.dumps(identity[name], ensure_ascii=False)}" for name in differing)
        for identity in identities
    ]
    if len(set(settings)) == len(settings):
        return settings
    data = [f"data of digest {_data(study.contents)}" for study in studies]  # what is in a set has changed
    return [", ".join(filter(None, pair)) for pair in zip(settings, data, strict=True)]


def _data(contents: Any) -> str:
    """Tell one state of a set from another, shortly."""
    content = json.dumps(contents, sort_keys=True).encode()
    return "unknown" if contents is None else blake2b(content, digest_size=4).hexdigest()


def finding(row: SummaryRow, baseline: SummaryRow) -> str:
    """Say how a row differs from the baseline with the same positions, how sure that is, and which learns sooner."""
    difference = row.difference
    assert difference is not None
    lead = f"With {row.pe} positions, {row.way} {_beside(difference.mean)} {BASELINE}"
    levels = f"{row.score.mean:.2f} % against {baseline.score.mean:.2f} %"
    if difference.verdict is Verdict.NONE:
        return f"{lead} ({levels}): {Verdict.NONE.value}, {difference.no_verdict}."
    pairs = plural(len(difference.by_seed), "pair of runs", "pairs of runs")
    measured = f"{levels}; difference {interval(difference)}, {pairs}, p (Holm) {probabilities(difference)}"
    return f"{lead} ({measured}): {conclusion(difference)}.{_sooner(row, baseline)}"


def _sooner(row: SummaryRow, baseline: SummaryRow) -> str:
    """Say when a row and the baseline first have the baseline's final score, where all runs have it."""
    if not row.reached or None in row.reached + baseline.reached:
        return ""
    soon, itself = reached(row), reached(baseline)
    return f" {row.way} first has {BASELINE}’s final score after {soon} epochs, {BASELINE} itself after {itself}."


def conclusion(difference: Difference) -> str:
    """Say what the interval says, whether Holm's correction leaves it, and how many seeds would decide."""
    verdict = difference.verdict
    if verdict is Verdict.UNDECIDED:
        return f"{verdict.value}; seeds that would decide: {seeds_to_decide(difference)}"
    return verdict.value + ("" if difference.corrected is verdict else ", not significant after Holm’s correction")


def _beside(points: float) -> str:
    """Say where a score is beside another: "is 0.31 points above", "equals"."""
    apart = f"{abs(points):.2f}"
    if apart == "0.00":
        return "equals"
    return f"is {apart} {'point' if apart == '1.00' else 'points'} {'above' if points > 0 else 'below'}"


def reached(row: SummaryRow) -> str:
    """Write the epochs until the baseline's final score: "8.4", "8.4 (3 of 5 seeds)", "never", or "–" without pair."""
    epochs = [epoch for epoch in row.reached if epoch is not None]
    if not row.reached:
        return "–"
    if not epochs:
        return "never"
    of_some = "" if len(epochs) == len(row.reached) else f" ({len(epochs)} of {len(row.reached)} seeds)"
    return f"{fmean(epochs):.1f}{of_some}"


def beside(study: Study) -> str:
    """Name what all positions are held against: "default × learnable"."""
    assert study.reference is not None
    way, pe = study.reference
    return f"{way} × {pe}"


def _ranking(study: Study) -> str | None:
    """Say which positions are above and below the reference, and which do not differ from it significantly."""
    if not study.compares_positions:
        return None
    by_verdict: dict[Verdict, list[str]] = {verdict: [] for verdict in Verdict}
    for row in sorted(study.rows, key=lambda row: -row.score.mean):
        if row.beside is not None:
            by_verdict[row.beside.corrected].append(f"{row.way} × {row.pe} ({signed(row.beside.mean)})")
    names = {
        Verdict.ABOVE: "above it",
        Verdict.BELOW: "below it",
        Verdict.UNDECIDED: "not significantly different",
        Verdict.NONE: Verdict.NONE.value,
    }
    told = [f"{name}: {listed(by_verdict[verdict])}" for verdict, name in names.items() if by_verdict[verdict]]
    return f"Held against {beside(study)}, with Holm’s correction for all of them: {'; '.join(told)}."


@dataclass(frozen=True)
class Findings:
    """The sentences at the top of a report, and what to keep in mind.

    `main` is of one join; then come how far the tables are apart, and how positions compare with the reference.
    """

    main: tuple[str, ...]
    gap: str | None
    ranking: str | None
    remarks: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        """All but the remarks."""
        return (*self.main, *filter(None, [self.gap, self.ranking]))


def findings(study: Study) -> Findings:
    """Return the findings of `lape`, or of the last way where it was not compared, and all reservations."""
    rows = study.rows
    baselines = {row.pe: row for row in rows if row.way == BASELINE}
    compared = [row for row in rows if row.difference is not None]
    ways = [row.way for row in compared]
    chosen = LAPE if LAPE in ways else ways[-1] if ways else None
    main = tuple(finding(row, baselines[row.pe]) for row in compared if row.way == chosen)
    gap = None
    if study.gaps:
        spans = [f"{gap.points:.2f} points for {gap.way} ({gap.worst} to {gap.best})" for gap in study.gaps]
        gap = f"From the worst positions to the best, mean {study.measure} rises by {listed(spans)}."
    return Findings(main, gap, _ranking(study), tuple(_remarks(study)))


def left_out(some: LeftOut, what: str) -> list[str]:
    """Say of which ways and positions something is missing, and why."""
    return [f"{what} {listed(f'{way} × {pe}' for way, pe in pairs)}. {reason}" for reason, pairs in some.items()]


ABOUT_SIZES = (
    "The same runs with the same weights on images of other sizes: a learnt table is resized, a fixed one made anew. "
    "Differences are paired by seed at each size. Each interval covers its difference at 95 %; together they do not: "
    "Holm’s correction of p is for all sizes."
)


def about_marks(study: Study) -> str:
    """Say what + and − at a mean mean."""
    if not study.compares_positions:
        return ""
    return f"+ and −: significantly above or below {beside(study)} at this size, with Holm’s correction for all sizes."


def not_taken(study: Study) -> list[str]:
    """Say of which ways and positions there is no number at a size of images, and why."""
    return [line for size in study.sizes for line in left_out(study.refused_at(size), f"Not taken at {size}:")]


def _under_pooling(study: Study) -> list[str]:
    """Say what is known of LaPE where models pool their patches."""
    joins = {one.way.join for one, result in study.results.items() if result.record.get("pools_patches") is True}
    if not joins:
        return []
    from lape.method import JOINS, UNDER_POOLING  # torch comes with it

    against = any(JOINS[join].works_against_pooling for join in joins)
    return [f"These models pool their patches. {UNDER_POOLING}"] if against else []


def _remarks(study: Study) -> list[str]:
    rows, seeds = study.rows, study.seeds
    remarks = left_out(study.left_out, "Left out:")
    if len(seeds) == 1:
        more = shlex.join(["--seeds", "5"])
        remarks.append(
            f"One seed gives no spread and no interval, so nothing can be concluded. Train more, as with {more}."
        )
    elif len(seeds) < FEWEST:
        more = shlex.join(["--seeds", "5"])
        remarks.append(
            f"{len(seeds)} seeds give no verdict, as {FEWEST} at least are needed. Train more, as with {more}."
        )
    if BASELINE not in study.ways:
        remarks.append(f"The join {BASELINE} was not trained, so no differences are shown.")
    remarks += _under_pooling(study)
    for combination, error in study.failures.items():
        remarks.append(f"Failed and missing: {combination} ({error}).")
    for combination in study.elsewhere:
        remarks.append(f"Not finished yet, another process works on it: {combination}.")
    for row in rows:
        if row.difference is not None and row.difference.unpaired:
            lost = listed(row.difference.unpaired)
            remarks.append(
                f"{row.way} × {row.pe} is paired with {BASELINE} without seed {lost}, which only one of them has."
            )
        elif row.difference is None and row.way != BASELINE and BASELINE in study.ways:
            remarks.append(
                f"{row.way} × {row.pe} has no run of {BASELINE} with the same positions and seed: no difference."
            )
    intervals = [row.difference for row in rows if row.difference is not None and row.difference.interval is not None]
    if len(intervals) > 1:
        remarks.append(
            f"Each of the {len(intervals)} intervals covers its difference at 95 %; together they do not. "
            "So p stands with Holm’s correction for all of them beside it."
        )
    if study.jobs is None:
        remarks.append("Times per step may have been taken while other runs went on, so they are rough: use lape cost.")
    elif study.jobs > 1:
        remarks.append(
            f"Times per step were taken with up to {study.jobs} runs at once, so they are rough: use lape cost."
        )
    if len(study.provenances()) > 1:
        remarks.append("The runs were not all made with one commit, version and machine: see below.")
    return remarks


# --- Claims -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judgement:
    """The paper's claims beside a study, and how it went."""

    findings: tuple[Finding, ...]  # of every claim
    summary: str
    reasons: tuple[str, ...]  # why there is no verdict on some
    counted: tuple[str, ...]  # what is a fact and needs no verdict
    published: Mapping[str, Mapping[Side, float]]  # scores in percent, by whose they are

    @property
    def tested(self) -> tuple[Finding, ...]:
        """The claims that the study tests."""
        return tuple(one for one in self.findings if one.outcome is not Outcome.UNTESTED)

    @property
    def untested(self) -> tuple[Finding, ...]:
        """The others."""
        return tuple(one for one in self.findings if one.outcome is Outcome.UNTESTED)


def judgements(studies: Sequence[Study]) -> list[Judgement]:
    """Judge all claims by each study of a page, and count the outcomes."""
    findings = judged(studies)
    family = sum(one.difference is not None and one.difference.p is not None for some in findings for one in some)
    return [_judgement(study, some, family) for study, some in zip(studies, findings, strict=True)]


def _judgement(study: Study, findings: tuple[Finding, ...], family: int) -> Judgement:
    tested = [one for one in findings if one.outcome is not Outcome.UNTESTED]
    summary = f"These runs test none of {len(findings)} claims of the paper."
    if tested:
        outcomes = _counts(one.outcome for one in tested)
        summary = f"Of {len(findings)} claims of the paper these runs test {len(tested)} ({outcomes})."
    if family > 1 and tested:
        outcomes = _counts(one.corrected for one in tested)
        summary += f" With Holm’s correction for the {family} p-values of all claims that are tested here: {outcomes}."
    return Judgement(findings, summary, tuple(_reasons(tested)), tuple(_counted_facts(study)), published(study))


def _counts(outcomes: Iterable[Outcome]) -> str:
    counts = Counter(outcomes)
    return ", ".join(f"{outcome.value}: {counts[outcome]}" for outcome in Outcome if counts[outcome])


def _reasons(findings: Sequence[Finding]) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for one in findings:
        if one.difference is not None and one.difference.no_verdict is not None:
            by_reason.setdefault(one.difference.no_verdict, []).append(one.claim.sentence)
    return [f"No verdict: {'; '.join(sentences)}. Why: {reason}." for reason, sentences in by_reason.items()]


def _counted_facts(study: Study) -> list[str]:
    sentences = []
    for fact in FACTS:
        off = fact.off(study)
        pairs = plural(len(off), "pair of runs", "pairs of runs")
        wrong = [f"{count:g} with seed {seed}" for seed, count in off.items() if count]
        told = f"not so, off by {listed(wrong)}" if wrong else f"so in {pairs}"
        if off:
            sentences.append(f"Counted, not estimated: {fact.sentence} ({fact.place}): {told}.")
    return sentences


def published(study: Study) -> dict[str, Mapping[Side, float]]:
    """Return published scores by whose they are: the paper's of the same recipe or of DeiT-Ti, and those of others."""
    found: dict[str, Mapping[Side, float]] = {}
    if of_recipe := paper.of_recipe(study):
        found["in the paper"] = of_recipe
    elif study.measure == "accuracy":
        found["in the paper (DeiT-Ti)"] = paper.joining()
    if (other := paper.replication(study)) is not None:
        found[f"in other hands ({other.name})"] = other.scores
    return found


CLAIM_NAMES = ("claim", "in these runs", "after correction")
CLAIM_NUMBERS = ("difference", "95 % interval", "p (Holm)", "in", "pairs", "seeds to decide")
PLACE = "place"


def claim_headings(judgement: Judgement) -> tuple[str, ...]:
    """Return what `claim_cells` are under; the numbers of others stand before the place in the paper."""
    return (*CLAIM_NAMES, *CLAIM_NUMBERS, *judgement.published, PLACE)


def claim_cells(finding: Finding, judgement: Judgement) -> tuple[str, ...]:
    """Write a tested claim: sentence, verdicts, the mean difference and what it rests on, others' numbers, place."""
    difference, claim = finding.difference, finding.claim
    assert difference is not None
    others = (claim.published(scores) for scores in judgement.published.values())
    return (
        claim.sentence,
        finding.outcome.value,
        finding.corrected.value,
        signed(difference.mean, claim.unit.decimals),
        interval(difference, claim.unit.decimals),
        probabilities(difference),
        claim.unit.name,
        str(len(difference.by_seed)),
        seeds_to_decide(difference),
        *("–" if gain is None else signed(gain) for gain in others),
        claim.place,
    )


ABOUT_CLAIMS = (
    "A claim holds where the whole 95 % interval of its difference, paired by seed, is above 0; it does not hold where "
    "the whole interval is below; in between it is undecided. "
    f"“Not more than {MARGIN} points below” is held against −{MARGIN} in place of 0: half of what LaPE gains on DeiT-Ti"
    " in other hands. Intervals are Student’s, those of rank correlations Fisher’s; p is two-sided. There is no "
    "verdict where a run is at chance, where nothing varies, for fewer than three pairs, and where a change over the "
    "layers is no larger than one between seeds. Seeds to decide: with so many, a difference of this mean and spread "
    "is significant four times in five. In other hands: Lee, Ham and Kim, AAAI 2025. What positions a claim is "
    "about stands in brackets."
)
