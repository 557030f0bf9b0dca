"""One tokenizer of each kind, and the number of embedding rows, padding included."""

from gptforge.tokenizers import Tokenizer, from_name
from gptforge.tokenizers.char import ByteTokenizer, CharTokenizer
from gptforge.tokenizers.hf_bpe import train_bpe

TEXTS = [
    "To be, or not to be",
    "  two  spaces\n\n\tand it's 3 o'clock",
    "naïve café: é日本🪶 — be be\n",
    "",
]
ALPHABET = "".join(sorted(set("".join(TEXTS))))

TOKENIZERS: dict[str, Tokenizer] = {
    "gpt2": from_name("gpt2", ""),
    "bpe": train_bpe([" ".join(TEXTS)] * 20, 300),
    "char": CharTokenizer(ALPHABET),
    "byte": ByteTokenizer(),
    "char with eot": CharTokenizer(ALPHABET, with_eot=True),
    "byte with eot": ByteTokenizer(with_eot=True),
}
# A byte model may have no padding row.
ROWS = {"byte": 256} | {
    n: -(-t.vocab_size // 64) * 64 for n, t in TOKENIZERS.items() if n != "byte"
}
