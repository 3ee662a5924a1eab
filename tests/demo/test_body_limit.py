"""The limit of a request's body, whether it announces its length or not."""

import asyncio

import pytest

from dalle_jax.demo.server import BodyLimit


async def echo(scope, receive, send):
    """Reads the whole body and answers with its length."""
    length, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError("the client left")
        length, more = length + len(message["body"]), message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(length).encode()})


def answer(body, part=7, headers=(), most=20):
    """Sends a body in parts, and returns the status and the answer."""
    parts = [body[i : i + part] for i in range(0, len(body), part)] or [b""]
    waiting = [{"type": "http.request", "body": each, "more_body": i < len(parts)} for i, each in enumerate(parts, 1)]
    sent = []

    async def receive():
        return waiting.pop(0)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "headers": list(headers)}
    asyncio.run(BodyLimit(echo, most)(scope, receive, send))
    return sent[0]["status"], sent[1]["body"], waiting


@pytest.mark.parametrize("length", [0, 1, 20])
def test_a_body_within_the_limit_passes(length):
    status, body, _ = answer(b"x" * length)
    assert status == 200 and body == str(length).encode()


def test_a_longer_body_is_rejected_while_it_is_read():
    status, _, waiting = answer(b"x" * 100)
    assert status == 413 and len(waiting) > 10


def test_an_announced_length_is_rejected_at_once():
    status, _, waiting = answer(b"x" * 100, headers=[(b"content-length", b"100")])
    assert status == 413 and len(waiting) == 15
    assert answer(b"x", headers=[(b"content-length", b"many")])[0] == 413


def test_other_errors_pass():
    async def broken(*_):
        raise ValueError("a fault")

    with pytest.raises(ValueError, match="fault"):
        asyncio.run(BodyLimit(broken, 5)({"type": "http", "headers": []}, None, None))
