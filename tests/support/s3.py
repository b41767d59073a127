"""A real S3 server on this machine, with one bucket.

Example::

    with serve_s3() as address, monkeypatch.context() as patch:
        for name, value in environment(address).items():
            patch.setenv(name, value)
        push(store, "s3://bucket/run")
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import boto3
from moto.server import ThreadedMotoServer

KEYS = {"access_key_id": "anybody", "secret_access_key": "anything", "region": "us-east-1"}


@contextlib.contextmanager
def serve_s3() -> Iterator[str]:
    """Run the server; yield its address, such as ``http://127.0.0.1:5000``."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    client = boto3.client(
        "s3",
        endpoint_url=address,
        region_name=KEYS["region"],
        aws_access_key_id=KEYS["access_key_id"],
        aws_secret_access_key=KEYS["secret_access_key"],
    )
    client.create_bucket(Bucket="bucket")
    try:
        yield address
    finally:
        server.stop()


def environment(address: str) -> dict[str, str]:
    """Return the environment variables by which a program finds the server."""
    return {"AWS_ENDPOINT_URL": address} | {f"AWS_{key.upper()}": KEYS[key] for key in KEYS}
