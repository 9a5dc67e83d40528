"""Small functions that the configs share. A config computes nothing; it only says what to run."""

from ml_collections import ConfigDict, config_dict

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def base() -> ConfigDict:
    """Every field a run may have, with the defaults of the paper's recipe where it has one."""
    return ConfigDict({
        "seed": 0,
        "method": "trm_ml",  # trm_ml, dualcoop, contrastive, simcon, napreg, mask
        "model": {
            # A file of weights, a hub repository owner/name@revision, an architecture's name
            # (OpenAI's weights), "glyphs" or "random"
            "pretrained": "random",
            "tokenizer": "clip",  # or "words"; a pretrained file may carry its own
            "architecture": "",  # of OpenAI's CLIP, such as "RN101" ...
            "clip": {},  # ... and what differs from it, or all fields of the towers
            "matching": {},  # or a model that scores regions against words (common_napreg.py)
            "knowledge": {},  # or one of regions with words on them (common_mask.py)
            "options": {},  # keyword arguments of methods/<method>.make
            "initial_from": "",  # an exported model to start from ...
            "initial_params": (),  # ... for the parameters that match these regexes
        },
        "data": {
            "dataset": "glyphs",
            "root": "",
            "options": {},  # keyword arguments of the source
            "image_size": 224,
            "text_length": 32,
            "length_buckets": (),  # lengths of a batch's texts, where every caption is an example
            "batch_size": 128,
            "batch_size_schedule": (),  # of method mask: (epochs, batch size), one after the other
            "train_size": 0,  # 0: all; glyph scenes are endless and need a number
            "test_size": 0,
            "test_dataset": "",  # where evaluation reads, if not from the same dataset: a name, ...
            "test_root": "",  # ... its folder ...
            "test_options": {},  # ... and keyword arguments of its source
            "caption_shuffle": 0.0,  # share of the training images that get another's captions
            "holdout": 0.0,  # evaluate on this share of the training images, not on the test set
            "label_protocol": "hash",
            "known_fraction": 0.1,
            "label_seed": 0,
            "mask_file": "",
            "augment": "none",
            "test_augment": "none",  # squash to a square; "center_crop" is ImageNet's protocol
            "workers": 0,  # decoding processes; 0: threads
            "cache_features": False,  # read the frozen tower's features, not the images
            "cache_dir": "",  # default: WORKDIR/features
            "max_bad_fraction": 0.01,
        },
        "prompts": {},
        "nouns": {},
        "words": {},
        "rows": {},
        "loss": {},
        "memory": {},
        "optimizer": {
            "name": "adamw",
            "learning_rate": 5e-4,
            "schedule": "one_cycle",
            "warmup_epochs": 0.0,
            "warmup_rate": 0.0,
            "end_rate": 0.0,  # of the schedule "cosine"
            "drop_epochs": (),  # of the schedule "step"
            "factors": (),  # (regex of parameters, factor of their learning rate)
            "weight_decay": 1e-4,
            "b2": 0.999,
            "decay": (".",),
            "freeze": (),
            "clip": 0.0,
            "ema": 0.0,
        },
        "train": {
            "epochs": 40,
            "steps": config_dict.placeholder(int),  # wins over epochs when set
            "microbatch": 0,
            "log_every": 50,
            "eval_every": 0,  # 0: at the end only
            "checkpoint_every": 500,
            "keep": 2,
            "nan_policy": "skip",  # or "stop"
        },
        "precision": {"compute": "auto"},  # bfloat16 on GPU and TPU, float32 on CPU
        "mesh": {"data": -1, "fsdp": 1, "shard": ()},
        "evaluate": {
            "kinds": ("multilabel",),
            "batch_size": 64,
            "pool": "global",
            "folds": 1,  # of retrieval: 5 is COCO-1K of 5,000 images
            "templates": ("a photo of a {}.",),
            "pictures": 8,  # images whose maps are left in WORKDIR/pictures at the end
            "segmentation": {},  # the protocol, see segmentation()
        },
    })


