"""Verdicts err as seldom as they say, and say nothing where there is nothing to say."""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_up_runs import CONTENTS, analysis_of, study_of
from scipy.stats import ttest_1samp

from lape.method import POSITION_NORMS
from lape.report import tables, words
from lape.studies.claims import CLAIMS, MARGIN, TABLES, Outcome, judged
from lape.studies.inference import fisher, holm, seeds_to_decide, student
from lape.studies.statistics import Chance, Combination, FinishedRun, Point, Verdict, Way, difference
from lape.studies.study import Result, Study, read_result

LAPE, DEFAULT, SHARING = Way("lape"), Way("default"), Way("lape-sharing")
SIDES = [
    *((Way(join), pe) for join in ("default", "lape", "shared", "lape-sharing") for pe in TABLES),
    (Way("unshared"), "learnable"),
    *((Way("lape", norm), "learnable") for norm in POSITION_NORMS if norm != "layernorm"),
]
LAYERS = 6
CHANCE, FOLDER = Chance(10.0, 10_000), Path()


# --- How often verdicts err


def page_of(generator, seeds, gains, wandering):
    """A study of every way and table: seeds share a level, runs have noise of their own, and ways `gains` points."""
    level = generator.normal(0, 1, seeds)
    results, analyses = {}, {}
    for way, pe in SIDES:
        lower = 5.0 * (pe == "sinusoidal-1d")  # far below learnable, under every join
        scores = 80 - lower + gains(way, pe) + level + generator.normal(0, 0.5, (2, seeds))
        for seed, (third, final) in enumerate(scores.round(2).T.tolist()):
            one = Combination(way, pe, seed)
            curve = (Point(1, 10, third), Point(3, 30, final))
            results[one] = Result(FinishedRun(one, "accuracy", final, curve, 100, 0.01, CHANCE), FOLDER, {})
            if way in (DEFAULT, LAPE):
                noise = generator.normal(0, 1, (2, LAYERS))
                half, lambda2 = noise.cumsum(axis=1) if wandering else noise
                shape = generator.normal(0, 0.05, 2)
                analyses[one] = analysis_of(0.5 + shape[0], 0.5 + shape[1], half.tolist(), lambda2.tolist())
    return Study(results, "", analyses=analyses)


def at_the_bounds(way, pe):
    """No way is better than another, and LaPE is below LaPE (sharing) by just as much as is not allowed."""
    return MARGIN if way == SHARING else 0.0


def test_without_an_effect_fewer_than_one_verdict_in_twenty_is_wrong():
    """A thousand pages without any effect: each claim for itself, and with Holm's correction all of a page together.

    Half of them have three seeds and layers that know nothing of one another, half five seeds and layers that follow
    one another, as in a model.
    """
    generator, pages = np.random.default_rng(0), 1000
    holds, fails, plain_pages, corrected_pages = Counter(), Counter(), 0, 0
    for page in range(pages):
        seeds, wandering = ((3, False), (5, True))[page % 2]
        (findings,) = judged([page_of(generator, seeds, at_the_bounds, wandering)])
        holds.update(one.claim.sentence for one in findings if one.outcome is Outcome.HOLDS)
        fails.update(one.claim.sentence for one in findings if one.outcome is Outcome.FAILS)
        plain_pages += any(one.outcome is Outcome.HOLDS for one in findings)
        corrected_pages += any(one.corrected is Outcome.HOLDS for one in findings)
    assert max(holds.values()) / pages < 0.05
    assert max(fails.values()) / pages < 0.05
    assert corrected_pages / pages < 0.05
    assert plain_pages / pages > 0.15  # what the correction is for


def test_effects_are_found():
    def gains(way, pe):
        normed = way.join == "lape" and "norm" in way.pe_norm
        return 3.0 * (normed + (way == LAPE) + (way == LAPE and pe == "sinusoidal-1d"))

    generator, found = np.random.default_rng(1), Counter()
    for _ in range(20):
        study = page_of(generator, 5, gains, False)
        slopes = np.linspace(0, 1, LAYERS)
        for one in study.analyses:
            falls, grows = (slopes + generator.normal(0, 0.05, (2, LAYERS))).tolist()
            apart = 0.2 * (one.way == LAPE) + generator.normal(0, 0.02)
            study.analyses[one] = analysis_of(apart, apart, grows, [-each for each in falls])
        (findings,) = judged([study])
        found.update(one.claim.sentence for one in findings if one.corrected is Outcome.HOLDS)
    assert {claim.sentence for claim in CLAIMS} == {sentence for sentence, times in found.items() if times > 15}


