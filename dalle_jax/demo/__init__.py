"""A page in the browser that draws and edits images with trained priors: `python -m dalle_jax.demo RUN [RUN …]`."""
