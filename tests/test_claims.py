"""Laws of the claims: a verdict is where the interval lies, and each claim looks at what it says it looks at."""

from dataclasses import replace
from math import inf, nan, sqrt

import pytest
from made_up_runs import analysis_of, study_of

from lape.method import JOINS, POSITION_NORMS
from lape.studies.claims import CLAIMS, FACTS, TABLES, Finding, Outcome, judged, with_depth
from lape.studies.statistics import Way, difference

LAPE, DEFAULT = Way("lape"), Way("default")
THREE = {0: 80.0, 1: 81.0, 2: 82.0}


def found(study, words: str) -> Finding:
    (findings,) = judged([study])
    (one,) = [one for one in findings if words in one.claim.sentence]
    return one


def raised(by):
    """Scores that lie so far above THREE, with some noise."""
    return {seed: score + by + 0.1 * (seed - 1) for seed, score in THREE.items()}


def study_with(folder, analyses, finals=None):
    """A study of three seeds for each (way, table), with the analysis that `analyses` has for it and the seed."""
    study = study_of(folder, finals or dict.fromkeys(analyses, THREE))
    made = {one: analyses[one.way, one.pe](one.seed) for one in study.results if (one.way, one.pe) in analyses}
    return replace(study, analyses=made)


# --- Verdicts


@pytest.mark.parametrize(
    ("differences", "above", "not_below"),
    [
        ((1.0, 1.1, 0.9), Outcome.HOLDS, Outcome.HOLDS),
        ((-1.0, -1.1, -0.9), Outcome.FAILS, Outcome.FAILS),
        ((1.0, -1.0, 0.5), Outcome.UNDECIDED, Outcome.UNDECIDED),
        ((-0.2, -0.21, -0.19), Outcome.FAILS, Outcome.HOLDS),  # below, and not by more than the margin of 0.4
        ((-0.4, -0.41, -0.39), Outcome.FAILS, Outcome.UNDECIDED),
        ((0.0, 0.0, 0.0), Outcome.NO_VERDICT, Outcome.NO_VERDICT),
        ((1.0, 1.0, 1.0), Outcome.NO_VERDICT, Outcome.NO_VERDICT),
        ((5.0, 5.1), Outcome.NO_VERDICT, Outcome.NO_VERDICT),
        ((5.0,), Outcome.NO_VERDICT, Outcome.NO_VERDICT),
        ((-5.0,), Outcome.NO_VERDICT, Outcome.NO_VERDICT),
        ((), Outcome.UNTESTED, Outcome.UNTESTED),
    ],
)
def test_a_verdict_is_where_the_interval_lies(differences, above, not_below, tmp_path):
    lape = {seed: 80.0 + apart for seed, apart in enumerate(differences)}
    other = dict.fromkeys(lape, 80.0)
    finals = {("default", "learnable"): other, ("lape-sharing", "learnable"): other, ("lape", "learnable"): lape}
    study = study_of(tmp_path, finals)
    assert found(study, "LaPE is above the default join (learnable)").outcome is above
    assert found(study, "not more than 0.4 points below LaPE (sharing) (learnable)").outcome is not_below


def test_a_claim_is_judged_by_the_difference_paired_by_seed(tmp_path):
    finals = {("default", "learnable"): {0: 20.0, 1: 90.0, 2: 50.0}, ("lape", "learnable"): {0: 21.0, 1: 91.2, 2: 50.9}}
    one = found(study_of(tmp_path, finals), "LaPE is above the default join (learnable)")
    alone = difference(finals["lape", "learnable"], finals["default", "learnable"])
    assert replace(one.difference, p_holm=None) == alone
    assert one.outcome is Outcome.HOLDS


def test_runs_of_other_seeds_test_nothing(tmp_path):
    finals = {("default", "learnable"): {0: 80.0, 1: 81.0}, ("lape", "learnable"): {2: 90.0, 3: 91.0}}
    (findings,) = judged([study_of(tmp_path, finals)])
    assert {one.outcome for one in findings} == {Outcome.UNTESTED}


def test_no_two_claims_are_the_same():
    assert len({one.sentence for one in (*CLAIMS, *FACTS)}) == len(CLAIMS) + len(FACTS)


# --- What each claim looks at


def scores_of(high, low):
    return {high: raised(2.0), low: THREE}


TWO_WAYS = [
    *((f"above the default join ({pe})", ("lape", pe), ("default", pe)) for pe in TABLES),
    *(
        (f"ahead at one third of training ({pe})", ("lape", pe), ("default", pe))
        for pe in ("learnable", "sinusoidal-1d")
    ),
    *((f"above shared ({pe})", ("lape", pe), ("shared", pe)) for pe in TABLES),
    ("above unshared (learnable)", ("lape", "learnable"), ("unshared", "learnable")),
    *((f"not more than 0.4 points below LaPE (sharing) ({pe})", ("lape", pe), ("lape-sharing", pe)) for pe in TABLES),
    *(
        (f"above LaPE with {norm} in its place", ("lape", "learnable"), (Way("lape", norm), "learnable"))
        for norm in POSITION_NORMS
        if norm != "layernorm"
    ),
]


