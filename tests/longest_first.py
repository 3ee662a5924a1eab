"""The test files that take longest, by their CPU time. Workers begin with them.

Update the order when a file changes much: `python -m pytest --durations=60`. All other files follow in any order.
"""

from pathlib import Path

FOLDER = Path(__file__).parent

FILES = (  # comments: seconds of CPU time on a busy machine
    "checkpoints/test_survival.py",  # minutes with its slow tests
    "docs/test_code_blocks.py",  # minutes with its slow tests
    "priors/test_protocol.py",  # 98
    "text_to_image/test_text_to_image.py",  # 83
    "aot/test_target.py",  # 80
    "models/attention/test_splash.py",  # 65
    "priors/test_autoregressive.py",  # 45
    "training/test_loop.py",  # 40
    "priors/test_maskgit.py",  # 37
    "tasks/test_clip_task.py",  # 35
    "evaluation/test_measure.py",
    "tasks/test_dvae_task.py",
    "data/test_workers.py",
    "distributed/test_factorisations.py",
    "models/test_transformer.py",  # 28
    "image_tokenizers/test_dvae.py",  # 25
    "image_tokenizers/test_vqgan.py",
    "pretrained/test_import_vqgan.py",
    "pretrained/test_catalogue.py",
    "pretrained/test_inception.py",
    "text_to_image/test_clip_scorer.py",
    "experiments/test_tpu_vm.py",  # 18
    "distributed/test_joining.py",  # 15
    "text_to_image/test_editing.py",  # 15
    "pretrained/test_import_clip.py",  # 14
    "data/test_pipeline.py",  # 14
    "jobs/test_finetune.py",
    "export/test_export.py",
    "export/test_hub.py",
    "models/test_clip.py",  # 13
    "pretrained/test_openai_dvae.py",
    "training/test_profiling.py",  # 11
)