def trm_ml(config: ConfigDict) -> ConfigDict:
    """TRM-ML's own fields: the paper's recipe, every choice of its specification."""
    config.method = "trm_ml"
    config.prompts = prompts()
    config.model.options = ConfigDict({
        "region_attention": True,
        "query_self_attention": False,
        "query_init": "text",
        "attention_init": "xavier",
        "baseline_pool": "mean",
        "initial_scale": 20.0,
    })
    config.loss = ConfigDict({
        "classification": "asl",
        "region_weight": 1.0,
        "distillation_weight": 0.05,
        "contrastive_weight": 0.01,
        "gamma_pos": 1.0,
        "gamma_neg": 2.0,
        "shift": 0.05,
        "focus_gradient": False,
        "rejection_rate": 0.002,
        "expected_positives": 0.0,
        "reduction": "sum",
        "unknown": "auto",
        "distillation": "bernoulli",
        "stop_teacher": True,
        "temperature": 0.2,
        "negatives": "both",
    })
    config.memory = ConfigDict({
        "pseudo_labels": "both",
        "slots": 64,
        "pixels": 4,
        "decay": 0.99,
        "stage_one_epochs": 5.0,
    })
    config.optimizer.freeze = ("^clip/",)
    # One pattern: the ablations have no queries or no kernels, but always prompts.
    config.optimizer.decay = ("kernel$|queries$|^prompts/",)
    return config


def prompts() -> ConfigDict:
    """The papers' dual prompts: 16 random tokens per class and sign before the class name."""
    return ConfigDict({
        "length": 16,
        "class_specific": True,
        "negative_names": True,
        "initial_words": "",
        "remat": False,
    })


def dualcoop(config: ConfigDict) -> ConfigDict:
    """DualCoOp's own recipe (references in methods/dualcoop.py)."""
    config.method = "dualcoop"
    config.prompts = prompts()
    config.model.options = ConfigDict({
        "position_scale": 20.0,
        "output_scale": 5.0,
    })
    config.model.clip.dense_pos_embed = True
    config.loss = ConfigDict({
        "weight": 0.03,
        "gamma_pos": 1.0,
        "gamma_neg": 2.0,
        "shift": 0.05,
        "reduction": "sum_batch",
    })
    config.memory = ConfigDict()
    config.optimizer.update({
        "name": "sgd",
        "learning_rate": 2e-3,
        "schedule": "constant_warmup_cosine",
        "warmup_epochs": 1.0,
        "warmup_rate": 1e-5,
        "weight_decay": 5e-4,
        "decay": (".",),
        "freeze": ("^clip/",),
    })
    config.data.batch_size = 32
    config.data.augment = "dualcoop"
    config.train.epochs = 50
    return config


def coco(config: ConfigDict, *, year: str) -> ConfigDict:
    """MS-COCO in its official layout, or prepared (launch/prepare.py)."""
    config.data.dataset = "coco"
    config.data.options = ConfigDict({
        "year": year, "keep_empty": False, "allow_empty_classes": False,
    })
    return config


def voc(config: ConfigDict, *, year: str) -> ConfigDict:
    """Pascal VOC in the layout of VOCdevkit, or prepared (launch/prepare.py)."""
    config.data.dataset = "voc"
    config.data.options = ConfigDict({
        "year": year, "difficult": "negative", "check_counts": True, "allow_empty_classes": False,
    })
    return config


def openai_clip(config: ConfigDict, architecture: str) -> ConfigDict:
    """OpenAI's CLIP of that name, weights and all (python -m trm_jax.pretrained lists them)."""
    config.model.update({"architecture": architecture, "pretrained": architecture})
    # "cudnn" may be faster for a ViT at high resolution on an NVIDIA GPU.
    config.model.clip = ConfigDict({
        "dense_pos_embed": False, "attention": "xla",
        "image": {"mean": CLIP_MEAN, "std": CLIP_STD},
    })
    return config


