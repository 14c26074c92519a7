#!/usr/bin/env bash
# Checks bans, licences, sources and advisories with a pinned cargo-deny, installed once into a cache outside git.
#
# The advisory database comes by git. Where the network is closed, that one check is left out and said so: the line
# goes to the file named by LEFT_OUT if there is one, for the summary of `make test`.
set -euo pipefail
cd "$(dirname "$0")/../.."

readonly VERSION=0.20.2
readonly FETCH_SECONDS=60
tools=${XDG_CACHE_HOME:-$HOME/.cache}/fleet-kms/tools
deny=$tools/bin/cargo-deny

if [ "$("$deny" --version 2>/dev/null)" != "cargo-deny $VERSION" ]; then
    echo "installing cargo-deny $VERSION into $tools (about 3 minutes, once)"
    # Its own build directory: it shares no dependency build with this workspace.
    CARGO_TARGET_DIR=$tools/build cargo install --quiet --locked --version "$VERSION" --root "$tools" cargo-deny
    rm -rf "$tools/build"
fi

"$deny" --log-level error check bans licenses sources

if GIT_TERMINAL_PROMPT=0 timeout "$FETCH_SECONDS" "$deny" --log-level error fetch db >"$tools/fetch.log" 2>&1; then
    "$deny" --log-level error check --disable-fetch advisories
else
    note='advisories: the advisory database could not be fetched (closed network)'
    echo "left out: $note"
    if [ -n "${LEFT_OUT:-}" ]; then echo "$note" >>"$LEFT_OUT"; fi
fi
