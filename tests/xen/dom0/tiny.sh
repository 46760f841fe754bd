# A kernel of some kilobytes is captured and cloned: its code, stack, page tables and data all arrive by page faults.
# shellcheck shell=dash source=tests/xen/dom0/kit.sh
. /test/kit.sh
cd /tmp || exit 1

# rounds NAME: how many it has done without an error
rounds() { xl dmesg | grep -c "(d$(xl domid "$1")) tiny: round [0-9]* errors=0"; }
has_rounds() { [ "$(rounds "$1")" -ge "$2" ]; }
# A guest with drivers would take note when it is asked to suspend. This one does it by itself, after its second round.
acknowledge() {
    request=/local/domain/$(xl domid "$1")/control/shutdown
    within 60 "xl asks $1 to suspend" is_asked
    xenstore-write "$request" ''
}
is_asked() { [ "$(xenstore-read "$request")" = suspend ]; }

xl create -e "$(configure tiny parent)" || fail "xl create"
within 30 "the parent's second round" has_rounds parent 2
acknowledge parent &
# Not `snowflock capture xl`, which rightly refuses a domain that is suspended already.
xl save -c parent parent.save 2>save.log || fail "xl save"
snowflock descriptor make xl-stream parent.save -o tiny >make.log 2>&1 || fail "descriptor make"
snowflock descriptor export xl tiny.snow -o hole || fail "descriptor export"
within 30 "the parent goes on" has_rounds parent 4
xl destroy parent

serve tiny
paused tiny clone
page clone tiny --prefetch off
within 60 "three rounds of the clone" has_rounds clone 3
xl dmesg | grep "(d$(xl domid clone)) tiny:" | grep -v errors=0 && fail "the clone found errors"
ok "a clone checked its memory: $(rounds clone) rounds"
destroyed clone "$pager"
[ "$(json clone.json ring_requests)" -gt 1000 ] || fail "only $(json clone.json ring_requests) faults: pages came by other ways"
