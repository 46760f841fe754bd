#!/bin/sh
# Stands in for xl: it has one domain, `web`, number 3. Beside this script lie the domain's `state`, in the letters of `xl list`; its
# `stream`, as `xl save` wrote it; and files that make it behave otherwise: `slow`, `broken` and `crashing`.
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

case $1 in
list)
    case $2 in web | 3) ;; *) say "$2 is an invalid domain identifier (rc=-6)" && exit 1 ;; esac
    echo "Name                                        ID   Mem VCPUs	State	Time(s)"
    echo "web                                          3   128     1     $(cat "$here/state")       8.0"
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
