"""Every config file and variant loads, and the code accepts its sections."""

import dataclasses
import pathlib
import sys

import flax.linen as nn
import jax
import optax
import pytest
from flax import traverse_util

from dalle_jax.configuration import config_files
from dalle_jax.configuration.options import from_config
from dalle_jax.configuration.sections import COCO, CUB, TAR_SHARDS, section
from dalle_jax.configuration.size_rules import open_sizes, with_largest
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.distributed.mesh import make_mesh
from dalle_jax.distributed.rows import check_batch
from dalle_jax.errors import ConfigError
from dalle_jax.evaluation.measure import Options
from dalle_jax.evaluation.test_sets import Protocol
from dalle_jax.image_tokenizers import tokenizer
from dalle_jax.models import clip
from dalle_jax.optim import optimizers, schedules
from dalle_jax.priors.clip_condition import ClipEmbedding
from dalle_jax.priors.condition import Text
from dalle_jax.priors.low_resolution import LowResolution
from dalle_jax.priors.registry import condition_of, make
from dalle_jax.priors.sampling import SamplingOptions
from dalle_jax.tasks import beit
from dalle_jax.token_layout import TokenLayout

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
TRAININGS = {
    "dvae": "dvae",
    "vqgan": "vqgan",
    "prior": "prior",
    "maskgit": "prior",
    "clip": "clip",
    "beit": "beit",
}  # config file: its task
TOKENIZERS = ("dvae", "vqgan")


def load(name):
    return config_files.load_module(CONFIGS / f"{name}.py")


ROWS = [(name, variant) for name in TRAININGS for variant in load(name).VARIANTS]


def check_training(config, name):
    config = with_largest(config)
    data = config.data.copy_and_resolve_references()
    if data.source in ("auto", "folder", "tar_shards"):
        data.path = "somewhere"
    options = from_config(DataOptions, data, "data")
    for key, numbers in config.schedules.items():
        schedule = schedules.make(numbers, key)
        assert float(schedule(0)) >= 0 and float(schedule(config.steps)) >= 0
    assert isinstance(
        optimizers.make_optimizer(from_config(optimizers.OptimizerOptions, config.optimizer, "optimizer")),
        optax.GradientTransformation,
    )
    from_config(optimizers.AverageOptions, config.ema, "ema")
    check_batch(make_mesh(**config.mesh), config.batch_size, config.optimizer.accumulate_steps)
    assert config.workdir == f"runs/{name}-{config.variant}"
    assert set(config.cadence) == {"log", "eval", "preview", "checkpoint"} and set(config.keep) == {"last", "best"}
    return options


@pytest.mark.parametrize("name, variant", ROWS, ids=[":".join(row) for row in ROWS])
def test_trainings(name, variant):
    config = load(name).get_config(variant)
    task = "vq" if (name, variant) == ("dvae", "small") else TRAININGS[name]
    assert (config.job, config.task, config.variant) == ("train", task, variant)
    options = check_training(config, name)
    config = with_largest(config)
    if name == "clip":
        sizes = clip.options_of_training(config, config.text.vocab_size)
        assert config.optimizer.accumulate_steps == 1
        assert (sizes == clip.CLIPOptions(dtype="bfloat16")) == (variant == "vit_b32"), "the published size"
        recipe = (sizes.image_positions, sizes.image_readout, config.negatives.spoiled)
        assert (recipe == (1.0, "class_token", 0)) == (variant != "shapes"), "OpenAI's"
        jax.eval_shape(clip.CLIP(sizes).init, jax.random.key(0))
        return
    if name == "beit":
        inner = check_training(config.tokenizer, "dvae")
        images = tokenizer.of_training(config.tokenizer)
        model = beit.make(config, images.vocab_size)
        assert images.grid(inner.image_size) == (model.layout.height, model.layout.width), "a token is a patch"
        assert (inner.image_size == options.image_size) == (variant == "shapes"), "half the size"
        jax.eval_shape(model.init, jax.random.key(0))
        return
    images = tokenizer.of_training(config if name in TOKENIZERS else config.tokenizer)
    grid = images.grid(options.image_size)
    if name not in TOKENIZERS:
        inner = check_training(config.tokenizer, "vqgan" if config.tokenizer.task == "vqgan" else "dvae")
        assert inner.image_size == options.image_size, "the tokenizer is trained at the prior's image size"
        kind = condition_of(config)
        given = {ClipEmbedding: ClipEmbedding(8), LowResolution: LowResolution(Text(300, 20), 2048, 8, 8)}
        condition = given[kind] if kind in given else kind.of_config(config)
        layout = TokenLayout(condition, images.vocab_size, *grid)
        prior = make(config.prior, config.model, layout)
        if config.model.trunk.depth <= 24:  # tests/priors/test_autoregressive.py counts the large ones
            jax.eval_shape(prior.init, jax.random.key(0))
        assert config.data_tokens == "each_batch" or options.augment == "none"
    else:
        jax.eval_shape(images.init, jax.random.key(0))


