"""Exports in transformers' format, opened by other programs where they are installed.

llama.cpp is in test_gguf.py.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from gptforge.config import GPTConfig
from gptforge.convert.bundle import ModelBundle
from gptforge.convert.hf import read_hf, write_hf
from gptforge.model import GPT
from tests.convert.kinds import ROWS, TEXTS, TOKENIZERS

KINDS = ("gpt2", "bpe", "char", "byte", "char with eot")
PROMPT, STEPS = "To be, or", 12


@pytest.fixture(scope="module", params=KINDS)
def export(request, tmp_path_factory) -> tuple[Path, ModelBundle]:
    kind = request.param
    config = GPTConfig(block_size=32, vocab_size=ROWS[kind], n_layer=2, n_head=2, n_embd=64)
    model = GPT(config).init_weights(torch.Generator().manual_seed(0))
    # Larger than at initialization, where all tokens are about equally likely.
    tensors = {
        name: tensor.detach() * (6 if tensor.ndim == 2 else 1)
        for name, tensor in model.state_dict().items()
        if "lm_head" not in name
    }
    folder = tmp_path_factory.mktemp("export")
    write_hf(folder, ModelBundle(config, tensors, TOKENIZERS[kind]), card="# A model\n")
    return folder, read_hf(folder)


def encode(bundle: ModelBundle, text: str) -> list[int]:
    return bundle.tokenizer.encode(text).tolist()


@torch.inference_mode()
def greedy(bundle: ModelBundle) -> list[int]:
    model, ids = bundle.build_model(), encode(bundle, PROMPT)
    for _ in range(STEPS):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids


@torch.inference_mode()
def logits(bundle: ModelBundle, ids: list[int]) -> torch.Tensor:
    return bundle.build_model()(torch.tensor([ids]))[0]


def test_transformers_generates_the_same_greedy_text(export) -> None:
    import transformers

    folder, bundle = export
    model = transformers.GPT2LMHeadModel.from_pretrained(folder, local_files_only=True)
    ids = torch.tensor([encode(bundle, PROMPT)])
    generated = model.generate(ids, max_new_tokens=STEPS, do_sample=False, eos_token_id=None)
    assert generated[0].tolist() == greedy(bundle)


def test_mlx_lm_gives_the_same_logits_and_greedy_text(export) -> None:
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    import mlx.core as mx
    import mlx_lm
    from mlx_lm.generate import generate_step

    folder, bundle = export
    model, tokenizer = mlx_lm.load(str(folder))
    for text in TEXTS[:3]:
        assert tokenizer.encode(text, add_special_tokens=False) == encode(bundle, text)
        assert tokenizer.decode(encode(bundle, text)) == text
    ids = encode(bundle, TEXTS[0])
    expected = torch.tensor(model(mx.array([ids]))[0].tolist())
    torch.testing.assert_close(expected, logits(bundle, ids), atol=2e-3, rtol=1e-3)
    prompt, generated = mx.array(encode(bundle, PROMPT)), []
    for token, _ in generate_step(prompt, model, max_tokens=STEPS):
        generated.append(int(token))
    assert encode(bundle, PROMPT) + generated == greedy(bundle)


def test_ctranslate2_gives_the_same_logits_and_greedy_text(export, tmp_path) -> None:
    ctranslate2 = pytest.importorskip("ctranslate2", reason="CTranslate2 is not installed")
    import transformers

    folder, bundle = export
    converter = ctranslate2.converters.TransformersConverter(str(folder))
    converter.convert(str(tmp_path / "ct2"))
    generator = ctranslate2.Generator(str(tmp_path / "ct2"), device="cpu", intra_threads=1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = encode(bundle, TEXTS[0])
    output = generator.forward_batch([tokenizer.convert_ids_to_tokens(ids)])
    expected = torch.from_numpy(np.array(output))[0]
    torch.testing.assert_close(expected, logits(bundle, ids), atol=2e-3, rtol=1e-3)
    [result] = generator.generate_batch(
        [tokenizer.convert_ids_to_tokens(encode(bundle, PROMPT))],
        # Counts the prompt without its first token.
        max_length=len(encode(bundle, PROMPT)) - 1 + STEPS,
        sampling_topk=1,
        end_token=[],
    )
    assert result.sequences_ids[0] == greedy(bundle)


def test_lm_eval_gives_the_same_loglikelihoods(export) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    folder, bundle = export
    harness = HFLM(pretrained=str(folder), device="cpu", dtype="float32")
    pairs = [("To be, or", " not"), ("To be", ", or not to be"), ("", "not to be")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    results = harness.loglikelihood(requests, disable_tqdm=True)
    eot = bundle.tokenizer.eot_token
    for (context, continuation), (logprob, _) in zip(pairs, results, strict=True):
        start = encode(bundle, context) or [bundle.tokenizer.vocab_size if eot is None else eot]
        ids, count = start + encode(bundle, continuation), len(encode(bundle, continuation))
        rows = logits(bundle, ids[:-1])[-count:].log_softmax(-1)
        expected = float(rows[torch.arange(count), ids[-count:]].sum())
        assert logprob == pytest.approx(expected, abs=1e-3)


def test_the_trainer_fine_tunes_an_export_that_can_be_imported(export, tmp_path) -> None:
    pytest.importorskip("accelerate", reason="accelerate, which the Trainer needs, is missing")
    import transformers

    folder, bundle = export
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    # Different lengths, to be padded.
    rows = [tokenizer(text) for text in ("To be, or not to be", "not", "to be") * 3]
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path / "work"),
            max_steps=3,
            per_device_train_batch_size=3,
            learning_rate=1e-2,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=rows,
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )
    assert trainer.train().training_loss > 0
    trainer.save_model(str(tmp_path / "out"))
    imported = read_hf(tmp_path / "out", tokenizer=bundle.tokenizer)
    ids = encode(bundle, PROMPT)
    with torch.inference_mode():
        expected = model.eval()(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits(imported, ids), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(imported, ids), logits(bundle, ids), atol=1e-2)
