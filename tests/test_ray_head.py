"""Starting Ray heads: ports that never clash, and an error that says why one did not start."""

from __future__ import annotations

import pytest

from benchmarks import ray_head


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
