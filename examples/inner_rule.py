"""An inner rule of your own: gradient descent whose rate falls from step to step, with the fall meta-learned.

Run: python examples/inner_rule.py
"""

import torch

from lambda_maml import Pattern, adapt, data, models, rules


class Decaying(rules.Rule):
    """theta <- theta - lr decay^k g in step k; `decay` gets a gradient from the query loss."""

    def __init__(self, lr: float, decay: float) -> None:
        super().__init__()
        self.lr, self.decay = lr, torch.nn.Parameter(torch.tensor(decay))

    def update(self, grads, state, params, step):
        rate = self.lr * self.decay**step.index
        return {name: -rate * g for name, g in grads.items()}, state


if __name__ == "__main__":
    torch.manual_seed(0)
    model, rule = models.conv4(ways=5, in_channels=1, width=16, image_size=28), Decaying(0.4, 0.9)
    xs, ys, xq, yq = data.sample_tasks(data.load("glyphs"), 1, ways=5, shots=5)[0]
    for pattern in ("11111", "00011", "00001", "11111,00001"):
        learner = adapt(model, xs, ys, pattern=pattern, steps=5, rule=rule, second_order=True)
        loss = torch.nn.functional.cross_entropy(learner(xq), yq)
        (slope,) = torch.autograd.grad(loss, [rule.decay])
        print(f"{Pattern(pattern)}: query loss {loss.item():.3f}, its derivative by the decay {slope.item():+.4f}")