# --- Where there is no verdict


def learnt(score, chance):
    return FinishedRun(Combination(LAPE, "learnable", 0), "", score, (Point(1, 1, score),), 1, 1.0, chance).learnt


@pytest.mark.parametrize(
    ("score", "chance", "expected"),
    [
        (10.18, Chance(10.0, 10_000), False),
        (10.59, CHANCE, False),  # of 10,000 images, the lower end is 9.99 %
        (10.60, CHANCE, True),
        (12.0, Chance(10.0, 100), False),
        (3.0, Chance(10.0, 10_000), False),
        (0.0, Chance(10.0, 100), False),
        (100.0, Chance(100.0, 100), False),  # one class
        (0.0, Chance(0.0, None), False),
        (0.1, Chance(0.0, None), True),
        (90.0, None, False),
    ],
)
def test_a_run_has_learnt_where_the_interval_of_its_score_is_above_chance(score, chance, expected):
    assert learnt(score, chance) is expected


def test_models_that_learnt_nothing_support_no_claim(tmp_path):
    """All at 10.18 % of ten classes, and λ2 a little smaller in each layer."""
    finals = {(way, pe): {seed: 10.18 + 0.17 * seed for seed in range(3)} for way, pe in SIDES}
    study = study_of(tmp_path, finals, curve=lambda final: [10.0, 10.0, final])
    falling = [0.0350, 0.0346, 0.0342, 0.0338, 0.0334, 0.0330]
    analyses = {one: analysis_of(0.5 + 0.01 * one.seed, 0.1, falling, falling) for one in study.results}
    study = replace(study, analyses=analyses)
    (judgement,) = words.judgements([study])
    assert {one.outcome for one in judgement.findings} == {Outcome.NO_VERDICT}
    assert {one.corrected for one in judgement.findings} == {Outcome.NO_VERDICT}
    assert all("at chance: " in reason for reason in judgement.reasons)
    assert "(no verdict: 27)" in judgement.summary
    (counted,) = judgement.counted
    assert counted.startswith("Counted, not estimated: LaPE adds exactly 2·D parameters a layer (Table 5): not so")
    (sentence, *_) = words.findings(study).main
    assert "no verdict, at chance: lape × learnable, seed 0 (10.18 %, guessing 10.00 %), and 5 more." in sentence
    assert {row.difference.verdict for row in study.rows if row.difference} == {Verdict.NONE}
    assert "holds" not in tables.as_json(study) + tables.markdown([study]).split("A claim holds")[0]


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        ([91.0], "too few pairs of runs: 1, of at least 3"),
        ([91.0, 92.0], "too few pairs of runs: 2, of at least 3"),
        ([91.0, 91.0, 91.0, 91.00001], "no variance: all 4 pairs of runs differ by the same"),
        ([90.0, 90.0, 90.0], "no variance: all 3 pairs of runs differ by the same"),
        ([91.0, math.nan, 92.0, 91.5], "no finite number for seed 1"),
        ([91.0, 91.5, 92.0, math.inf], "no finite number for seed 3"),
    ],
)
def test_what_is_missing_or_alike_gives_no_verdict(scores, reason):
    found = difference(dict(enumerate(scores)), dict.fromkeys(range(len(scores)), 90.0))
    assert (found.verdict, found.corrected, found.p, found.no_verdict) == (Verdict.NONE, Verdict.NONE, None, reason)


def test_a_run_that_does_not_say_what_chance_is_gives_no_verdict(tmp_path):
    finals = {("default", "learnable"): {0: 80.0, 1: 81.0, 2: 82.0}, ("lape", "learnable"): {0: 85.0, 1: 86.1, 2: 87.0}}
    study = study_of(tmp_path, finals)
    unknown = {one: replace(result, run=replace(result.run, chance=None)) for one, result in study.results.items()}
    (judgement,) = words.judgements([replace(study, results=unknown)])
    assert {one.outcome for one in judgement.tested} == {Outcome.NO_VERDICT}
    assert all("does not say how many classes and validation images" in reason for reason in judgement.reasons)


