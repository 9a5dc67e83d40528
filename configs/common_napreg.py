"""What the configs of cross-modal retrieval share: NAPReg on SCAN, SGRAF, NAAF or two towers."""

from ml_collections import ConfigDict

from configs import common

# Tokens of a batch of captions: its longest is cut to the next of these. Each is compiled once; few
# of them waste time on padding.
_LENGTHS = (10, 12, 14, 16, 18, 20, 24, 28, 32, 48, 80)

# Of regions against words; `direction`, `pooling` .. of SCAN, `module` .. of SGRAF.
_SCORERS = {
    # Scales of 0 are the direction's own: 4 and 5 for i2t, 9 and 6 for t2i.
    "scan": {"direction": "i2t", "pooling": "mean", "attention_scale": 0.0, "lse_scale": 0.0},
    "sgraf": {
        "module": "sgr", "sim_dim": 256, "steps": 3, "dropout": 0.4, "attention_scale": 9.0,
        "precision": "highest",  # of products on an accelerator; "high", "default"
    },
    "naaf": {"attention_scale": 20.0, "mixing_scale": 5.0, "threshold_update": "batch"},
}


def napreg(kind: str, root: str) -> ConfigDict:
    """The paper's recipe; `kind` is scan, sgraf or naaf.

    `root` is a folder of {split}_ims.npy and {split}_caps.txt, or a file of Karpathy's splits
    (dataset_flickr30k.json), whose regions are then given by data.options.regions.
    """
    config = retrieval()
    config.model.update({"tokenizer": "words", "matching": {
        "kind": kind,
        "embed_dim": 1024,
        "image": {"width": 2048, "regions": 36},
        "text": {
            # "gru", with the file of GloVe vectors to start from, or "bert" with its folder
            "kind": "gru", "weights": "", "embedding": 300,
            "dropout": 0.4 if kind == "sgraf" else 0.0,
            "min_count": 4,  # of a word, or ...
            "vocabulary": "",  # ... SCAN's vocabulary file
        },
        "scorer": _SCORERS[kind],
    }})
    # Captions that meet a batch of images at a time: SGRAF holds a context for each of their words.
    config.model.options.block = 4 if kind == "sgraf" else 16
    config.data.update({"batch_size": 128, "length_buckets": _LENGTHS})
    folder, _, name = root.rpartition("/")
    if name.endswith(".json"):
        config.data.update({"dataset": "karpathy", "root": folder or "."})
        config.data.options.update({
            "annotations": name, "regions": "", "num_regions": 36, "index_dir": "",
            "restval": True,
        })
    else:
        config.data.update({"dataset": "flickr8k_features", "root": root})
        config.data.options.captions_per_image = 5
    config.evaluate.update({"kinds": ("pair_scores",), "batch_size": 128})
    return config


def retrieval() -> ConfigDict:
    """NAPReg's own fields, every choice of its specification."""
    config = common.base()
    config.method = "napreg"
    config.nouns = ConfigDict({
        "min_count": 2,  # K: how often a noun occurs in the training captions to have a proxy
        "lemmatise": "plurals",  # or "off"
        "tagger": "",  # NLTK's own, or the file or folder of the perceptron tagger
    })
    config.loss = ConfigDict({
        "pair": "multi_similarity",  # triplet, polynomial, infonce
        "margin": 0.2,
        "warmup_epochs": 0.0,  # of "triplet": the mean of violations before the hardest
        "same_image": "negative",  # of "triplet" and "polynomial"; "ignore"
        "temperature": 0.05,  # of "infonce"
        "nouns": "nap",  # proxy_anchor, none
        "noun_weight": 1.0,
        "context": "mean_nouns",  # per_noun
        "positives": "caption",  # image: the nouns of all captions of the image
        "alpha": 2.0, "beta": 40.0, "base": 0.5, "mining_margin": 0.1,
        "proxy_scale": 32.0, "proxy_margin": 0.1,
        "reduction": "mean",  # sum
    })
    config.optimizer.update({
        "learning_rate": 2e-4, "schedule": "step", "drop_epochs": (15,), "weight_decay": 0.0,
        "decay": (), "clip": 2.0,
        "factors": (),  # (("^proxies", 100.0),) is Proxy-Anchor's
    })
    config.train.update({"epochs": 30, "log_every": 100, "checkpoint_every": 1000})
    return config


def sgraf(module: str, root: str, *, epochs: int) -> ConfigDict:
    """SGRAF's recipe for its half `module`, "sgr" or "saf"."""
    if module not in ("sgr", "saf"):
        raise ValueError(f"the module {module!r} is none of sgr, saf")
    config = napreg("sgraf", root)
    config.model.matching.scorer.module = module
    config.optimizer.drop_epochs = (min(epochs - 10, 30),)
    config.train.epochs = epochs
    return config
