#!/usr/bin/env bash
# Every check of `make test`: prints the stages and how long they take, runs all of them even when one fails, and ends
# with a table and one line that counts the tests.
set -uo pipefail
cd "$(dirname "$0")/../.."

# name | seconds on a warm machine | seconds the first time | what it is | command
stages() {
    cat <<'STAGES'
fmt-check|2|5|formatting|cargo fmt --all -- --check
lint|20|170|clippy, warnings are errors|cargo clippy --workspace --all-targets --locked -- -D warnings
proto-check|10|60|generated code equals proto/|make --no-print-directory proto-check
doc|10|120|documentation, broken links are errors|RUSTDOCFLAGS="-D warnings" cargo doc --quiet --no-deps --workspace --locked
deny|3|200|licences, bans, sources, advisories|tests/ci/deny.sh
build|60|420|programs and tests|cargo build --workspace --locked && cargo test --workspace --locked --no-run
unit|60|90|unit and contract tests|cargo test --workspace --locked --no-fail-fast --lib --bins
doctest|10|20|examples in the documentation|cargo test --workspace --locked --no-fail-fast --doc
system|900|1400|layering, system and real-peer tests (the first run builds kube-apiserver and etcd)|cargo test --workspace --locked --no-fail-fast --test "*"
STAGES
}

out=${CARGO_TARGET_DIR:-target}/ci
mkdir -p "$out"
rm -f "$out"/*.log
export LEFT_OUT=$PWD/$out/left-out
case $out in /*) LEFT_OUT=$out/left-out ;; esac
: >"$LEFT_OUT"

plan() {
    local warm=0 cold=0
    printf '%-12s %6s %6s  %s\n' stage warm first 'what it checks'
    while IFS='|' read -r name seconds first what _; do
        printf '%-12s %5ss %5ss  %s\n' "$name" "$seconds" "$first" "$what"
        warm=$((warm + seconds)) cold=$((cold + first))
    done < <(stages)
    printf '%-12s %3d min %d min on two cores\n\n' total $(((warm + 59) / 60)) $(((cold + 59) / 60))
}

# Runs one stage; adds a line to the table.
run() {
    local name=$1 command=$2 log=$out/$1.log start=$SECONDS result=ok
    printf '=== %s: %s\n' "$name" "$command"
    if ! bash -c "$command" </dev/null 2>&1 | tee "$log"; then
        result=FAILED
        failed=$((failed + 1))
    fi
    table+=$(printf '%-12s %6ss  %s' "$name" $((SECONDS - start)) "$result")$'\n'
    echo
}

# Sums one word of the lines that cargo test ends with: count passed
count() {
    cat "$out"/*.log | sed -n "s/^test result: .*[. ]\([0-9][0-9]*\) $1.*/\1/p" | awk '{ n += $1 } END { print n + 0 }'
}

failed=0 table=
plan
while IFS='|' read -r name _ _ _ command; do
    run "$name" "$command" || true
done < <(stages)

printf '%-12s %7s  %s\n%s' stage seconds result "$table"
if [ -s "$LEFT_OUT" ]; then
    echo 'left out by a closed network:'
    sed 's/^/  /' "$LEFT_OUT"
else
    echo 'nothing was left out'
fi

tests_failed=$(count failed)
verdict=ok
if [ "$failed" -gt 0 ] || [ "$tests_failed" -gt 0 ]; then verdict=FAILED; fi
printf '\ntest result: %s. %s passed; %s failed; %s ignored; 0 measured; %s filtered out; finished in %s.00s\n' \
    "$verdict" "$(count passed)" "$tests_failed" "$(count ignored)" "$(count 'filtered out')" "$SECONDS"
[ "$verdict" = ok ]
