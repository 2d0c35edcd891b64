"""Text to batches: corpora, tokenizers, and one process-independent order of packed rows."""
