"""The report says what the numbers say, whichever way they go, and its page needs nothing but itself."""

import csv
import io
import json
import math
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from itertools import accumulate
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from made_up_runs import BASE, analysis_of, study_of
from rich.console import Console

from lape import recipes, report
from lape.analysis import Correlation
from lape.data.sizes import Size
from lape.errors import RunError, UsageError
from lape.method import POSITION_NORMS
from lape.report import cost, figures, methods, page, plots, progress, tables, words
from lape.report.run import Bar
from lape.studies import paper
from lape.studies.claims import CLAIMS
from lape.studies.statistics import Combination, Way
from lape.studies.study import RunAtSizes
from lape.training.evaluation import AtSize
from lape.training.loop import Progress

GAIN = {  # lape minus default: 4, 2, 3 with a half width of 4.303/√3 = 2.484; and 0, 1, 2 with the same
    ("default", "learnable"): {0: 92.0, 1: 90.0, 2: 91.0},
    ("lape", "learnable"): {0: 96.0, 1: 92.0, 2: 94.0},
    ("default", "sinusoidal-1d"): {0: 80.0, 1: 81.0, 2: 82.0},
    ("lape", "sinusoidal-1d"): {0: 80.0, 1: 82.0, 2: 84.0},
}
LOSS = {("default", "learnable"): {0: 95.0, 1: 96.0, 2: 97.0}, ("lape", "learnable"): {0: 90.0, 1: 91.5, 2: 92.0}}
TIE = {("default", "learnable"): {0: 95.0, 1: 96.0}, ("lape", "learnable"): {0: 95.0, 1: 96.0}}
ONE_SEED = {("default", "learnable"): {0: 90.0}, ("lape", "learnable"): {0: 93.0}}
THREE_JOINS = {**LOSS, ("shared", "learnable"): {0: 95.0, 1: 96.0, 2: 97.5}}
STAND_INS = {
    **GAIN,
    **{
        (Way("lape", norm), "learnable"): {0: 91.0, 1: 92.5, 2: 90.0 + place}
        for place, norm in enumerate(POSITION_NORMS)
        if norm != "layernorm"
    },
    (Way("lape", start="preserve"), "learnable"): {0: 90.0, 1: 92.0, 2: 94.0},
}
KINDS = {  # rope-mixed and none come with the default join alone
    **GAIN,
    ("default", "rope-mixed"): {0: 97.0, 1: 95.5, 2: 96.0},
    ("default", "none"): {0: 60.0, 1: 62.0, 2: 61.5},
}
NO_DEFAULT = {("shared", "learnable"): {0: 95.0, 1: 96.0}, ("lape", "learnable"): {0: 95.0, 1: 96.0}}
CASES = {
    "gain": GAIN,
    "loss": LOSS,
    "tie": TIE,
    "one-seed": ONE_SEED,
    "three-joins": THREE_JOINS,
    "no-default": NO_DEFAULT,
    "stand-ins": STAND_INS,
    "kinds": KINDS,
}
ON_A_PAGE = pytest.mark.parametrize("study", ["one-seed", "no-default", "stand-ins", "kinds"], indirect=True)


def analysed(study, layers=3):
    """The study with analyses of its own making; with the default join λ2 falls from layer to layer."""
    falling = [1 / (1 + layer) for layer in range(layers)]
    analyses = {
        one: analysis_of(half_distance=[1.0] * layers, lambda2=falling if one.way.join == "default" else None)
        for one in study.results
    }
    return replace(study, analyses=analyses)


def sections(study, depth=3):
    return [page.Section(analysed(study, depth), made_up_maps(study, depth))]


def made_up_maps(study, depth=3, grid=(3, 5)):
    patches = grid[0] * grid[1]
    maps = torch.linspace(-1, 1, patches).outer(torch.linspace(-1, 1, patches)).double().expand(depth, -1, -1)
    return {
        panel.title: plots.Maps(0, {str(way): Correlation(maps, grid) for way in panel.ways})
        for panel in plots.panels(study)
    }


@pytest.fixture(params=CASES, scope="module")
def study(request, tmp_path_factory):
    return study_of(tmp_path_factory.mktemp("runs"), CASES[request.param])


@pytest.fixture(scope="module")
def shown(study):
    return page.page(sections(study))


# --- Words


def test_a_gain_is_told_with_its_interval(tmp_path):
    found = words.findings(study_of(tmp_path, GAIN))
    assert found.main == (
        "With learnable positions, lape is 3.00 points above default (94.00 % against 91.00 %; difference +0.52 to "
        "+5.48, 3 pairs of runs, p (Holm) 0.035 (0.070)): significant (95 % interval above 0), not significant after "
        "Holm’s correction. lape first has default’s final score after 4.0 epochs, default itself after 4.0.",
        "With sinusoidal-1d positions, lape is 1.00 point above default (82.00 % against 81.00 %; difference −1.48 to "
        "+3.48, 3 pairs of runs, p (Holm) 0.225 (0.225)): not significant (95 % interval includes 0); seeds that would "
        "decide: 10. lape first has default’s final score after 4.0 epochs, default itself after 4.0.",
    )
    assert found.gap == (
        "From the worst positions to the best, mean accuracy rises by 10.00 points for default (sinusoidal-1d to "
        "learnable) and 12.00 points for lape (sinusoidal-1d to learnable)."
    )


