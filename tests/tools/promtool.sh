#!/usr/bin/env bash
# Prints the path of a pinned promtool, which the tests check metrics and alert rules with.
#
# It is taken out of Debian's package `prometheus` into a cache outside git, once: no root, and no daemon is installed.
# On a system without apt, name one by PROMTOOL.
set -euo pipefail
# shellcheck source=tests/peers/lib.sh
. "$(dirname "$0")/../peers/lib.sh"

readonly VERSION=2.42.0+ds-5+deb12u1

if [ -n "${PROMTOOL:-}" ]; then
    printf '%s\n' "$PROMTOOL"
    exit
fi
tools=$(tools_cache)
promtool=$tools/promtool-$VERSION

install_promtool() {
    [ ! -x "$promtool" ] || return 0
    command -v apt-get >/dev/null || die 'promtool comes from a Debian package, and there is no apt-get: name one by PROMTOOL'
    local work
    work=$(mktemp -d)
    (cd "$work" && apt-get download -qq "prometheus=$VERSION" >&2 && dpkg-deb -x ./*.deb unpacked) ||
        die "Debian's package prometheus $VERSION cannot be had: apt-get update, or name a promtool by PROMTOOL"
    cp "$work/unpacked/usr/bin/promtool" "$promtool.partial"
    mv "$promtool.partial" "$promtool"
    rm -rf "$work"
}

with_lock "$tools/promtool.lock" install_promtool
printf '%s\n' "$promtool"
