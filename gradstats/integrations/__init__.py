"""Adapters to other libraries: trainers that measure as they train, and trackers that rows go to.

Each module needs its library alone, and is imported by its name, as in
``from gradstats.integrations.lightning import GradStatsCallback``.
"""