@pytest.mark.parametrize(("words", "these", "those"), TWO_WAYS, ids=[row[0] for row in TWO_WAYS])
def test_a_claim_of_two_ways_holds_where_the_first_is_higher_and_not_where_it_is_lower(words, these, those, tmp_path):
    there = found(study_of(tmp_path / "1", scores_of(these, those)), words)
    back = found(study_of(tmp_path / "2", scores_of(those, these)), words)
    assert (there.outcome, back.outcome) == (Outcome.HOLDS, Outcome.FAILS)
    assert there.difference is not None
    assert there.difference.mean == pytest.approx(2.0)


def test_ahead_at_one_third_looks_at_one_third_and_not_at_the_end(tmp_path):
    slow = study_of(tmp_path / "1", {("default", "learnable"): THREE}, curve=lambda end: [end - 40, end - 20, end])
    fast = study_of(tmp_path / "2", {("lape", "learnable"): THREE}, curve=lambda end: [end - 10, end - 5, end])
    study = replace(slow, results={**slow.results, **fast.results})
    assert found(study, "ahead at one third of training (learnable)").difference.mean == 30.0
    assert found(study, "above the default join (learnable)").difference.mean == 0.0


def test_the_gap_between_tables_is_taken_seed_by_seed_and_without_its_sign_where_there_is_one(tmp_path):
    """Without a gap by default there is none to close: there, distances are noise, and have no sign."""
    finals = {
        ("default", "learnable"): {0: 80.0, 1: 81.0, 2: 82.0},
        ("default", "sinusoidal-1d"): {0: 84.0, 1: 85.0, 2: 86.5},  # 4, 4 and 4.5 apart
        ("lape", "learnable"): {0: 90.0, 1: 90.0, 2: 90.0},
        ("lape", "sinusoidal-1d"): {0: 89.0, 1: 91.0, 2: 89.0},
    }
    one = found(study_of(tmp_path / "1", finals), "nearer to each other")
    assert one.difference.by_seed == {0: 3.0, 1: 3.0, 2: 3.5}
    assert one.outcome is Outcome.HOLDS
    either_sign = finals | {("default", "sinusoidal-1d"): {0: 84.0, 1: 77.0, 2: 86.5}}
    one = found(study_of(tmp_path / "2", either_sign), "nearer to each other")
    assert (one.outcome, one.difference.by_seed) == (Outcome.NO_VERDICT, {0: 3.0, 1: 3.0, 2: 3.5})
    assert "no gap to close" in one.difference.no_verdict


def test_normalising_compares_the_means_of_stand_ins_with_and_without_and_needs_all_of_them(tmp_path):
    kinds = {name: kind.normalise for name, kind in POSITION_NORMS.items() if name != "layernorm"}
    finals = {(Way("lape", norm), "learnable"): raised(3.0 if normed else 0.0) for norm, normed in kinds.items()}
    one = found(study_of(tmp_path / "1", finals), "Normalising is what matters")
    assert one.difference.mean == pytest.approx(3.0)
    some = dict(list(finals.items())[1:])
    assert found(study_of(tmp_path / "2", some), "Normalising is what matters").outcome is Outcome.UNTESTED


def test_the_shape_of_correlation_is_compared_by_seed(tmp_path):
    two_dimensional = {
        (DEFAULT, "sinusoidal-1d"): lambda seed: analysis_of(two_dimensionality=0.1 + 0.01 * seed),
        (LAPE, "sinusoidal-1d"): lambda seed: analysis_of(two_dimensionality=0.6 + 0.02 * seed),
    }
    one = found(study_with(tmp_path / "1", two_dimensional), "more two-dimensional")
    assert one.outcome is Outcome.HOLDS
    assert one.difference.mean == pytest.approx(0.51)
    different = {
        (DEFAULT, "learnable"): lambda seed: analysis_of(layer_difference=0.3 + 0.01 * seed),
        (LAPE, "learnable"): lambda seed: analysis_of(layer_difference=0.1),
    }
    assert found(study_with(tmp_path / "2", different), "layers differ more").outcome is Outcome.FAILS


