"""DualCoOp beside the demo: the same scenes and labels, its own recipe or ours.

python launch/train.py --config=configs/dualcoop_demo.py:own --workdir=runs/dualcoop_demo
"""

from configs import common


def get_config(arg: str = ""):
    """`arg` is RECIPE or RECIPE,FRACTION; the recipe is "own" (default) or "ours"."""
    recipe, _, fraction = arg.partition(",")
    if recipe not in ("", "own", "ours"):
        raise ValueError(f"dualcoop_demo.py:{recipe}: the recipe is 'own' or 'ours'")
    config = common.base()
    common.glyph_task(config, known_fraction=float(fraction or 0.1))
    common.dualcoop(config)
    config.data.augment = "none"  # the scenes' features are cached
    if recipe == "ours":
        common.our_recipe(config)
        config.prompts.length = common.GLYPH_CONTEXT
    # Its own recipe learns more slowly and asks for 50 epochs: it gets twice ours.
    config.train.epochs = common.GLYPH_EPOCHS * (1 if recipe == "ours" else 2)
    return config