def test_beit_has_its_papers_size():
    """BEiT-B: 85.8 million parameters in the trunk, 75 of 196 patches, tokens at 112 pixels."""
    config = load("beit").get_config("paper")
    model = beit.make(config, 8192)
    params = jax.eval_shape(model.init, jax.random.key(0))
    trunk = sum(leaf.size for leaf in jax.tree.leaves(params["trunk"]))
    assert trunk == pytest.approx(85.1e6, rel=0.01)
    assert (model.layout.image_length, model.options.masked(196), config.tokenizer.data.image_size) == (196, 75, 112)


def numbers_of(config):
    """Returns the numbers that follow the length of a training, or could, by path."""
    sections = {"steps": config.steps, "cadence": config.cadence.to_dict(), "schedules": config.schedules.to_dict()}
    return {"/".join(path): value for path, value in traverse_util.flatten_dict(sections).items()}


@pytest.mark.parametrize("name, variant", ROWS, ids=[":".join(row) for row in ROWS])
def test_schedules_follow_the_length_of_the_training(name, variant):
    config = load(name).get_config(variant)
    config.steps = config.steps or 2000  # None: by the size of the data set
    before = numbers_of(config)
    config.steps *= 3
    after = numbers_of(config)
    follow = {key for key in after if after[key] != before[key]} - {"steps", "cadence/log"}
    rate = "schedules/learning_rate"
    if variant in ("shapes", "emoji", "small", "folder", "shape_classes", "classes", "clipgen", "upsample"):
        expected = {f"{rate}/steps", "cadence/eval", "cadence/preview", "cadence/checkpoint"}
        expected |= {"schedules/temperature/steps"} if config.task in TOKENIZERS else set()
        if name == "vqgan":
            expected |= {f"schedules/adversarial_weight/{key}" for key in ("wait_steps", "warmup_steps")}
            expected |= {"schedules/discriminator_weight/wait_steps"}
        expected |= {f"{rate}/warmup_steps"} if name in ("prior", "maskgit", "beit") else set()
        if variant == "folder":
            expected |= {"dvae": {"schedules/kl_weight/steps"}, "clip": {f"{rate}/warmup_steps"}}.get(name, set())
    else:
        expected = {f"{rate}/steps"} if name in ("clip", "beit") else set()
        if name == "dvae" and variant != "paper":
            expected = {f"{rate}/steps", "schedules/temperature/steps"}
        if name == "vqgan" and variant != "gumbel_f8":
            expected = {"schedules/temperature/steps"}
    assert follow == expected
    for key in sorted(follow, reverse=True):  # a start that follows another one is set before it
        assert after[key] == pytest.approx(3 * before[key], abs=3)
        part, value = config[key.partition("/")[0]], key.partition("/")[2].replace("/", ".")
        part.update_from_flattened_dict({value: 5})  # alone
        changed = {key: 5}
        if key == "schedules/adversarial_weight/wait_steps":  # both players start together
            changed["schedules/discriminator_weight/wait_steps"] = 5
        assert numbers_of(config) == after | changed
        after |= changed


