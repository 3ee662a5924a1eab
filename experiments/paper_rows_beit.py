"""The rows of `papers.py` for BEiT (arXiv 2106.08254), with the code that its authors released ("released")."""

from paper_rows import ADAM, EMA, RANGE, Row, average, decay_of, percent, zero_is_none

BEIT = (
    Row("layers, width, heads (3)", "12, 768, 12", "model.trunk.depth model.trunk.width model.trunk.heads"),
    Row(
        "head size (3)", "64", "model.trunk.width model.trunk.heads model.trunk.head_dim",
        show=lambda width, heads, size: str(size or width // heads),
    ),
    Row(
        "width of the MLP (3)", "3,072", "model.trunk.width model.trunk.mlp_ratio",
        show=lambda width, ratio: f"{round(width * ratio):,}",
    ),
    Row("image size, patch (2.1)", "224, 16", "data.image_size model.patch"),
    Row("target (2.3)", "tokens", "model.target"),
    Row("size of the image that the tokenizer reads (released)", "112", "tokenizer.data.image_size"),
    Row("codes of the tokenizer (2.1)", "8,192", "tokenizer.model.vocab_size"),
    Row("masks (algorithm 1)", "blocks", "model.masks"),
    Row("masked patches (2.3)", "40%; released: 75 of 196", "model.masked_share", "as released", percent),
    Row("smallest block (algorithm 1)", "16", "model.smallest_block"),
    Row("label smoothing of pre-training", "none", "model.label_smoothing", show=zero_is_none),
    Row("norm, epsilon (released)", "layernorm, 1e-6", "model.trunk.norm model.trunk.norm_epsilon"),
    Row(
        "place of norms, number of final norms (released)", "pre, 1",
        "model.trunk.norm_placement model.trunk.final_norms",
    ),
    Row("norm of the embeddings", "no", "model.trunk.embedding_norm"),
    Row("norm of queries and keys", "no", "model.trunk.qk_norm"),
    Row("biases (released)", "of queries and values", "model.trunk.qkv_bias", "one option for these and the keys"),
    Row("activation (released)", "gelu", "model.trunk.activation"),
    Row("positions (released)", "relative", "model.trunk.positions"),
    Row("LayerScale (released)", "0.1", "model.trunk.layer_scale"),
    Row("drop path (table 9)", "0.1", "model.trunk.drop_path"),
    Row("dropout, of attention (table 9)", "0, 0", "model.trunk.dropout model.trunk.attention_dropout"),
    Row("activations (released)", "float16 mixed precision", "model.trunk.dtype", RANGE),
    Row(
        "residual stream, logits in float32", "not said", "model.trunk.float32_residual model.trunk.float32_logits",
        "mixed precision as in our CLIP",
    ),
    Row(
        "augmentation (3)", "random resized crop, flip, colour jitter", "data.augment",
        "DALL-E's first stage; colours stay", lambda name: f"crop of listing 1 of DALL-E, flip ({name})",
    ),
    Row("AdamW β1, β2, ε (table 9)", "0.9, 0.98, 1e-8", ADAM),
    Row("weight decay (table 9)", "0.05", "optimizer.weight_decay"),
    Row(
        "decayed parameters (released)", "all but gains, biases and the class token", "optimizer.decay",
        "the rest are the mask and the table of positions", decay_of,
    ),
    Row("gradient clip (table 9)", "3", "optimizer.clip_norm"),
    Row("clip of the running variance", "none", "optimizer.clip_variance", show=zero_is_none),
    Row("Adam's first moment", "float32", "optimizer.first_moment"),
    Row("factors of the step size", "none", "optimizer.scales"),
    Row("parts with their own settings", "none", "optimizer.parts"),
    Row(
        "step size (table 9: 10 epochs of warm-up)", "0 to 0.0015 in 6,255 updates, cosine to 1e-5 at 500,455",
        "schedules.learning_rate",
    ),
    Row("average of the parameters", "none", EMA, show=lambda decay, every: average(decay, every) if decay else "none"),
    Row("batch (table 9)", "2,048", "batch_size"),
    Row("updates (table 9: 800 epochs of 1,281,167 images)", "500,455", "steps"),
)  # fmt: skip

TABLES = {"beit.py:paper": BEIT}
