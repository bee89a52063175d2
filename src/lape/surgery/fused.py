"""When a layer's norm and what it adds for positions are one kernel, and how a norm comes to call it.

On a GPU the sum LN_x|l(x_l) + p_l costs more than its norm: under autocast the norm writes float32, the sum reads and
writes it again, and the product that follows reads it once more for its cast. So the norm is handed `Joined` in place
of its tokens, and runs as it is: where it calls `F.layer_norm`, one kernel (`lape.surgery.kernels`) reads the tokens
once and writes the sum once, in the dtype that the product would cast it to.
"""

import warnings
from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as modules

from lape.hosts import class_name

DEVICES: tuple[str, ...] = ("cuda",)  # the types of devices whose tokens are normed so
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHANNELS = 8192  # that a program holds of a token, at most
WIDE = 384  # channels from which on it was faster on an H100; with fewer the host was slower than the card


class Fusing(Protocol):
    """The positions of a model, as far as they say where its norms add positions by themselves."""

    fused_on: tuple[str, ...]  # types of devices
    fused_from: int  # channels


class Joined:
    """Tokens x (B, ..., D) and what joins them behind their norm, p (1, ..., D): `F.layer_norm` of it is LN(x) + p."""

    def __init__(self, tokens: Tensor, position: Tensor, positions: Fusing) -> None:
        self.tokens, self.position, self.positions = tokens, position, positions

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, inputs: tuple[Any, ...], options: Mapping[str, Any] | None = None
    ) -> Tensor:
        """Take the place of `F.layer_norm`, the one function that a norm of `fits` calls."""
        joined: Joined = inputs[0]
        return joined.normed(inputs[1], **(options or {}))

    def normed(self, shape: list[int], weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """Return LN(x) + p; where the kernel cannot be built, it is not tried again in this model."""
        tokens, position, device = self.tokens, self.position, self.tokens.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tokens.dtype
        try:
            from lape.surgery.kernels import layer_norm_plus

            rows = tokens.flatten(1, -2), position.flatten(1, -2).squeeze(0)
            return layer_norm_plus(rows[0], weight, bias, rows[1], eps, dtype).view(tokens.shape)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # Triton asks for a compiler, a place for files, a card that it knows
            self.positions.fused_on = ()
            if not isinstance(error, ImportError):  # without Triton there is nothing to say
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                warnings.warn(
                    f"Norms and positions are computed one after the other, which is slower: the kernel that does both "
                    f"cannot be built ({reason}). lape.set_fused(model, False) leaves it out.",
                    stacklevel=2,
                )
        return F.layer_norm(tokens, shape, weight, bias, eps).add_(position)


def fits(norm: Any, tokens: Tensor, position: Tensor, fewest: int) -> bool:
    """Return whether one kernel computes what a norm and a sum with a position (1, ..., D) would, from `fewest` on."""
    if _transformed() or not _layer_norm(norm):
        return False
    tensors = tokens, norm.weight, norm.bias, position
    return (
        all(type(one) in (Tensor, nn.Parameter) for one in tensors)  # not None, nor a subclass, whose memory is another
        and all(one.device == tokens.device and one.dtype in DTYPES for one in tensors)
        and (norm.weight.dtype == norm.bias.dtype == tokens.dtype or torch.is_autocast_enabled(tokens.device.type))
        and position.shape == (1, *tokens.shape[1:])
        and norm.normalized_shape == tokens.shape[-1:]
        and tokens.numel() > 0
        and fewest <= tokens.shape[-1] <= CHANNELS
    )


def _transformed() -> bool:
    """Return whether a function is traced or differentiated in a way in which a kernel needs rules of its own."""
    tracing = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    return tracing or functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def _layer_norm(norm: Any) -> bool:
    """Return whether all that a norm does is to call `F.layer_norm`: torch's, and timm's unless it is fast."""
    timms = class_name(type(norm)) == "timm.layers.norm.LayerNorm" and not norm._fast_norm
    return (type(norm) is nn.LayerNorm or timms) and "forward" not in norm.__dict__


def observers(norm: nn.Module) -> list[Any]:
    """Return all that is called with what a norm gets and puts out, or with its gradients."""
    everywhere = modules._global_forward_hooks, modules._global_forward_pre_hooks, modules._global_backward_hooks
    tables = norm._forward_hooks, norm._forward_pre_hooks, norm._backward_hooks, norm._backward_pre_hooks
    return [hook for table in (*tables, *everywhere) for hook in table.values()]
