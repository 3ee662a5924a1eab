"""The type checker of the tests: `conftest.py` applies it to the packages whose annotations carry shapes."""

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

PACKAGES = ("dalle_jax.models", "dalle_jax.priors", "dalle_jax.image_tokenizers")

# An int is a float here, as in PEP 484: options are often written as whole numbers.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def install() -> None:
    """Checks shapes, dtypes and types at every call of a function of `PACKAGES` that is imported from now on."""
    install_import_hook(PACKAGES, "type_checks.check")