def test_a_loss_is_told_in_the_same_words(tmp_path):
    """Differences -5, -4.5, -5: mean -29/6, s = 1/√12, half width 4.303/6."""
    (sentence,) = words.findings(study_of(tmp_path, LOSS)).main
    assert sentence == (
        "With learnable positions, lape is 4.83 points below default (91.17 % against 96.00 %; difference −5.55 to "
        "−4.12, 3 pairs of runs, p (Holm) 0.001 (0.001)): significant (95 % interval below 0)."
    )


def test_a_tie_of_two_seeds_has_no_verdict(tmp_path):
    found = words.findings(study_of(tmp_path, TIE))
    (sentence,) = found.main
    assert "lape equals default" in sentence
    assert sentence.endswith("no verdict, no variance: all 2 pairs of runs differ by the same.")
    assert any("2 seeds give no verdict, as 3 at least are needed" in remark for remark in found.remarks)


def test_one_seed_has_no_interval_and_says_so(tmp_path):
    found = words.findings(study_of(tmp_path, ONE_SEED))
    assert "95 % interval" not in found.main[0]
    assert found.main[0].endswith("no verdict, too few pairs of runs: 1, of at least 3.")
    assert any("One seed gives no spread and no interval" in remark for remark in found.remarks)


def test_lape_stands_at_the_top_and_the_others_in_the_table(tmp_path):
    study = study_of(tmp_path, THREE_JOINS)
    assert [", lape is" in sentence for sentence in words.findings(study).main] == [True]
    assert "+0.17 | −0.55 to +0.88" in tables.markdown([study])  # shared: 0, 0, 0.5


def test_without_the_default_join_nothing_is_differed(tmp_path):
    found = words.findings(study_of(tmp_path, NO_DEFAULT))
    assert found.main == ()
    assert any("default was not trained" in remark for remark in found.remarks)


def test_a_failed_run_is_named_and_its_pair_left_out(tmp_path):
    finals = {("default", "learnable"): {0: 90.0, 1: 91.0, 2: 92.0}, ("lape", "learnable"): {0: 91.0, 2: 93.5}}
    failures = {Combination(Way("lape"), "learnable", 1): RunError("the loss is nan at step 7")}
    study = study_of(tmp_path, finals, failures=failures)
    remarks = " ".join(words.findings(study).remarks)
    assert "lape × learnable, seed 1 (the loss is nan at step 7)" in remarks
    assert "paired with default without seed 1" in remarks
    assert "too few pairs of runs: 2" in words.findings(study).main[0]
    with pytest.raises(RunError, match="1 of 6 runs failed"):
        study.raise_missing()


@pytest.mark.parametrize(
    ("points", "text"), [(0.004, "0.00"), (-0.004, "0.00"), (-0.006, "−0.01"), (1.0, "+1.00"), (-12.345, "−12.35")]
)
def test_signs(points, text):
    assert words.signed(points) == text


def test_positions_of_every_kind_are_held_against_the_learnable_table_by_default(tmp_path):
    study = study_of(tmp_path, KINDS)
    assert study.reference == (Way("default"), "learnable")
    ranked = tables.positions(study)
    assert [row[:2] for row in ranked.rows] == [
        ["default", "rope-mixed"],
        ["lape", "learnable"],
        ["default", "learnable"],
        ["lape", "sinusoidal-1d"],
        ["default", "sinusoidal-1d"],
        ["default", "none"],
    ]
    assert [row[3] for row in ranked.rows] == ["+5.17", "+3.00", "–", "−9.00", "−10.00", "−29.83"]
    by_side = {(row.way, row.pe): row for row in study.rows}
    assert by_side[Way("default"), "rope-mixed"].beside.by_seed == {0: 5.0, 1: 5.5, 2: 5.0}
    own = by_side[Way("lape"), "sinusoidal-1d"]
    assert (own.difference.mean, own.beside.mean) == (1.0, -9.0)
    held = [row.beside for row in study.rows if row.beside]
    corrected = accumulate(((5 - place) * p for place, p in enumerate(sorted(one.p for one in held))), max)
    assert sorted(one.p_holm for one in held) == pytest.approx(list(corrected))
    assert words.findings(study).ranking == (
        "Held against default × learnable, with Holm’s correction for all of them: above it: default × rope-mixed "
        "(+5.17); below it: default × sinusoidal-1d (−10.00) and default × none (−29.83); not significantly different: "
        "lape × learnable (+3.00) and lape × sinusoidal-1d (−9.00)."
    )
    record = {(row["way"], row["pe"]): row for row in csv.DictReader(io.StringIO(tables.as_csv(study)))}
    assert float(record["default", "none"]["beside_mean"]) == by_side[Way("default"), "none"].beside.mean
    assert record["default", "learnable"]["beside_mean"] == ""


def test_joins_of_the_same_tables_alone_are_not_ranked(tmp_path):
    study = study_of(tmp_path, GAIN)
    assert not study.compares_positions
    assert (tables.positions(study).rows, words.findings(study).ranking) == ([], None)
    assert study_of(tmp_path / "one", LOSS).reference is None


