"""Everything that is to be known of lape on a CUDA card, within eight minutes: python benchmarks/gpu.py --out DIR

The most important part comes first. Each is a process of its own with a limit of time; what it has measured by then is
in DIR/PART.jsonl, a line for each result, and DIR/table.md is written anew after each part. Without a card it says what
it would do; `--dry` runs a small version of every part on the CPU, whose numbers say nothing of a card.

It needs lape with its extras train and dense. Where something is missing, the part that needs it says so.
"""

import argparse
import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

Result = dict[str, Any]  # what was measured, by name; {"law": ..., "holds": ...} for a law
SECONDS = 480.0  # for all parts together


@dataclass(frozen=True)
class Place:
    """Where a part runs, and how much of it."""

    device: str
    small: bool
    out: Path

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    def autocast(self, low: str = "bfloat16") -> AbstractContextManager[object]:
        import torch

        return torch.autocast(self.device, getattr(torch, low))

    def synchronise(self) -> None:
        import torch

        if self.cuda:
            torch.cuda.synchronize()

    def milliseconds(self, work: Callable[[], object]) -> float:
        """How long the device computes."""
        import torch

        if not self.cuda:
            start = time.perf_counter()
            work()
            return 1e3 * (time.perf_counter() - start)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def in_turns(self, works: dict[str, Callable[[], object]], rounds: int, seconds: float) -> dict[str, list[float]]:
        """The milliseconds of every work in each round, all in turn, after three that warm up; at most some seconds."""
        begun = time.perf_counter()
        for work in works.values():
            for _ in range(1 if self.small else 3):
                work()
        taken: dict[str, list[float]] = {name: [] for name in works}
        names = list(works)
        for turn in range(rounds):
            for place in range(len(names)):
                name = names[(turn + place) % len(names)]  # nobody is always after the same neighbour
                taken[name].append(self.milliseconds(works[name]))
            if turn > 1 and time.perf_counter() - begun > seconds:
                break
        return taken

    def peak(self, work: Callable[[], object]) -> int | None:
        """The bytes that a work holds at most, beyond those that were held before."""
        import torch

        if not self.cuda:
            return None
        self.synchronise()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        self.synchronise()
        return torch.cuda.max_memory_allocated() - before


def law(name: str, holds: object, **content: Any) -> Result:
    return {"law": name, "holds": bool(holds), **content}


def attempted(name: str, prove: Callable[[], Iterator[Result]]) -> Iterator[Result]:
    """The results of a proof; where it fails, that is one."""
    try:
        yield from prove()
    except Exception as error:
        yield law(name, False, error=f"{type(error).__name__}: {error}"[:500])


# --- Parts


