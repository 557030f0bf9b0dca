"""Text generation: prefill, decode with a KV cache, sample, detokenize."""
