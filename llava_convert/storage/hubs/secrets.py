"""Texts of servers and clients, without what is secret in them."""

from __future__ import annotations

import os
import re
import sys
from urllib.parse import urlsplit

from llava_convert.core.text import escaped
from llava_convert.storage.hubs import HUBS, hub

_VARIABLES = (
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MODELSCOPE_API_TOKEN", "MODELSCOPE_SDK_TOKEN"),
    *("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
)
_PATTERNS = (
    (re.compile(r"\b(hf_[A-Za-z0-9]{6,}|ms-[0-9A-Za-z-]{8,})"), "***"),
    (re.compile(r"(?i)(bearer|m_session_id=)\s*[^\s'\",;]+"), r"\1 ***"),
    (re.compile(r"(?i)\b(basic) [a-z0-9+/]{8,}=*"), r"\1 ***"),
    (re.compile(r"(://)[^\s/'\"@]+@"), r"\1***@"),  # user and password of an address
    (re.compile(r"(://[^\s'\"?#]+)#[^\s'\")]+"), r"\1#…"),
    # The query of a signed address is a key. requests names addresses by their path alone.
    (re.compile(r"(/[^\s'\"?]*)\?[^\s'\")]+"), r"\1?…"),
)


def scrubbed(text: str) -> str:
    """A text without tokens, without the secret parts of addresses, and without what a terminal would obey."""
    for secret in _secrets():
        text = text.replace(secret, "***")
    for pattern, instead in _PATTERNS:
        text = pattern.sub(instead, text)
    return escaped(text, keep="\n")


def shown(url: str) -> str:
    """A URL without what may be secret in it: user, password, the signature in its query, and the fragment."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}".rstrip("/")


def _secrets() -> list[str]:
    """The tokens that may have been sent: those of the environment, and of the hubs whose clients are loaded."""
    found = [os.environ.get(name) for name in _VARIABLES]
    found += [hub(name).token() for name in HUBS if f"llava_convert.storage.hubs.{name}" in sys.modules]
    return [secret for secret in found if secret]
