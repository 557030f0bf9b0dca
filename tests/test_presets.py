import pytest

from gptforge.config import Config
from gptforge.config_checks import validate
from gptforge.errors import UserError
from gptforge.estimate import formulas
from gptforge.presets import PRESETS, get_preset


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_valid_configuration(name: str) -> None:
    validate(get_preset(name))
    assert get_preset(name).preset == name


def test_gpt2_is_the_default() -> None:
    assert get_preset("gpt2") == Config(preset="gpt2")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gpt2", 124_475_904),
        ("gpt2-medium", 354_871_296),
        ("gpt2-large", 774_090_240),
        ("gpt2-xl", 1_557_686_400),
    ],
)
def test_sizes_of_gpt2(name: str, parameters: int) -> None:
    config = get_preset(name)
    model = {**vars(config.model), "vocab_size": 50304}
    assert formulas.num_params(type(config.model)(**model)) == parameters
    assert config.global_batch_size == 128


def test_an_unknown_preset_is_an_error_with_the_names() -> None:
    with pytest.raises(UserError, match="gpt2-medium"):
        get_preset("gpt3")