def test_a_shape_that_is_not_defined_is_no_number(tmp_path):
    undefined = {
        (DEFAULT, "sinusoidal-1d"): lambda seed: analysis_of(two_dimensionality=nan),
        (LAPE, "sinusoidal-1d"): lambda seed: analysis_of(two_dimensionality=0.6),
    }
    assert found(study_with(tmp_path, undefined), "more two-dimensional").outcome is Outcome.UNTESTED


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 2.0, 30.0], 1.0),
        ([3.0, 2.0, 1.0], -1.0),
        ([1.0, inf, 2.0], 0.5),  # ranks 1, 3, 2
        ([1.0, 2.0, inf, inf], 3 / sqrt(10)),  # ranks 1, 2, 3.5, 3.5: 4.5 / sqrt(4.5 · 5)
        ([inf, inf], 0.0),
        ([2.0, 2.0, 2.0], 0.0),
        ([1.0], 0.0),
    ],
)
def test_rank_correlation_with_depth(values, expected):
    assert with_depth([values, values[::-1]]) == pytest.approx([expected, -expected])


def test_reach_grows_with_depth_where_half_distance_does(tmp_path):
    def growing(seed):
        return analysis_of(half_distance=[1.0, 2.0, 3.0, 4.0, 5.0, inf])

    def shrinking(seed):
        return analysis_of(half_distance=[6.0, 5.0, 4.0, 3.0, 2.0, 1.0 - 0.1 * seed])

    def missing(seed):
        return analysis_of(half_distance=[1.0, 2.0, 3.0, 4.0, 5.0, nan])

    cases = (growing, Outcome.HOLDS), (shrinking, Outcome.FAILS), (missing, Outcome.UNTESTED)
    for name, (made, outcome) in enumerate(cases):
        study = study_with(tmp_path / str(name), {(LAPE, "learnable"): made})
        assert found(study, "reaches farther with depth").outcome is outcome


FALLING = [0.9, 0.7, 0.5, 0.4, 0.3, 0.1]


@pytest.mark.parametrize("pe", TABLES)
def test_lambda2_shrinks_where_its_rank_falls_with_depth(pe, tmp_path):
    falling = study_with(tmp_path / "1", {(DEFAULT, pe): lambda seed: analysis_of(lambda2=FALLING)})
    rising = study_with(tmp_path / "2", {(DEFAULT, pe): lambda seed: analysis_of(lambda2=FALLING[::-1])})
    unknown = study_with(tmp_path / "3", {(DEFAULT, pe): lambda seed: analysis_of(lambda2=None)})
    outcomes = [found(study, f"shrinks with depth ({pe})").outcome for study in (falling, rising, unknown)]
    assert outcomes == [Outcome.HOLDS, Outcome.FAILS, Outcome.UNTESTED]


@pytest.mark.parametrize(("width", "off"), [(4, 0.0), (5, 6.0)])
def test_that_lape_adds_two_parameters_a_channel_and_layer_is_counted_in_one_pair_of_runs(width, off, tmp_path):
    """The made-up runs have 24 parameters more under LaPE: three layers of width 4."""
    finals = {("default", "learnable"): {0: 80.0}, ("lape", "learnable"): {0: 80.0}}
    study = study_with(tmp_path, {(LAPE, "learnable"): lambda seed: analysis_of(width=width)}, finals)
    (fact,) = FACTS
    assert fact.off(study) == {0: off}


def test_one_table_with_other_parameters_is_not_hidden_by_another(tmp_path):
    """A surplus with one table and a want with the other do not make up for each other."""
    widths = {"learnable": 5, "sinusoidal-1d": 3}
    finals = {(join, pe): THREE for join in ("default", "lape") for pe in widths}
    analyses = {(LAPE, pe): lambda seed, width=width: analysis_of(width=width) for pe, width in widths.items()}
    (fact,) = FACTS
    assert fact.off(study_with(tmp_path, analyses, finals)) == {0: 12.0, 1: 12.0, 2: 12.0}


def test_every_claim_is_tested_by_runs_of_all_joins_tables_and_stand_ins(tmp_path):
    finals = {(join, pe): THREE for join in JOINS for pe in TABLES if join != "unshared" or pe == "learnable"}
    finals |= {(Way("lape", norm), "learnable"): THREE for norm in POSITION_NORMS}
    study = study_of(tmp_path, finals)
    study = replace(study, analyses={one: analysis_of(lambda2=[0.3, 0.2, 0.1]) for one in study.results})
    (findings,) = judged([study])
    assert [one.claim.sentence for one in findings if one.outcome is Outcome.UNTESTED] == []


def test_a_run_that_changes_is_seen_by_the_claims_of_its_way_and_table_alone(tmp_path):
    """No claim but those on sinusoidal-2d looks at sinusoidal-2d."""
    finals = {(join, pe): THREE for join in ("default", "lape", "shared", "lape-sharing") for pe in TABLES}
    (before,) = judged([study_of(tmp_path / "1", finals)])
    (after,) = judged([study_of(tmp_path / "2", finals | {("lape", "sinusoidal-2d"): raised(5.0)})])
    changed = [
        one.claim.sentence
        for one, other in zip(before, after, strict=True)
        if (one.difference and one.difference.by_seed) != (other.difference and other.difference.by_seed)
    ]
    assert changed
    assert all("sinusoidal-2d" in sentence for sentence in changed)
