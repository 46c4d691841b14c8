"""An exponential moving average (EMA) of the weights, evaluated and used instead of them."""
import contextlib
from collections.abc import Iterator

import torch


class EMA:
    """`average = rate * average + (1 - rate) * weights`, updated once per applied step.

    decay: the rate in the long run. It starts lower, (1 + n) / (10 + n) at update n, so that the
    average soon forgets its start (TensorFlow's ExponentialMovingAverage with num_updates).
    """

    def __init__(self, model: torch.nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.averages = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.updates = torch.zeros((), device=next(model.parameters()).device)

    @torch.no_grad()
    def update(self, applied: bool | torch.Tensor = True) -> None:
        """Update after a step. A bool tensor on the model's device never makes the host wait."""
        rate = ((1 + self.updates) / (10 + self.updates)).clamp(max=self.decay)
        weight = (1 - rate) * applied  # 0 for a skipped step
        averages = list(self.averages.values())
        parameters = [p.detach() for p in self.model.parameters()]
        torch._foreach_lerp_(averages, parameters, [weight] * len(averages))
        self.updates += applied

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the averages for the block, then its own weights again."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self):
        for name, parameter in self.model.named_parameters():
            own = parameter.data
            parameter.data = self.averages[name]
            self.averages[name] = own

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averages by parameter name."""
        return self.averages

    def load_state_dict(self, averages: dict[str, torch.Tensor], updates: float) -> None:
        """Load averages and their number of updates; ValueError if they fit another model."""
        if averages.keys() != self.averages.keys():
            raise ValueError("its averages are of other weights")
        for name, average in self.averages.items():
            average.copy_(averages[name])
        self.updates.fill_(updates)
