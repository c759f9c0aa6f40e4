"""Experiments as commands: grids of training runs, each in a run folder of its own, resumable and judged alike."""