@pytest.mark.parametrize(
    ("half_distance", "reason"),
    [
        ([1.0, 2.0, 3.0], "too few layers for the interval of a rank correlation: 3, of at least 4"),
        ([1.0, 1.001, 1.002, 1.003, 1.004, 1.005], "a change of 0.005 from the first layer to the last"),
        ([1.0, 2.0, 3.0, 4.0, 5.0, math.inf], None),
    ],
)
def test_a_trend_over_the_layers_exceeds_what_seeds_differ_by(half_distance, reason, tmp_path):
    study = study_of(tmp_path, {("lape", "learnable"): {0: 80.0, 1: 81.0, 2: 82.0}})
    layers = {0: half_distance, 1: [0.99 * each for each in half_distance], 2: half_distance}
    study = replace(study, analyses={one: analysis_of(half_distance=layers[one.seed]) for one in study.results})
    (one,) = (some for some in judged([study])[0] if "reaches farther" in some.claim.sentence)
    assert one.outcome is (Outcome.HOLDS if reason is None else Outcome.NO_VERDICT)
    assert (one.difference.no_verdict or "").startswith(reason or "")
    if reason is None:
        assert 0 < one.difference.interval[0] < one.difference.mean < one.difference.interval[1] < 1


@pytest.mark.parametrize("score", [-1.0, 100.5])
def test_a_score_that_is_no_percentage_is_refused(score, tmp_path):
    with pytest.raises(Exception, match="is no percentage"):
        study_of(tmp_path, {("lape", "learnable"): {0: score}})


@pytest.mark.parametrize(
    "contents",
    [
        *({}, {"classes": 10}, {**CONTENTS, "classes": []}, {**CONTENTS, "validation": {}}),
        {**CONTENTS, "train": {"pictures": "many"}},  # the methods paragraph counts them
    ],
)
def test_contents_that_are_none_are_refused(contents, tmp_path):
    (result,) = study_of(tmp_path, {("lape", "learnable"): {0: 50.0}}).results.values()
    file = result.folder / "result.json"
    file.write_text(json.dumps({**result.record, "contents": contents}))
    with pytest.raises(Exception, match="is not the result of a finished run"):
        read_result(result.folder)


# --- The numbers


def test_students_interval_and_p_are_scipys():
    values = [0.9, 0.9, 0.5, -0.2, 1.3]
    for bound in (0.0, -MARGIN):
        found, known = student(values, bound), ttest_1samp(values, bound)
        assert found.p == pytest.approx(known.pvalue, rel=1e-9)
        assert found.interval == pytest.approx(tuple(known.confidence_interval(0.95)), rel=1e-9)


def test_holms_correction_by_hand():
    """Holm (1979): the smallest times 4, the next times 3, and none below the one before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_seeds_that_decide_are_those_of_the_tables_of_power():
    """A paired test at 5 %, two-sided, with power 80 %: 34 pairs for d = 0.5, 15 for 0.8 (Cohen), 199 for 0.2."""
    assert [seeds_to_decide(effect) for effect in (0.2, 0.5, 0.8, 5.0, 0.0)] == [199, 34, 15, 3, None]


def test_fishers_interval_stays_within_one_and_has_a_width():
    for correlations in ([1.0] * 5, [1.0, 0.9, 1.0], [-1.0] * 3, [0.0, 0.0, 0.0], [1.0, -1.0, 1.0]):
        found = fisher(correlations, LAYERS)
        assert -1 < found.interval[0] < found.mean < found.interval[1] < 1
    # Five seeds agree on +1.00 over six layers: half a step below is 1 - 6/210; Student's point is that of 4 degrees.
    middle, half = math.atanh(1 - 6 / 210), 2.7764451 * math.sqrt(1.06 / 3 / 5)
    assert fisher([1.0] * 5, 6).interval == pytest.approx((math.tanh(middle - half), math.tanh(middle + half)))
    assert fisher([1.0] * 3, 12).interval[0] > fisher([1.0] * 3, 6).interval[0]  # of more layers, more is known


def test_a_table_is_corrected_over_its_rows_and_a_page_over_its_studies(tmp_path):
    finals = {("default", "learnable"): {0: 80.0, 1: 81.0, 2: 82.0}, ("lape", "learnable"): {0: 81.0, 1: 82.2, 2: 83.1}}
    one = study_of(tmp_path, finals)
    (alone,) = judged([one])
    assert alone[0].difference.p_holm < 3 * alone[0].difference.p
    twice = judged([one, one])
    assert [len(some) for some in twice] == [len(CLAIMS)] * 2
    assert twice[0] == twice[1]
    assert twice[0][0].difference.p_holm > alone[0].difference.p_holm
    more = {**finals, **{(join, "learnable"): finals["lape", "learnable"] for join in ("shared", "lape-sharing")}}
    by_way = {row.way.join: row.difference for row in study_of(tmp_path / "more", more).rows}
    assert by_way["lape"].p_holm == pytest.approx(3 * by_way["lape"].p)