def kernel(place: Place) -> Iterator[Result]:
    """The kernel that norms and adds: its numbers beside float64, and its time beside norm, sum and cast."""
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    def apart(x: Tensor, gain: Tensor, shift: Tensor, p: Tensor, out: torch.dtype) -> Tensor:
        with torch.autocast(place.device, enabled=False):
            return F.layer_norm(x.float(), x.shape[-1:], gain, shift, 1e-6).add_(p).to(out)

    fused = None
    if place.cuda:
        from lape.surgery.kernels import layer_norm_plus

        def fused(x: Tensor, gain: Tensor, shift: Tensor, p: Tensor, out: torch.dtype) -> Tensor:
            return layer_norm_plus(x, gain, shift, p, 1e-6, out)

    def inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
        torch.manual_seed(0)
        sizes = shape, shape[2:], shape[2:], shape[1:]
        drawn = [torch.randn(size, device=place.device) for size in sizes]
        return [(3 * drawn[0] + 1).to(dtype).requires_grad_(), *(one.requires_grad_() for one in drawn[1:])]

    steps = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}
    shapes = (
        [(1, 1, 8), (5, 3, 48)]
        if place.small
        else [(1, 1, 8), (5, 3, 48), (64, 197, 192), (7, 50, 1408), (3, 65, 8192)]
    )
    for shape, out in product(shapes, steps):
        name = f"{shape} {str(out).partition('.')[2]}"

        def numbers(shape: tuple[int, int, int] = shape, out: torch.dtype = out, name: str = name) -> Iterator[Result]:
            given = inputs(shape, torch.float32)
            doubles = [one.detach().double().requires_grad_() for one in given]
            y, right = (
                (fused or apart)(*given, out),
                F.layer_norm(doubles[0], shape[2:], *doubles[1:3], 1e-6) + doubles[3],
            )
            g = torch.randn(shape, device=place.device).to(out)
            worst = ((y.double() - right).abs() / (right.abs() + 4)).max().item()
            yield law(f"kernel {name}: values", worst <= steps[out], worst=worst)
            for what, one, exact in zip(
                ("x", "gain", "shift", "position"),
                torch.autograd.grad(y, given, g),
                torch.autograd.grad(right, doubles, g.double()),
                strict=True,
            ):
                error = ((one.double() - exact).norm() / exact.norm().clamp(min=1e-12)).item()
                yield law(f"kernel {name}: gradient of {what}", error < 1e-5, error=error)
            if out != torch.float32:  # in float32 sums are rounded in another order
                bits = ((fused or apart)(*given, out) != apart(*given, out)).double().mean().item()
                yield law(f"kernel {name}: bits of norm, sum and cast", bits < 1e-2, share_of_others=bits)

        yield from attempted(f"kernel {name}", numbers)
    for shape in [(2, 17, 48)] if place.small else [(256, 197, 192), (256, 197, 384), (256, 197, 768), (128, 65, 256)]:
        given, out = inputs(shape, torch.float32), torch.bfloat16
        g = torch.randn(shape, device=place.device).to(out)
        ways = {"apart": apart} | ({"fused": fused} if fused else {})
        outputs = {name: way(*given, out) for name, way in ways.items()}
        works: dict[str, Callable[[], object]] = {}
        for name, way in ways.items():
            works[f"{name}, forward"] = partial(way, *(one.detach() for one in given), out)
            works[f"{name}, backward"] = partial(torch.autograd.grad, outputs[name], given, g, retain_graph=True)
        taken = {name: median(each) for name, each in place.in_turns(works, 3 if place.small else 50, 5).items()}
        count = shape[0] * shape[1] * shape[2]
        least = {"forward": count * (4 + 2), "backward": count * (4 + 2 + 4)}  # bytes: float32 tokens, bfloat16 behind
        yield {
            "shape": list(shape),
            "microseconds": {name: 1e3 * each for name, each in taken.items()},
            "GB/s of what must move": {name: least[name.split(", ")[1]] / each / 1e6 for name, each in taken.items()},
        }


def laws(place: Place) -> Iterator[Result]:
    """A CUDA card computes what the CPU does: every join and table; fold, half, layouts, checkpoints, graphs."""
    import torch

    import lape

    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    asked = {"img_size": 64, "depth": 2 if place.small else 4, "embed_dim": 96, "num_heads": 3, "num_classes": 7}
    joins = ["lape", "lape-sharing", "pvg", "default", "shared", "unshared"]
    tables = ["learnable", "sinusoidal-2d", "sinusoidal-1d", "learnable+relative"]
    if place.small:
        joins, tables = joins[:1], tables[:1]
    for pe, join in product(tables, joins):
        try:
            model = lape.create_model("vit_tiny_patch16_224", join=join, pe=pe, **asked)
        except lape.UsageError:
            continue
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        yield from attempted(f"{join} {pe}", partial(_of_a_model, place, model, f"{join} {pe}"))
    if place.cuda:
        for folded in (False, True):
            yield from attempted("CUDA graph", partial(_in_a_graph, asked, folded))
        yield from attempted("no waiting for the card", partial(_without_waiting, asked))


