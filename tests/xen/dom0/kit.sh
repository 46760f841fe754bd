# What the scenarios have in common; sourced by busybox's shell in dom0. Lines that begin with ## are read by tests/xen/run.
# shellcheck shell=dash

consoles=/var/log/xen/console

now() { cut -d' ' -f1 /proc/uptime; }
# seconds BEFORE [AFTER]
seconds() { awk -v a="$1" -v b="${2:-$(now)}" 'BEGIN { printf "%.2f", b - a }'; }
note() { echo "## say @$(now) $*"; }
ok() { echo "## ok $*"; }
figure() { echo "## figure $1 $2"; }
fail() {
    echo "## FAILED @$(now) $*"
    exit 1
}

# within SECONDS WHAT COMMAND...: tries the command until it succeeds
within() {
    local until what
    until=$(($(cut -d. -f1 /proc/uptime) + $1))
    what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        [ "$(cut -d. -f1 /proc/uptime)" -lt "$until" ] || fail "$what: not in time"
        usleep 100000
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
    within 120 "$1 checks its memory" more_lines "$1" '^FULL' "${before:-0}"
    if grep -qE 'errors=[1-9]' "$(console "$1")"; then
        grep -E 'errors=[1-9]' "$(console "$1")" | head -n 5
        fail "$1: wrong pages"
    fi
    ok "$1: $(grep '^FULL' "$(console "$1")" | tail -n 1 | tr -d '\r')"
}
