"""The priors over (text, image) tokens, their shared token layout, and what turns logits into tokens."""
