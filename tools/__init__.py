"""The steps between and around training: preprocessing, evaluation, plots, the command line itself."""
