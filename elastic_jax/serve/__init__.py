"""Serving every size of a checkpoint at once: an engine of slots, and an OpenAI-compatible HTTP endpoint over it."""
