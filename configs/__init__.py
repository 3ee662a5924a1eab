"""One file per configuration. `python -m dalle_jax.main --config=configs/NAME.py --help` explains each."""
