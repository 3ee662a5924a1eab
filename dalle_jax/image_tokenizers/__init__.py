"""Image tokenizers: encode images to grids of tokens, and decode tokens to images."""
