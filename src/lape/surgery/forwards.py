"""The forwards of one model: each owns its rungs, and a block finds the forward that it runs in.

Several may run at a time: in threads, within one another, by turns, and once more in a backward pass.
"""

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdRef

from lape.errors import UsageError
from lape.method import Grid, Rung
from lape.surgery.layers import Layer

# A layer's rung and what it hands on, from its number and the ω_l that it is handed.
Step = Callable[["Forward", int, Tensor | None], tuple[Rung, Tensor | None]]


@dataclass(eq=False)
class Forward:
    """One forward: its grid, its layers, and the ω_l as far as its blocks have asked for them.

    The rung of a layer is made when its block asks, so that only the parameters of that block are read.
    """

    grid: Grid
    layers: list[Layer]
    step: Step
    start: Callable[[Grid], Tensor | None]
    rows: Tensor | None = None  # (B, N) or (1, N): which rows the tokens have, where not all in their order
    training: bool = False  # what moves in training does
    next: int = 0  # the number of the block that has not run yet
    last: int = -1  # the number of the last block that takes something
    tokens: Tensor | None = None  # what was handed to the next block
    task: int = -1  # the backward pass that it runs in
    open: bool = True
    differentiable: bool = field(init=False)  # it was begun with gradients
    without_gradient: bool = field(init=False)  # some ω_l was made without
    handed: list[Tensor | None] = field(init=False)  # ω_l for each layer so far, and for the next
    made: dict[int, Rung] = field(default_factory=dict)  # the rungs, by layer
    taken_without_gradient: bool = False  # a norm took its part without gradients, though its rung has some
    constants: dict[Hashable, Tensor] = field(default_factory=dict)  # what its layers share, and no parameter is in

    def __post_init__(self) -> None:
        self.differentiable = torch.is_grad_enabled()
        self.without_gradient = not self.differentiable
        self.handed = [self.start(self.grid)]

    def once(self, of: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """Return what is made for the first layer that asks for it, for all layers."""
        if of not in self.constants:
            self.constants[of] = make()
        return self.constants[of]

    def rung(self, layer: int) -> Rung:
        """Return the rung of a layer, of the rows that the tokens have."""
        if torch.is_grad_enabled() and self.without_gradient:
            # Re-entrant checkpointing runs a block first without gradients, then on a graph of its own. That one must
            # start at the parameters: a graph that the layers share can be walked back only once.
            return self._anew().rung(layer)
        while len(self.handed) <= layer:  # blocks that were passed over hand on all the same
            self._take(len(self.handed) - 1)
        return self._take(layer)

    def rung_again(self, layer: int) -> Rung:
        """Return the rung of a layer of which a part is computed again in a backward pass, and not the block."""
        if self.taken_without_gradient or layer not in self.made:
            return self._anew().rung(layer)
        return self.made[layer]

    def _take(self, layer: int) -> Rung:
        self.without_gradient |= not torch.is_grad_enabled()
        rung, following = self.step(self, layer, self.handed[layer])
        rung = rung if self.rows is None else rung.kept(self.rows)
        if len(self.handed) == layer + 1:  # else the block runs once more
            self.handed.append(following)
            self.made[layer] = rung
        return rung

    def _anew(self) -> "Forward":
        return Forward(
            *(self.grid, self.layers, self.step, self.start),
            rows=self.rows,
            training=self.training,
            constants=self.constants,
        )


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.calls: list[_Call] = []
        self.newest: Forward | None = None  # of those that were begun outside of a call


@dataclass
class _Call:
    """One call of the model that has not returned, and the forwards begun in it."""

    task: int
    forwards: list[Forward] = field(default_factory=list)


class Forwards:
    """The forwards of one model that are running, and those whose blocks may run again in a backward pass."""

    def __init__(self) -> None:
        self.of_thread = _OfThread()
        # By where tokens lie in memory: the forward that they belong to, for as long as they live.
        self.by_tokens: dict[int, tuple[WeakIdRef, Forward]] = {}
        self.latest: Forward | None = None  # for compiled graphs, which know of no other

    def __reduce__(self) -> tuple[type["Forwards"], tuple[()]]:
        return Forwards, ()  # no copy is in the middle of a forward

    # --- A call of the model

    def enter_call(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Note that the model is called."""
        if not torch.compiler.is_compiling():
            self.of_thread.calls.append(_Call(backward_pass()))

    def leave_call(self, model: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Note that the call has returned or failed: the forwards begun in it are over."""
        if torch.compiler.is_compiling():
            self.latest = None
            return
        forwards = self.of_thread.calls.pop().forwards if self.of_thread.calls else []
        for forward in forwards:
            self.close(forward)
        silent = [forward for forward in forwards if forward.last >= 0 and not forward.next]
        if silent and output is not None and not model.training:  # in training every layer may drop out
            raise UsageError(NO_BLOCK)

    # --- A forward

    def begin(self, forward: Forward) -> None:
        """Note a forward whose positions have just met its tokens."""
        if torch.compiler.is_compiling():
            if forward.last >= 0:  # else nobody would end it, and every compiled forward would make it and keep it
                self.latest = forward
            return
        self.latest = forward
        forward.task = backward_pass()
        calls = self.of_thread.calls
        if calls:
            calls[-1].forwards.append(forward)
        else:
            self.of_thread.newest = forward

    def hand(self, forward: Forward, tokens: object) -> None:
        """Note the tokens that a forward hands to its next block."""
        if torch.compiler.is_compiling() or not isinstance(tokens, Tensor):
            return
        if self.of_thread.calls:
            forward.tokens = tokens
        if forward.differentiable or not self.of_thread.calls:
            self._remember(tokens, forward)

    def follow(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Note that a module makes others of the tokens that were handed out: a hook on one before the first block."""
        if torch.compiler.is_compiling() or not inputs or not isinstance(inputs[0], Tensor):
            return
        forward = self._handed_out(inputs[0]) or self._recall(inputs[0])
        if forward is not None and forward.open:
            self.hand(forward, output)

    def _running(self) -> list[Forward]:
        """Return the forwards that this thread is in, in this backward pass or in none: those of the innermost call."""
        calls, newest, task = self.of_thread.calls, self.of_thread.newest, backward_pass()
        if calls and calls[-1].task == task:
            return calls[-1].forwards
        return [newest] if newest is not None and newest.task == task else []

    def _handed_out(self, tokens: object) -> Forward | None:
        """Return the running forward that handed these very tokens to its next block."""
        return next((forward for forward in self._running() if forward.tokens is tokens), None)

    def _remember(self, tokens: Tensor, forward: Forward) -> None:
        place = _place(tokens)
        known = self.by_tokens.get(place) if place else None
        if place and (known is None or known[1] is not forward or known[0]() is None):

            def forget(reference: WeakIdRef, memory: dict[int, tuple[WeakIdRef, Forward]] = self.by_tokens) -> None:
                if place in memory and memory[place][0] is reference:
                    del memory[place]

            self.by_tokens[place] = WeakIdRef(tokens, forget), forward

    def _recall(self, tokens: Tensor) -> Forward | None:
        place = _place(tokens)
        reference, forward = self.by_tokens.get(place, (None, None)) if place else (None, None)
        return None if reference is None or reference() is None else forward

    def find(self, layer: int, tokens: object) -> Forward:
        """Return the forward in which a block runs that is given these tokens.

        Raises UsageError where the block runs in none, or where it cannot be known in which.
        """
        if torch.compiler.is_compiling():
            if self.latest is None:
                raise UsageError(NO_FORWARD)
            return self.latest
        again = backward_pass() != -1
        remembered = self._recall(tokens) if isinstance(tokens, Tensor) else None
        if remembered is not None and (remembered.open or again):
            return remembered
        if (forward := self._handed_out(tokens)) is not None:
            return forward
        possible = [forward for forward in self._running() if forward.next <= layer]
        if not possible and again:
            possible = list({id(forward): forward for _, forward in self.by_tokens.values()}.values())
            if len(possible) != 1:
                raise UsageError(NOT_REMEMBERED)
        if len(possible) == 1:
            return possible[0]
        raise UsageError(SEVERAL_FORWARDS if possible else NO_FORWARD)

    def refuse_bypass(self, layer: int) -> None:
        """Raise UsageError where a forward runs, and a block's norm is called though the block itself is not."""
        if any(forward.next <= layer for forward in self._running()):
            raise UsageError(NO_BLOCK)

    def close(self, forward: Forward) -> None:
        """Note that a forward is over: from here on its blocks run in a backward pass alone."""
        forward.open, forward.tokens = False, None
        if torch.compiler.is_compiling():
            self.latest = None
            return
        if self.of_thread.newest is forward:
            self.of_thread.newest = None
        if self.latest is forward:
            self.latest = None
        for call in self.of_thread.calls:
            if forward in call.forwards:
                call.forwards.remove(forward)


NO_FORWARD = (
    "This block's positions come from its model: call the model, not the block on its own, nor a loop of your own over "
    "its blocks."
)
NO_BLOCK = (
    "The model's blocks are not called but their forward methods, or graphs that were compiled before lape.apply, and "
    "so they take no positions. Call block(x), not block.forward(x), and compile after lape.apply."
)
SEVERAL_FORWARDS = (
    "Several forwards of this model have begun and none of them handed out the tokens that this block is given, so it "
    "cannot be known whose positions are meant. Finish one before the next begins."
)
NOT_REMEMBERED = (
    "Under activation checkpointing a block runs again in the backward pass with the tokens that it had before, and "
    "these are others: they were moved or copied. Leave out what moves them (saving tensors on the CPU), or "
    "checkpointing."
)


def backward_pass() -> int:
    """Return the number of the backward pass that runs in this thread; -1: none does."""
    return torch._C._current_graph_task_id()


def _place(tokens: Tensor) -> int:
    """Return where tokens lie in memory; 0 for such as lie nowhere (of torch.func, of jit)."""
    try:
        return tokens.data_ptr()
    except RuntimeError:
        return 0
