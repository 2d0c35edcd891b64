"""elastic_jax: one parent language model in, one checkpoint with several nested models out.

Elastic means nested widths here, not surviving lost hosts.
"""
