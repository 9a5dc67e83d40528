"""Models that score the regions of an image against the words of a caption."""
