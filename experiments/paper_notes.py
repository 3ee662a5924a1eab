"""Differences from the papers that no option changes, for `papers.py`: (what, the paper has, we have, why)."""

AVERAGE = (
    "start of the average",
    "not said",
    "the decay of renewal n is at most (1 + n) / (10 + n)",
    "a short run would else keep its random start; the paper's is far past it",
)

PRIOR = (
    (
        "padding of the text (2.2)",
        "an embedding for each position, attended to",
        "the same; in the loss all padding is one class",
        "a position can only hold its own padding",
    ),
    ("block (2.4)", "not said", "pre-norm", "as in GPT"),
    (
        "gradient scale of each block (2.4)",
        "yes",
        "no",
        "it serves float16; bfloat16 has the range of float32 (footnote 12)",
    ),
    (
        "weights of layers (D.2)",
        "16 bits",
        "float32, cast for each product",
        "they are split over the chips, so they fit",
    ),
    ("Adam's second moment of kernels (D.2)", "16 bits", "float32", "JAX has no 0-6-10; bfloat16 loses small updates"),
    ("gradients between machines (2.5, D.1)", "PowerSGD", "whole, in bfloat16", "pods have a fast network"),
    (
        "candidates of an image (2.6)",
        "512",
        "1, or --config.candidates=512",
        "512 cost 512 times as much",
    ),
    AVERAGE,
)

NOTES = {
    "dvae.py:paper": (
        (
            "images smaller than 256 (listing 1)",
            "rejected",
            "enlarged to 256",
            "no image of yours is left out",
        ),
        ("loss scaling (A.2)", "one scale for the loss", "none", "it serves float16"),
        AVERAGE,
    ),
    "prior.py:paper": PRIOR,
    "prior.py:5.6b": PRIOR,
    "prior.py:2.8b": PRIOR,
    "maskgit.py:paper": (
        ("blocks (released)", "post-norm", "pre-norm and a final norm", "those of the autoregressive prior"),
        ("norm of the embeddings (released)", "yes", "no", "pre-norm blocks need none"),
        ("epsilon of norms (released)", "1e-12", "1e-5", "those of the autoregressive prior"),
        ("biases of queries, keys and values (released)", "yes", "no", "those of the autoregressive prior"),
        ("the condition attends to the image (released)", "yes", "no", "the text is computed once for all steps"),
        ("position embeddings (released)", "a table of positions", "row + column", "those of the autoregressive prior"),
        (
            "classes of the loss (released)",
            "tokens, classes and the mask",
            "image tokens",
            "no other class can be right",
        ),
        ("GELU of the head (released)", "gelu_tanh", "gelu", "the difference is below 0.001"),
        ("least share of masked tokens (released)", "0.5, read by no released code", "none", "not in the paper"),
        AVERAGE,
    ),
    "clip.py:vit_b32": (
        (
            "text (2.4)",
            "byte pairs, start and end token",
            "a text model of your captions, end token",
            "yours to choose",
        ),
        ("weights of the text tower (2.5)", "16 bits, stochastically rounded", "float32", "they fit"),
        (
            "images with the same caption (2.3)",
            "negatives of each other",
            "not negatives",
            "frequent in small data sets",
        ),
        ("resize (2.3)", "not said; released: bicubic", "area average in training", "one resize for all trainings"),
    ),
    "beit.py:paper": (
        ("tokenizer (2.1)", "DALL-E's public dVAE", "our dVAE", "give DALL-E's as tokenizer_from=DIR"),
        ("image of the tokenizer (released)", "Lanczos", "linear, antialiased", "inside the compiled update"),
        ("last block of a mask (algorithm 1)", "may be a few patches less", "cut", "every image has the same number"),
        (
            "initial weights (2.5)",
            "0.02, divided by √(2 · layer) at the outputs",
            "by the number of inputs, outputs divided by √(2 · depth)",
            "those of our priors",
        ),
        ("relative positions in fine-tuning (released)", "a table for each layer", "one table", "one option for both"),
        ("step size in fine-tuning (released)", "falls from layer to layer", "one", "optimizer.scales can name parts"),
    ),
}
