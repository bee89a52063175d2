"""The report says what the numbers say, whichever way they go, and its page needs nothing but itself."""

import csv
import io
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from made_up_runs import BASE, comparison_of
from rich.console import Console

from lape import report
from lape.analysis import Correlation
from lape.errors import RunError
from lape.report import page, plots, progress, tables, words
from lape.statistics import Combination
from lape.training import Progress

GAIN = {  # lape minus default: 4, 2, 3 with a half width of 4.303/√3 = 2.484; and 1, 1, 1
    ("default", "learnable"): {0: 92.0, 1: 90.0, 2: 91.0},
    ("lape", "learnable"): {0: 96.0, 1: 92.0, 2: 94.0},
    ("default", "sinusoidal-1d"): {0: 80.0, 1: 81.0, 2: 82.0},
    ("lape", "sinusoidal-1d"): {0: 81.0, 1: 82.0, 2: 83.0},
}
LOSS = {("default", "learnable"): {0: 95.0, 1: 96.0, 2: 97.0}, ("lape", "learnable"): {0: 90.0, 1: 91.5, 2: 92.0}}
TIE = {("default", "learnable"): {0: 95.0, 1: 96.0}, ("lape", "learnable"): {0: 95.0, 1: 96.0}}
ONE_SEED = {("default", "learnable"): {0: 90.0}, ("lape", "learnable"): {0: 93.0}}
THREE_JOINS = {**LOSS, ("shared", "learnable"): {0: 95.0, 1: 96.0, 2: 97.5}}
NO_DEFAULT = {("shared", "learnable"): {0: 95.0, 1: 96.0}, ("lape", "learnable"): {0: 95.0, 1: 96.0}}
CASES = {
    "gain": GAIN,
    "loss": LOSS,
    "tie": TIE,
    "one-seed": ONE_SEED,
    "three-joins": THREE_JOINS,
    "no-default": NO_DEFAULT,
}


def made_up_maps(comparison, depth=3, grid=(3, 5)):
    patches = grid[0] * grid[1]
    maps = torch.linspace(-1, 1, patches).outer(torch.linspace(-1, 1, patches)).double().expand(depth, -1, -1)
    return {pe: plots.Maps(0, {join: Correlation(maps, grid) for join in comparison.joins}) for pe in comparison.pes}


@pytest.fixture(params=CASES)
def comparison(request, tmp_path):
    return comparison_of(tmp_path, CASES[request.param])


# --- Words


def test_a_gain_is_told_with_its_interval(tmp_path):
    found = words.findings(comparison_of(tmp_path, GAIN))
    assert found.main == (
        "With the table learnable, lape differs from default by +3.00 points (94.00 % against 91.00 %; 95 % interval "
        "+0.52 to +5.48, 3 pairs of runs): above zero.",
        "With the table sinusoidal-1d, lape differs from default by +1.00 points (82.00 % against 81.00 %; 95 % "
        "interval +1.00 to +1.00, 3 pairs of runs): above zero.",
    )
    assert found.gap == (
        "From the worst table to the best, mean accuracy rises by 10.00 points for default (sinusoidal-1d to "
        "learnable) and 12.00 points for lape (sinusoidal-1d to learnable)."
    )


def test_a_loss_is_told_in_the_same_words(tmp_path):
    """Differences -5, -4.5, -5: mean -29/6, s = 1/√12, half width 4.303/6."""
    (sentence,) = words.findings(comparison_of(tmp_path, LOSS)).main
    assert sentence == (
        "With the table learnable, lape differs from default by −4.83 points (91.17 % against 96.00 %; 95 % interval "
        "−5.55 to −4.12, 3 pairs of runs): below zero."
    )


def test_a_tie_is_not_decided(tmp_path):
    (sentence,) = words.findings(comparison_of(tmp_path, TIE)).main
    assert "by 0.00 points" in sentence
    assert sentence.endswith("95 % interval 0.00 to 0.00, 2 pairs of runs): not told from zero.")


def test_one_seed_has_no_interval_and_says_so(tmp_path):
    found = words.findings(comparison_of(tmp_path, ONE_SEED))
    assert "95 % interval" not in found.main[0]
    assert "gives no interval and decides nothing" in found.main[0]
    assert any("One seed gives no spread and no interval" in remark for remark in found.remarks)


def test_lape_stands_at_the_top_and_the_others_in_the_table(tmp_path):
    comparison = comparison_of(tmp_path, THREE_JOINS)
    assert [", lape differs" in sentence for sentence in words.findings(comparison).main] == [True]
    assert "+0.17 | −0.55 to +0.88" in tables.markdown(comparison)  # shared: 0, 0, 0.5


def test_without_the_default_join_nothing_is_differed(tmp_path):
    found = words.findings(comparison_of(tmp_path, NO_DEFAULT))
    assert found.main == ()
    assert any("default was not trained" in remark for remark in found.remarks)


