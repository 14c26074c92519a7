"""Gives a request whose idempotency key is good and was sent before a key of its own.

Schemathesis sends one and the same good key with nearly every request of its coverage phase; each but the first would be
answered by what remembers the keys, and try nothing behind it. What is no good key stays as it was made.
"""

import re
import uuid

import schemathesis

KEY = "idempotency-key"
GOOD = re.compile(r"[A-Za-z0-9._~-]{1,64}")
sent = set()


@schemathesis.hook
def before_call(context, case, **kwargs):
    key = (case.headers or {}).get(KEY)
    if not isinstance(key, str) or not GOOD.fullmatch(key):
        return
    if key in sent:
        case.headers[KEY] = uuid.uuid4().hex
    sent.add(key)
