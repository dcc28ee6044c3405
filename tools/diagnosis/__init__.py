"""Checks of a machine and its neighbours: each a small function that returns a finding with its remedy."""