def clip_glyphs() -> ConfigDict:
    """The small CLIP of the glyph scenes: three ResNet stages (stride 16), joint width 128."""
    return ConfigDict({
        "embed_dim": 128,
        "dense_pos_embed": False,
        "image": {
            "kind": "resnet", "layers": (1, 1, 1), "width": 16, "heads": 4, "image_size": 96,
            "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25),
        },
        "text": {
            "vocab_size": 0, "context_length": 32, "width": 128, "heads": 4, "layers": 2,
            "activation": "quick_gelu", "eos_id": 0,
        },
    })


def clip_features(width: int) -> ConfigDict:
    """A head on precomputed features of `width` and a small text tower, joint width 256."""
    return ConfigDict({
        "embed_dim": 256,
        "dense_pos_embed": False,
        "image": {"kind": "features", "width": width, "hidden": 512, "skip": True, "pool": "mean"},
        "text": {
            "vocab_size": 0, "context_length": 48, "width": 128, "heads": 4, "layers": 2,
            "activation": "quick_gelu", "eos_id": 0,
        },
    })


GLYPH_EPOCHS, GLYPH_CONTEXT, GLYPH_BATCH = 6, 4, 32
GLYPH_OPTIMIZER = {"learning_rate": 2e-3, "b2": 0.95, "weight_decay": 0.5}


def glyph_task(config: ConfigDict, *, known_fraction: float) -> ConfigDict:
    """Glyph scenes through the bundled CLIP: 4,000 to learn from, 1,000 to be tested on.

    The scenes are larger than those the CLIP was trained on, with objects about as large as it
    knows: a grid of 14 x 14 positions, as the paper's 448 pixels give for a CLIP of 224.
    """
    config.model.clip = clip_glyphs()
    config.model.pretrained = "glyphs"
    config.model.tokenizer = "words"
    config.data.update({
        "dataset": "glyphs", "image_size": 224, "train_size": 4000, "test_size": 1000,
        "known_fraction": known_fraction, "cache_features": True,
    })
    config.data.options.update({"seed": 7, "object_scale": 0.58, "clutter": 0.25})
    config.evaluate.batch_size = 100
    return config


def glyph_schedule(config: ConfigDict) -> ConfigDict:
    """A one-cycle of 750 steps, thresholds that keep up with it, one pixel for small objects.

    Chosen on a fifth of the training scenes (`data.holdout`).
    """
    config.prompts.length = GLYPH_CONTEXT
    config.model.options.initial_scale = 50.0
    config.data.batch_size = GLYPH_BATCH
    config.optimizer.update(GLYPH_OPTIMIZER)
    config.memory.update({"stage_one_epochs": 2.0, "decay": 0.9, "pixels": 1})
    config.train.update({"epochs": GLYPH_EPOCHS, "log_every": 25, "eval_every": 375})
    return config


def our_recipe(config: ConfigDict) -> ConfigDict:
    """DualCoOp with this project's optimizer, features and batch size."""
    config.model.clip.dense_pos_embed = False
    config.data.batch_size = GLYPH_BATCH
    config.loss.update({"weight": 1.0, "reduction": "mean_batch"})
    config.optimizer.update({
        "name": "adamw", "schedule": "one_cycle", "warmup_epochs": 0.0, "warmup_rate": 0.0,
        "decay": ("^prompts/",), **GLYPH_OPTIMIZER,
    })
    return config


LOSSES = ("infonce", "simcon", "mv_simcon")
# Of `loss`, for runs of minutes: while towers find their first features, all images look alike to
# them, and would be one another's positives. Nothing is as similar as infinity: InfoNCE so far.
SHORT_RUN = {"thresholds": (float("inf"), 0.95, 0.90, 0.85), "changes": (0.25, 0.5, 0.75)}


