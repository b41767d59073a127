"""Describe errors of an object store in one sentence that says what to do."""

from __future__ import annotations

import pytest

from msft_store import StoreError
from msft_store.remote.transport.object_store import (
    describe_error,
    is_permanent,
    object_remote,
    suggest_fix,
)

AT = "Error performing HEAD http://me:secret@host:9/b/store.json?sig=secret in 1.2ms"


@pytest.mark.parametrize(
    ("scheme", "text", "cause", "advice", "final"),
    [
        (
            "s3",
            f"Generic S3 error: {AT}, after 6 retries, max_retries: 6, retry_timeout: 60s  - HTTP "
            'error: error sending request\n\nDebug source:\n ... message: "Connection refused" '
            "kind: ConnectionRefused",
            "connection refused by http://me@host:9",
            "AWS_ENDPOINT_URL",
            False,
        ),
        (
            "gs",
            f"Generic GCS error: {AT}\nkind: Timeout",
            "no answer in time from",
            "network",
            False,
        ),
        (
            "s3",
            f"Generic S3 error: {AT} - Server returned non-2xx status code: 503 Slow Down: ",
            "Server returned non-2xx status code: 503 Slow Down",
            "",
            False,
        ),
        (
            "s3",
            f"... {AT} - Server returned non-2xx status code: 403 Forbidden: ",
            "access denied (403 Forbidden)",
            "check the credentials",
            True,
        ),
        (
            "s3",
            f"{AT} - Server returned non-2xx status code: 403 Forbidden: <Error><Code>"
            "InvalidAccessKeyId</Code><Message>No such key.</Message></Error>",
            "InvalidAccessKeyId: No such key.",
            "check the credentials",
            True,
        ),
        (
            "s3",
            f"{AT} - Server returned non-2xx status code: 301 Moved: <Code>PermanentRedirect</Code>"
            "<Message>Use another endpoint</Message>",
            "PermanentRedirect",
            "AWS_REGION",
            False,
        ),
        (
            "s3",
            "Generic S3 error: Error performing PUT http://169.254.169.254/latest/api/token in 2ms",
            "there are no credentials",
            "AWS_ACCESS_KEY_ID",
            False,
        ),
        (
            "abfs",
            "Generic MicrosoftAzure error: Account must be specified\n\nDebug source: x",
            "Account must be specified",
            "AZURE_STORAGE_ACCOUNT_NAME",
            False,
        ),
        (
            "https",
            f"Generic HTTP error: {AT} - Server returned non-2xx status code: 405 Not Allowed: ",
            "405 Not Allowed",
            "WebDAV",
            True,
        ),
        ("s3", f"Generic S3 error: odd {AT}", "odd", "", False),
    ],
)
def test_the_cause_and_what_to_do(
    scheme: str, text: str, cause: str, advice: str, final: bool
) -> None:
    error = OSError(text)
    assert cause in describe_error(error)
    assert "secret" not in describe_error(error)
    assert "\n" not in describe_error(error)
    assert advice in suggest_fix(scheme, error)
    assert bool(advice) == bool(suggest_fix(scheme, error))
    assert is_permanent(error) == final


def test_client_options_do_not_forbid_unencrypted_http() -> None:
    pytest.importorskip("obstore")
    remote = object_remote(
        "s3://bucket/run",
        endpoint="http://127.0.0.1:9",
        skip_signature=True,
        client_options={"timeout": "5s"},
        retry_config={"max_retries": 0},
    )
    with pytest.raises(StoreError, match="connection refused"):
        remote.size("store.json")
