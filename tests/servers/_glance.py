"""glance_store as the other side of an interop test: it runs in an environment of its own, told what to do in JSON."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

__all__ = ["glance_store"]

_SIDE = """
import hashlib, json, sys, types
import glance_store
from oslo_config import cfg

conf = cfg.CONF
conf.register_opt(cfg.DictOpt("enabled_backends"))
conf(["--config-file", sys.argv[1]])
glance_store.register_store_opts(conf)
glance_store.create_multi_stores(conf)
glance_store.verify_store()
told = []
for job in json.load(sys.stdin):
    if job["verb"] == "add":
        data = open(job["path"], "rb")
        context = types.SimpleNamespace(project_id=job["project"]) if "project" in job else None
        answer = glance_store.add_with_multihash(
            conf, job["id"], data, job["size"], "old", "sha256", context=context
        )
        told.append({"uri": answer[0], "size": answer[1], "sha256": answer[3]})
    elif job["verb"] == "get":
        digest, count = hashlib.sha256(), 0
        for chunk in glance_store.get(job["uri"], "old")[0]:
            digest.update(chunk)
            count += len(chunk)
        size = glance_store.get_size_from_uri_and_backend(job["uri"], "old")
        told.append({"count": count, "size": size, "sha256": digest.hexdigest()})
    else:
        glance_store.delete(job["uri"], "old")
        told.append({})
print(json.dumps(told))
"""


def glance_store(python: str | Path, conf: Path, *jobs: dict[str, Any], path: str = "") -> list[dict[str, Any]]:
    """What it answers to each job on its backend ``old``; ``path`` is for modules that its environment lacks."""
    done = subprocess.run(
        [python, "-W", "ignore", "-c", _SIDE, conf],
        input=json.dumps(jobs),
        env=dict(os.environ, PYTHONPATH=path) if path else None,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return told
