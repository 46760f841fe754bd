#!/bin/sh
# Stands in for xl: it has one domain, `web`, number 3. Beside this script lie the domain's `state`, in the letters of `xl list`; its
# `stream`, as `xl save` wrote it; `config.json`, as `xl list -l` shows it; the `clones` that were restored, what they were `restored`
# from, and the numbers of those `destroyed`; and files that make it behave otherwise: `slow`, `broken`, `crashing`, `unrestorable`,
# `mute`.
here=$(dirname "$0")
[ "$1" = -vvv ] && shift
say() { echo "$*" >&2; }
state() { echo "$1" >"$here/state"; }

# The guest is asked to suspend, and does.
suspend() {
    say "libxl: debug: libxl_dom_suspend.c:203:domain_suspend_callback_common: Domain 3:issuing PVH/HVM suspend request via XenBus control node"
    say "libxl: debug: libxl_dom_suspend.c:281:domain_suspend_common_pvcontrol_suspending: Domain 3:guest acknowledged suspend request"
    state ---ss-
    say "libxl: debug: libxl_dom_suspend.c:358:suspend_common_wait_guest_check: Domain 3:guest has suspended"
    [ -e "$here/crashing" ] && rm "$here/crashing" && exit 1
    return 0
}

# A line of `xl list`: name, number, state.
line() { printf '%-40s %5d %5d %5d     %s  %8.1f\n' "$1" "$2" 128 1 "$3" 8.0; }

case $1 in
list)
    if [ "$2" = -l ]; then
        cat "$here/config.json"
        exit
    fi
    [ -e "$here/mute" ] && [ -e "$here/clones" ] && say "libxl: error: no answer" && exit 1
    { line Domain-0 0 r----- && line web 3 "$(cat "$here/state")"; } >"$here/list.$$"
    for domain in "$here"/clones/*; do
        [ -e "$domain" ] && line "$(basename "$domain")" "$(cat "$domain")" --p--- >>"$here/list.$$"
    done
    found=$(awk -v wanted="$2" 'wanted == "" || wanted == (wanted ~ /^[0-9]+$/ ? $2 : $1)' "$here/list.$$")
    rm "$here/list.$$"
    if [ -z "$found" ]; then
        case $2 in
        *[!0-9]*) say "$2 is an invalid domain identifier (rc=-6)" ;;
        *) say "Error: Domain '$2' does not exist." ;;
        esac
        exit 1
    fi
    echo "Name                                        ID   Mem VCPUs	State	Time(s)"
    echo "$found"
    ;;
restore)
    [ "$2 $3" = "-e -p" ] || exit 2
    case $4 in
    *.cfg) name=$(sed -n 's/^name = "\(.*\)"$/\1/p' "$4") && cp "$4" "$here/restored-$name" ;;
    *) name=$(grep -a -o '"name":"[^"]*"' "$4" | cut -d '"' -f 4) && cp "$4" "$here/restored-$name" ;;
    esac
    [ -e "$here/unrestorable" ] && [ "$name" = clone-2 ] && say "libxl: error: no memory" && exit 3
    mkdir -p "$here/clones"
    echo "1${name##*-}" >"$here/clones/$name"
    ;;
destroy)
    echo "$2" >>"$here/destroyed"
    for domain in "$here"/clones/*; do
        [ -e "$domain" ] && case $2 in "$(cat "$domain")" | "$(basename "$domain")") true ;; *) false ;; esac && rm "$domain" && exit 0
    done
    exit 1
    ;;
save)
    [ "$2 $3 $4" = "-c 3 /proc/self/fd/1" ] || exit 2
    say "Saving to $4 new xl format (info 0x3/0x0/853)"
    suspend
    { head -c 20000 "$here/stream" && { [ ! -e "$here/slow" ] || sleep 2; } && tail -c +20001 "$here/stream"; } >"$4"
    failed=$?
    state -b----
    exit $failed
    ;;
migrate)
    [ "$2 $3 $4" = "-s  3" ] || exit 2
    [ -e "$here/broken" ] && case $5 in *--resume*) ;; *) say "libxl: error: no logdirty" && exit 1 ;; esac
    mkfifo "$here/to.$$" "$here/from.$$"
    sh -c "$5" <"$here/to.$$" >"$here/from.$$" &
    exec 3>"$here/to.$$" 4<"$here/from.$$"
    rm "$here/to.$$" "$here/from.$$"
    read -r banner <&4
    if [ "$banner" != "xl migration receiver ready, send binary domain data." ]; then
        say "migration receiver stream contained unexpected data instead of banner"
        exit 1
    fi
    # Whoever goes before there are pages makes xl crash.
    head -c 15000 "$here/stream" >&3 || exit 139
    # A guest that is suspended does not suspend, but its pages can be had; here they are other ones.
    case $5 in *--resume*) head -c 2000000 /dev/zero >&3 && exit 2 ;; esac
    head -c 20000 "$here/stream" | tail -c +15001 >&3 && { [ ! -e "$here/slow" ] || sleep 2; } && suspend &&
        tail -c +20001 "$here/stream" >&3
    answer=$(head -c 33 <&4)
    exec 3>&-
    wait
    if [ "$answer" = "domain received, ready to unpause" ]; then
        state -----d
        exit 0
    fi
    say "migration receiver stream contained unexpected data instead of ready message"
    say "Migration failed, resuming at sender."
    state -b----
    exit 1
    ;;
*) exit 2 ;;
esac
