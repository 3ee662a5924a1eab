"""The names that `dalle_jax` exports."""

import subprocess
import sys

import pytest

import dalle_jax
from dalle_jax.jobs import train as train_job
from dalle_jax.text_to_image.clip_scorer import ClipScorer
from dalle_jax.text_to_image.text_to_image import TextToImage


def test_public_names():
    assert dalle_jax.TextToImage is TextToImage
    assert dalle_jax.ClipScorer is ClipScorer
    assert dalle_jax.train is train_job.run
    assert set(dalle_jax.__all__) == {"TextToImage", "ClipScorer", "save", "show", "train"} <= set(dir(dalle_jax))
    with pytest.raises(AttributeError, match="nothing"):
        dalle_jax.nothing  # noqa: B018


def test_importing_the_package_does_not_import_jax():
    program = "import sys, dalle_jax; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("name", sorted(dalle_jax.__all__))
def test_public_methods_are_documented(name):
    public = getattr(dalle_jax, name)
    methods = (
        [public]
        if not isinstance(public, type)
        else [
            getattr(public, method)
            for method in vars(public)
            if not method.startswith("_") and callable(getattr(public, method))
        ]
    )
    assert methods
    for method in methods:
        assert method.__doc__.splitlines()[0].endswith((".", ".]")), method
