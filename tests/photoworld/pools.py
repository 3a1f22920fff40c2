"""A pool of features of very few clips, by a vision encoder with random weights."""

from earlytom_compile.photoworld import pool
from earlytom_compile.photoworld.model import build_model
from earlytom_compile.photoworld.pool import Pool

EACH = 2


def tiny_model(seed=0):
    """One layer of each, in the sizes of the real one."""
    return build_model(seed, vision_layers=1, text_layers=1)


def fill_tiny(folder, monkeypatch, clips=4, videos=2):
    """Pools of clips and of videos."""
    monkeypatch.setattr(pool, "EACH", EACH)
    tower = tiny_model().model.vision_tower
    pool.fill(folder, tower, clips, "train")
    pool.fill(folder, tower, videos, "validation")
    return Pool(folder, "train"), Pool(folder, "validation")
