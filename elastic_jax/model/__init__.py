"""The decoder: pure mixer functions under one table of parameters."""
