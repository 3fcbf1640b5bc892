"""`torch.compile` for the blocks of a decoder: one graph serves all blocks, in every size.

A graph must not depend on what came before. A resumed run meets other sizes first than a run that
was never stopped, and graphs for the sizes met so far would round otherwise. So every size is a
symbol from the first call on, no two sizes are one symbol because they were equal once, and nothing
is tuned by timing it.
"""

import torch
from torch import nn

from minirlhf.errors import MACHINE, UserError, printable
from minirlhf.models.transformer import Block

GRAPHS = 64  # with fewer, whether a block is compiled would depend on what came before it


def compile_blocks(*models: nn.Module) -> None:
    """Compiles the blocks of these models, in place; names and numbers of weights stay.

    Passes over whole rows are compiled, when they are first made, with and without a gradient;
    decoding is not.

    Raises:
        UserError: torch.compile does not work on this machine.
    """
    from torch._dynamo import config as graphs
    from torch.fx.experimental import _config as sizes

    graphs.recompile_limit, sizes.use_duck_shape = GRAPHS, False
    device = next(models[0].parameters()).device
    try:
        torch.compile(torch.exp, dynamic=True)(torch.zeros(3, device=device))
    except Exception as error:  # whatever the compiler's own tools raise
        why = printable(str(error).strip().partition("\n")[0]) or type(error).__name__
        do = "install a C++ compiler (a GPU needs Triton too), or do not compile"
        raise UserError("torch.compile", f"fails here: {why}", do, MACHINE) from error
    for model in models:
        for module in model.modules():
            if isinstance(module, Block):
                module.compile(dynamic=True)