def test_the_reference_is_drawn_in_the_panel_of_every_other_table(tmp_path):
    study = study_of(tmp_path, KINDS)
    panels = plots.learning_curves(study).axes
    drawn = {panel.get_title(loc="left"): {line.get_label() for line in panel.get_lines()} for panel in panels}
    there = {title for title, labels in drawn.items() if "default × learnable, in every panel" in labels}
    assert there == {"sinusoidal-1d", "rope-mixed", "none"}


def test_the_epochs_until_the_score_of_the_default_join_are_counted_seed_by_seed(tmp_path):
    finals = {("default", "learnable"): {0: 90.0, 1: 80.0}, ("lape", "learnable"): {0: 92.0, 1: 95.0, 2: 99.0}}
    study = study_of(tmp_path, finals, curve=lambda final: [final - 20, final - 10, final, final])
    default, lape = study.rows
    assert (default.reached, lape.reached) == ((3, 3), (3, 2))  # a seed that only one has is left out
    assert (words.reached(default), words.reached(lape)) == ("3.0", "2.5")
    worse = study_of(tmp_path / "b", {("default", "none"): {0: 90.0, 1: 50.0}, ("shared", "none"): {0: 80.0, 1: 60.0}})
    assert words.reached(worse.rows[1]) == "3.0 (1 of 2 seeds)"
    assert words.reached(study_of(tmp_path / "c", ONE_SEED | {("lape", "learnable"): {0: 80.0}}).rows[1]) == "never"
    assert words.reached(study_of(tmp_path / "d", NO_DEFAULT).rows[0]) == "–"


def test_positions_at_every_size_are_marked_where_they_differ_from_the_reference(tmp_path):
    study = study_of(tmp_path, KINDS)
    small, large = Size(4, 4), Size(8, 8)

    def judged(one, result):
        refusal = "no grid" if one.pe == "none" else None
        far = (
            {} if refusal else {"val_accuracy": 50.0 + one.seed + (10.0 if one.pe == "rope-mixed" else 0.1 * one.seed)}
        )
        return RunAtSizes(
            large, {small: AtSize(small, far, refusal), large: AtSize(large, {"val_accuracy": result.run.score})}
        )

    study = replace(study, sizes=(small, large), at_sizes={one: judged(one, r) for one, r in study.results.items()})
    across = tables.across_sizes(study)
    assert across.headings == ["join", "positions", "4x4", "8x8 (trained)"]
    cells = {tuple(row[:2]): row[2:] for row in across.rows}
    assert cells["default", "rope-mixed"] == ["61.00 +", "96.17 +"]
    assert cells["default", "learnable"] == ["51.10", "91.00"]
    assert cells["lape", "learnable"][1] == "94.00"  # significant by itself, not after the correction
    assert cells["default", "none"] == [tables.NOT_TAKEN, "61.17 −"]
    assert "Positions side by side" in page.page([page.Section(study, {})])
    assert across.markdown() in tables.markdown([study])
    assert tables.across_sizes(replace(study_of(tmp_path / "b", LOSS), sizes=())).rows == []


# --- Tables


def test_csv_holds_unrounded_numbers(tmp_path):
    study = study_of(tmp_path, LOSS)
    default, lape = csv.DictReader(io.StringIO(tables.as_csv(study)))
    assert float(lape["difference_mean"]) == study.rows[1].difference.mean
    assert float(lape["score_std"]) == study.rows[1].score.std
    assert default["difference_mean"] == default["verdict"] == ""
    assert lape["verdict"] == lape["verdict_corrected"] == "significant (95 % interval below 0)"
    assert float(lape["p"]) == float(lape["p_holm"]) == study.rows[1].difference.p


def test_json_holds_numbers_settings_versions_and_command(tmp_path):
    study = study_of(tmp_path, GAIN)
    content = json.loads(tables.as_json(study))
    assert content["rows"][1]["difference_by_seed"] == {"0": 4.0, "1": 2.0, "2": 3.0}
    assert len(content["runs"]) == 12
    assert content["settings"]["epochs"] == BASE.epochs
    assert not {"join", "pe", "seed"} & content["settings"].keys()
    assert content["command"] == "lape compare --data digits"
    assert content["provenance"] == [
        {"commit": "0123abc", "versions": {"lape": "0.1.0", "torch": "2.15.0"}, "machine": "a machine, 2 cores"}
    ]
    assert content["reference"] == {"way": "default", "pe": "learnable"}
    assert {gap["way"]: gap["points"] for gap in content["gaps"]} == {"default": 10.0, "lape": 12.0}


def test_markdown_has_tables_of_one_width_for_rows_claims_and_analysis(study):
    seen = [part.splitlines() for part in tables.markdown([study]).split("\n\n") if part.startswith("|")]
    (judgement,) = words.judgements([study])
    others = [tables.positions(study), tables.shapes(study), tables.weights(study)]
    expected = [len(study.rows), len(others[0].rows), len(judgement.tested), *(len(one.rows) for one in others[1:])]
    assert [len(lines) - 2 for lines in seen] == [length for length in expected if length]
    assert all(len({line.count("|") for line in lines}) == 1 for lines in seen)
    if judgement.tested:
        assert judgement.summary in tables.markdown([study])


def test_the_terminals_table_fits_eighty_columns_with_every_number_whole(tmp_path):
    study = study_of(tmp_path, GAIN)
    out = io.StringIO()
    Console(file=out, width=80).print(tables.terminal(study))
    for row in study.rows:
        for number in (words.percent(row.score), words.percent(row.third), f"{row.parameters:,}"):
            assert number.replace(" ± ", "±") in out.getvalue()
    assert "…" not in out.getvalue()
    assert "+0.52 to +5.48" in out.getvalue()


