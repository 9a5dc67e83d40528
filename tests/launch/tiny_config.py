"""The tiny configs as config files: `tiny_config.py:NAME`."""

from tests import tiny


def get_config(arg: str = ""):
    """`arg`: "", cached, contrastive, simcon, scan, saf, mask, manifest or typo."""
    if arg == "contrastive":
        return tiny.contrastive()
    if arg == "simcon":
        return tiny.simcon("simcon")
    if arg == "mask":
        return tiny.mask("regions.npz", "test", "vectors.txt")
    if arg in ("scan", "saf"):
        return tiny.napreg(arg)
    if arg not in ("", "cached", "manifest", "typo"):
        raise ValueError(f"tiny_config.py:{arg} is unknown;\ncheck the word after the colon")
    config = tiny.trm_ml(cached=arg == "cached")
    config.evaluate.pictures = 2
    if arg == "manifest":
        config.model.tokenizer = "clip"
        config.data.update({"dataset": "manifest", "train_size": 0, "test_size": 0})
        config.data.options.update({"classes": "", "unlisted": "unknown"})
    if arg == "typo":
        config.data.options.caption_nois = 0.5
    return config