def test_a_failed_run_is_named_and_its_pair_left_out(tmp_path):
    finals = {("default", "learnable"): {0: 90.0, 1: 91.0, 2: 92.0}, ("lape", "learnable"): {0: 91.0, 2: 93.5}}
    failures = {Combination("lape", "learnable", 1): RunError("the loss is nan at step 7")}
    comparison = comparison_of(tmp_path, finals, failures=failures)
    remarks = " ".join(words.findings(comparison).remarks)
    assert "lape × learnable, seed 1 (the loss is nan at step 7)" in remarks
    assert "paired with default without seed 1" in remarks
    assert "2 pairs of runs" in words.findings(comparison).main[0]
    with pytest.raises(RunError, match="1 of 6 runs failed"):
        comparison.raise_failures()


@pytest.mark.parametrize(
    ("points", "text"), [(0.004, "0.00"), (-0.004, "0.00"), (-0.006, "−0.01"), (1.0, "+1.00"), (-12.345, "−12.35")]
)
def test_signs(points, text):
    assert words.signed(points) == text


# --- Tables


def test_csv_holds_unrounded_numbers(tmp_path):
    comparison = comparison_of(tmp_path, LOSS)
    default, lape = csv.DictReader(io.StringIO(tables.as_csv(comparison)))
    assert float(lape["difference_mean"]) == comparison.rows[1].difference.mean
    assert float(lape["score_std"]) == comparison.rows[1].score.std
    assert default["difference_mean"] == default["verdict"] == ""
    assert lape["verdict"] == "below zero"


def test_json_holds_numbers_settings_versions_and_command(tmp_path):
    comparison = comparison_of(tmp_path, GAIN)
    content = json.loads(tables.as_json(comparison))
    assert content["rows"][1]["difference_by_seed"] == {"0": 4.0, "1": 2.0, "2": 3.0}
    assert len(content["runs"]) == 12
    assert content["settings"]["epochs"] == BASE.epochs
    assert not {"join", "pe", "seed"} & content["settings"].keys()
    assert content["command"] == "lape compare --data digits"
    assert content["provenance"] == [
        {"commit": "0123abc", "versions": {"lape": "0.1.0", "torch": "2.15.0"}, "machine": "a machine, 2 cores"}
    ]
    assert {gap["join"]: gap["points"] for gap in content["gaps"]} == {"default": 10.0, "lape": 12.0}


