# A Linux guest is captured live and forked; its clones outlive their page server and their pagers, and end as they should.
# shellcheck shell=dash source=tests/xen/dom0/kit.sh
. /test/kit.sh
cd /tmp || exit 1

parent web 128 16 2

note "two clones at once"
snowflock fork xl web --clones 2 --name 'web-{id}' -o /tmp/web --lane socket --json >fork.json 2>fork.log &
fork=$!
within 240 "the first clone says something" has_begun web-1
within 60 "the second clone says something" has_begun web-2
figure pause_ms "$(sed -n 's/.*stood still for \([0-9]*\) ms.*/\1/p' fork.log)"
figure descriptor_bytes_128 "$(stat -c %s web.snow)"
small web

# Before anything of their memory is checked, so that most of it must still come.
[ "$(processes 'memtap xen' | wc -l)" -eq 2 ] || fail "not two pagers"
note "the page server is killed, then a pager"
kill -9 "$(processes 'memserver serve')" || fail "kill"
within 60 "another page server" grep -q 'memserver died, starting it again' fork.log
pager=$(processes 'memtap xen*clone-1')
kill -9 "$pager" || fail "kill"
within 60 "another memtap" grep -q 'web-1: its memtap was killed' fork.log
checked web-1
checked web-2
ok "clones outlived their page server and a pager"
checked web
ok "the parent goes on"

note "the ends of clones"
pager=$(processes 'memtap xen*clone-2')
xl destroy web-2 || fail "xl destroy"
within 30 "memtap ends with its domain" ended "$pager"
kill "$fork"
within 60 "fork xl ends" ended "$fork"
if xl domid web-1 2>/dev/null; then fail "a clone outlived fork xl"; fi
if processes 'mem*' | grep .; then fail "processes outlived fork xl"; fi
ok "xl destroy ends a pager, and nothing outlives fork xl"

note "what these clones needed is pushed to the next one, before it runs"
[ -s web.snowws ] || fail "fork xl left no working set"
snowflock descriptor export xl web.snow -o hole 2>&1 || fail "descriptor export"
serve web
paused linux next 128 16 2
page next web --lane socket --working-set wait
began_after next >/dev/null || exit 1
checked next
destroyed next "$pager"
figure pushed_pages "$(json next.json order_pages)"
figure demand_faults_after_push "$(json next.json demand_faults)"
sed -n '/"pager"/,/}/p' next.json
[ "$(json next.json order_pages)" -gt 100 ] || fail "only $(json next.json order_pages) pages of the working set were pushed"
ok "a working set was pushed"

note "the page server is gone for good"
paused linux alone 128 16 2
page alone web --lane socket --working-set off --patience 2s --prefetch off
began_after alone >/dev/null || exit 1
kill -9 "$server"
ends "$pager" 3 "memtap"
if xl domid alone 2>/dev/null; then fail "a clone without pages is still there"; fi
ok "a clone without pages is destroyed"
checked web
