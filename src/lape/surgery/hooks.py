"""What a block of a foreign model is told by hooks: each part of its rung, and each exactly once.

A block's rung decides what is hung. While the block runs, the norms that stand before its attention now, found by their
paths, add the rung's attention part, and what puts out its queries and keys turns them; and when it is done, whatever
it did not take, or took twice, is an error. A convolution that the block has stands behind it.
"""

import copy
import math
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lape.errors import UsageError
from lape.hosts import Block, Host, Rotated, parts, rotated_at
from lape.method import Rung, Scheme
from lape.surgery.forwards import Forward, Forwards, backward_pass
from lape.surgery.fused import Fusing, Joined, fits, observers
from lape.surgery.weak import Weak


class RungSource(Fusing, Protocol):
    """What hooks ask the positions of a model."""

    host: Host
    scheme: Scheme
    forwards: Forwards

    def for_the_block(self, forward: Forward, layer: int, again: bool = False) -> Rung:
        """Return what the block of a layer takes in a forward, or takes again in a backward pass."""
        ...

    def tokens_axis(self, tokens: Tensor) -> int:
        """Return the axis of tokens."""
        ...

    def laid_out(self, part: Tensor, tokens: Tensor) -> Tensor:
        """Return a part (1, N, D) of a rung as tokens lie."""
        ...

    def convolved(self, tokens: Tensor, forward: Forward, layer: int, generator: nn.Module) -> Tensor:
        """Return tokens behind the convolution of a block."""
        ...


@dataclass
class Run:
    """One run of a block: its forward, its rung, and how many norms and projections have still to take their part."""

    forward: Forward
    rung: Rung
    attentions: int
    rotations: int


GENERATOR = "peg"  # where a block keeps the convolution that stands behind it
HOOKS = "lape_hooks"  # where a block keeps its BlockHooks
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)  # whoever iterates over one meets all of its children


def owner(block: nn.Module, row: Block) -> nn.Module:
    """Return the module that holds what a join adds to a block: the block, or of a container the part with the norm."""
    path = row.norms.split(".")
    while isinstance(block, CONTAINERS):
        block = parts(block, path.pop(0))[0]
    return block


def called(block: nn.Module, row: Block) -> nn.Module:
    """Return the module whose call is a run of the block: a list of parts is itself never called."""
    return owner(block, row) if isinstance(block, nn.ModuleList | nn.ModuleDict) else block


class Silent:
    """In place of a block's hooks on a copy of its norm that belongs to no block."""


