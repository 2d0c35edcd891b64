"""The verbs of the `elastic` command, a file each: `SUMMARY`, `EXAMPLE`, its arguments, and the thin function that runs it."""
