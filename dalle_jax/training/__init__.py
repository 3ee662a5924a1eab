"""The training loop and its compiled update."""
