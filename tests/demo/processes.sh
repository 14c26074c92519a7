# Processes and ports of the demo. Sourced by demo.sh, which sets $state and $logs.
# shellcheck shell=bash disable=SC2154

# free_port: below the range from which Linux takes the source ports of outgoing connections, so that nothing takes it
# between the look and its use. Sets REPLY; a subshell would forget which ports were given.
free_port() {
    while true; do
        REPLY=$((20000 + RANDOM % 12000))
        case " ${given_ports:-} " in *" $REPLY "*) continue ;; esac
        (exec 3<>"/dev/tcp/127.0.0.1/$REPLY") 2>/dev/null || break
    done
    given_ports="${given_ports:-} $REPLY"
}

# start NAME COMMAND...: in a session of its own, so that Ctrl-C stops the demo before its processes and a kept demo
# outlives the terminal.
start() {
    local name=$1
    shift
    setsid "$@" </dev/null >>"$logs/$name.log" 2>&1 &
    printf '%s %s %s\n' "$name" $! "$(started_at $!)" >>"$state/processes"
}

# A process is its id and its start: an id alone may belong to somebody else by the time the demo is stopped.
started_at() {
    sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d ' ' -f 20
}

is_running() {
    local name=$1 pid started
    read -r _ pid started < <(grep "^$name " "$state/processes" | tail -n 1)
    [ -n "$started" ] && [ "$(started_at "$pid")" = "$started" ]
}

# stop_process NAME PID STARTED: SIGTERM, and SIGKILL for one that does not go within five seconds.
stop_process() {
    local pid=$2 started=$3 tries=50
    [ "$(started_at "$pid")" = "$started" ] || return 0
    kill -TERM "$pid" 2>/dev/null || true
    while [ $tries -gt 0 ] && [ "$(started_at "$pid")" = "$started" ] && ! is_zombie "$pid"; do
        sleep 0.1
        tries=$((tries - 1))
    done
    [ $tries -gt 0 ] || kill -KILL "$pid" 2>/dev/null || true
}

is_zombie() {
    [ "$(sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d ' ' -f 1)" = Z ]
}

stop_named() {
    local line
    line=$(grep "^$1 " "$state/processes" | tail -n 1)
    # shellcheck disable=SC2086 # three words
    stop_process $line
}

# In the order in which each still has what it needs: first those that were started last.
stop_all() {
    local name pid started
    [ -f "$state/processes" ] || return 0
    while read -r name pid started; do
        stop_process "$name" "$pid" "$started"
    done < <(tac "$state/processes")
    rm -f "$state/processes"
}

# wait_for NAME WHAT COMMAND...: until the command succeeds, which process NAME has to make true within a minute.
wait_for() {
    local name=$1 what=$2 end=$((SECONDS + 60))
    shift 2
    until "$@" >/dev/null 2>&1; do
        is_running "$name" || log_and_die "$name ended before it was $what"
        [ $SECONDS -lt $end ] || log_and_die "$name is not $what after 60 s"
        sleep 0.2
    done
}

log_and_die() {
    say "the end of its log:"
    tail -n 20 "$logs/${1%% *}.log" >&2
    die "demo: $1"
}

# http_ok PORT PATH: without curl, which a user may not have.
http_ok() {
    local answer
    exec 3<>"/dev/tcp/127.0.0.1/$1" || return 1
    printf 'GET %s HTTP/1.0\r\nHost: localhost\r\n\r\n' "$2" >&3
    IFS= read -r answer <&3
    exec 3>&-
    case $answer in *' 200 '*) return 0 ;; *) return 1 ;; esac
}