def _of_a_model(place: Place, model: Any, name: str) -> Iterator[Result]:
    import torch

    import lape

    def gradients(one: Any) -> list[Any]:
        return [parameter.grad for parameter in one.parameters() if parameter.grad is not None]

    def furthest(ours: Sequence[Any], theirs: Sequence[Any]) -> float:
        return max(
            ((a.cpu() - b.cpu()).norm() / b.cpu().norm().clamp(min=1e-6)).item()
            for a, b in zip(ours, theirs, strict=True)
        )

    for dtype, most in ((torch.float64, 1e-9), (torch.float32, 2e-4)):
        here = copy.deepcopy(model).to(dtype)
        there = copy.deepcopy(here).to(place.device)
        x = torch.randn(3, 3, 64, 64, dtype=dtype)
        y, z = here(x), there(x.to(place.device))
        y.square().sum().backward()
        z.square().sum().backward()
        error, of_gradient = furthest([z], [y]), furthest(gradients(there), gradients(here))
        yield law(f"{name} {dtype}: outputs", error < most, error=error)
        yield law(f"{name} {dtype}: gradients", of_gradient < 20 * most, error=of_gradient)
    there = model.to(place.device).eval()
    x = torch.randn(4, 3, 64, 64, device=place.device)
    with torch.no_grad():
        y = there(x)
        folded = lape.fold(copy.deepcopy(there))
        yield law(f"{name}: folded", furthest([folded(x)], [y]) < 1e-4)
        plain = lape.set_fused(copy.deepcopy(there), False)
        yield law(f"{name}: fused", furthest([y], [plain(x)]) < 1e-4)
        with place.autocast():
            error = furthest([there(x).float()], [plain(x).float()])
            yield law(f"{name}: fused in bf16", error < 2e-2, error=error)
        half = copy.deepcopy(there).half()
        yield law(f"{name}: half", torch.isfinite(half(x.half())).all())
        last = copy.deepcopy(there).to(memory_format=torch.channels_last)
        yield law(f"{name}: channels last", furthest([last(x.to(memory_format=torch.channels_last))], [y]) < 1e-3)
    there.train()
    kept = []
    for checkpointing in (True, False):
        there.set_grad_checkpointing(checkpointing)
        there.zero_grad()
        there(x).square().sum().backward()
        kept.append([gradient.clone() for gradient in gradients(there)])
    yield law(f"{name}: checkpointing", furthest(*kept) < 1e-4)


