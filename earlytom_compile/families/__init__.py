"""What is special about a model family, one file each; ``base.py`` is the seam, ``registry.py`` finds a family."""
