"""Train a GPT-2 and generate text with it.

    python gpt.py                                    train on input.txt, as fits this machine
    python gpt.py --preset gpt2                      GPT-2 small, 124M parameters
    python gpt.py --input book.txt --out_dir runs/b  your own text
    python gpt.py sample runs/shakespeare-cpu --prompt "Romeo:"
    python gpt.py --help                             all flags and commands

The training loop is in gptforge/training/trainer.py.
"""

import sys

try:
    from gptforge.cli import main
except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(main())