def test_markdown_is_a_table_of_one_width(comparison):
    lines = [line for line in tables.markdown(comparison).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(comparison.rows)
    assert len({line.count("|") for line in lines}) == 1


def test_the_terminals_table_fits_eighty_columns_with_every_number_whole(tmp_path):
    comparison = comparison_of(tmp_path, GAIN)
    out = io.StringIO()
    Console(file=out, width=80).print(tables.terminal(comparison))
    for row in comparison.rows:
        for number in (words.percent(row.score), words.percent(row.third), f"{row.parameters:,}"):
            assert number.replace(" ± ", "±") in out.getvalue()
    assert "…" not in out.getvalue()
    assert "+0.52 to +5.48" in out.getvalue()


# --- Pictures


def test_curves_have_a_panel_per_table_a_line_per_join_and_a_mark_at_one_third(tmp_path):
    figure = plots.learning_curves(comparison_of(tmp_path, GAIN))
    assert [panel.get_title(loc="left") for panel in figure.axes] == ["learnable", "sinusoidal-1d"]
    lines = {line.get_label(): line.get_xydata() for line in figure.axes[0].get_lines()}
    assert lines["default"].tolist() == [[10, 41], [20, 61], [30, 81], [40, 91]]
    assert lines["lape"].tolist() == [[10, 44], [20, 64], [30, 84], [40, 94]]
    marks = [tuple(line.get_xydata()[0]) for line in figure.axes[0].get_lines() if line.get_marker() == "o"]
    assert marks == [(10, 41), (10, 44)]
    band = figure.axes[0].collections[1].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (42, 96)


def test_one_colour_scale_serves_all_maps(tmp_path):
    maps = made_up_maps(comparison_of(tmp_path, GAIN))["learnable"]
    figure = plots.correlation_maps(maps)
    images = [image for panel in figure.axes for image in panel.get_images()]
    assert len(images) == 2 * 2 * 3  # kinds of map, joins, layers
    assert {image.get_clim() for image in images} == {(-1, 1)}
    assert [panel.get_ylabel() for panel in figure.axes if panel.get_ylabel()][:2] == ["default", "lape"]
    assert {image.get_array().shape for image in images} == {(15, 15), (3, 5)}


def test_every_join_has_a_colour_of_its_own():
    joins = ("default", "shared", "unshared", "lape-sharing", "lape")
    for theme in (plots.LIGHT, plots.DARK):
        assert len(set(plots.hues(joins, theme).values())) == len(joins)


# --- The run as it goes


def watched(console, monkeypatch, comparison):
    """A first run half way, then done; a second one failed; a minute later a third at one quarter."""
    first, second, third = list(comparison.results)[:3]
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
        display.ends(first, comparison.results[first])
        display.ends(second, RunError("the disk is full"))
        for _ in range(5):
            display.moves(third, at(20))


def test_elsewhere_than_in_a_terminal_a_run_is_told_in_plain_lines(tmp_path, monkeypatch):
    out = io.StringIO()
    watched(Console(file=out, width=40), monkeypatch, comparison_of(tmp_path, GAIN))
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
    watched(console, monkeypatch, comparison_of(tmp_path, GAIN))
    assert "default × learnable, seed 0" in out.getvalue()
    assert "epoch 2 of 4, accuracy 91.2 %" in out.getvalue()
    assert "0 of 3 done, about" in out.getvalue()


# --- The page


class Seen(HTMLParser):
    """What a page refers to, what it says, and whether its tags nest."""

    EMPTY = frozenset({"meta", "source", "img", "br"})

    def __init__(self, text):
        super().__init__()
        self.references, self.alts, self.tags, self.text, self.open = [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.tags.append(tag)
        self.references += [named[key] for key in ("src", "href", "srcset", "action", "data", "poster") if key in named]
        self.alts += [named.get("alt")] if tag == "img" else []
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_refers_to_nothing_outside_itself(comparison):
    text = page.page(comparison, made_up_maps(comparison))
    seen = Seen(text)
    assert seen.references
    assert all(reference.startswith("data:image/png;base64,") for reference in seen.references)
    assert all(seen.alts)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(seen.tags)
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style


def test_the_page_says_every_number_and_sentence(comparison):
    said = " ".join("".join(Seen(page.page(comparison, made_up_maps(comparison))).text).split())
    found = words.findings(comparison)
    for sentence in (words.question(comparison), *found.main, *found.remarks, comparison.command):
        assert sentence in said
    for row in tables.cells(comparison)[1]:
        assert " ".join(row) in " ".join(said.split()) or all(cell in said for cell in row)


def test_the_first_thing_said_is_what_was_compared_then_what_was_found(tmp_path):
    comparison = comparison_of(tmp_path, LOSS)
    text = page.page(comparison, {})
    body = " ".join("".join(Seen(text[text.index("<main>") : text.index("</main>") + 7]).text).split())
    assert body.startswith(f"{words.question(comparison)} {words.findings(comparison).main[0]}")


def test_names_given_by_people_are_escaped(tmp_path):
    bad = replace(BASE, data="<script>alert(1)</script>&", model='"><img src=x>', model_args={"</td><b>": "<i>"})
    comparison = replace(comparison_of(tmp_path, LOSS, base=bad), command="lape <compare> && x")
    text = page.page(comparison, {})
    seen = Seen(text)
    assert not {"script", "b", "i"} & set(seen.tags)
    assert len(seen.alts) == 2
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&amp;" in text
    assert "<script>alert(1)</script>&" in "".join(seen.text)


def test_everything_is_written_into_the_folder(tmp_path):
    comparison = comparison_of(tmp_path / "runs", GAIN)
    where = report.write(comparison, made_up_maps(comparison), tmp_path / "out")
    assert where == tmp_path / "out" / "index.html"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "table.md",
        "table.csv",
        "table.json",
        "learning-curves.png",
        "differences.png",
        "correlation-learnable.png",
        "correlation-sinusoidal-1d.png",
        "index.html",
    }
    assert (tmp_path / "out" / "learning-curves.png").read_bytes().startswith(b"\x89PNG")


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
MEASURE = "<script>document.title = [document.documentElement.scrollWidth, innerWidth, document.images.length,\
 [...document.images].filter(i => i.naturalWidth > 0).length].join(' ')</script></body>"


@pytest.mark.parametrize("width", [390, 1200], ids=lambda width: f"{width}px-{'chromium' if BROWSER else 'NO-BROWSER'}")
def test_in_a_browser_the_page_is_no_wider_than_the_screen(width, tmp_path):
    """The page is shown in a frame of that width: headless windows cannot be as narrow as a phone."""
    if BROWSER is None:
        assert not os.environ.get("CI"), "No chromium or chrome on PATH, and CI must measure the page in one."
        pytest.xfail("no chromium or chrome on PATH: the page was not measured")
    comparison = comparison_of(tmp_path / "runs", GAIN, base=replace(BASE, model="a_model_with_a_name_" * 6))
    text = page.page(comparison, made_up_maps(comparison, depth=12)).replace("</body>", MEASURE)
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    (tmp_path / "frame.html").write_text(
        f'<iframe src="page.html" style="width: {width}px; height: 800px; border: 0" onload="'
        'document.title = this.contentDocument.title"></iframe>'
    )
    said = subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom"),
            (tmp_path / "frame.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    title = re.search(r"<title>(\d+) (\d+) (\d+) (\d+)</title>", said)
    assert title, said[-2000:]
    scroll, inner, images, loaded = map(int, title.groups())
    assert inner == width
    assert scroll <= width
    assert images == loaded == 4
