"""The model compiled for micro-batches of one size."""
import torch


class Compiled:
    """model(x, noise, kept) through torch.compile while the model trains on (size, n_mels, frames), else as it is: ragged
    micro-batches and evaluation are not worth a compilation each.

    graphs: replay CUDA graphs, which spares the launch of each kernel; gradients then have to stay where they are
    (zeroed, not dropped), since a graph writes to fixed places.
    """

    def __init__(self, model, size, graphs=False):
        self.model, self.size, self.graphs = model, size, graphs
        self._fast = torch.compile(model, dynamic=False, mode="reduce-overhead" if graphs else None)

    def __call__(self, x, noise=None, kept=None):
        if len(x) != self.size or not self.model.training:
            return self.model(x, noise, kept)
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        return self._fast(x, noise, kept)
