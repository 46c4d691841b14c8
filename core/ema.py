"""An exponential moving average of the weights, which is what is evaluated and used."""
import contextlib

import torch


class EMA:
    """Keeps `average = rate * average + (1 - rate) * weights`, updated once per optimiser step that happened.

    decay: the rate in the long run; it starts lower, (1 + n) / (10 + n) at update n, so that the random or pretrained
    start is soon forgotten (as TensorFlow's ExponentialMovingAverage with num_updates).
    """

    def __init__(self, model, decay):
        self.model, self.decay = model, decay
        self.averages = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.updates = torch.zeros((), device=next(model.parameters()).device)

    @torch.no_grad()
    def update(self, happened=True):
        """happened: a bool, or a bool tensor on the model's device, for which the host never waits."""
        rate = ((1 + self.updates) / (10 + self.updates)).clamp(max=self.decay)
        weight = (1 - rate) * happened
        averages = list(self.averages.values())
        torch._foreach_lerp_(averages, [p.detach() for p in self.model.parameters()], [weight] * len(averages))
        self.updates += happened

    @contextlib.contextmanager
    def applied(self):
        """The model with the averages for weights, and with its own again afterwards."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self):
        for name, p in self.model.named_parameters():
            p.data, self.averages[name] = self.averages[name], p.data

    def state_dict(self):
        """name -> tensor, like the model's own."""
        return self.averages

    def load_state_dict(self, state, updates):
        """The averages and the number of updates that were saved; raises ValueError where they are not the model's."""
        if state.keys() != self.averages.keys():
            raise ValueError("averages that are not of its weights")
        for name, average in self.averages.items():
            average.copy_(state[name])
        self.updates.fill_(updates)
