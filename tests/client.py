"""Requests to a server on loopback, from the standard library."""

import json
import urllib.error
import urllib.request

import pytest


def post(url, body, **headers):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)


def refused(url, body, **headers):
    """Status and sentence of a refusal."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(url, body, **headers)
    error = json.load(caught.value)["error"]
    assert error["code"] == caught.value.code and "\n" not in error["message"]
    return caught.value.code, error["message"]


def close(expected):
    return pytest.approx(expected, abs=1e-5)
