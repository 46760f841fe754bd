# The parent's host: captures, serves for the other host, and is told there how that went.
# shellcheck shell=dash source=tests/xen/dom0/kit.sh
. /test/kit.sh
cd /tmp || exit 1
ip addr add 10.77.0.1/24 dev eth0
ip link set eth0 up

parent web 128 16
capture web web
mkdir share
cp web.snow hole share/
serve web --mcast 239.77.0.1:7071%eth0
httpd -p 10.77.0.1:80 -h /tmp/share
verdict=$(timeout 700 nc -l -p 7000) || fail "no word from the other host"
snowflock memserver status --admin /tmp/server
checked web
[ "$verdict" = passed ] || fail "the other host says: $verdict"
ok "served the clones of the other host"