class BlockHooks:
    """The hooks of one block; `layer` is its number among the blocks that the model has now."""

    def __init__(self, positions: RungSource, block: nn.Module, row: Block, layer: int) -> None:
        self.positions, self.row, self.layer = positions, row, layer
        self.hung = False  # whether the block takes anything
        self.attends = False  # whether a norm of the block takes something
        self.rotated: Rotated | None = None  # where its queries and keys are turned, if they are
        self._block = Weak(block)
        self._attending: list[weakref.ref[nn.Module]] = []  # the norms (or projections) that have our hook
        self._turning: list[weakref.ref[nn.Module]] = []  # and what puts out queries and keys
        # The runs of the block that are not over, a stack a thread: a model may be called from within itself.
        self.runs: dict[int, list[Run | None]] = defaultdict(list)
        self.traced: Rung | None = None  # of the run that is being compiled

    def __deepcopy__(self, memo: dict[int, Any]) -> "BlockHooks | Silent":
        if id(self.block) not in memo:  # a norm is copied without its block, to stand inside of an adapter
            return Silent()
        twin = memo[id(self)] = BlockHooks.__new__(BlockHooks)
        twin.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        # `follow` finds the norms' hooks again.
        return self.__dict__ | {"_attending": [], "_turning": [], "runs": defaultdict(list)}

    @property
    def block(self) -> nn.Module:
        """The block."""
        return self._block()

    @property
    def hooked(self) -> list[nn.Module]:
        """The norms and projections that have our hook and are still there."""
        references = (*self._attending, *self._turning)
        return [module for reference in references if (module := reference()) is not None]

    @property
    def generator(self) -> nn.Module | None:
        """The convolution that stands behind the block."""
        return self.block._modules.get(GENERATOR)

    def hang(self, rung: Rung) -> None:
        """Hang all hooks on the block as it is now; raise UsageError where it cannot take a part of its rung."""
        self.block.__dict__[HOOKS] = self
        if rung.empty and self.generator is None:
            return
        unit = called(self.block, self.row)
        if unit is not self.block and (rung.residual is not None or rung.bias is not None or self.generator):
            raise UsageError(
                f"{self.name} is a list whose parts the model calls one by one, and between them nothing can be added "
                "to the residual stream or the attention logits. Use join='lape', 'lape-sharing' or 'default'."
            )
        self.hung = True
        self.attends = rung.attention is not None
        self.rotated = None if rung.rotation is None else rotated_at(self.row, self.block)
        unit.register_forward_pre_hook(self.enter, with_kwargs=True)
        unit.register_forward_hook(self.leave, always_call=True)
        self.follow()

    def take_down(self) -> None:
        """Take all hooks off the block and what is in it; a copy that has not run yet does not know its norms."""
        self.block.__dict__.pop(HOOKS, None)
        for module in (*self.block.modules(), *self.hooked):
            _unhook(module, lambda hook: _of(hook) is self)
        self._attending, self._turning = [], []

    def follow(self) -> None:
        """Hang the hooks on what stands in the block now: a norm or projection may have been replaced since."""
        attending: list[nn.Module] = []
        turning: list[nn.Module] = []
        if self.attends:
            attending = parts(self.block, self.row.projection or self.row.norms)
        if self.rotated is not None:
            turning = [*parts(self.block, self.rotated.queries), *parts(self.block, self.rotated.keys)]
        now, hooked = [*attending, *turning], self.hooked
        if len(now) == len(hooked) and all(module is one for module, one in zip(now, hooked, strict=True)):
            return
        for norm in hooked:
            _unhook(norm, lambda hook: hook in (self.offer, self.attend, self.turn))
        for norm in now:
            theirs = [_of(hook) for hook in norm._forward_hooks.values()]
            if any(isinstance(other, BlockHooks) and other is not self for other in theirs):
                raise UsageError(
                    f"{self.name} has its norm before attention, or its queries and keys, in common with another "
                    "block, and would be told of that one's positions too. Give each block its own."
                )
            if any(other is self for other in theirs):  # quantisation hands hooks on to what it puts in place
                continue
            if any(norm is one for one in attending):
                norm.register_forward_pre_hook(self.offer)
                norm.register_forward_hook(self.attend)
            else:
                norm.register_forward_hook(self.turn)
        self._attending, self._turning = list(map(weakref.ref, attending)), list(map(weakref.ref, turning))

    @property
    def name(self) -> str:
        """What a person calls the block."""
        return f"Block {self.layer} ({type(self.block).__name__})"

    def enter(
        self, unit: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Begin a run: add residual and bias to what the block is called with."""
        at = self.row.tokens
        place = at if at < len(inputs) else list(options)[at - len(inputs)]
        tokens = inputs[place] if isinstance(place, int) else options[place]
        if torch.compiler.is_compiling():
            forward = self.positions.forwards.find(self.layer, tokens)
            self.traced = rung = self.positions.for_the_block(forward, self.layer)
            forward.next = self.layer + 1
        else:
            rung = self._begin(tokens)
        if rung.residual is not None:
            tokens = tokens + self._laid_out(rung.residual, tokens)
        if rung.bias is not None:
            options = self._biased(rung.bias, tokens, options)
        if isinstance(place, int):
            return (*inputs[:place], tokens, *inputs[place + 1 :]), options
        return inputs, options | {place: tokens}

    def _begin(self, tokens: Tensor) -> Rung:
        """Note that the block runs, and in which forward; return its rung."""
        runs = self.runs[threading.get_ident()]
        runs.append(None)  # `leave` is called too where what follows is refused
        forward = self.positions.forwards.find(self.layer, tokens)
        rung = self.positions.for_the_block(forward, self.layer)
        self.follow()
        if isinstance(tokens, fx.Proxy):
            for norm in self.hooked:
                norm.__dict__["__module__"] = __name__  # of torch.nn it would be a leaf, whose hooks no trace sees
        runs[-1] = Run(forward, rung, len(self._attending), len(self._turning))
        forward.next = self.layer + 1
        self.positions.forwards.hand(forward, tokens)
        return rung

    def _biased(self, bias: Tensor, tokens: Tensor, options: dict[str, Any]) -> dict[str, Any]:
        """Return a block's keywords with a bias beside what is added to its attention logits already."""
        name = self.positions.host.logits
        assert name is not None
        without = {name: None, "is_causal": False}
        if traced := {key: value for key, value in without.items() if isinstance(options.get(key), fx.Proxy)}:
            raise UsageError(
                "A symbolic trace (torch.fx) cannot tell whether a mask comes beside the bias. Trace without one: "
                f"torch.fx.symbolic_trace(model, concrete_args={traced})."
            )
        mask = options.get(name)
        if mask is not None:
            bias = bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask
        if options.get("is_causal"):  # fused or not, attention takes a mask or is causal, not both
            future = torch.ones(bias.shape[-2:], dtype=torch.bool, device=bias.device).triu(1)
            bias, options = bias.masked_fill(future, -torch.inf), {**options, "is_causal": False}
        return {**options, name: bias.to(tokens.dtype)}

    def offer(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> Joined | None:
        """Hand the norm the attention part too, with its tokens, where one kernel norms and adds."""
        if isinstance(self, Silent) or torch.compiler.is_compiling():  # the compiler merges them by itself
            return None
        tokens = inputs[0]
        if not isinstance(tokens, Tensor) or tokens.device.type not in self.positions.fused_on:
            return None
        if any(_of(hook) is not self for hook in observers(norm)) or self.positions.tokens_axis(tokens) != 1:
            return None
        attention = self._taken(tokens).attention
        if attention is None:
            return None
        attention = self._laid_out(attention, tokens)
        if not fits(norm, tokens, attention, self.positions.fused_from):
            return None
        return Joined(tokens, attention, self.positions)

    def attend(self, norm: nn.Module, inputs: tuple[Tensor | Joined, ...], output: Tensor) -> Tensor:
        """Add the attention part of the rung to the output of the norm before attention."""
        if isinstance(self, Silent):  # a copy of a bound method has the same function, and a copied object
            return output
        if isinstance(inputs[0], Joined):
            tokens, attention = inputs[0].tokens, None  # the norm has added it
        else:
            tokens, attention = inputs[0], self._taken(inputs[0]).attention
            if attention is None:
                return output
        if (run := self._count(attentions=1)) is not None:
            self.positions.forwards.hand(run.forward, tokens)
        if attention is None:
            return output
        if self.row.projection is not None:
            return self._projected(norm, tokens, output, attention)
        # LayerNorm's backward does not read its output, so the sum may take its place: an eighth of the time of a new
        # tensor (tokens of 16 images at DeiT-Ti's width, two CPU cores). Another norm may hand out its input.
        attention = self._laid_out(attention, output)
        return output.add_(attention) if isinstance(norm, nn.LayerNorm) else output + attention

    def turn(self, projection: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Turn queries or keys by the rotation of the rung."""
        if isinstance(self, Silent):
            return output
        rotated, kind = self.rotated, self.positions.scheme.embedding.rotation
        rotation = self._taken(inputs[0]).rotation
        if rotation is None or rotated is None or kind is None:
            return output
        self._count(rotations=1)
        split = output.unflatten(-1, (-1, 2 * rotation.shape[-1])) if rotated.axis is None else output
        heads_first = split if rotated.axis == 1 else split.transpose(1, 2)  # (B, heads, N, d)
        self._refuse_others(heads_first, rotation)
        turned = kind.turn(heads_first, rotation)
        turned = turned if rotated.axis == 1 else turned.transpose(1, 2)
        return turned.flatten(-2) if rotated.axis is None else turned

    def _refuse_others(self, channels: Tensor, rotation: Tensor) -> None:
        """Raise UsageError where queries or keys are others than their rotation was made for."""
        if isinstance(channels, fx.Proxy) or torch.compiler.is_compiling():
            return
        sides = (channels.shape[-2], rotation.shape[-2], channels.shape[-1], 2 * rotation.shape[-1])
        if all(isinstance(side, int) for side in sides) and (sides[0] != sides[1] or sides[2] != sides[3]):
            raise UsageError(
                f"{self.name} has queries or keys of {sides[0]} tokens and {sides[2]} channels, and the rotation of "
                f"this input is for {sides[1]} and {sides[3]}: some tokens were merged, dropped or added, or the row "
                "of the model names other modules. Leave that out, or mend the row: lape.Block(rotated=..., heads=...)."
            )

    def _taken(self, tokens: Tensor) -> Rung:
        """Return the rung that what is called within the block takes its part of; an empty one beside the model."""
        if torch.compiler.is_compiling():
            return Rung() if self.traced is None else self.traced
        runs = self.runs.get(threading.get_ident())
        if runs and (run := runs[-1]) is not None:
            run.forward.taken_without_gradient |= run.forward.differentiable and not torch.is_grad_enabled()
            return run.rung
        if backward_pass() == -1:
            self.positions.forwards.refuse_bypass(self.layer)
            return Rung()  # called by somebody beside the model
        forward = self.positions.forwards.find(self.layer, tokens)  # what is within the block is computed again
        return self.positions.for_the_block(forward, self.layer, again=True)

    def _count(self, attentions: int = 0, rotations: int = 0) -> Run | None:
        """Count that a part of the rung is taken; return the run, if it is one."""
        runs = () if torch.compiler.is_compiling() else self.runs.get(threading.get_ident(), ())
        if runs and (run := runs[-1]) is not None:
            run.attentions -= attentions
            run.rotations -= rotations
            return run
        return None

    def _projected(self, projection: nn.Module, tokens: Tensor, output: Tensor, attention: Tensor) -> Tensor:
        """Add it where a projection serves attention and MLP together: to the queries, keys and values alone."""
        width = 3 * attention.shape[-1]
        attention = self._laid_out(attention, tokens)
        if type(projection) is nn.Linear:
            projected = F.linear(attention, projection.weight[-width:])
            return output + F.pad(projected, (output.shape[-1] - width, 0))
        # Quantised, adapted, parametrised: it projects the sum itself.
        projected = type(projection).forward(projection, tokens + attention)  # pyright: ignore[reportAttributeAccessIssue]
        return torch.cat([output[..., :-width], projected[..., -width:]], dim=-1)

    def leave(self, unit: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """End a run: raise UsageError unless each part of its rung was taken once; convolve what the block puts out."""
        forwards = self.positions.forwards
        if torch.compiler.is_compiling():
            self.traced = None
            if forwards.latest is None:
                return None
            output, latest = self._convolved(output, forwards.latest), forwards.latest
            if self.layer == latest.last:
                forwards.close(latest)
            return output
        if inputs and isinstance(inputs[0], fx.Proxy):
            for norm in self.hooked:
                norm.__dict__.pop("__module__", None)
        runs = self.runs[threading.get_ident()]
        run = runs.pop() if runs else None
        if run is None or output is None:
            return None  # without an output it has raised an error of its own
        output = self._convolved(output, run.forward)
        if self.layer == run.forward.last:
            forwards.close(run.forward)
        else:
            forwards.hand(run.forward, output[self.row.tokens] if isinstance(output, tuple) else output)
        if run.attentions:
            path, due = self.row.projection or self.row.norms, len(self._attending)
            raise UsageError(
                f"{self.name} takes its position behind {path!r}, once; it called that {due - run.attentions} times, "
                f"and {due} was due, so its attention would not be told of positions, or its MLP would be too. Name "
                "the norm whose output enters attention alone: lape.Host(block=lape.Block(...))."
            )
        if run.rotations:
            due = len(self._turning)
            raise UsageError(
                f"{self.name} turns its queries and keys once each; what puts them out was called "
                f"{due - run.rotations} times, and {due} was due. Name the modules whose outputs they are: "
                "lape.Host(block=lape.Block(rotated=...))."
            )
        return output

    def _convolved(self, output: Any, forward: Forward) -> Any:
        """Return what the block puts out, behind its convolution where it has one."""
        if self.generator is None:
            return output
        if not isinstance(output, tuple):
            return self.positions.convolved(output, forward, self.layer, self.generator)
        at = self.row.tokens
        convolved = self.positions.convolved(output[at], forward, self.layer, self.generator)
        return (*output[:at], convolved, *output[at + 1 :])

    def _laid_out(self, part: Tensor, tokens: Tensor) -> Tensor:
        """Return a part of the rung as tokens lie; raise UsageError where they are others than it was made for."""
        if isinstance(tokens, fx.Proxy):
            return part
        if not torch.compiler.is_compiling():
            refuse_other_tokens(self.positions, self.name, part, tokens)
        return self.positions.laid_out(part, tokens)


def refuse_other_tokens(positions: RungSource, name: str, part: Tensor, tokens: Tensor) -> None:
    """Raise UsageError where what is called by a name is given other tokens than a part of its rung was made for."""
    at = positions.tokens_axis(tokens)
    sides = tokens.shape[:1] if at == 0 else tokens.shape[at:-1]
    # torch.export leaves some sides open, and would close them for being compared.
    known = all(isinstance(side, int) for side in (*sides, part.shape[1]))
    if known and (count := math.prod(sides)) != part.shape[1]:
        raise UsageError(
            f"{name} is given {count} tokens, and the positions of this input are those of {part.shape[1]}: some were "
            "merged, dropped or added behind the table, and which is not known. Leave that out, or apply LaPE to a "
            "model without it."
        )


def hooks_of(block: nn.Module) -> BlockHooks | None:
    """Return the hooks of a block, where it has some."""
    return block.__dict__.get(HOOKS)


def _of(hook: Any) -> Any:
    """Return the object that a hook is a method of, or the hook."""
    return getattr(hook, "__self__", hook)


def _unhook(module: nn.Module, belongs: Callable[[Any], bool]) -> None:
    """Take hooks off a module; handles of torch's own do not outlive copies and deletions."""
    for table in (module._forward_hooks, module._forward_pre_hooks):
        for number in [number for number, hook in table.items() if belongs(hook)]:
            del table[number]
            for marks in (
                module._forward_hooks_with_kwargs,
                module._forward_hooks_always_called,
                module._forward_pre_hooks_with_kwargs,
            ):
                marks.pop(number, None)


def unhook(module: nn.Module, positions: RungSource) -> None:
    """Take the hooks of a model's positions off a module."""
    _unhook(
        module,
        lambda hook: _of(hook) is positions.forwards or getattr(_of(hook), "positions", None) is positions,
    )
