"""Starting Ray heads: ports that never clash, and an error that says why one did not start."""

from __future__ import annotations

import sys

import pytest

from benchmarks import ray_head

ANSWERS_ONCE = """
import socket, sys
port = next(int(part.partition("=")[2]) for part in sys.argv if part.startswith("--port="))
with socket.create_server(("127.0.0.1", port)) as server:
    server.accept()
sys.exit("out of luck")
"""


def test_ports_differ():
    ports = ray_head._free_ports(200)
    assert len(set(ports)) == 200


def test_a_head_that_does_not_start_says_why(monkeypatch):
    (taken,) = ray_head._free_ports(1)
    monkeypatch.setattr(ray_head, "_free_ports", lambda count: [taken] * count)
    with (
        pytest.raises(RuntimeError, match=rf"(?s)ended with exit code 1.*port number {taken} that is used"),
        ray_head.ray_head(num_cpus=1),
    ):
        pytest.fail("two of its servers were to listen on one port")


def test_a_head_that_ends_while_it_comes_up_says_why(monkeypatch):
    stand_ins = {"start": [sys.executable, "-c", ANSWERS_ONCE], "health-check": ["false"]}
    monkeypatch.setattr(ray_head, "_ray", stand_ins.__getitem__)
    with pytest.raises(RuntimeError, match=r"ended with exit code 1: out of luck"), ray_head.ray_head(num_cpus=1):
        pytest.fail("it has ended")
