"""A training step dispatches no more than it needs: on a card each operation is a kernel that the host launches."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

# Operations of an eager step of CCT-7/3x1's recipe: of what goes on beside the model, and of all.
MOST = {"augmentation": 14, "mixing and normalising": 15, "erasing": 3, "optimiser": 4, "the rest": 4}
MOST_OF_ALL = 550


@pytest.fixture(scope="module")
def launches():
    sys.path.insert(0, str(BENCHMARKS))  # it files its table as the others do
    try:
        spec = spec_from_file_location("launches", BENCHMARKS / "launches.py")
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


def test_a_step_launches_no_more_than_it_needs(launches):
    """Random erasing does not go from image to image, and what was drawn is not computed on the device."""
    found = launches.count(launches.recipe("bf16-mixed", compile=False))
    totals = {part: counts.total() for part, counts in found.items()}
    assert totals.keys() == {*MOST, "forward", "backward"}
    assert all(totals[part] <= most for part, most in MOST.items()), totals
    assert sum(totals.values()) <= MOST_OF_ALL, totals
    assert not any("_local_scalar_dense" in counts for counts in found.values())