# --- Pictures


def test_curves_have_a_panel_per_table_a_line_per_join_and_a_mark_at_one_third(tmp_path):
    figure = plots.learning_curves(study_of(tmp_path, GAIN))
    assert [panel.get_title(loc="left") for panel in figure.axes] == ["learnable", "sinusoidal-1d"]
    lines = {line.get_label(): line.get_xydata() for line in figure.axes[0].get_lines()}
    assert lines["default"].tolist() == [[10, 41], [20, 61], [30, 81], [40, 91]]
    assert lines["lape"].tolist() == [[10, 44], [20, 64], [30, 84], [40, 94]]
    marks = [tuple(line.get_xydata()[0]) for line in figure.axes[0].get_lines() if line.get_marker() == "o"]
    assert marks == [(10, 41), (10, 44)]
    band = figure.axes[0].collections[1].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (42, 96)


def test_one_colour_scale_serves_all_maps(tmp_path):
    maps = made_up_maps(study_of(tmp_path, GAIN))["learnable"]
    figure = plots.correlation_maps(maps)
    images = [image for panel in figure.axes for image in panel.get_images()]
    assert len(images) == 2 * 2 * 3  # kinds of map, joins, layers
    assert {image.get_clim() for image in images} == {(-1, 1)}
    assert [panel.get_ylabel() for panel in figure.axes if panel.get_ylabel()][:2] == ["default", "lape"]
    assert {image.get_array().shape for image in images} == {(15, 15), (3, 5)}


def test_every_way_of_joining_has_a_colour_of_its_own(tmp_path):
    joins = tuple(map(Way, ("default", "shared", "unshared", "lape-sharing", "lape")))
    stand_ins = tuple(Way("lape", norm) for norm in POSITION_NORMS if norm != "layernorm")
    for theme in (plots.LIGHT, plots.DARK):
        ways = (*joins, *stand_ins, Way("lape", start="preserve"))
        assert len(set(plots.hues(ways, theme).values())) == len(ways)


def test_stand_ins_have_a_panel_of_their_own_beside_default_and_lape(tmp_path):
    found = plots.panels(study_of(tmp_path, STAND_INS))
    assert [panel.title for panel in found] == ["learnable", "learnable, in place of LN", "sinusoidal-1d"]
    assert [str(way) for way in found[0].ways] == ["default", "lape"]
    assert [str(way) for way in found[1].ways[:3]] == ["default", "lape", "lape with identity"]
    assert len(found[1].ways) == 2 + 7 + 1
    assert all(line.get_label() in map(str, found[1].ways) for line in _lines(tmp_path / "2", 1))


def _lines(folder, panel):
    axes = plots.learning_curves(study_of(folder, STAND_INS)).axes[panel]
    return [line for line in axes.get_lines() if not line.get_label().startswith("_")]


def test_runs_that_were_not_validated_as_often_are_drawn_all_the_same(tmp_path):
    study = study_of(tmp_path, TIE)
    short = replace(
        study_of(tmp_path / "2", TIE, curve=lambda final: [final]).results[Combination(Way("lape"), "learnable", 0)]
    )
    figure = plots.learning_curves(replace(study, results={**study.results, short.run.combination: short}))
    assert len(figure.axes) == 1


def test_the_weights_of_equation_6_are_drawn_for_each_table_with_the_default_join(tmp_path):
    figure = plots.weights_by_depth(analysed(study_of(tmp_path, GAIN)))
    assert [panel.get_title(loc="left") for panel in figure.axes] == ["learnable", "sinusoidal-1d"]
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].get_lines()}
    assert list(lines["λ₂, positions"]) == pytest.approx([1, 1 / 2, 1 / 3])


# --- The run as it goes


def watched(console, monkeypatch, study):
    """A first run half way, then done; a second one failed; a minute later a third at one quarter."""
    first, second, third = list(study.results)[:3]
    now = iter(range(0, 10_000, 10))
    monkeypatch.setattr(progress, "monotonic", lambda: next(now))

    def at(step):
        return Progress(step // 20, 4, step, 80, 100.0, 1.0, 0.5, "accuracy", 91.25 if step >= 20 else None)

    with progress.Display(console) as display:
        display.begins([], [first, second, third], jobs=2)
        display.moves(first, at(40))
        display.moves(second, at(10))
        if console.is_terminal:
            display.bars.refresh()
        display.ends(first, study.results[first])
        display.ends(second, RunError("the disk is full"))
        for _ in range(5):
            display.moves(third, at(20))


def test_elsewhere_than_in_a_terminal_a_run_is_told_in_plain_lines(tmp_path, monkeypatch):
    out = io.StringIO()
    watched(Console(file=out, width=40), monkeypatch, study_of(tmp_path, GAIN))
    assert "\x1b" not in out.getvalue()
    lines = out.getvalue().splitlines()
    assert lines[0] == "3 runs to train, up to 2 at once."
    assert "default × learnable, seed 0: accuracy 92.00 %" in lines
    assert "default × learnable, seed 1: failed. the disk is full" in lines
    assert any(line.startswith("75% trained, 2 of 3 done, about ") for line in lines)
    assert len(lines) < 9  # not one for every piece of news


def test_in_a_terminal_every_run_at_work_has_a_line(tmp_path, monkeypatch):
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=True, color_system=None)
    watched(console, monkeypatch, study_of(tmp_path, GAIN))
    assert "default × learnable, seed 0" in out.getvalue()
    assert "epoch 3 of 4, accuracy 91.2 %" in out.getvalue()
    assert "epoch 1 of 4" in out.getvalue()  # before the first is done
    assert "0 of 3 done, about" in out.getvalue()