def simcon(config: ConfigDict, name: str) -> ConfigDict:
    """SimCon's own fields: the paper's recipe, every choice of its specification.

    `name` of the loss: "infonce", "simcon" or "mv_simcon", which all else holds for.
    """
    if name not in LOSSES:
        raise ValueError(f"the loss {name!r} is none of {', '.join(LOSSES)}")
    config.method = "simcon"
    config.model.options = ConfigDict({
        "max_scale": 100.0,
        "remat_image": False,
        "scan_image": False,
        "remat_text": False,
    })
    config.loss = ConfigDict({
        "name": name,
        "thresholds": (0.95, 0.90, 0.85),
        "changes": (2 / 30, 15 / 30),
        "joint_positives": True,
        "ncs_weight": 1.0,
        "self_similarity": "exclude",
        "multi_label_weight": 0.0,
        "multi_label_nouns": 3,
        "direction_weight": 0.0,
        "implementation": "auto",
        "columns": "gather",
        "block": 0,
        "dtype": "float32",
    })
    config.evaluate.segmentation = segmentation()
    return config


def segmentation() -> ConfigDict:
    """The protocol of zero-shot segmentation (GroupViT's), for Pascal VOC and COCO-Object."""
    return ConfigDict({
        "short_side": 448,
        "long_side": 2048,
        "window": 448,
        "stride": 224,
        "top_classes": 5,
        "background_threshold": 0.95,  # 0.35 for Pascal Context, 0: no background
        "tta": False,
        "tta_scales": (0.5, 0.75, 1.0),
        "tta_short_side": 512,
        "batch_size": 16,
    })


def groupvit(arg: str, *, parts: tuple[str, ...] = ()) -> ConfigDict:
    """GroupViT on image-text pairs in WebDataset shards: the recipe of the SimCon paper.

    `arg` is LOSS or LOSS,data.root. `parts` are folders below data.root that are trained on
    together; none is data.root itself. Evaluated on VOC 2012 below data.test_root.
    """
    name, _, root = arg.partition(",")
    config = simcon(base(), name or "mv_simcon")
    config.model.update({"architecture": "groupvit", "pretrained": "random"})
    config.data.update({
        "dataset": "mixture" if parts else "webdataset", "root": root,
        "image_size": 224, "text_length": 77, "batch_size": 2048, "augment": "groupvit",
        "test_augment": "center_crop", "test_dataset": "voc_segmentation",
        "max_bad_fraction": 0.02,
    })
    if parts:
        config.data.options.parts = tuple(
            {"dataset": "webdataset", "root": part} for part in parts
        )
    else:
        config.data.options.update({"shards": (), "caption_key": "", "index_dir": ""})
    # Empty options are left to the dataset: "names" is VOC's, "masks" COCO-Object's.
    config.data.test_options.update({"names": "", "masks": ""})
    config.optimizer.update({
        "learning_rate": 1.6e-3, "schedule": "cosine", "warmup_epochs": 2.0, "warmup_rate": 4e-6,
        "end_rate": 4e-5, "weight_decay": 0.05, "clip": 5.0,
        # As the authors': all but biases and what has one dimension.
        "decay": ("kernel$", "embedding$", "group_token$", "logit_scale$"),
    })
    config.train.update({"epochs": 30, "log_every": 50, "checkpoint_every": 1000})
    config.evaluate.update({"kinds": ("segmentation",), "batch_size": 256})
    return config


def groupvit_glyphs(image_size: int) -> ConfigDict:
    """A GroupViT small enough for a CPU: patches of 8 pixels, width 64, 12 groups, then 6.

    The text tower is that of the small CLIP. No MLP projectors: at this size their batch
    statistics keep the towers from getting started.
    """
    return ConfigDict({
        "embed_dim": 128,
        "projector_hidden": 0,
        "dense_pos_embed": False,
        "image": {
            "kind": "groupvit", "patch_size": 8, "width": 64, "heads": 2, "depths": (1, 1, 1),
            "group_tokens": (12, 6, 0), "output_groups": (12, 6, 0), "drop_path": 0.0,
            "activation": "quick_gelu", "initializer_range": 0.08, "image_size": image_size,
            "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25),
        },
        "text": clip_glyphs().text,
    })
