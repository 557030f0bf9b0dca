import torch
from torch import nn

from gptforge.optim.ema import WINDOW_DIVISOR, WeightEMA


def walk(model: nn.Module, ema: WeightEMA, steps: int) -> list[torch.Tensor]:
    """Change the weights and update the average; returns the weights after each step."""
    history = []
    for _ in range(steps):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ema.update()
        ema.num_updates += 1
        history.append(model.weight.detach().clone())
    return history


def test_average_equals_a_plain_loop() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    ema = WeightEMA(model, 0.9)
    expected = model.weight.detach().double()
    decays = []
    for step in range(300):
        decays.append(ema.decay)
        [weight] = walk(model, ema, 1)
        expected = decays[-1] * expected + (1 - decays[-1]) * weight.double()
        # 1 / (1 - decay) is the number of steps that count: a quarter of those made, or fewer.
        assert round(1 / (1 - ema.decay)) <= max(1, (step + 1) // WINDOW_DIVISOR)
    assert decays == sorted(decays)
    assert decays[0] == 0
    assert decays[-1] == 0.9
    torch.testing.assert_close(ema.tensors["weight"].double(), expected, rtol=1e-5, atol=1e-5)


def test_swap_exchanges_weights_and_average() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    ema = WeightEMA(model, 0.9)
    weight = walk(model, ema, 50)[-1]
    average = ema.tensors["weight"].clone()
    assert not torch.equal(weight, average)
    with ema.swap():
        assert torch.equal(model.weight, average)
        assert torch.equal(ema.tensors["weight"], weight)
    assert torch.equal(model.weight, weight)
    assert torch.equal(ema.tensors["weight"], average)
