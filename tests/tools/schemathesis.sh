#!/usr/bin/env bash
# Prints the path of a pinned schemathesis, which tries the admin API by its own document.
#
# It lives in a virtual environment of its own in a cache outside git, made once. On a system without python3, name one
# by SCHEMATHESIS.
set -euo pipefail
# shellcheck source=tests/peers/lib.sh
. "$(dirname "$0")/../peers/lib.sh"

readonly VERSION=4.32.5

if [ -n "${SCHEMATHESIS:-}" ]; then
    printf '%s\n' "$SCHEMATHESIS"
    exit
fi
tools=$(tools_cache)
venv=$tools/schemathesis-$VERSION

install_schemathesis() {
    [ ! -f "$venv/complete" ] || return 0
    command -v python3 >/dev/null || die 'schemathesis needs python3, and there is none: name one by SCHEMATHESIS'
    rm -rf "$venv"
    say "installing schemathesis $VERSION into $venv (about 20 s, once)"
    # Chained, because `set -e` does not hold in what with_lock runs.
    python3 -m venv "$venv" >&2 &&
        "$venv/bin/pip" install --quiet --disable-pip-version-check "schemathesis==$VERSION" >&2 &&
        touch "$venv/complete" || die "schemathesis $VERSION cannot be installed from PyPI"
}

with_lock "$tools/schemathesis.lock" install_schemathesis
printf '%s\n' "$venv/bin/schemathesis"