def _in_a_graph(asked: dict[str, Any], folded: bool) -> Iterator[Result]:
    import torch

    import lape

    model = lape.create_model("vit_tiny_patch16_224", join="lape", **asked).cuda().eval()
    model = lape.fold(model) if folded else model
    x = torch.randn(8, 3, 64, 64, device="cuda")
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = model(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        yield law(f"CUDA graph, {'folded' if folded else 'lape'}", torch.allclose(output, model(x), atol=1e-5))


def _without_waiting(asked: dict[str, Any]) -> Iterator[Result]:
    import torch

    import lape

    model = lape.create_model("vit_tiny_patch16_224", join="lape", pe="sinusoidal-2d", **asked).cuda().train()
    x = torch.randn(8, 3, 64, 64, device="cuda")
    model(x).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x).sum().backward()
        yield law("no waiting for the card, forward and backward", True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def contenders(name: str) -> dict[str, Callable[[], Any]]:
    """The models that are timed beside one another, by what they are called."""
    import lape

    def untouched() -> Any:
        return lape.remove(lape.create_model(name, join="default"))

    def joined() -> Any:
        return lape.create_model(name, join="lape")

    def folded() -> Any:
        return lape.fold(joined().eval())

    return {
        "timm": untouched,
        "again": untouched,
        "default": lambda: lape.create_model(name, join="default"),
        "lape": joined,
        "lape, one kernel": lambda: lape.set_fused(joined()),
        "lape, apart": lambda: lape.set_fused(joined(), False),
        "folded": folded,
        "folded, one kernel": lambda: lape.set_fused(folded()),
        "folded, apart": lambda: lape.set_fused(folded(), False),
    }


def batch_for(model: Any, count: int, place: Place) -> tuple[Any, Any]:
    """Images that a model takes, and their classes."""
    import torch

    drawn = torch.randn(count, model.patch_embed.proj.in_channels, *model.patch_embed.img_size, device=place.device)
    return drawn, torch.arange(count, device=place.device) % model.num_classes


def speed(place: Place, compiled: bool = False) -> Iterator[Result]:
    """Time and memory of a step in bf16, eager, beside timm's model: training, inference, fused or not, folded."""
    import torch
    from torch.nn.functional import cross_entropy

    names = ["vit_nano_patch4_32"] if place.small else ["deit_tiny_patch16_224", "deit_small_patch16_224"]
    batch, rounds = (2, 2) if place.small else (256, 40)
    for name in names[:1] if compiled else names:
        made = {key: make().to(place.device) for key, make in contenders(name).items()}
        if compiled:
            made = {key: model for key, model in made.items() if "," not in key}  # the compiler fuses by itself
        called = {key: torch.compile(model) if compiled else model for key, model in made.items()}
        x, y = batch_for(made["timm"], batch, place)

        def training(key: str, model: Any, optimizer: Any, x: Any = x, y: Any = y, called: Any = called) -> None:
            model.train()
            optimizer.zero_grad()
            with place.autocast():
                loss = cross_entropy(called[key](x), y)
            loss.backward()
            optimizer.step()

        def inference(key: str, model: Any, x: Any = x, called: Any = called) -> None:
            model.eval()
            with torch.inference_mode(), place.autocast():
                called[key](x)

        works: dict[str, dict[str, Callable[[], object]]] = {"training": {}, "inference": {}}
        for key, model in made.items():
            learns = [parameter for parameter in model.parameters() if parameter.requires_grad]
            if learns:
                optimizer = torch.optim.AdamW(learns, lr=1e-6, fused=True)
                works["training"][key] = partial(training, key, model, optimizer)
            works["inference"][key] = partial(inference, key, model)
        for kind, each in works.items():
            taken = place.in_turns(each, rounds, 10 if compiled else 20)
            held = {key: place.peak(work) for key, work in each.items()}
            base = taken["timm"]
            yield {
                "model": name,
                "batch": batch,
                "step": kind,
                "compiled": compiled,
                "timm, ms": median(base),
                "images a second": 1e3 * batch / median(base),
                "beside timm": {
                    key: median(a / b for a, b in zip(times, base, strict=True)) for key, times in taken.items()
                },
                "memory beside timm": {
                    key: own / of_timm for key, own in held.items() if own is not None and (of_timm := held["timm"])
                },
                "rounds": len(base),
            }
        del made, called, works


def compiled(place: Place) -> Iterator[Result]:
    """Compiled: every join whole, in two modes, beside its eager outputs; then the table of speed."""
    import torch

    import lape

    _allow_graphs()
    asked = {"img_size": 64, "depth": 2, "embed_dim": 96, "num_heads": 3, "num_classes": 7}
    modes = ["default"] if place.small else ["default", "reduce-overhead"]
    for mode, join in product(modes, ["lape", "default"]):

        def whole(mode: str = mode, join: str = join) -> Iterator[Result]:
            torch.compiler.reset()
            begun = time.perf_counter()
            model = lape.create_model("vit_tiny_patch16_224", join=join, **asked).to(place.device)
            x = torch.randn(8, 3, 64, 64, device=place.device)
            with torch.no_grad():
                y = model.eval()(x)
                backend = {"backend": "aot_eager"} if place.small else {"mode": mode}
                called = torch.compile(model, fullgraph=True, **backend)
                for _ in range(3):
                    z = called(x).clone()
            error = (z - y).abs().max().item()
            yield law(f"compiled, {mode}, {join}: outputs", error < 2e-2, error=error)
            model.train()
            optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
            for _ in range(4 if place.small else 10):
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(called(x), torch.arange(8, device=place.device) % 7)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            taken = time.perf_counter() - begun
            yield law(f"compiled, {mode}, {join}: it learns", losses[-1] < losses[0], seconds=taken)

        yield from attempted(f"compiled, {mode}, {join}", whole)
    if not place.small:
        torch.compiler.reset()
        yield from speed(place, compiled=True)


def _allow_graphs() -> None:
    """Let torch make more graphs of one class than its usual eight, beyond which it computes uncompiled."""
    import torch._dynamo

    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    setattr(torch._dynamo.config, limit, 64)


def profile(place: Place) -> Iterator[Result]:
    """Which kernels a training step of LaPE consists of, eager in bf16: calls, microseconds, and share of the step."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    name, batch, repeats = ("vit_nano_patch4_32", 2, 1) if place.small else ("deit_tiny_patch16_224", 256, 3)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if place.cuda else [])]
    for key in ("timm", "lape", "lape, norm and sum apart"):
        model = contenders(name)[key]().to(place.device).train()
        x, y = batch_for(model, batch, place)

        def step(model: Any = model, x: Any = x, y: Any = y) -> None:
            with place.autocast():
                loss = torch.nn.functional.cross_entropy(model(x), y)
            loss.backward()

        step()
        place.synchronise()
        with torch.profiler.profile(activities=activities) as profiler:
            for _ in range(repeats):
                step()
            place.synchronise()
        # An operator has the time of the kernels that it launches, and these are listed too.
        computing = DeviceType.CUDA if place.cuda else DeviceType.CPU
        events = [event for event in profiler.key_averages() if event.device_type == computing]
        times = {e.key: e.self_device_time_total if place.cuda else e.self_cpu_time_total for e in events}
        whole = sum(times.values())
        calls = {event.key: event.count / repeats for event in events}
        yield {
            "model": key,
            "microseconds a step": whole / repeats,
            "kernels a step": sum(calls.values()),
            "kernels": {
                one[:80]: {"calls": calls[one], "microseconds": taken / repeats, "share": taken / whole}
                for one, taken in sorted(times.items(), key=lambda pair: -pair[1])[:20]
            },
        }


def images(place: Place) -> Iterator[Result]:
    """Images a second of the recipe of CCT-7/3x1, whole, and without each of its parts; digits stand for CIFAR."""
    from lape import recipes
    from lape.training.loop import train

    recipe = recipes.load("cifar100/cct_7_3x1_32").experiment()
    base = replace(
        recipe, recipe=None, data="digits", img_size=32, epochs=1, steps=3 if place.small else 120, warmup_epochs=0,
        cooldown_epochs=0, lr_by_epoch=False, validate_every=1000, accelerator=place.device,
        precision="32-true" if place.small else "bf16-mixed", batch_size=2 if place.small else recipe.batch_size,
        train_images=6 if place.small else None, workers=0 if place.small else recipe.workers,
        model="vit_nano_patch4_32" if place.small else recipe.model,
    )  # fmt: skip
    ways = {
        "whole": {},
        "16-mixed": {"precision": "16-mixed"},
        "without erasing": {"reprob": 0.0},
        "without augmentation": {"auto_augment": "", "reprob": 0.0},
        "without augmentation and mixing": {"auto_augment": "", "reprob": 0.0, "mixup": 0.0, "cutmix": 0.0},
        "join default": {"join": "default"},
        "whole, again": {},
        "compiled": {"compile": True},
    }
    for way, settings in ways.items():
        if place.small and settings and way != "without augmentation and mixing":
            continue

        def run(way: str = way, settings: dict[str, Any] = settings) -> Iterator[Result]:
            chosen = replace(base, **settings)
            result = json.loads(train(chosen, Path(mkdtemp(), "run")).read_text())
            seconds = result["seconds_per_step"]
            yield {"way": way, "milliseconds a step": 1e3 * seconds, "images a second": chosen.batch_size / seconds}

        yield from attempted(way, run)


def resume(place: Place) -> Iterator[Result]:
    """A run that is killed while it writes goes on to what it would have been."""
    import torch
    from kills import EXPERIMENT, after, begun, finished, killed
    from torch import Tensor

    from lape.training.checkpoints import LAST, read

    experiment = replace(
        EXPERIMENT, epochs=2 if place.small else 6, accelerator=place.device,
        precision="32-true" if place.small else "16-mixed",
    )  # fmt: skip

    def weights(folder: Path) -> dict[str, Tensor]:
        return read(folder / LAST)["model"]

    def prove() -> Iterator[Result]:
        cut, undisturbed = Path(mkdtemp(), "cut"), Path(mkdtemp(), "undisturbed")
        with begun(experiment, cut) as process:
            kill = killed(process, cut, after(0.05))
        yield {"killed at step": kill.step, "while it wrote": kill.writing}
        there, whole = weights(finished(experiment, cut)), weights(finished(experiment, undisturbed))
        apart = max((there[key].double() - whole[key].double()).abs().max().item() for key in whole)
        alike = all(torch.equal(there[key], whole[key]) for key in whole)
        yield law("killed, it goes on to the same weights", apart < 1e-3, furthest=apart, bit_for_bit=alike)

    yield from attempted("kill and resume", prove)


def dense(place: Place) -> Iterator[Result]:
    """The three dense models for some steps: Mask R-CNN, UperNet, Segmenter, on drawn shapes."""
    from lape.experiment import Experiment
    from lape.training.loop import train

    for model, data, precision in (
        ("mask_rcnn_vit_adapter_nano", "shapes-detection", "16-mixed"),
        ("upernet_vit_adapter_nano", "shapes-segmentation", "bf16-mixed"),
        ("segmenter_nano_patch8", "shapes-segmentation", "bf16-mixed"),
    ):

        def run(model: str = model, data: str = data, precision: str = precision) -> Iterator[Result]:
            experiment = Experiment(
                model=model, data=data, steps=1 if place.small else 10, batch_size=1 if place.small else 8, lr=1e-4,
                warmup_epochs=0, workers=0, accelerator=place.device, precision="32-true" if place.small else precision,
            )  # fmt: skip
            result = json.loads(train(experiment, Path(mkdtemp(), "run")).read_text())
            row = result["curve"][-1] if "curve" in result else {}
            yield {"model": model, "milliseconds a step": 1e3 * result["seconds_per_step"], "last": row}

        yield from attempted(model, run)


@dataclass(frozen=True)
class Part:
    """A part, and how many seconds it may take."""

    run: Callable[[Place], Iterator[Result]]
    seconds: float


# In the order of what one would be sorriest to miss.
PARTS = {
    "kernel": Part(kernel, 50),
    "speed": Part(speed, 100),
    "laws": Part(laws, 75),
    "profile": Part(profile, 30),
    "images": Part(images, 70),
    "compiled": Part(compiled, 70),
    "resume": Part(resume, 50),
    "dense": Part(dense, 35),
}


# --- The run


def origin() -> Result:
    """What it was measured with, as far as it can be known: lape may not be installed here."""
    import torch

    record: Result = {"torch": torch.__version__, "python": sys.version.split()[0]}
    with suppress(Exception):
        import triton

        record["triton"] = triton.__version__
    with suppress(Exception):
        from lape.training.provenance import commit, machine

        record |= {"commit": commit(), "machine": machine()}
    return record


def one_part(name: str, place: Place) -> None:
    """Run a part in this process, and write each result as it comes."""
    with (place.out / f"{name}.jsonl").open("w") as file:
        try:
            for result in PARTS[name].run(place):
                print(name, json.dumps(result)[:160], flush=True)
                file.write(json.dumps(result) + "\n")
                file.flush()
        except Exception as error:
            file.write(
                json.dumps(law(f"the part {name} ends", False, error=f"{type(error).__name__}: {error}"[:800])) + "\n"
            )
            raise


def all_parts(names: Sequence[str], place: Place, seconds: float) -> list[str]:
    """Run parts in processes of their own, each within its time; returns what became of them."""
    begun, outcomes = time.monotonic(), []
    for name in names:
        start = time.monotonic()
        limit = min(PARTS[name].seconds, seconds - (start - begun))
        if limit <= 1:
            outcomes.append(f"{name}: not begun, the time was over")
            continue
        command = [sys.executable, __file__, "--out", str(place.out), "--part", name]
        with TemporaryDirectory() as scratch:  # of the runs of training; a part that is stopped leaves them behind
            environment = os.environ | {"TMPDIR": scratch}
            process = subprocess.Popen(
                [*command, *(["--dry"] if place.small else [])], env=environment, start_new_session=True
            )
            try:
                status = process.wait(limit)
                ended = "done" if status == 0 else f"ended with status {status}"
            except subprocess.TimeoutExpired:
                ended = f"stopped after its {limit:.0f} s"
            finally:
                with suppress(ProcessLookupError):  # and what it has begun itself
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        outcomes.append(f"{name}: {ended}, {time.monotonic() - start:.0f} s")
        write_table(place.out, outcomes)
    return outcomes


def write_table(out: Path, outcomes: Sequence[str]) -> None:
    """Write what there is so far, for people."""
    lines = ["# On a CUDA card", "", ", ".join(f"{key} {value}" for key, value in origin().items()), ""]
    lines += [f"- {outcome}" for outcome in outcomes]
    results = {
        name: [json.loads(line) for line in path.read_text().splitlines()]
        for name in PARTS
        if (path := out / f"{name}.jsonl").exists()
    }
    proofs = [result for each in results.values() for result in each if "law" in result]
    broken = [result for result in proofs if not result["holds"]]
    lines += ["", f"{len(proofs)} laws, {len(broken)} broken", *(f"- {json.dumps(result)}" for result in broken)]
    for name, each in results.items():
        rows = [result for result in each if "law" not in result]
        if rows:
            lines += ["", f"## {name}", "", *(steps(rows) if "beside timm" in rows[0] else facts(rows))]
    (out / "table.md").write_text("\n".join(lines) + "\n")


def facts(rows: Sequence[Result]) -> list[str]:
    """A table of whatever was measured: its first value, and the others by name."""
    lines = ["| | |", "| --- | --- |"]
    for row in rows:
        (_, first), *others = row.items()
        cells = "<br>".join(f"{key}: {_short(value)}" for key, value in others)
        lines.append(f"| {_short(first)} | {cells} |")
    return lines


def steps(rows: Sequence[Result]) -> list[str]:
    """A table of steps: milliseconds of timm's model, and how many times as long the others take."""
    names = list(dict.fromkeys(name for row in rows for name in row["beside timm"]))
    headings = ["model, batch, step", "timm, ms", "images a second", *names[1:]]
    lines = [f"| {' | '.join(headings)} |", f"| --- |{' ---: |' * (len(headings) - 1)}"]
    for row in rows:
        beside = row["beside timm"]
        cells = [f"{row['model']}, {row['batch']}, {row['step']}", f"{row['timm, ms']:.2f}"]
        cells.append(f"{row['images a second']:,.0f}")
        cells += [f"{beside[name]:.3f}" if name in beside else "–" for name in names[1:]]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(one)}" for key, one in value.items())
    return str(value)


def main(words: Sequence[str] | None = None) -> int:
    """Run what is asked for; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder of the results")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=[*PARTS], help="which, in this order; default: all"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all of them together")
    parser.add_argument("--dry", action="store_true", help="a small version on the CPU")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # in the process of one part
    chosen = parser.parse_args(words)
    import torch

    if not chosen.dry and not torch.cuda.is_available():
        print("There is no CUDA card here. With one it would run, within eight minutes:")
        for name, part in PARTS.items():
            print(f"  {name}, {part.seconds:.0f} s at most: {part.run.__doc__}")
        print("--dry runs a small version of each on the CPU.")
        return 0
    chosen.out.mkdir(parents=True, exist_ok=True)
    place = Place("cpu" if chosen.dry else "cuda", chosen.dry, chosen.out)
    if chosen.part:
        one_part(chosen.part, place)
        return 0
    outcomes = all_parts(chosen.parts, place, chosen.seconds)
    print("\n".join(outcomes), f"{chosen.out / 'table.md'} has the results.", sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
