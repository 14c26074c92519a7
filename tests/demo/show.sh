# What the demo prints. Sourced by demo.sh.
# shellcheck shell=bash

# step TEXT: one thing the demo does, with the seconds since its start.
step() {
    printf '\n[%3d s] %s\n' "$SECONDS" "$*"
}

# shown COMMAND...: runs it as typed and shows both the command and what it prints.
shown() {
    printf '    $ %s\n' "$*"
    "$@" | indented
}

# shown_line LINE: the same for a line with a pipe in it.
shown_line() {
    printf '    $ %s\n' "$1"
    bash -o pipefail -c "$1" | indented
}

indented() {
    sed 's/^/      /'
}

# note TEXT: what to see in the output above.
note() {
    printf '      -> %s\n' "$*"
}

# Reads a stored Secret on stdin and prints the header that kms-agent put in front of the wrapped DEK
# (docs/wire-format.md). Nothing in it is secret.
decode_stored_secret() {
    od -An -v -tu1 | awk '
        { for (i = 1; i <= NF; i++) byte[n++] = $i }
        END {
            for (at = 0; colons < 5 && at < n; at++) {
                prefix = prefix sprintf("%c", byte[at])
                if (byte[at] == 58) colons++
            }
            printf "prefix        %s\n", prefix
            printf "wrapped DEK   %d bytes\n", byte[at] * 256 + byte[at + 1]
            printf "  format      %d\n", byte[at + 2]
            printf "  version     %d\n", ((byte[at + 3] * 256 + byte[at + 4]) * 256 + byte[at + 5]) * 256 + byte[at + 6]
            for (i = at + 7; i < at + 23; i++) id = id sprintf("%02x", byte[i])
            printf "  key id      %s-%s-%s-%s-%s\n", substr(id, 1, 8), substr(id, 9, 4), substr(id, 13, 4),
                substr(id, 17, 4), substr(id, 21)
        }'
}

# The key version in a stored Secret's header.
version_of() {
    stored_secret "$1" | decode_stored_secret | awk '$1 == "version" { print $2 }'
}

# expect WHAT WANTED FOUND: the demo is a proof, so it ends where a claim does not hold.
expect() {
    [ "$2" = "$3" ] || die "demo: $1 should be \"$2\" and is \"$3\""
}
