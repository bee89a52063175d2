"""How much of the machine's rate of products a training step of LaPE reaches, and where the rest of its time goes.

python benchmarks/step.py --out benchmarks/results/step
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from jsonargparse import auto_cli
from timm.layers import set_fused_attn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from turns import file, in_turns

import lape
from lape.analysis.cost import TrainingStep

# The first pattern that is found in the name of an operator decides.
KINDS = {
    "attention": "scaled_dot_product|flash_attention|softmax|::bmm$",
    "products": "::(addmm|mm)$|convolution|mkl",
    "GELU": "gelu",
    "LayerNorm": "layer_norm",
    "AdamW": "adamw",
    "what the compiler merged": "CompiledFxGraph|cpp_fused",
    "sums": "::(add|add_|sum)$",
    "copies": "::(copy_|cat|clone|fill_|zero_)$",
}
FORMATS = {"32-true": None, "bf16-mixed": torch.bfloat16}
TOKENS = 197

Shape = tuple[int, int, int]  # (a, b, c): a matrix (a, b) times a matrix (b, c)


def rate(shapes: Sequence[Shape], low: torch.dtype | None) -> float:
    """Floating point operations a second of the fastest of these products, each the best of ten."""

    def best(shape: Shape) -> float:
        rows, inner, columns = shape
        a, b = torch.randn(rows, inner, dtype=low), torch.randn(inner, columns, dtype=low)
        c = torch.empty(rows, columns, dtype=low)
        times = []
        for _ in range(10):
            start = perf_counter()
            torch.mm(a, b, out=c)
            times.append(perf_counter() - start)
        return 2 * rows * inner * columns / min(times)

    return max(map(best, shapes))


def work(model: str, batch_size: int) -> int:
    """Floating point operations of a step's products, forward and backward."""
    step = TrainingStep(lape.create_model(model).to("meta"), torch.empty(batch_size, 3, 224, 224, device="meta"), None)
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def shares(step: Callable[[], None], repeats: int = 3) -> Counter[str]:
    """Seconds of a step by kind of operator; each operator's own time, without those that it calls."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(repeats):
            step()
    found: Counter[str] = Counter()
    for event in profiler.key_averages():
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, event.key)), event.key)
        found[kind] += event.self_cpu_time_total / 1e6 / repeats
    return found


def main(
    out: Path | None = None,
    models: Sequence[str] = ("deit_tiny_patch16_224", "deit_small_patch16_224"),
    batch_size: int = 16,
    rounds: int = 7,
) -> None:
    """Print the table

    Args:
        out: Folder for table.md and table.json.
        models: DeiTs of 224 pixels.
        batch_size: Images in a step.
        rounds: How often the products and the step take turns.
    """
    rows = [
        [
            "model",
            "precision",
            "attention",
            "compiled",
            "ms a step",
            "of the rate",
            "its products",
            "shares of the time",
        ]
    ]
    content = {}
    for model, (precision, low), fused, compile in product(models, FORMATS.items(), (True, False), (False, True)):
        set_fused_attn(fused)
        flops = work(model, batch_size)
        torch.manual_seed(0)
        made = lape.create_model(model)
        width, lines = made.embed_dim, batch_size * TOKENS
        step = TrainingStep(torch.compile(made) if compile else made, torch.randn(batch_size, 3, 224, 224), low)

        def seconds(step: Callable[[], None] = step) -> float:
            start = perf_counter()
            step()
            return perf_counter() - start

        measures = {
            "rate": partial(rate, [(side, side, side) for side in (512, 1024, 2048)], low),
            "its products": partial(rate, [(lines, width, 4 * width)], low),
            "step": seconds,
        }
        found = in_turns(measures, rounds)
        of_rate = median(flops / taken / best for taken, best in zip(found["step"], found["rate"], strict=True))
        own = median(own / best for own, best in zip(found["its products"], found["rate"], strict=True))
        parts = shares(step)
        name = [model, precision, "fused" if fused else "in parts", "yes" if compile else "no"]
        rows.append([*name, f"{1e3 * median(found['step']):.0f}", f"{of_rate:.0%}", f"{own:.0%}"])
        rows[-1].append(", ".join(f"{kind} {taken / parts.total():.0%}" for kind, taken in parts.most_common(5)))
        content[", ".join(name)] = {**found, "flops": flops, "seconds by operator": dict(parts.most_common(25))}
    said = (
        f"{batch_size} images a step, LaPE, medians over {rounds} rounds. of the rate: floating point operations a "
        "second of the step's products, beside the fastest product of two square matrices (sides 512, 1024, 2048) in "
        "the same round and number format. its products: the same for one product alone, that of all tokens with an "
        "MLP's first weight. attention in parts: as timm computes it with TIMM_FUSED_ATTN=0."
    )
    file(out, rows, said, measured=content)


if __name__ == "__main__":
    auto_cli(main)