@pytest.mark.parametrize("name", TRAININGS)
@pytest.mark.parametrize("variant", ["small", "folder"])
def test_sizes_that_follow_the_data(name, variant):
    """They are open, and so is every number that depends on them, until they are set."""
    config = load(name).get_config(variant)
    config.lock()
    sizes = ["steps"] + ([] if name in (*TOKENIZERS, "beit") else ["text.vocab_size", "text.length"])
    assert open_sizes(config) == sizes
    numbers = numbers_of(config)
    assert numbers["schedules/learning_rate/steps"] is None and numbers["cadence/eval"] is None
    if name in ("prior", "maskgit"):
        assert open_sizes(config.tokenizer) == ["steps"]
    fixed = with_largest(config)
    assert not open_sizes(fixed) and None not in numbers_of(fixed).values()
    assert open_sizes(config) == sizes, "the given one is unchanged"
    config.steps = 7
    assert open_sizes(config) == sizes[1:] and with_largest(config).steps == 7


@pytest.mark.parametrize("name", ["prior", "maskgit"])
@pytest.mark.parametrize("variant", ["small", "shapes"])
def test_the_tokenizers_data_follow_the_priors(name, variant):
    """Every key of `data` holds for both trainings, unless it is set for the tokenizer."""
    other = {int: 7, str: "other", bool: True, float: 0.25, type(None): "other"}
    for field in dataclasses.fields(DataOptions):
        config = load(name).get_config(variant)
        config.lock()
        if field.name == "builder_kwargs":
            if variant == "shapes":
                config.data.builder_kwargs.num_train = 3
                assert config.tokenizer.data.builder_kwargs.num_train == 3
                config.tokenizer.data.builder_kwargs.num_train = 4
                assert config.data.builder_kwargs.num_train == 3
            continue
        before = config.tokenizer.data[field.name]
        value = not config.data[field.name] if type(config.data[field.name]) is bool else None
        value = other[type(config.data[field.name])] if value is None else value
        config.data[field.name] = value
        own = field.name in ("augment", "bpe_dropout", "condition")
        assert config.tokenizer.data[field.name] == (before if own else value), field.name
        resolved = config.copy_and_resolve_references()
        assert resolved.tokenizer.data[field.name] == (before if own else value)
        if before is not None:
            config.tokenizer.data[field.name] = before
            assert config.data[field.name] == value, f"{field.name} can be set for the tokenizer alone"


def test_the_papers_numbers():
    dvae, prior = load("dvae").get_config("paper"), load("prior").get_config("paper")
    assert (dvae.data.image_size, dvae.model.vocab_size, dvae.batch_size) == (256, 8192, 512)
    rate, tau, kl = (schedules.make(dvae.schedules[k], k) for k in ("learning_rate", "temperature", "kl_weight"))
    assert [float(s(0)) for s in (rate, tau, kl)] == pytest.approx([1e-4, 1.0, 0.0])
    assert float(rate(1_200_000)) == pytest.approx(1.25e-6, rel=1e-4)
    assert float(tau(150_000)) == pytest.approx(1 / 16, rel=1e-4) and float(kl(5000)) == pytest.approx(6.6, rel=1e-4)
    trunk, optimizer = prior.model.trunk, prior.optimizer
    assert (trunk.width, trunk.depth, trunk.heads, prior.model.kernel, prior.text.length) == (3968, 64, 62, 11, 256)
    assert (optimizer.b2, optimizer.weight_decay, optimizer.clip_norm) == (0.96, 4.5e-2, 4.0)
    assert prior.data.augment == "prior" and prior.data.bpe_dropout == 0.1 and prior.batch_size == 1024
    assert float(schedules.make(prior.schedules.learning_rate, "learning_rate")(5000)) == pytest.approx(4.5e-4)


