# A parent is captured live, and goes on.
# shellcheck shell=dash source=tests/xen/dom0/kit.sh
. /test/kit.sh
cd /tmp || exit 1
parent web 128 32
note "$(snowflock --version)"
cat >receiver.sh <<'R'
printf 'xl migration receiver ready, send binary domain data.\n'
snowflock descriptor make xl-stream - -o /tmp/web --name web >/tmp/receiver.log 2>&1
printf 'captured'
R
since=$(now)
xl migrate -s '' web 'sh /tmp/receiver.sh' 2>migrate.log
note "xl migrate: $? after $(seconds "$since") s"
cat receiver.log
tail -n 3 migrate.log
ls -l web.*
checked web
snowflock descriptor export xl web.snow -o hole.save || fail "export"
since=$(now)
xl restore -e -p "$(configure linux clone 128 32)" hole.save 2>restore.log || { tail -n 5 restore.log; fail "xl restore"; }
ok "xl restore: $(seconds "$since") s"
xl list
