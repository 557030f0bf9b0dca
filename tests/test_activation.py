"""Both forms of GELU, GPT-2's tanh and nanoGPT's exact one, wherever a model can go."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers

from gptforge import load
from gptforge.bench.baselines import transformers_model
from gptforge.builders.export_model import export_gguf, export_hf
from gptforge.builders.import_model import import_if_needed, import_model
from gptforge.builders.load_model import load_saved
from gptforge.checkpoint.format import read_config
from gptforge.config import Config, GPTConfig
from gptforge.convert.bundle import ModelBundle
from gptforge.convert.hf import read_hf, write_hf
from gptforge.convert.nanogpt import read_nanogpt
from gptforge.device import Precision
from gptforge.errors import UserError
from gptforge.inference.model import InferenceModel
from gptforge.kernel_select import select_kernels
from gptforge.kernels.packed_linear import PackedLinear
from gptforge.model import GPT
from gptforge.tokenizers.char import ByteTokenizer
from gptforge.training.backends.manual import ManualBackend
from tests.programs import DEBUG

BF16 = Precision(torch.bfloat16, "")
SHAPE = GPTConfig(block_size=32, vocab_size=256, n_layer=2, n_head=2, n_embd=64, activation="gelu")


@pytest.fixture
def bundle() -> ModelBundle:
    """A model with activations so large that the two forms differ clearly."""
    model = GPT(SHAPE).init_weights(torch.Generator().manual_seed(0))
    tensors = {n: 6 * t.detach() for n, t in model.state_dict().items() if "lm_head" not in n}
    return ModelBundle(SHAPE, tensors, ByteTokenizer())


@pytest.fixture
def ckpt(bundle, tmp_path) -> Path:
    """The same model as nanoGPT saves it."""
    names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    shape = {name: getattr(SHAPE, name) for name in names} | {"bias": True, "dropout": 0.0}
    state = {**bundle.state_dict, "lm_head.weight": bundle.state_dict["transformer.wte.weight"]}
    torch.save({"model": state, "model_args": shape}, tmp_path / "ckpt.pt")  # noqa: TID251
    return tmp_path / "ckpt.pt"


def nanogpt_logits(bundle: ModelBundle, ids: torch.Tensor) -> torch.Tensor:
    """Logits as nanoGPT's model.py computes them."""
    w, (batch, length) = bundle.state_dict, ids.shape
    x = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][:length]

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def layer_norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    for n in range(SHAPE.n_layer):
        block = f"transformer.h.{n}"
        qkv = linear(f"{block}.attn.c_attn", layer_norm(f"{block}.ln_1", x)).split(SHAPE.n_embd, 2)
        q, k, v = (t.view(batch, length, SHAPE.n_head, -1).transpose(1, 2) for t in qkv)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + linear(f"{block}.attn.c_proj", y.transpose(1, 2).reshape(batch, length, -1))
        fch = linear(f"{block}.mlp.c_fc", layer_norm(f"{block}.ln_2", x))
        x = x + linear(f"{block}.mlp.c_proj", torch.nn.GELU()(fch))
    return layer_norm("transformer.ln_f", x) @ w["transformer.wte.weight"].t()


IDS = torch.arange(64).view(2, 32) * 7 % 256


def gap(bundle: ModelBundle) -> float:
    """How much the logits of the two forms differ."""
    other = dataclasses.replace(SHAPE, activation="gelu_tanh")
    other_logits = ModelBundle(other, bundle.state_dict, bundle.tokenizer).build_model()(IDS)
    return float((other_logits - bundle.build_model()(IDS)).detach().abs().max())


def test_imported_nanogpt_logits_match(ckpt, bundle) -> None:
    read = read_nanogpt(ckpt, tokenizer=ByteTokenizer())
    assert read.config.activation == "gelu"
    error = float((read.build_model()(IDS) - nanogpt_logits(bundle, IDS)).detach().abs().max())
    assert error < gap(bundle) / 50


def test_inference_model_uses_it(bundle) -> None:
    model = bundle.build_model()
    for frozen in (False, True):
        inference = InferenceModel(model, vocab_size=256, frozen=frozen)
        cache = inference.allocate_cache(2, 32)
        slots = torch.arange(32)
        with torch.inference_mode():
            logits = inference.forward(IDS, slots.expand(2, 32), cache, slots, None)
            assert float((logits - model(IDS)[:, -1]).abs().max()) < gap(bundle) / 50


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_packed_linear_has_both_forms(packed, approximate) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 512, generator=generator), torch.randn(512, 512, generator=generator)
    linear = PackedLinear(weight, weight[0], pack=packed)
    expected = F.gelu(F.linear(x, weight, weight[0]), approximate=approximate)
    torch.testing.assert_close(linear.forward_gelu(x, approximate), expected, rtol=1e-4, atol=1e-4)


