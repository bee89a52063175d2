"""The rule by which `benchmarks/to_the_end.py` finds a learning rate for each way."""

from pathlib import Path

import pytest


def test_a_best_rate_at_an_end_of_those_tried_asks_for_the_next_beyond_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import to_the_end

    within, low, high, equal = to_the_end.SUBJECTS[:4]
    scores = {
        within: {0.002: 81.0, 0.004: 82.0, 0.008: 81.0},
        low: {0.002: 83.0, 0.004: 82.0, 0.008: 81.0},
        high: {0.002: 81.0, 0.004: 82.0, 0.008: 83.0},
        equal: {0.002: 82.0, 0.004: 82.0, 0.008: 81.0},  # the lower one is taken
    }
    assert to_the_end.best(scores[equal]) == 0.002
    assert to_the_end.beyond(scores) == {0.001: [low, equal], 0.016: [high]}
