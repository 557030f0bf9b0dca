"""The end-of-text token in other programs' formats."""

import json

import pytest
import torch

from gptforge.convert.bundle import WTE, ModelBundle, with_eos_token
from gptforge.convert.gguf import _vocabulary
from gptforge.convert.hf_tokenizer import tokenizer_json
from gptforge.tokenizers.char import ByteTokenizer, CharTokenizer
from tests.conftest import TINY


@pytest.mark.parametrize(
    "tokenizer", [CharTokenizer(" abc", with_eot=True), ByteTokenizer(with_eot=True)]
)
def test_transformers_encodes_and_decodes_the_end_of_text_token(tokenizer, tmp_path) -> None:
    from transformers import PreTrainedTokenizerFast

    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json(tokenizer)))
    hf_tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    ids = [tokenizer.eot_token, *tokenizer.encode("a cab").tolist()]
    assert hf_tokenizer("<|endoftext|>a cab")["input_ids"] == ids
    assert hf_tokenizer.decode(ids, clean_up_tokenization_spaces=False) == "<|endoftext|>a cab"
    assert hf_tokenizer.decode(ids, skip_special_tokens=True) == "a cab"


@pytest.mark.parametrize(
    "tokenizer", [CharTokenizer(" abc", with_eot=True), ByteTokenizer(with_eot=True)]
)
def test_gguf_has_the_end_of_text_token(tokenizer) -> None:
    wte = torch.zeros(320, 16)
    bundle, eos_id = with_eos_token(ModelBundle(TINY, {WTE: wte}, tokenizer))
    assert (eos_id, bundle.config.vocab_size) == (tokenizer.eot_token, tokenizer.vocab_size)
    tokens, _ = _vocabulary(tokenizer, eos_id)
    assert len(tokens) == tokenizer.vocab_size
    assert tokens[eos_id] == "<|endoftext|>"
