# What the scenarios have in common; sourced by busybox's shell in dom0. Lines that begin with ## are read by tests/xen/run.
# shellcheck shell=dash disable=SC2034 # what scenarios use

consoles=/var/log/xen/console

now() { cut -d' ' -f1 /proc/uptime; }
# seconds BEFORE [AFTER]
seconds() { awk -v a="$1" -v b="${2:-$(now)}" 'BEGIN { printf "%.2f", b - a }'; }
note() { echo "## say @$(now) $*"; }
ok() { echo "## ok $*"; }
figure() { echo "## figure $1 $2"; }
# With all that may tell why.
fail() {
    {
        xl list
        tail -n 12 /tmp/*.log /tmp/snowflock-0/*/*.log /tmp/snowflock-0/*/*/*.log $consoles/*.log 2>/dev/null
        echo "## FAILED @$(now) $*"
    } >&2
    exit 1
}

# within SECONDS WHAT COMMAND...: tries the command until it succeeds; rarely, since all share one slow processor
interval=0.5
within() {
    local until what up
    read -r up _ </proc/uptime
    until=$((${up%.*} + $1))
    what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        read -r up _ </proc/uptime
        [ "${up%.*}" -lt "$until" ] || fail "$what: not in time"
        sleep "$interval"
    done
}

# configure TEMPLATE NAME [MIB PATTERN_MIB VCPUS]: prints the name of the configuration file
configure() {
    sed "s/NAME/$2/; s/PATTERN/${4:-}/; s/MIB/${3:-}/; s/VCPUS/${5:-1}/" "/test/$1.cfg" >"/tmp/$2.cfg"
    echo "/tmp/$2.cfg"
}

console() { echo "$consoles/guest-$1.log"; }
# lines NAME PATTERN: how many lines of the guest's console have it
lines() { grep -c "$2" "$(console "$1")" 2>/dev/null; }
more_lines() { [ "$(lines "$1" "$2")" -gt "$3" ]; }
# send NAME CHARACTER: a command to the checking guest, see tests/lab
send() { printf '%s' "$2" >"$(xenstore-read "/local/domain/$(xl domid "$1")/console/tty")"; }

has_begun() { [ -s "$(console "$1")" ]; }
# began_after NAME: milliseconds from memtap letting the domain go to the first line on its console, which is waited for
began_after() {
    local begun released interval=0.02
    within 200 "$1 says something" has_begun "$1"
    begun=$(date +%s.%N)
    within 5 "memtap's log of $1" grep -q 'domain runs' "/tmp/$1.log"
    released=$(sed -n 's/^\([-0-9]*\)T\([:0-9]*\)\(\.[0-9]*\)Z.*domain runs.*/\1 \2 \3/p' "/tmp/$1.log" | tail -n 1)
    awk -v begun="$begun" -v whole="$(date -u -d "${released% *}" +%s)" -v part="${released##* }" 'BEGIN { printf "%d", (begun - whole - part) * 1000 }'
}

# parent NAME MIB PATTERN_MIB [VCPUS]: the checking guest, until it has filled its memory
parent() {
    local since
    since=$(now)
    xl create -e "$(configure linux "$1" "$2" "$3" "${4:-1}")" || fail "xl create"
    note "$1: created in $(seconds "$since") s"
    within 240 "$1 boots" grep -q READY "$(console "$1")"
    note "$1: $(grep READY "$(console "$1")" | tr -d '\r') after $(seconds "$since") s"
}

# checked NAME: the guest looks at every page, and has said of none that it was wrong
checked() {
    local before
    before=$(lines "$1" '^FULL')
    send "$1" F
    within 300 "$1 checks its memory" more_lines "$1" '^FULL' "${before:-0}"
    if grep -qE 'errors=[1-9]' "$(console "$1")"; then
        grep -E 'errors=[1-9]' "$(console "$1")" | head -n 5
        fail "$1: wrong pages"
    fi
    ok "$1: $(grep '^FULL' "$(console "$1")" | tail -n 1 | tr -d '\r')"
}

# capture DOMAIN NAME: as /tmp/NAME, live
capture() {
    snowflock capture xl "$1" -o "/tmp/$2" --method migrate --json >"/tmp/$2.capture" 2>"/tmp/$2-capture.log" || fail "capture xl $1"
    cat "/tmp/$2.capture"
    snowflock descriptor export xl "/tmp/$2.snow" -o /tmp/hole --force 2>&1 || fail "descriptor export"
}
# small NAME: its descriptor is, whatever the size of the guest
small() { [ "$(stat -c %s "/tmp/$1.snow")" -le 20480 ] || fail "the descriptor of $1 is larger than 20 KiB"; }

# serve NAME [ARGUMENTS...]: the page server of /tmp/NAME, at a socket and for other hosts
serve() {
    local name=$1
    shift
    snowflock memserver serve --image "/tmp/$name.snowidx" --listen unix:/tmp/pages --listen tcp://0.0.0.0:7070 --admin /tmp/server \
        "$@" >>/tmp/memserver.log 2>&1 &
    server=$!
    within 30 "memserver is ready" [ -S /tmp/pages ]
}

# page NAME DESCRIPTOR [ARGUMENTS...]: a memtap for the domain, which then runs
page() {
    local name=$1 descriptor=$2
    shift 2
    snowflock memtap xen --domain "$name" --descriptor "/tmp/$descriptor.snow" --server "${SERVER:-unix:/tmp/pages}" --admin "/tmp/$name.admin" \
        --stats "/tmp/$name.json" "$@" >>"/tmp/$name.log" 2>&1 &
    pager=$!
}

# paused TEMPLATE NAME [MIB PATTERN_MIB VCPUS]: a domain without memory, from /tmp/hole
paused() { xl restore -e -p "$(configure "$@")" /tmp/hole 2>/tmp/restore.log || { cat /tmp/restore.log; fail "xl restore $2"; }; }

# processes PATTERN: the numbers of those whose arguments begin like that, after `snowflock`
processes() {
    local process arguments
    for process in /proc/[0-9]*; do
        arguments=$(tr '\0' ' ' 2>/dev/null <"$process/cmdline")
        # shellcheck disable=SC2254 # a pattern
        case $arguments in *snowflock\ $1*) echo "${process#/proc/}" ;; esac
    done
}

ended() { ! kill -0 "$1"; }
# ends PID CODE WHAT: the process ends by itself, with this exit code
ends() {
    within 30 "$3 ends" ended "$1"
    wait "$1"
    [ $? -eq "$2" ] || fail "$3 did not end with exit code $2"
}
# destroyed NAME PID: the domain is, and its memtap ends without an error
destroyed() {
    xl destroy "$1" || fail "xl destroy $1"
    ends "$2" 0 "the memtap of $1"
}

# json FILE KEY: the last number of that name
json() { grep -o "\"$2\": *[0-9.]*" "$1" | tail -n 1 | sed 's/.*: *//'; }
