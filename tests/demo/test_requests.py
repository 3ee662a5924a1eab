"""Requests from the network: bounded, and decoded from bytes alone."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from dalle_jax.demo import requests
from dalle_jax.errors import ConfigError, DataError

RUNS = ["maskgit", "prior"]
BASIC = {"caption": "a red circle", "runs": ["maskgit"]}


def encoded(image):
    content = io.BytesIO()
    Image.fromarray(image).save(content, format="PNG")
    return base64.b64encode(content.getvalue()).decode()


IMAGE = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)


def test_a_request_of_the_page():
    mask = {"height": 2, "width": 5, "bits": "c040"}
    given = {
        **BASIC,
        "method": "inpaint",
        "image": encoded(IMAGE),
        "mask": mask,
        "sampling": {"top_k": None, "steps": 3},
    }
    request = requests.parse({**given, "n": 2, "negative": " "}, RUNS)
    np.testing.assert_array_equal(request.image, IMAGE)
    np.testing.assert_array_equal(request.mask, [[1, 1, 0, 0, 0], [0, 0, 0, 0, 1]])
    assert request.sampling == {"steps": 3} and request.negative is None and request.runs == ("maskgit",)


@pytest.mark.parametrize(
    "changes, token",
    [
        ({"caption": "x" * 1001}, "1001"),
        ({"caption": 5}, "caption"),
        ({"n": 17}, "n is 17"),
        ({"n": 0}, "n is 0"),
        ({"candidates": 65}, "65"),
        ({"runs": []}, "runs"),
        ({"runs": ["/etc"]}, "/etc"),
        ({"runs": [[]]}, "runs"),
        ({"method": "load"}, "load"),
        ({"sampling": {"order": "halton"}}, "order"),
        ({"sampling": [1]}, "sampling"),
        ({"sampling": {"guidance_schedule": 5}}, "guidance_schedule is 5"),
        ({"secret": 1}, "secret"),
        ({"method": "vary"}, "image"),
        ({"method": "vary", "image": "/etc/passwd"}, "base64"),
        ({"method": "vary", "image": base64.b64encode(b"hello").decode()}, "image"),
        ({"method": "vary", "image": "A" * (requests.MOST_BYTES * 4 // 3 + 8)}, "8 MiB"),
        ({"method": "inpaint", "image": encoded(IMAGE)}, "brush"),
        ({"method": "inpaint", "image": encoded(IMAGE), "mask": {"height": 999, "width": 1, "bits": ""}}, "999"),
        ({"method": "inpaint", "image": encoded(IMAGE), "mask": {"height": 4, "width": 4, "bits": "ff"}}, "bits"),
        ({"method": "inpaint", "image": encoded(IMAGE), "mask": {"height": 4, "width": 4, "bits": "xy"}}, "bits"),
        ({"method": "outpaint", "image": encoded(IMAGE), "pad": [0, 0, 4]}, "pad"),
        ({"method": "outpaint", "image": encoded(IMAGE), "pad": [0, 0, 0, -1]}, "pad"),
    ],
)
def test_other_requests_are_rejected(changes, token):
    with pytest.raises((ConfigError, DataError), match=token):
        requests.parse({**BASIC, **changes}, RUNS)


def test_no_object_is_rejected():
    with pytest.raises(DataError, match="JSON"):
        requests.parse("draw", RUNS)


def test_a_large_image_is_rejected_before_it_is_unpacked():
    content = io.BytesIO()
    Image.new("L", (8000, 8000)).save(content, format="PNG")
    with pytest.raises(DataError, match="64000000|64,000,000|8000"):
        requests.decoded(base64.b64encode(content.getvalue()).decode())
