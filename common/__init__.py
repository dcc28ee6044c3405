"""What every room needs and nothing else: a leaf that imports none of the other rooms."""

__version__ = "0.1.0"