@pytest.mark.parametrize("width", [60, 120])
def test_a_bar_says_what_is_done_before_the_first_step_and_stays_in_its_line(width):
    out = io.StringIO()

    def shown() -> str:
        out.seek(0)
        out.truncate()
        bar.bar.refresh()
        (line,) = [
            line for line in re.sub(r"\x1b\[[\d;?]*[A-Za-z]|\r", "\n", out.getvalue()).splitlines() if line.strip()
        ]
        assert len(line) <= width
        assert "━━" in line or "/30000" in line  # where there are no colours one sees what is done alone
        return line

    console = Console(file=out, width=width, force_terminal=True, color_system=None)
    with Bar(console, compiled=True) as bar:
        assert re.match("reading data, making the .*━ +compiling", shown())
        bar.check(0.25)
        assert re.match("checking the files ━.* 25%", shown())
        bar.check(1.0)
        assert re.match("first step ━.* compiling", shown())
        bar(Progress(0, 300, 1, 30_000, 12345.0, 7500.0, math.nan, "accuracy", None))
        assert re.match("epoch 1/300 .* 1/30000 125:00 left, 12", shown())
        assert "nan" not in shown()
        bar(Progress(0, 300, 299, 30_000, 12345.0, 7500.0, 2.3, "accuracy", None))
        assert re.match("epoch 3/300 .* 299/30000 125:00 left, ", shown())


# --- The page


