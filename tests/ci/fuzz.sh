#!/usr/bin/env bash
# Fuzzes the parsers of outside bytes, so many seconds each: fuzz.sh SECONDS. cargo-fuzz is pinned and installed once into
# a cache outside git. New inputs go to a folder beside the build, not into the committed corpus.
set -euo pipefail
cd "$(dirname "$0")/../.."

readonly VERSION=0.13.2
seconds=${1:-60}
tools=${XDG_CACHE_HOME:-$HOME/.cache}/fleet-kms/tools
fuzz=$tools/bin/cargo-fuzz

if [ "$("$fuzz" fuzz --version 2>/dev/null)" != "cargo-fuzz $VERSION" ]; then
    echo "installing cargo-fuzz $VERSION into $tools (about a minute, once)"
    CARGO_TARGET_DIR=$tools/build cargo install --quiet --locked --version "$VERSION" --root "$tools" cargo-fuzz
    rm -rf "$tools/build"
fi

found=${CARGO_TARGET_DIR:-target}/fuzz-corpus
for target in wrapped_dek authority; do
    mkdir -p "$found/$target"
    # The sanitizer flags need a nightly compiler, or a stable one that is told to be one.
    RUSTC_BOOTSTRAP=1 PATH=$tools/bin:$PATH cargo fuzz run --fuzz-dir tests/fuzz "$target" "$found/$target" \
        "tests/fuzz/corpus/$target" -- -max_total_time="$seconds" -print_final_stats=1
done
