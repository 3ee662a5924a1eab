"""The meaning of every metric: one plain sentence, and the direction in which it is better.

The parts of a name that vary (percentages, groups, reasons) are matched by pattern.
"""

from __future__ import annotations

import dataclasses
import re

HIGHER, LOWER = "higher is better", "lower is better"

# pattern of a metric's name without "train/" and "eval/": direction ("" for none) and sentence.
_MEANINGS = {
    # images
    r"r?fid_clip": (
        LOWER,
        "Distance between the statistics of drawn (or reconstructed) and real images, seen by CLIP.",
    ),
    r"r?fid": (LOWER, "The same distance, seen by Inception-v3."),
    r"inception_score": (HIGHER, "High if Inception-v3 sees one thing in each image, and many things in all images."),
    r"inception_score_std": ("", "Standard deviation of the Inception score over ten parts of the images."),
    r"precision_\w+": (HIGHER, "Share of the drawn images that look like some real image."),
    r"recall_\w+": (HIGHER, "Share of the real images that look like some drawn image, so that none is missing."),
    r"classifier_accuracy_\w+": (HIGHER, "Accuracy on real images of a linear classifier that the drawn ones trained."),
    r"clip_score": (HIGHER, "100 times the cosine between image and caption, seen by CLIP."),
    r"caption_accuracy": (HIGHER, "Share of the images that show every attribute of their caption."),
    r"attribute_accuracy": (HIGHER, "Share of all attributes in the captions that their images show."),
    r"by_attribute, .*": (HIGHER, "Share of the captions with this attribute whose images show it."),
    r"steps": ("", "Runs of the model over the image to draw it."),
    r"seconds_per_image": (LOWER, "Time to draw one image in a full batch."),
    # the image tokenizer
    r"psnr": (HIGHER, "Likeness of reconstructed and real images, in decibels. 30 is close, 20 is coarse."),
    r"ssim": (HIGHER, "Likeness of their structure, 1 for equal images."),
    r"lpips": (LOWER, "Difference of reconstructed and real images to a network trained on human opinions."),
    r"mse": (LOWER, "Mean squared difference of reconstructed and real pixels in [0, 1]."),
    r"pixel_loss|reconstruction": (LOWER, "Difference of reconstructed and real pixels in [-1, 1]."),
    r"perceptual_loss": (LOWER, "Their difference to a network trained on human opinions."),
    r"commitment|codebook_loss": (LOWER, "Distance between the features of images and their codes."),
    r"entropy_loss": (LOWER, "Low if each choice of a code is certain and all codes are used."),
    r"generator_loss": ("", "How well the discriminator tells reconstructions from real images."),
    r"discriminator_loss": ("", "How often the discriminator errs."),
    r"logits_(real|fake)": ("", "Mean score that the discriminator gives to real images or to reconstructions."),
    r"adaptive_weight": ("", "Weight of the adversarial loss that balances it with the others."),
    r"r1_penalty": ("", "Squared gradient of the discriminator at real images."),
    r"codebook_perplexity": (HIGHER, "Number of codes that the tokens use evenly."),
    r"codebook_usage": (HIGHER, "Share of the codes that some token uses."),
    r"kl_nats": ("", "Information in the tokens of a grid position."),
    r"reconstruction_nats": (LOWER, "Surprise at the value of a subpixel given the tokens."),
    r"elbo": (HIGHER, "Bound on the log likelihood of a subpixel."),
    r"relaxation_gap": ("", "Loss through choosing single codes instead of mixtures. 0 is best."),
    # priors
    r"image_nats_per_token|image_nats": (LOWER, "Surprise at the next token of a real image. 0 is certainty."),
    r"image_nats_masked_\d+_\d+": (LOWER, "The same surprise where this percentage of the tokens is masked."),
    r"text_nats": (LOWER, "Surprise at the next token of a caption."),
    r"accuracy": (HIGHER, "Share of the images whose class is right."),
    r"image_accuracy|token_accuracy": (HIGHER, "Share of the tokens for which the first choice is right."),
    # CLIP
    r"retrieval@\d+": (HIGHER, "Share of images and captions whose partner CLIP finds, mean of both directions."),
    r"image_to_text(@\d+|_accuracy)": (HIGHER, "Share of the images whose caption CLIP finds."),
    r"text_to_image(@\d+|_accuracy)": (HIGHER, "Share of the captions whose image CLIP finds."),
    r"among": ("", "Number of images or captions among which it searches."),
    r"spoiled_accuracy": (HIGHER, "Share of captions that CLIP tells from the same caption with one word changed."),
    r"logit_scale": ("", "Factor on the cosines before the loss."),
    # training
    r"loss": (LOWER, "The value that training minimises."),
    r"learning_rate": ("", "Step size of the optimizer."),
    r"gradient_norm": ("", "Length of the gradient before it is clipped."),
    r"skipped": (LOWER, "Updates that were left out because they were not finite."),
    r"seconds_per_step": (LOWER, "Time of one update."),
    r"examples_per_second": (HIGHER, "Examples that training sees in a second."),
}


@dataclasses.dataclass(frozen=True)
class Meaning:
    """The meaning of a metric.

    Attributes:
      direction: `HIGHER`, `LOWER`, or "" if neither is better.
      sentence: says what is measured.
    """

    direction: str
    sentence: str

    def direction_as_sentence(self) -> str:
        """Returns "Higher is better.", "Lower is better." or ""."""
        return f"{self.direction[0].upper()}{self.direction[1:]}." if self.direction else ""


def meaning(name: str) -> Meaning | None:
    """Returns the meaning of a metric, or None if it is not known.

    Args:
      name: the metric's name, with or without "train/" or "eval/" in front.
    """
    name = name.removeprefix("train/").removeprefix("eval/")
    return next((Meaning(*found) for pattern, found in _MEANINGS.items() if re.fullmatch(pattern, name)), None)
