"""What was trained and how numbers were made, as a paragraph to paste into a paper."""

from typing import Any

from lape.experiment import Experiment
from lape.files import writing
from lape.files.characters import plural, visible
from lape.report import words
from lape.studies.inference import ERROR, FEWEST
from lape.studies.statistics import BASELINE
from lape.studies.study import Study
from lape.training.contents import PARTS

MARK = f"\n({writing.MARK}; without this line the file is not replaced.)\n"


def paragraph(study: Study) -> str:
    """Say of a study what was trained, with what settings, and how its intervals and p-values were made."""
    sentences = [
        _trained(study),
        *_training(study.experiment),
        *_statistics(study),
        *map(_made_with, study.provenances()),
    ]
    return visible(" ".join(sentences))


def _trained(study: Study) -> str:
    base, runs = study.experiment, len(study.results)
    ways, pes = len(study.ways), len(study.pes)
    return (
        f"We trained {base.model} on {base.data}{_images(study)}, {_start(base)}, with "
        f"{plural(ways, 'way', 'ways')} of joining position embeddings with tokens ({words.listed(study.ways)}), "
        f"{plural(pes, 'position embedding')} ({words.listed(study.pes)}) and the "
        f"{'seeds' if study.seeds[1:] else 'seed'} {words.listed(study.seeds)}: {plural(runs, 'run')}."
    )


def _images(study: Study) -> str:
    contents: Any = study.contents
    if contents is None:
        return words.images(study)
    train, validation = (contents[part]["pictures"] for part in PARTS)
    classes = plural(len(contents["classes"]), "class", "classes")
    return f" ({train:,} training and {plural(validation, 'validation image')}, {classes})"


def _start(base: Experiment) -> str:
    return f"from the weights {base.weights}" if base.weights else "from random weights"


def _training(base: Experiment) -> list[str]:
    rate = f"a highest learning rate of {base.lr:g}"
    if base.lr_batch:
        rate += f" for {plural(base.lr_batch, 'image')}, scaled in proportion to the batch size"
    size = f" at {base.img_size} × {base.img_size} pixels" if base.img_size else ""
    decay = f"a weight decay of {base.weight_decay:g}"
    sentences = [
        f"Each run took {words.length(base)} of the optimiser {base.optimizer}, with batches of "
        f"{plural(base.batch_size, 'image')}{size}, {rate}, {decay} and the learning-rate schedule {base.schedule}"
        f"{_warm_up(base)}, in the precision {base.precision}."
    ]
    if base.recipe:
        sentences.append(f"Settings that are not named here are those of the recipe {base.recipe}.")
    return sentences


def _warm_up(base: Experiment) -> str:
    if base.warmup_steps is not None:
        return f" after a warm-up of {plural(base.warmup_steps, 'step')}"
    epochs = base.warmup_epochs
    if epochs is None:
        return " after a warm-up over a tenth of all steps"
    if epochs == 0:
        return " without a warm-up"
    return f" after a warm-up of {epochs:g} {'epoch' if epochs == 1 else 'epochs'}"


def _statistics(study: Study) -> list[str]:
    score = (
        f"{words.sentence(study.measure)} is that on the validation images after the last step, given as mean ± "
        "standard deviation over the seeds (n − 1)."
    )
    differences = [row.difference for row in study.rows if row.difference is not None]
    if not differences:
        return [score]
    sure, judged = 100 * (1 - ERROR), sum(one.p is not None for one in differences)
    return [
        score,
        f"Differences to the join {BASELINE} are paired by position embedding and seed. Their {sure:g} % intervals are "
        f"Student’s, mean ± t({1 - ERROR / 2:g}, n − 1)·s/√n over the n pairs, and p-values are two-sided, of a mean "
        f"difference of 0 (paired t-test). Beside them stand p-values with Holm’s correction for the {judged} of these "
        f"differences that have one; a difference is significant where p is below {ERROR:g}.",
        f"Nothing is concluded from fewer than {FEWEST} pairs, from pairs that all differ by the same, and from runs "
        f"at chance, of which the whole {sure:g} % interval (Clopper and Pearson’s) is not above guessing.",
    ]


def _made_with(origin: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
    commit = origin["commit"] or "unknown"
    return f"Computed with {versions or 'unknown versions'} (commit {commit}) on {origin['machine']}."
