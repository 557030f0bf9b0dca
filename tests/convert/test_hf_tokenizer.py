"""The mark between documents in other programs' forms."""

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
def test_transformers_takes_the_mark_for_one_id_and_writes_it(tokenizer, tmp_path) -> None:
    from transformers import PreTrainedTokenizerFast

    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json(tokenizer)))
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    ids = [tokenizer.eot_token, *tokenizer.encode("a cab").tolist()]
    assert theirs("<|endoftext|>a cab")["input_ids"] == ids
    assert theirs.decode(ids, clean_up_tokenization_spaces=False) == "<|endoftext|>a cab"
    assert theirs.decode(ids, skip_special_tokens=True) == "a cab"


@pytest.mark.parametrize(
    "tokenizer", [CharTokenizer(" abc", with_eot=True), ByteTokenizer(with_eot=True)]
)
def test_llama_cpp_gets_the_mark_as_the_end_of_text(tokenizer) -> None:
    table = torch.zeros(320, 16)
    made, end = with_eos_token(ModelBundle(TINY, {WTE: table}, tokenizer))
    assert (end, made.config.vocab_size) == (tokenizer.eot_token, tokenizer.vocab_size)
    spelled, _ = _vocabulary(tokenizer, end)
    assert len(spelled) == tokenizer.vocab_size
    assert spelled[end] == "<|endoftext|>"
