"""MASK on Visual Genome: knowledge of about 12,000 words, matched with the captions of Flickr30K.

python launch/train.py --config=configs/mask_vg.py --workdir=runs/mask_vg \
    --config.data.root=VG --config.data.options.features=VG_BUTD \
    --config.words.vectors=glove.840B.300d.txt \
    --config.data.test_root=FLICKR30K --config.data.test_options.regions=FLICKR30K_BUTD

VG holds image_data.json, objects.json and attributes.json; features are bottom-up regions, an npz
an image or TSV files; FLICKR30K holds dataset_flickr30k.json.
"""

from configs import common_mask


def get_config(arg: str = ""):
    """`arg` is data.root,words.vectors or empty."""
    root, _, vectors = arg.partition(",")
    config = common_mask.mask("visual_genome", root, vectors)
    config.data.options.update({
        "features": "", "min_count": 5, "min_iou": 0.5, "naming": "visual_genome", "index_dir": "",
    })
    config.data.update({"test_dataset": "karpathy", "test_root": ""})
    config.data.test_options.update({
        "annotations": "dataset_flickr30k.json", "regions": "", "num_regions": 36, "index_dir": "",
        "restval": True,
    })
    # The paper's 4,096 regions, of which a row holds about 23, and from epoch 200 on 2,048.
    config.data.batch_size = 176
    config.data.batch_size_schedule = ((200, 176), (200, 88))
    config.rows.samples = 96
    config.train.update({"epochs": 400, "log_every": 100})
    return config
