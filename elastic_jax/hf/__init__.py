"""Hugging Face both ways: one file per model family, safetensors, import and export."""
