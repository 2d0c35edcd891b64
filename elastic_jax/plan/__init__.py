"""Compiling a run for hardware that is not here: does it fit, what does it cost, what would make it fit."""
