"""Watching a run: where its time goes, how much of the hardware it uses, and the tools that show it."""
