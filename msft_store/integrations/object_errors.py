"""What an object store's library says of a failure, as one sentence for a person.

The library's text has the request, its retries and, below it, the error as a tree. Of that only
the cause is shown, and what to do about it.

Example::

    said(error)                        # "connection refused by http://127.0.0.1:9000"
    hint("s3", error)                  # "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, …"
"""

from __future__ import annotations

import re

from msft_store.integrations.remotes import shown

_XML = re.compile(r"<Code>([^<]*)</Code>.*?<Message>([^<]*)</Message>", re.DOTALL)
_STATUS = re.compile(r"status code: (\d+[^:\n]*)|\bstatus: (\d+)")
_FINAL = re.compile("501|4(?!08|09|25|29)")
"""What a server answers when the same request will do no better later."""
_DENIED = ("401", "403")
_URL = re.compile(r"https?://\S+")
_ORIGIN = re.compile(r"https?://[^/\s,]+")
_NOISE = re.compile(
    r"^Generic \w+ error: |Error performing \w+ \S+ in \S+(, after .*?retry_timeout: \S+)? +- "
)
_CAUSES = (
    ("ConnectionRefused", "connection refused by {}"),
    ("dns error", "no such host: {}"),
    ("kind: Timeout", "no answer in time from {}"),
    ("TimedOut", "no answer in time from {}"),
    ("InvalidContentType", "{} does not speak TLS: is it http://?"),
    ("Certificate", "the certificate of {} is not trusted"),
    ("kind: Connect", "no connection to {}"),
)
_WITHOUT_KEYS = ("169.254.169.254", "169.254.170.2", "token request", "session.get_credentials")
_KEYS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_SKIP_SIGNATURE=true for a public "
    "bucket)",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS to the file of a service account's key",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or what else Azure takes",
}
_ENDPOINTS = {"s3": "AWS_ENDPOINT_URL"}


def status(error: Exception) -> str:
    """Return the status that a server answered with, ``""`` if there was no answer."""
    found = _STATUS.search(str(error))
    return "" if found is None else (found[1] or found[2])


def is_final(error: Exception) -> bool:
    """Return whether a server refused what it will refuse again."""
    return _FINAL.match(status(error)) is not None


def said(error: Exception) -> str:
    """Return the cause of a failure in one line, without what must not be seen."""
    text = str(error)
    origin = _ORIGIN.search(text)
    where = "the server" if origin is None else shown(origin[0])
    xml = _XML.search(text)
    if xml is not None:
        return f"{xml[1]}: {xml[2]}"
    if lacks_keys(error):
        return "there are no credentials"
    if status(error)[:3] in _DENIED:
        return f"access denied ({status(error)})"
    if not status(error):
        for sign, cause in _CAUSES:
            if sign in text:
                return cause.format(where)
    line = _NOISE.sub("", _NOISE.sub("", text.partition("\n")[0]))
    return _URL.sub(lambda url: shown(url[0]), line)[:300].strip().rstrip(":")


def hint(scheme: str, error: Exception) -> str:
    """Return what to do about a failure, ``""`` if nothing is known."""
    text, code, kind = str(error), status(error)[:3], _kind(scheme)
    if lacks_keys(error):
        return _KEYS.get(kind, "")
    if "NoSuchBucket" in text:
        return "create the bucket first, or correct the URL"
    if "PermanentRedirect" in text or "without LOCATION" in text or code == "301":
        return "set AWS_REGION to the bucket's region"
    if code in _DENIED or "Unauthenticated" in type(error).__name__:
        return "check the credentials, and that they may list, read and write there"
    if kind == "http" and code in {"404", "405", "501"}:
        return "a web server must speak WebDAV for this"
    if "Account must be specified" in text:
        return "set AZURE_STORAGE_ACCOUNT_NAME"
    if not code and any(sign in text for sign, _ in _CAUSES):
        name = _ENDPOINTS.get(kind)
        return f"check the network{f' and {name}' if name else ''}"
    return ""


def lacks_keys(error: Exception) -> bool:
    """Return whether it was looked for credentials in vain."""
    return any(sign in str(error) for sign in _WITHOUT_KEYS)


def _kind(scheme: str) -> str:
    if scheme.startswith(("s3", "gs", "http")):
        return scheme[:2] if scheme[0] != "h" else "http"
    return "az"