def test_kernels_with_tanh_gelu_are_not_selected_for_the_exact_one() -> None:
    gpu = torch.device("cuda")
    if torch.version.hip:
        pytest.skip("no manual backward on AMD GPUs")
    assert select_kernels(Config(), gpu, BF16).manual_backward
    assert not select_kernels(Config(activation="gelu"), gpu, BF16).manual_backward
    with pytest.raises(AssertionError, match="no exact GELU"):
        ManualBackend(GPT(SHAPE), torch.float32)


def test_import_train_export_keeps_it(ckpt, bundle, program, play) -> None:
    import_model(str(ckpt), Path("nano"), tokenizer="byte")
    assert read_config(Path("nano")).activation == "gelu"
    flags = ("--input", play, "--max_steps", 2, "--out_dir", "run", "--init_from", "nano")
    flags = (*DEBUG, *flags, "--n_embd", 64, "--n_layer", 2, "--n_head", 2)
    refused = program(*flags, "--activation", "gelu_tanh")
    assert (refused.code, "--activation gelu_tanh, but the model of" in refused.err) == (2, True)
    done = program(*flags)
    assert done.code == 0, done.err
    assert load_saved("run").bundle.config.activation == "gelu"
    export_hf("nano", Path("hf"))
    assert json.loads(Path("hf/config.json").read_text())["activation_function"] == "gelu"
    assert read_hf(Path("hf")).config.activation == "gelu"
    reference = transformers.GPT2LMHeadModel.from_pretrained("hf", local_files_only=True).eval()
    # The export adds an end-of-text token behind the vocabulary.
    logits = reference(IDS).logits[..., : SHAPE.vocab_size]
    error = float((logits - bundle.build_model()(IDS)).detach().abs().max())
    assert error < gap(bundle) / 50
    assert load("hf", device="cpu").model.config.activation == "gelu"


@pytest.mark.parametrize(
    ("name", "activation"),
    [("gelu_new", "gelu_tanh"), ("gelu_pytorch_tanh", "gelu_tanh"), ("gelu", "gelu")],
)
def test_transformers_config_names_the_form(bundle, tmp_path, name, activation) -> None:
    write_hf(tmp_path, bundle, card="# A model\n")
    facts = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(facts | {"activation_function": name}))
    assert read_hf(tmp_path).config.activation == activation
    del facts["activation_function"]
    (tmp_path / "config.json").write_text(json.dumps(facts))
    # The default of transformers.
    assert read_hf(tmp_path).config.activation == "gelu_tanh"
    (tmp_path / "config.json").write_text(json.dumps(facts | {"activation_function": "relu"}))
    with pytest.raises(UserError, match="activation_function is 'relu': GPT-2's is one of gelu_"):
        read_hf(tmp_path)


def test_gguf_export_reports_the_difference_to_llama_cpp(ckpt, bundle, program, messages) -> None:
    pytest.importorskip("gguf")
    import_model(str(ckpt), Path("nano"), tokenizer="byte")
    export_gguf("nano", Path("m.gguf"), dtype="f32")
    assert "changes logits by up to " in messages[2]
    reported = float(messages[2].split("logits by up to ")[1].split(";")[0])
    assert 0 < reported < 3 * gap(bundle)


def test_config_files_without_the_field_mean_tanh(tmp_path) -> None:
    import tomllib

    from gptforge.config import merge
    from gptforge.config_file import to_toml

    values = tomllib.loads(to_toml(Config(), {}))
    assert values.pop("activation") == "gelu_tanh"
    values.pop("made_by")
    assert merge(Config(), values, source="x").activation == "gelu_tanh"


def test_import_by_an_earlier_version_is_repeated(ckpt, program, monkeypatch) -> None:
    """That version read nanoGPT's exact GELU as the tanh form."""
    with monkeypatch.context() as earlier:
        earlier.setattr("gptforge.builders.import_model.GELU_DIGEST_TAG", "")
        earlier.setattr(
            "gptforge.convert.nanogpt.GPTConfig",
            lambda **sizes: GPTConfig(**sizes | {"activation": "gelu_tanh"}),
        )
        import_model("ckpt.pt", Path("runs/imported/ckpt.pt"), tokenizer="byte")
    assert load_saved("runs/imported/ckpt.pt").bundle.config.activation == "gelu_tanh"
    with pytest.raises(UserError, match="256 tokens, and the file does not say which"):
        import_if_needed("ckpt.pt")


def test_transformers_baseline_computes_the_same(bundle) -> None:
    baseline = transformers_model(bundle.build_model()).eval()
    error = float((baseline(IDS).logits - bundle.build_model()(IDS)).detach().abs().max())
    assert error < gap(bundle) / 50
