"""What the configs of MASK share: knowledge from word-labelled regions, unpaired matching."""

from ml_collections import ConfigDict

from configs import common


def mask(dataset: str, root: str, vectors: str) -> ConfigDict:
    """The paper's recipe, every choice of its specification.

    `dataset` of word-labelled regions at `root`; `vectors` is a file of word vectors. What is
    evaluated on, images with captions, is data.test_dataset.
    """
    config = common.base()
    config.method = "mask"
    config.model.knowledge = ConfigDict({
        "width": 512,  # Z of the prototypes; widths of features and word vectors are the data's
        "heads": 4,
        "encoder": {"fc_layers": 1, "attention_layers": 3},  # PAE (Table 12)
        "reconstructor": {"fc_layers": 2, "attention_layers": 1},  # FRM
        "mapper": {"fc_layers": 3, "attention_layers": 3},  # MTM
    })
    config.words = ConfigDict({
        # A file of GloVe, word2vec (text or binary) or fastText; or "corpus:FILE", made of its
        # texts, one a line, with so many numbers ...
        "vectors": vectors,
        "width": 300,
        "caption_words": "all",  # nouns_adjectives, nouns
        "tagger": "",  # of these: NLTK's own, or the file or folder of the perceptron tagger
        "unknown": "interpolate",  # prototypes of words outside the knowledge; procrustes, drop
        "neighbours": 10,
        "pooling": "max_mean",  # global_mean, bidirectional
    })
    # A row is an image, or a part of one, with its regions and their (region, word) samples.
    config.rows = ConfigDict({
        "regions": 36,
        "samples": 64,
        "attention_set": "image",  # region
        "most": 36,  # regions of an image that is matched
    })
    config.loss = ConfigDict({
        "kl_weight": 1.0,  # of the divergence beside the reconstruction
        "cross_modal_weight": 3.0,  # lambda_1
        "contrastive_weight": 3.0,  # lambda_2
        "temperature": 0.07,
        "negatives": "others",  # unlabelled, all
        "prototypes": "running",  # learnable
    })
    config.memory = ConfigDict({"decay": 0.99})
    config.optimizer.update({
        "name": "adamw", "learning_rate": 1e-4, "schedule": "constant", "weight_decay": 0.0,
        "decay": (),
    })
    config.data.update({"dataset": dataset, "root": root})
    config.train.update({"epochs": 400, "checkpoint_every": 1000})
    config.evaluate.update({"kinds": (), "batch_size": 128, "pictures": 0})
    return config