def test_the_published_numbers_of_vqgans():
    """taming transformers, MaskGIT's first stage, LlamaGen: optimiser, losses, and the start of the discriminator."""
    taming, maskgit, llamagen = (load("vqgan").get_config(name) for name in ("taming_f16", "maskgit", "llamagen_f16"))
    betas = [(config.optimizer.b1, config.optimizer.b2) for config in (taming, maskgit, llamagen)]
    assert betas == [(0.5, 0.9), (0.0, 0.99), (0.9, 0.95)]
    rates = [float(schedules.make(config.schedules.learning_rate)(9)) for config in (taming, maskgit, llamagen)]
    assert rates == pytest.approx([4.5e-6 * taming.batch_size, 1e-4, 1e-4])
    for config, start, weight in ((taming, 250_001, 0.8), (maskgit, 0, 0.1), (llamagen, 20_000, 0.5)):
        for name, value in (("adversarial_weight", weight), ("discriminator_weight", 0.5 if weight == 0.5 else 1.0)):
            schedule = schedules.make(config.schedules[name], name)
            assert float(schedule(start)) == pytest.approx(value) and (start == 0 or float(schedule(start - 1)) == 0)
        assert config.data.image_size == 256 and config.model.multipliers == (1, 1, 2, 2, 4)
    codes = [(config.model.vocab_size, config.model.code_dim) for config in (taming, maskgit, llamagen)]
    assert codes == [(1024, 256), (1024, 256), (16_384, 8)] and llamagen.model.normalized_codes
    assert (taming.objective.pixel_loss, taming.objective.adaptive, taming.discriminator.norm) == ("l1", True, "batch")
    assert (maskgit.objective.r1, maskgit.objective.entropy, maskgit.objective.adversarial) == (
        10.0, 0.1, "non_saturating",
    )  # fmt: skip
    assert (llamagen.objective.pixel_loss, llamagen.objective.adaptive) == ("l2", False)
    gumbel = load("vqgan").get_config("gumbel_f8")
    assert (gumbel.model.vocab_size, gumbel.model.quantizer, gumbel.model.multipliers) == (8192, "gumbel", (1, 1, 2, 4))
    ends = [float(schedules.make(gumbel.schedules.temperature)(step)) for step in (0, 1_000_001)]
    assert ends == pytest.approx([0.9, 1e-6]) and gumbel.schedules.kl_weight.value == 1e-8


def test_vit_b32_decays_all_weights_but_gains_and_biases():
    """CLIP, section 2.5. A tower of width D and 12 blocks has 12 * 13 D gains and biases in them."""
    config = load("clip").get_config("vit_b32")
    sizes = clip.options_of_training(config, config.text.vocab_size)
    params = jax.eval_shape(clip.CLIP(sizes).init, jax.random.key(0))
    options = from_config(optimizers.OptimizerOptions, config.optimizer, "optimizer")
    params = nn.meta.unbox(params)
    mask = optimizers.decay_mask(params, options)
    left = sum(x.size for x, decays in zip(jax.tree.leaves(params), jax.tree.leaves(mask)) if not decays)
    assert left == 12 * 13 * (768 + 512) + 4 * 768 + 2 * 512 + 1  # norms outside of the blocks, logit scale
    assert options.weight_decay == 0.2 and config.data.augment == "clip"
    for variant in ("shapes", "emoji", "small"):
        assert load("clip").get_config(variant).optimizer.decay == "kernels", "as they were measured"


@pytest.mark.parametrize("name", ["generate", "evaluate"])
def test_jobs_on_a_trained_workdir(name):
    config = load(name).get_config()
    assert config.job == name
    assert from_config(SamplingOptions, config.sampling, "sampling") == SamplingOptions()
    assert config.model_workdir == load("prior").get_config().workdir


def test_quickstart_is_the_default_priors_and_their_evaluation():
    config = load("quickstart").get_config()
    trunk, bidirectional = config.prior.model.trunk, config.maskgit.model.trunk
    assert config.maskgit.start_from == config.prior.workdir and trunk == bidirectional, (
        "MaskGIT starts from the whole trunk"
    )
    assert config.maskgit.schedules.learning_rate.steps == config.maskgit.steps
    assert from_config(SamplingOptions, config.maskgit_sampling, "sampling").steps in (None, 8)
    assert config.job == "quickstart" and config.prior.variant == "shapes"
    assert config.evaluate.model_workdir == config.prior.workdir and config.evaluate.count >= 256
    assert config.evaluate.split == "heldout" and config.clip.task == "clip"
    assert from_config(Options, config.evaluate.metrics, "metrics").candidates == 16


@pytest.mark.parametrize("name", TRAININGS)
def test_unknown_variants(name):
    with pytest.raises(ConfigError, match='did you mean "folder"'):
        load(name).get_config("folders")
    assert load(name).get_config().variant == "shapes", "the first one is the default"


def test_a_missing_config_file():
    with pytest.raises(ConfigError, match="nowhere.py"):
        load("nowhere")


