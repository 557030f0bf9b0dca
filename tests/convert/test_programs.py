"""An export to transformers' form, opened by the programs that read it; each where it is installed.

llama.cpp has a file of its own, tests/convert/test_gguf.py.
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

KINDS = ("gpt2", "bpe", "char", "byte", "char with marks")
PROMPT, STEPS = "To be, or", 12


@pytest.fixture(scope="module", params=KINDS)
def export(request, tmp_path_factory) -> tuple[Path, ModelBundle]:
    kind = request.param
    config = GPTConfig(block_size=32, vocab_size=ROWS[kind], n_layer=2, n_head=2, n_embd=64)
    model = GPT(config).init_weights(torch.Generator().manual_seed(0))
    # Larger weights: as drawn, all tokens are about equally likely.
    tensors = {
        name: tensor.detach() * (6 if tensor.ndim == 2 else 1)
        for name, tensor in model.state_dict().items()
        if "lm_head" not in name
    }
    folder = tmp_path_factory.mktemp("export")
    write_hf(folder, ModelBundle(config, tensors, TOKENIZERS[kind]), card="# A model\n")
    return folder, read_hf(folder)


def encode(parts: ModelBundle, text: str) -> list[int]:
    return parts.tokenizer.encode(text).tolist()


@torch.inference_mode()
def greedy(parts: ModelBundle) -> list[int]:
    model, ids = parts.build_model(), encode(parts, PROMPT)
    for _ in range(STEPS):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids


@torch.inference_mode()
def logits(parts: ModelBundle, ids: list[int]) -> torch.Tensor:
    return parts.build_model()(torch.tensor([ids]))[0]


def test_transformers_writes_the_same_greedy_text(export) -> None:
    import transformers

    folder, parts = export
    model = transformers.GPT2LMHeadModel.from_pretrained(folder, local_files_only=True)
    ids = torch.tensor([encode(parts, PROMPT)])
    found = model.generate(ids, max_new_tokens=STEPS, do_sample=False, eos_token_id=None)
    assert found[0].tolist() == greedy(parts)


def test_mlx_lm_gives_the_same_logits_and_greedy_text(export) -> None:
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    import mlx.core as mx
    import mlx_lm
    from mlx_lm.generate import generate_step

    folder, parts = export
    model, tokenizer = mlx_lm.load(str(folder))
    for text in TEXTS[:3]:
        assert tokenizer.encode(text, add_special_tokens=False) == encode(parts, text)
        assert tokenizer.decode(encode(parts, text)) == text
    ids = encode(parts, TEXTS[0])
    theirs = torch.tensor(model(mx.array([ids]))[0].tolist())
    torch.testing.assert_close(theirs, logits(parts, ids), atol=2e-3, rtol=1e-3)
    prompt, written = mx.array(encode(parts, PROMPT)), []
    for token, _ in generate_step(prompt, model, max_tokens=STEPS):
        written.append(int(token))
    assert encode(parts, PROMPT) + written == greedy(parts)


def test_ctranslate2_gives_the_same_logits_and_greedy_text(export, tmp_path) -> None:
    ctranslate2 = pytest.importorskip("ctranslate2", reason="CTranslate2 is not installed")
    import transformers

    folder, parts = export
    converter = ctranslate2.converters.TransformersConverter(str(folder))
    converter.convert(str(tmp_path / "ct2"))
    generator = ctranslate2.Generator(str(tmp_path / "ct2"), device="cpu", intra_threads=1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = encode(parts, TEXTS[0])
    found = generator.forward_batch([tokenizer.convert_ids_to_tokens(ids)])
    theirs = torch.from_numpy(np.array(found))[0]
    torch.testing.assert_close(theirs, logits(parts, ids), atol=2e-3, rtol=1e-3)
    [result] = generator.generate_batch(
        [tokenizer.convert_ids_to_tokens(encode(parts, PROMPT))],
        # It counts the prompt but for its first token.
        max_length=len(encode(parts, PROMPT)) - 1 + STEPS,
        sampling_topk=1,
        end_token=[],
    )
    assert result.sequences_ids[0] == greedy(parts)


def test_lm_eval_finds_the_same_likelihoods(export) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    folder, parts = export
    harness = HFLM(pretrained=str(folder), device="cpu", dtype="float32")
    pairs = [("To be, or", " not"), ("To be", ", or not to be"), ("", "not to be")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    found = harness.loglikelihood(requests, disable_tqdm=True)
    end = parts.tokenizer.eot_token
    for (context, ending), (logprob, _) in zip(pairs, found, strict=True):
        opening = encode(parts, context) or [parts.tokenizer.vocab_size if end is None else end]
        ids, count = opening + encode(parts, ending), len(encode(parts, ending))
        rows = logits(parts, ids[:-1])[-count:].log_softmax(-1)
        ours = float(rows[torch.arange(count), ids[-count:]].sum())
        assert logprob == pytest.approx(ours, abs=1e-3)


def test_the_trainer_trains_on_from_it_and_its_folder_comes_back(export, tmp_path) -> None:
    pytest.importorskip("accelerate", reason="accelerate, which the Trainer needs, is missing")
    import transformers

    folder, parts = export
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    # Texts of different lengths: they are padded.
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
    back = read_hf(tmp_path / "out", tokenizer=parts.tokenizer)
    ids = encode(parts, PROMPT)
    with torch.inference_mode():
        theirs = model.eval()(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits(back, ids), theirs, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(back, ids), logits(parts, ids), atol=1e-2)
