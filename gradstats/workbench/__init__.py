"""Tools around a training: what it needs, how it is best run, and what came out. Used by the commands."""
