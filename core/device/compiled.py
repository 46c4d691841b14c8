"""A model compiled by torch.compile for micro-batches of one size."""
import time
from collections.abc import Callable

import torch

from util import printable


class Compiled:
    """Call the compiled model for training micro-batches of `size` clips, else the model itself.

    The last micro-batch of an epoch and evaluation are not worth a compilation each.

    graphs: replay CUDA graphs, which saves the launch of each kernel. A graph writes gradients to
    fixed places, so they must be zeroed, not dropped.
    """

    def __init__(self, model: torch.nn.Module, size: int, graphs: bool = False):
        self.model, self.size, self.graphs = model, size, graphs
        self._compile()

    def _compile(self):
        mode = "reduce-overhead" if self.graphs else None
        self._compiled = torch.compile(self.model, dynamic=False, mode=mode)

    def reset(self) -> None:
        """Compile anew at the next call: other parameters are trained now."""
        torch._dynamo.reset()
        self._compile()

    def __call__(self, x, drop_noise=None, patch_ids=None) -> torch.Tensor:
        if len(x) != self.size or not self.model.training:
            return self.model(x, drop_noise, patch_ids)
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        return self._compiled(x, drop_noise, patch_ids)


def compile_for(learner, size: int, graphs: bool, attempt: Callable[[int], None]) -> None:
    """Compile the learner's model for micro-batches of `size` clips, or print why it stays eager.

    attempt(size): a forward and backward pass.
    """
    started = time.perf_counter()
    learner.compiled = Compiled(learner.model, size, graphs)
    learner.model.train()
    if graphs:
        # Without this the first backward pass would keep its output, which lies in the graphs' own
        # memory, as the gradient; the next replay would overwrite it.
        for parameter in learner.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
    try:
        for _ in range(3 if graphs else 1):  # graphs are recorded after a warm-up
            attempt(size)
    except Exception as error:  # no compiler, no Triton, unsupported code: a hundred types
        learner.compiled = None
        learner.zero_grad()
        reason = str(error).strip().splitlines() or [""]
        print("not compiled, the run goes on without: "
              f"{type(error).__name__}: {printable(reason[0][:200])}")
        return
    print(f"compiled for micro-batches of {size} in {time.perf_counter() - started:.0f} s")
