"""What a layout costs before it is run: memory by part, step time, and the layouts that fit."""
