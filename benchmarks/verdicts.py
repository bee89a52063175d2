"""Judge filed claims by today's rules, from the numbers in their table.

A mean, its 95 % interval and the pairs of runs give p, and Holm's correction. Two things are not in the table, and
there is no verdict on claims that need them: layers seed by seed, and how far tables are apart by default. These count
as p = 1 in the correction, which makes it the stricter.

python benchmarks/verdicts.py benchmarks/results/joins/report.md benchmarks/results/joins/verdicts.md
"""

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from jsonargparse import auto_cli
from scipy.special import stdtrit

from lape.files import writing
from lape.files.characters import as_code, in_markdown
from lape.report import words
from lape.report.table import Table
from lape.studies.claims import CLAIMS, MARGIN, OF_VERDICT, RANK, Claim, Outcome
from lape.studies.statistics import Difference, corrected, difference
from lape.training.provenance import provenance

WITH_MARGIN = f"not more than {MARGIN} points below"
NEARER = "nearer to each other"


def main(report: Path, out: Path) -> None:
    """Write verdicts

    Args:
        report: The tables of a report, with one of claims.
        out: Where the verdicts go.
    """
    filed = claims_of(report.read_text(encoding="utf-8"))
    claims = [claim for claim in CLAIMS if filed_sentence(claim) in filed]
    rows = [filed[filed_sentence(claim)] for claim in claims]
    found = list(map(filed_difference, claims, rows))
    silent = [Difference({}, (), 0.0, p=1.0) for one in found if one.no_verdict]
    judged = [one for one in corrected([*found, *silent])[: len(found)] if one is not None]
    cells = [
        (
            claim.sentence,
            row["in these runs"],
            OF_VERDICT[one.verdict].value,
            OF_VERDICT[one.corrected].value,
            row["difference"],
            row["95 % interval"],
            words.probabilities(one),
            words.seeds_to_decide(one),
        )
        for claim, row, one in zip(claims, rows, judged, strict=True)
    ]
    headings = ("claim", "in the file", "today", "after correction", "difference", "95 % interval")
    table = Table((*headings, "p (Holm)", "seeds to decide"), cells, names=4)
    reasons = dict.fromkeys(one.no_verdict for one in judged if one.no_verdict)
    parts = [
        f"The claims of {as_code(report.name)}, judged by today's rules from the numbers in its table, as its runs "
        "were not kept.",
        table.markdown(),
        f"Today: {counts(one.verdict for one in judged)}. With Holm's correction for {len(judged)} claims: "
        f"{counts(one.corrected for one in judged)}.",
        *(f"No verdict: {reason}." for reason in reasons),
        in_markdown(words.ABOUT_CLAIMS),
        as_code(provenance()["command"]),
    ]
    writing.write_marked({out: "\n\n".join(parts) + "\n" + writing.COMMENT})


def claims_of(text: str) -> dict[str, dict[str, str]]:
    """Return the rows of the table of claims by their sentence, each by its headings."""
    lines = iter(text.splitlines())
    headings = next(cells for cells in map(cells_of, lines) if cells[:1] == ["claim"])
    next(lines)  # the rule
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append(dict(zip(headings, cells_of(line), strict=True)))
    return {row["claim"]: row for row in rows}


def cells_of(line: str) -> list[str]:
    """Split a line of a Markdown table."""
    return [cell.strip() for cell in line.strip("| ").split("|")]


def filed_sentence(claim: Claim) -> str:
    """Return what a claim was called before it had a margin."""
    return claim.sentence.replace(WITH_MARGIN, "not below")


def filed_difference(claim: Claim, row: dict[str, str]) -> Difference:
    """Return a difference of the same mean, interval and pairs as in a row."""
    mean = number(row["difference"])
    low, high = map(number, row["95 % interval"].split(" to "))
    pairs = int(row["pairs"])
    deviation = (high - low) / 2 / float(stdtrit(pairs - 1, 0.975)) * math.sqrt(pairs)
    places = [place - (pairs - 1) / 2 for place in range(pairs)]
    spread = math.hypot(*places) / math.sqrt(pairs - 1)
    values = {place: mean + deviation * where / spread for place, where in enumerate(places)}
    found = difference(values, dict.fromkeys(values, 0.0), -MARGIN if WITH_MARGIN in claim.sentence else 0.0)
    assert found is not None
    if claim.unit is RANK:
        return found.without_verdict("a rank correlation needs the layers of each seed, which are not filed")
    if NEARER in claim.sentence:
        return found.without_verdict("whether the tables are apart by default is not filed run by run")
    return found


def number(text: str) -> float:
    """Read a number as a report writes it."""
    return float(text.replace("−", "-"))


def counts(verdicts: Iterable[object]) -> str:
    """Count outcomes, as a report does."""
    counted = Counter(OF_VERDICT[verdict] for verdict in verdicts)  # pyright: ignore[reportArgumentType]
    return ", ".join(f"{outcome.value}: {counted[outcome]}" for outcome in Outcome if counted[outcome])


if __name__ == "__main__":
    auto_cli(main)
