"""A training run to look at: `gradstats demo`. Its parts are imported when it runs."""
