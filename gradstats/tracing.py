"""What runs while a graph is compiled: real Python, where the compiler only has names of things."""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
from torch.utils._device import _device_constructors

live: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()  # interposers, by key
# An option of compilers after torch 2.9's.
CHECKPOINTS = "skip_fwd_side_effects_in_bwd_under_checkpoint"
HIDES_CONSTRUCTORS = torch.__version__ < "2.12"  # compared as versions are


def show_constructors() -> None:
    """Have older compilers give torch.arange and its like to a mode, as 2.12 and eager torch do.

    Else constants lose their mark, and positions as many as the samples pass for samples.
    """
    tracer = sys.modules.get("torch._dynamo.variables.torch")
    if tracer is not None:
        tracer.get_overridable_functions().update(_device_constructors())


def adopt(ctx: Any) -> None:
    """Runs while a graph is compiled: parameters may be other objects than when the model was attached."""
    key = ctx.get_local("key").as_python_constant()
    live[key].adopt_at(ctx.get_local("path").as_python_constant())


def ensure_shared_leaf(ctx: Any) -> None:
    """Runs while a graph is compiled: makes the leaf of its batch size, once."""
    if HIDES_CONSTRUCTORS:
        show_constructors()
    key = ctx.get_local("key").as_python_constant()
    batch = ctx.get_local("batch").as_python_constant()
    live[key].make_shared_leaf(batch)


def note_in_checkpoints(ctx: Any) -> None:
    """Runs while a graph is compiled: what a checkpoint runs may note the uses in it, once, until its end.

    The compiler refuses what changes an object there, for the backward does not change it again.
    """
    from torch._dynamo import config

    if not getattr(config, CHECKPOINTS, True):
        setattr(config, CHECKPOINTS, True)
        output = ctx._i_will_not_complain_if_bc_breaks_InstructionTranslator().output
        output.add_cleanup_hook(lambda: setattr(config, CHECKPOINTS, False))


def is_entered(mode: Any) -> bool:
    """Whether torch functions are given to the mode at this point of what is traced."""
    depth = torch._C._len_torch_function_stack()
    return any(torch._C._get_function_stack_at(i) is mode for i in range(depth))


def note_shared(ctx: Any) -> None:
    """Runs while a graph is compiled: what traces it next knows that the parameter has several uses."""
    key = ctx.get_local("key").as_python_constant()
    live[key].shared.add(ctx.get_local("name").as_python_constant())


def trace_again(ctx: Any) -> None:
    from torch._dynamo.exc import UnspecializeRestartAnalysis  # the one that may take other paths

    raise UnspecializeRestartAnalysis(restart_reason="parameters are used several times")
