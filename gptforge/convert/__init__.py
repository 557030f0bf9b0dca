"""Other programs' model formats: transformers, GGUF, nanoGPT, Hugging Face Hub and Spaces."""
