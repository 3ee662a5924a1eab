"""The training loop and the compiled update."""