class Seen(HTMLParser):
    """What a page refers to, what it says, and whether its tags nest."""

    EMPTY = frozenset({"meta", "source", "img", "br"})

    def __init__(self, text):
        super().__init__()
        self.references, self.alts, self.tags, self.text, self.open, self.ids = [], [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.tags.append(tag)
        self.ids += [named["id"]] if "id" in named else []
        self.references += [named[key] for key in ("src", "href", "srcset", "action", "data", "poster") if key in named]
        self.alts += [named.get("alt")] if tag == "img" else []
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@ON_A_PAGE
def test_the_page_refers_to_nothing_outside_itself(shown):
    seen = Seen(shown)
    assert seen.references
    assert all(reference.startswith(("data:image/webp;base64,", "#")) for reference in seen.references)
    within = [reference[1:] for reference in seen.references if reference.startswith("#")]
    assert sorted(within) == sorted(seen.ids)  # all that has an address is in the list of contents, once
    assert within
    assert all(seen.alts)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(seen.tags)
    style = shown[shown.index("<style>") : shown.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style


@ON_A_PAGE
def test_the_page_says_every_number_and_sentence(study, shown):
    said = " ".join("".join(Seen(shown).text).split())
    found = words.findings(study)
    for sentence in (words.question(study), *found.all, *found.remarks, study.command):
        assert sentence in said
    for row in tables.scores(study).rows:
        assert " ".join(row) in " ".join(said.split()) or all(cell in said for cell in row)


def test_the_first_thing_said_is_what_was_compared_then_what_was_found(tmp_path):
    study = study_of(tmp_path, LOSS)
    text = page.page([page.Section(study)])
    body = " ".join("".join(Seen(text[text.index("<main>") : text.index("</main>") + 7]).text).split())
    assert body.startswith(f"{words.question(study)} {words.findings(study).main[0]}")


def test_names_given_by_people_are_escaped(tmp_path):
    bad = replace(BASE, data="<script>alert(1)</script>&", model='"><img src=x>', model_args={"</td><b>": "<i>"})
    study = replace(study_of(tmp_path, LOSS, base=bad), command="lape <compare> && x")
    text = page.page([page.Section(study)])
    seen = Seen(text)
    assert not {"script", "b", "i"} & set(seen.tags)
    assert len(seen.alts) == 2
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&amp;" in text
    assert "<script>alert(1)</script>&" in "".join(seen.text)


def test_everything_is_written_into_the_folder(tmp_path):
    study = study_of(tmp_path / "runs", GAIN)
    where = report.write(study, made_up_maps(study), tmp_path / "out")
    assert where == tmp_path / "out" / "index.html"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "table.md",
        "table.csv",
        "table.json",
        "table.tex",
        "runs.csv",
        "methods.txt",
        "learning-curves.png",
        "differences.png",
        "correlation-learnable.png",
        "correlation-sinusoidal-1d.png",
        "index.html",
    }
    assert (tmp_path / "out" / "learning-curves.png").read_bytes().startswith(b"\x89PNG")


def test_figures_are_written_in_every_format_asked_for_and_the_page_links_to_each_file(tmp_path):
    study = analysed(study_of(tmp_path / "runs", GAIN))
    out = tmp_path / "out"
    report.write(study, {}, out, formats=figures.formats(["svg"]))  # and is replaced
    report.write(study, made_up_maps(study), out, formats=figures.formats(["png", "svg", "pdf"]))
    names = {"learning-curves", "differences", "layer-weights", "correlation-learnable", "correlation-sinusoidal-1d"}
    for suffix, begins in {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF-"}.items():
        assert {path.stem for path in out.glob(f"*.{suffix}")} == names
        assert all(path.read_bytes().startswith(begins) for path in out.glob(f"*.{suffix}"))
    assert b"/Type3" not in (out / "learning-curves.pdf").read_bytes()  # which publishers refuse
    linked = [name for name in Seen((out / "index.html").read_text()).references if not name.startswith(("data", "#"))]
    assert sorted(linked) == sorted(path.name for path in out.iterdir() if path.name != "index.html")
    assert {*out.iterdir()} <= {*report.places(out, formats=("png", "svg", "pdf"))}
    with pytest.raises(UsageError, match=r"'svgz' is not a format of figures\. Did you mean 'svg'"):
        figures.formats(["svgz"])


def test_beside_a_page_of_several_studies_stand_the_files_of_all_and_links_hold_for_any_name(tmp_path):
    studies = [study_of(tmp_path / str(lr), LOSS, replace(BASE, lr=lr)) for lr in (0.5, 0.25)]
    where = tmp_path / "javascript:a #%.html"
    for some in (studies[:1], studies):  # the first page is replaced
        report.write_page(some, {}, [], where, formats=figures.formats(["svg"]))
    beside = {path.name for path in tmp_path.iterdir() if path.is_file()} - {where.name}
    assert {name.removeprefix("javascript:a #%.") for name in beside} == {
        *("md", "tex", "runs.csv", "methods.txt"),
        *(f"study-{number}.{name}.svg" for number in (1, 2) for name in ("learning-curves", "differences")),
    }
    linked = [name for name in Seen(where.read_text()).references if not name.startswith(("data", "#"))]
    assert {unquote(name) for name in linked} == beside
    assert not any(re.search("[:#]|%(?!3A|20|23|25)", name) for name in linked)
    assert {tmp_path / name for name in beside} < {*report.places_beside(where, ["svg"])}
    runs = list(csv.DictReader(where.with_suffix(".runs.csv").open()))
    assert [(run["study"], run["way"], run["seed"]) for run in runs] == [
        (number, way, seed) for number in "12" for way in ("default", "lape") for seed in "012"
    ]
    one = next(iter(studies[1].results.values()))
    assert float(runs[6]["score"]) == one.run.score
    assert float(runs[6]["third_score"]) == one.run.third.score
    assert (runs[6]["folder"], runs[6]["commit"]) == (str(one.folder), "0123abc")


def test_methods_say_what_was_trained_and_how_sure_it_is_and_names_of_others_do_nothing(tmp_path):
    study = study_of(tmp_path / "1", GAIN, replace(BASE, lr=3e-3, warmup_epochs=2, lr_batch=512, recipe="own"))
    said = methods.paragraph(study)
    for part in (
        *("vit_nano_patch2_8 on digits (1,198 training and 599 validation images, 10 classes), from random weights",),
        *("(default and lape)", "(learnable and sinusoidal-1d)", "seeds 0, 1 and 2: 12 runs", "6 epochs", "adamw"),
        *("learning rate of 0.003 for 512 images", "schedule cosine after a warm-up of 2 epochs", "the recipe own"),
        *("95 % intervals are Student’s, mean ± t(0.975, n − 1)", "Holm’s correction for the 2 of", "fewer than 3"),
        *("lape 0.1.0, torch 2.15.0 (commit 0123abc) on a machine, 2 cores",),
    ):
        assert part in said
    assert "Differences" not in methods.paragraph(study_of(tmp_path / "2", NO_DEFAULT))
    bad = replace(BASE, data="<script>\x1b\n\\input{x}%", weights="</blockquote>", optimizer="$a_b&c$")
    hostile = study_of(tmp_path / "3", GAIN, bad)
    assert "\n" not in methods.paragraph(hostile)
    assert "\x1b" not in methods.paragraph(hostile)
    assert methods.paragraph(hostile) in "".join(Seen(page.page([page.Section(hostile)])).text)
    tex = tables.latex([hostile])
    assert r"\textless{}script\textgreater{}\textbackslash{}x1b\textbackslash{}n\textbackslash{}input\{x\}\%" in tex
    assert tex.count(r"\begin{table}") == tex.count(r"\end{table}") == 2
    assert "\\input" not in tex


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
MEASURE = "<script>document.title = [document.documentElement.scrollWidth, innerWidth, document.images.length,\
 [...document.images].filter(i => i.naturalWidth > 0).length,\
 performance.getEntriesByType('resource').filter(r => !r.name.startsWith('data:')).length].join(' ')</script></body>"


def filed_cost(folder):
    contenders = [
        {
            "name": name,
            "parameters": 1000,
            "flops": 10**9,
            "training_bytes": 2**20,
            "training": [1.0, 1.1],
            "inference": [0.5, 0.5],
        }
        for name in ("untouched", "and again", "lape")
    ]
    (folder / "cost.json").write_text(json.dumps({"explanation": "tiny, 2 rounds", "costs": contenders}))
    return cost.filed(folder / "cost.json")


@pytest.fixture(scope="module")
def whole_page(tmp_path_factory):
    """Everything that a page can hold: two studies, stand-ins, deep maps, long names, costs, and what was left out."""
    folder = tmp_path_factory.mktemp("studies")
    long_name = replace(BASE, model="a_model_with_a_name_" * 6)
    (stand_ins,) = sections(study_of(folder / "1", STAND_INS, long_name))
    (deep,) = sections(study_of(folder / "2", LOSS, replace(long_name, lr=1.0)), depth=12)
    return page.page(
        [stand_ins, deep], [filed_cost(folder)], {folder / ("a_folder_" * 12): "its result.json is broken"}
    )


@pytest.mark.parametrize("width", [380, 1200], ids=lambda width: f"{width}px-{'chromium' if BROWSER else 'NO-BROWSER'}")
def test_in_a_browser_the_page_is_no_wider_than_the_screen_and_asks_for_nothing(width, whole_page, tmp_path):
    """The page is shown in a frame of that width: headless windows cannot be as narrow as a phone."""
    if BROWSER is None:
        assert not os.environ.get("CI"), "No chromium or chrome on PATH, and CI must measure the page in one."
        pytest.xfail("no chromium or chrome on PATH: the page was not measured")
    (tmp_path / "page.html").write_text(whole_page.replace("</body>", MEASURE), encoding="utf-8")
    (tmp_path / "frame.html").write_text(
        f'<iframe src="page.html" style="width: {width}px; height: 800px; border: 0" onload="'
        'document.title = this.contentDocument.title"></iframe>'
    )
    told = subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom"),
            *("--enable-logging=stderr", (tmp_path / "frame.html").as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    title = re.search(r"<title>(\d+) (\d+) (\d+) (\d+) (\d+)</title>", told.stdout)
    assert title, told.stdout[-2000:]
    scroll, inner, images, loaded, requests = map(int, title.groups())
    assert inner == width
    assert scroll <= width
    assert images == loaded == 6 + 4  # differences, curves and weights of each, and the maps of each panel
    assert requests == 0
    assert "CONSOLE" not in told.stderr


# --- A page of several studies


def test_each_study_has_a_section_that_says_what_sets_it_apart(tmp_path):
    studies = [study_of(tmp_path / str(lr), LOSS, replace(BASE, lr=lr)) for lr in (0.5, 0.25)]
    said = " ".join("".join(Seen(page.page(list(map(page.Section, studies)))).text).split())
    assert "12 finished runs in 2 studies" in said
    assert "Unlike the other studies: lr 0.5." in said
    assert "Unlike the other studies: lr 0.25." in said


def test_one_study_is_set_apart_from_nothing(tmp_path):
    study = study_of(tmp_path, STAND_INS)
    assert words.apart([study]) == [""]
    assert "Unlike" not in page.page([page.Section(study)])


def test_what_was_left_out_and_what_was_not_analysed_is_said(tmp_path):
    pair = (Way("default"), "learnable")
    study = replace(
        study_of(tmp_path, LOSS),
        left_out={"all would be alike.": [(Way("unshared"), "sinusoidal-1d")]},
        not_analysed={"last.pt cannot be read.": [pair]},
    )
    said = " ".join("".join(Seen(page.page([page.Section(study)], (), {tmp_path: "is no result"})).text).split())
    assert "Left out: unshared × sinusoidal-1d. all would be alike." in said
    assert "Not analysed: default × learnable. last.pt cannot be read." in said
    assert f"{tmp_path}: is no result" in said


def test_filed_costs_are_a_table_and_a_broken_file_is_said(tmp_path):
    said = " ".join(Seen(page.page([page.Section(study_of(tmp_path / "runs", LOSS))], [filed_cost(tmp_path)])).text)
    assert all(cell in said for line in cost.table(filed_cost(tmp_path).costs).rows for cell in line)
    assert "tiny, 2 rounds" in said
    for broken in ("{", "[]", '{"explanation": "", "costs": []}', '{"explanation": "", "costs": [{"name": 1}]}'):
        (tmp_path / "cost.json").write_text(broken)
        with pytest.raises(RunError, match="is no cost"):
            cost.filed(tmp_path / "cost.json")


# --- Beside the paper


def test_every_row_of_tables_7_and_8_is_found_by_its_way_and_table():
    """Against the paper's numbers themselves, which the recipes are tested on, too."""
    numbers = json.loads((Path(__file__).parent / "paper_results.json").read_text())
    expected = {
        **{(Way(join), pe): top1 for _, pe, join, _, top1 in numbers["table7_joining_methods"]["rows"]},
        **{
            (Way("default") if norm == "default" else Way("lape", norm), "learnable"): top1
            for _, norm, top1 in numbers["table8_ln_decomposition"]["rows"]
        },
    }
    assert paper.joining() == expected


def beside(study):
    headings, rows = tables.scores(study).headings, tables.scores(study).rows
    place = next(place for place, heading in enumerate(headings) if "paper" in heading)
    return headings[place], {row[0]: row[place] for row in rows if row[1] == "learnable"}


def test_runs_of_no_recipe_stand_beside_deit_tiny_and_its_differences(tmp_path):
    heading, numbers = beside(study_of(tmp_path, STAND_INS))
    assert heading == "paper’s DeiT-Ti, %"
    assert numbers["default"] == "71.54"
    assert numbers["lape"] == "73.11 (+1.57)"
    assert numbers["lape with identity"] == "70.67 (−0.87)"
    assert numbers["lape, preserve"] == "–"  # not the paper's


def test_runs_of_a_recipe_stand_beside_its_own_numbers_unless_something_was_changed(tmp_path):
    cct = recipes.load("cifar100/cct_7_3x1_32").experiment()
    heading, numbers = beside(study_of(tmp_path / "1", LOSS, cct))
    assert heading == "paper, %"
    assert numbers == {"default": "80.928", "lape": "81.986 (+1.06)"}
    heading, _ = beside(study_of(tmp_path / "2", LOSS, replace(cct, epochs=2)))
    assert heading == "paper’s DeiT-Ti, %"


def test_other_tables_and_measures_have_no_number_of_the_papers(tmp_path):
    none = {(join, "none"): {0: 1.0} for join in ("default",)}
    assert not any("paper" in heading for heading in tables.scores(study_of(tmp_path, none)).headings)


# --- Claims, in the page and in the terminal


def test_the_page_shows_the_claims_that_are_tested_and_lists_the_others(tmp_path):
    study = analysed(study_of(tmp_path, GAIN))
    text = page.page([page.Section(study)])
    said = " ".join("".join(Seen(text).text).split())
    (judgement,) = words.judgements([study])
    assert judgement.tested
    assert judgement.untested
    for found in judgement.tested:
        assert " ".join(words.claim_cells(found, judgement)[0].split()) in said
    assert f"Not tested by these runs: {len(judgement.untested)} claims" in said
    assert judgement.summary in said
    name = '<th scope="row">LaPE is above the default join (learnable)</th>'
    assert f'<tr class="holds corrected-undecided">{name}<td>holds</td><td>undecided</td>' in text
    assert all(sentence in said for sentence in (*judgement.reasons, *judgement.counted))


def test_the_gain_in_the_paper_and_in_other_hands_stands_beside_the_claim(tmp_path):
    """DeiT-Ti for a model of no paper; the model's own where others trained it too; none by another measure."""
    first = "LaPE is above the default join (learnable)"
    for place, (model, gains) in enumerate(
        {"vit_nano_patch4_28": ["+1.57", "+0.80"], "deit_small_patch16_224": ["+1.57", "+0.58"]}.items()
    ):
        study = study_of(tmp_path / str(place), GAIN, replace(BASE, model=model))
        table = tables.claims(words.judgements([study])[0])
        whose = [name for name in table.headings if "DeiT" in name]
        assert [name.split(" (")[0] for name in whose] == ["in the paper", "in other hands"]
        cells = dict(zip(table.headings, next(row for row in table.rows if row[0] == first), strict=True))
        assert [cells[name] for name in whose] == gains
    assert paper.REPLICATIONS["upernet_vit_adapter_tiny"].scores[Way("mpvg"), "learnable"] == 41.69
    content = json.loads(tables.as_json(study))["claims"][0]
    assert content["published"] == pytest.approx({"in the paper (DeiT-Ti)": 1.57, "in other hands (DeiT-S)": 0.58})


def test_a_claim_is_counted_once(tmp_path):
    (judgement,) = words.judgements([analysed(study_of(tmp_path, STAND_INS))])
    assert len(judgement.tested) + len(judgement.untested) == len(CLAIMS)
    for verdicts in judgement.summary.split("With Holm"):  # plain, and corrected
        counted = re.findall(r"(?:holds|not hold|undecided|no verdict): (\d+)", verdicts)
        assert sum(map(int, counted)) == len(judgement.tested)


def test_without_a_claim_tested_this_is_said(tmp_path):
    study = study_of(tmp_path, {("shared", "none"): {0: 1.0}})
    assert words.judgements([study])[0].summary == f"These runs test none of {len(CLAIMS)} claims of the paper."
    assert "in these runs" not in page.page([page.Section(study)])


def test_the_claims_fit_eighty_columns(tmp_path):
    out = io.StringIO()
    Console(file=out, width=80).print(tables.terminal_of_claims([analysed(study_of(tmp_path, STAND_INS))]))
    assert "LaPE is above the default join (learnable)" in " ".join(out.getvalue().split())
    assert "+0.52 to +5.48" in out.getvalue()
    assert "…" not in out.getvalue()


def test_stand_ins_fit_eighty_columns(tmp_path):
    study = study_of(tmp_path, STAND_INS)
    out = io.StringIO()
    Console(file=out, width=80).print(tables.terminal(study))
    assert "…" not in out.getvalue()
    for row in study.rows:
        assert words.percent(row.score).replace(" ± ", "±") in out.getvalue()
        assert str(row.way).split()[-1] in out.getvalue()


def test_what_is_known_of_lape_under_pooling_is_said_of_models_that_pool(tmp_path: Path) -> None:
    study = study_of(tmp_path, GAIN)
    assert not any("mpvg" in remark for remark in words.findings(study).remarks)
    for result in study.results.values():
        result.record["pools_patches"] = True
    (remark,) = (remark for remark in words.findings(study).remarks if "mpvg" in remark)
    assert "73.51 % with mpvg" in remark
    only_default = replace(study, results={one: run for one, run in study.results.items() if one.way.join == "default"})
    assert not any("mpvg" in remark for remark in words.findings(only_default).remarks)
