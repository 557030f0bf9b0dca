"""Train a GPT-2 and write with it.

    python gpt.py                                    train on input.txt as this machine allows
    python gpt.py --preset gpt2                      the full GPT-2 small, 124M parameters
    python gpt.py --input book.txt --out_dir runs/b  your own text
    python gpt.py sample runs/shakespeare-cpu --prompt "Romeo:"
    python gpt.py --help                             every flag and command

Start reading at gptforge/train/trainer.py: that is the training loop.
"""

import sys

try:
    from gptforge.cli import main
except KeyboardInterrupt:
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(main())
