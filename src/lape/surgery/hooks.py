"""What a block of a foreign model is told by hooks: each part of its rung, and each exactly once.

A block's rung decides what is hung. While the block runs, the norms that stand before its attention now, found by their
paths, add the rung's attention part; and when it is done, whatever it did not take, or took twice, is an error.
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
from lape.hosts import Block, Host, parts
from lape.method import Rung
from lape.surgery.forwards import Forward, Forwards, backward_pass
from lape.surgery.weak import Weak


class RungSource(Protocol):
    """What hooks ask the positions of a model."""

    host: Host
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


@dataclass
class Run:
    """One run of a block: its forward, its rung, and how many of its norms have still to take the attention part."""

    forward: Forward
    rung: Rung
    due: int


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
        self._block = Weak(block)
        self._hooked: list[weakref.ref[nn.Module]] = []  # the norms (or projections) that have our hook
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
        return self.__dict__ | {"_hooked": [], "runs": defaultdict(list)}  # `follow` finds the norms' hooks again

    @property
    def block(self) -> nn.Module:
        """The block."""
        return self._block()

    @property
    def hooked(self) -> list[nn.Module]:
        """The norms (or projections) that have our hook and are still there."""
        return [norm for reference in self._hooked if (norm := reference()) is not None]

    def hang(self, rung: Rung) -> None:
        """Hang all hooks on the block as it is now; raise UsageError where it cannot take a part of its rung."""
        self.block.__dict__[HOOKS] = self
        if rung.empty:
            return
        unit = called(self.block, self.row)
        if unit is not self.block and (rung.residual is not None or rung.bias is not None):
            raise UsageError(
                f"{self.name} is a list whose parts the model calls one by one, and between them nothing can be added "
                "to the residual stream or the attention logits. Use join='lape', 'lape-sharing' or 'default'."
            )
        self.hung = True
        unit.register_forward_pre_hook(self.enter, with_kwargs=True)
        unit.register_forward_hook(self.leave, always_call=True)
        if rung.attention is not None:
            self.follow()

    def take_down(self) -> None:
        """Take all hooks off the block and its norms."""
        self.block.__dict__.pop(HOOKS, None)
        for module in (called(self.block, self.row), *self.hooked):
            _unhook(module, lambda hook: hook is self)
        self._hooked = []

    def follow(self) -> None:
        """Hang the hook on the norms that stand before attention now: one may have been replaced since."""
        norms = parts(self.block, self.row.projection or self.row.norms)
        hooked = self.hooked
        if len(norms) == len(hooked) and all(norm is one for norm, one in zip(norms, hooked, strict=True)):
            return
        for norm in hooked:
            _unhook(norm, lambda hook: hook is self, enter=False)
        for norm in norms:
            theirs = [_of(hook) for hook in norm._forward_hooks.values()]
            if any(isinstance(other, BlockHooks) and other is not self for other in theirs):
                raise UsageError(
                    f"{self.name} has its norm before attention in common with another block, and would be told of "
                    "that one's positions too. Give each block a norm of its own."
                )
            if not any(other is self for other in theirs):  # quantisation hands hooks on to what it puts in place
                norm.register_forward_hook(self.attend)
        self._hooked = [weakref.ref(norm) for norm in norms]

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
        if rung.attention is not None:
            self.follow()
        if isinstance(tokens, fx.Proxy):
            for norm in self.hooked:
                norm.__dict__["__module__"] = __name__  # of torch.nn it would be a leaf, whose hooks no trace sees
        runs[-1] = Run(forward, rung, 0 if rung.attention is None else len(self._hooked))
        forward.next = self.layer + 1
        self.positions.forwards.hand(forward, tokens)
        return rung

    def _biased(self, bias: Tensor, tokens: Tensor, options: dict[str, Any]) -> dict[str, Any]:
        """Return a block's keywords with a bias beside what is added to its attention logits already."""
        name = self.positions.host.logits
        assert name is not None
        mask = options.get(name)
        if mask is not None:
            bias = bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask
        if options.get("is_causal"):  # fused or not, attention takes a mask or is causal, not both
            future = torch.ones(bias.shape[-2:], dtype=torch.bool, device=bias.device).triu(1)
            bias, options = bias.masked_fill(future, -torch.inf), options | {"is_causal": False}
        return options | {name: bias.to(tokens.dtype)}

    def attend(self, norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Add the attention part of the rung to the output of the norm before attention."""
        if isinstance(self, Silent):  # a copy of a bound method has the same function, and a copied object
            return output
        attention = self._attention(inputs[0])
        if attention is None:
            return output
        if self.row.projection is not None:
            return self._projected(norm, inputs[0], output, attention)
        # LayerNorm's backward does not read its output, so the sum may take its place: an eighth of the time of a new
        # tensor (tokens of 16 images at DeiT-Ti's width, two CPU cores). Another norm may hand out its input.
        attention = self._laid_out(attention, output)
        return output.add_(attention) if isinstance(norm, nn.LayerNorm) else output + attention

    def _attention(self, tokens: Tensor) -> Tensor | None:
        """Return the attention part of the rung, and count that it is taken."""
        if torch.compiler.is_compiling():
            return None if self.traced is None else self.traced.attention
        runs = self.runs.get(threading.get_ident())
        if runs and (run := runs[-1]) is not None:
            run.due -= 1
            run.forward.taken_without_gradient |= run.forward.differentiable and not torch.is_grad_enabled()
            self.positions.forwards.hand(run.forward, tokens)
            return run.rung.attention
        if backward_pass() == -1:
            self.positions.forwards.refuse_bypass(self.layer)
            return None  # called by somebody beside the model
        forward = self.positions.forwards.find(self.layer, tokens)  # what is within the block is computed again
        return self.positions.for_the_block(forward, self.layer, again=True).attention

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

    def leave(self, unit: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """End a run: raise UsageError unless the block has taken the attention part of its rung once."""
        forwards = self.positions.forwards
        if torch.compiler.is_compiling():
            self.traced = None
            if forwards.latest is not None and self.layer == len(forwards.latest.layers) - 1:
                forwards.close(forwards.latest)
            return
        if inputs and isinstance(inputs[0], fx.Proxy):
            for norm in self.hooked:
                norm.__dict__.pop("__module__", None)
        runs = self.runs[threading.get_ident()]
        run = runs.pop() if runs else None
        if run is None or output is None:
            return  # without an output it has raised an error of its own
        if self.layer == run.forward.last:
            forwards.close(run.forward)
        else:
            forwards.hand(run.forward, output[self.row.tokens] if isinstance(output, tuple) else output)
        if run.rung.attention is None or not run.due:
            return
        path, due = self.row.projection or self.row.norms, len(self.hooked)
        raise UsageError(
            f"{self.name} takes its position behind {path!r}, once; it called that {due - run.due} times, and {due} "
            "was due, so its attention would not be told of positions, or its MLP would be too. Name the norm whose "
            "output enters attention alone: lape.Host(block=lape.Block(...))."
        )

    def _laid_out(self, part: Tensor, tokens: Tensor) -> Tensor:
        """Return a part of the rung as tokens lie; raise UsageError where they are others than it was made for."""
        positions = self.positions
        if isinstance(tokens, fx.Proxy):
            return part
        at = positions.tokens_axis(tokens)
        sides = tokens.shape[:1] if at == 0 else tokens.shape[at:-1]
        # torch.export leaves some sides open, and would close them for being compared.
        known = all(isinstance(side, int) for side in (*sides, part.shape[1]))
        if known and not torch.compiler.is_compiling() and (count := math.prod(sides)) != part.shape[1]:
            raise UsageError(
                f"{self.name} is given {count} tokens, and the positions of this input are those of {part.shape[1]}: "
                "some were merged, dropped or added behind the table, and which is not known. Leave that out, or apply "
                "LaPE to a model without it."
            )
        return positions.laid_out(part, tokens)


def hooks_of(block: nn.Module) -> BlockHooks | None:
    """Return the hooks of a block, where it has some."""
    return block.__dict__.get(HOOKS)


def _of(hook: Any) -> Any:
    """Return the object that a hook is a method of, or the hook."""
    return getattr(hook, "__self__", hook)


def _unhook(module: nn.Module, belongs: Callable[[Any], bool], enter: bool = True) -> None:
    """Take hooks off a module; handles of torch's own do not outlive copies and deletions."""
    for table in (module._forward_hooks, *([module._forward_pre_hooks] if enter else [])):
        for number in [number for number, hook in table.items() if belongs(_of(hook))]:
            del table[number]
            for marks in (
                module._forward_hooks_with_kwargs,
                module._forward_hooks_always_called,
                module._forward_pre_hooks_with_kwargs,
            ):
                marks.pop(number, None)


def unhook(module: nn.Module, positions: RungSource) -> None:
    """Take the hooks of a model's positions off a module."""
    _unhook(module, lambda hook: hook is positions.forwards or getattr(hook, "positions", None) is positions)