@pytest.mark.parametrize("name", ["compile", "generate", "quickstart"])
def test_configs_without_variants(name):
    path = CONFIGS / f"{name}.py"
    with pytest.raises(ConfigError, match=f"{name}.py:paper"):
        config_files.load(f"{path}:paper", "--config")
    assert config_files.load(str(path), "--config").job == name


def test_a_config_with_a_fault_keeps_its_traceback(tmp_path):
    path = tmp_path / "a.py"
    path.write_text("def get_config():\n    return get_config(3)\n")
    with pytest.raises(TypeError, match="get_config"):
        config_files.load(str(path), "--config")


def test_the_papers_data_sets():
    """Names and keys of COCO, CUB and tar shards, which the configs share."""
    for data, source, image_size, caption_key, splits in (
        (COCO, "coco_captions", 256, "captions/text", ("train", "validation")),
        (dict(CUB, image_size=224), "cub_captions", 224, "caption", ("train", "test")),
        (dict(TAR_SHARDS, image_size=64, path="DIR"), "tar_shards", 64, "caption", ("train", "validation")),
    ):
        options = from_config(DataOptions, section(DataOptions, **data), "data")
        assert (options.source, options.image_size, options.caption_key) == (source, image_size, caption_key)
        assert (options.train_split, options.eval_split) == splits
    for name in set(TRAININGS) - {"vqgan", "beit"}:
        for variant in ("coco", "cub"):
            assert load(name).get_config(variant).data.image_size == (224 if name == "clip" else 256)


def test_the_papers_protocols():
    """DALL-E, section 3.1: 30,000 captions of MS-COCO, all unique captions of CUB, radii 0 to 8."""
    for variant, source, split, captions, count in (
        ("coco", "coco_captions", "validation", "drawn", 30_000),
        ("cub", "cub_captions", "test", "unique", None),
    ):
        config = load("evaluate").get_config(variant)
        assert Protocol(config.split, config.captions, config.count) == Protocol(split, captions, count)
        options = from_config(DataOptions, config.data, "data")
        assert (options.source, options.path) == (source, None)
        assert "image_size" not in config.data, "the model determines it"
        assert config.workdir == f"runs/evaluated-{variant}"
        assert from_config(Options, config.metrics, "metrics").blur == (0, 1, 2, 4, 8)
    assert "data" not in load("evaluate").get_config(), "the model's own"


PACKAGE = {
    "__init__.py": "",
    "one.py": "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'value': 1})\n",
    "two.py": "from folder_of_configs import one\nget_config = one.get_config\n",
}


def test_config_files_of_one_package_import_each_other_from_any_directory(tmp_path, monkeypatch):
    folder = tmp_path / "folder_of_configs"
    folder.mkdir()
    for name, text in PACKAGE.items():
        (folder / name).write_text(text)
    before = list(sys.path)
    monkeypatch.delitem(sys.modules, "folder_of_configs", raising=False)
    assert config_files.load(f"{folder}/two.py").value == 1
    assert sys.path == before


@pytest.mark.parametrize(
    "argv, path", [(["--config=a.py:x"], "a.py:x"), (["-config", "a.py"], "a.py"), (["--config.steps=3"], "")]
)
def test_the_config_file_of_a_command_line(argv, path):
    assert config_files.given(["main", *argv]) == path


def test_llamagens_numbers():
    """arXiv 2406.06525: 111 million parameters, 16 x 16 tokens of 16,384 codes, 300 epochs."""
    config = load("prior").get_config("imagenet")
    images = tokenizer.of_training(config.tokenizer)
    layout = TokenLayout(condition_of(config).of_config(config), images.vocab_size, *images.grid(256))
    assert (layout.condition.vocab, layout.image_vocab, layout.image_length) == (1000, 16_384, 256)
    prior = make(config.prior, config.model, layout)
    shapes = jax.eval_shape(prior.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == pytest.approx(111e6, rel=0.01)
    assert prior.options.caption_drop == prior.options.trunk.dropout == 0.1 and prior.stream.prefix_length == 1
    assert config.steps * config.batch_size / 1_281_167 == pytest.approx(300, abs=0.1)
    optimizer = config.optimizer
    assert (optimizer.b2, optimizer.weight_decay, optimizer.clip_norm, optimizer.decay) == (0.95, 0.05, 1.0, "weights")
