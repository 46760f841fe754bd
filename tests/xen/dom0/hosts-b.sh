# The host of the clones, whose pages come over the network.
# shellcheck shell=dash source=tests/xen/dom0/kit.sh
. /test/kit.sh
cd /tmp || exit 1
ip addr add 10.77.0.2/24 dev eth0
ip link set eth0 up
SERVER=tcp://10.77.0.1:7070

# Whatever happens, the other host is told.
tell() {
    if [ $? -eq 0 ]; then echo passed; else echo failed; fi | nc -w 5 10.77.0.1 7000
}
trap tell EXIT

fetch() { wget -q -O "/tmp/$1" "http://10.77.0.1/$1"; }
within 400 "the parent's host has a descriptor" fetch web.snow
fetch hole || fail "no stream for xl restore"

note "a clone by unicast"
paused linux one 128 16
page one web --mcast off
began_after one >/dev/null || exit 1
checked one
destroyed one "$pager"
ok "a clone fetched $(json one.json demand_pages) pages on demand, $(json one.json bytes_received) bytes in all"

note "two clones by multicast, with all of their memory"
paused linux two 128 16
paused linux three 128 16
page two web --hydrate now
two=$pager
page three web --hydrate now
within 300 "the memtap of two is done" ended "$two"
within 300 "the memtap of three is done" ended "$pager"
ends "$two" 0 "the memtap of two"
ends "$pager" 0 "the memtap of three"
for clone in two three; do
    [ "$(json $clone.json received)" -gt 1000 ] || fail "only $(json $clone.json received) datagrams came by multicast"
    checked "$clone"
done
ok "two clones got $(json two.json received) and $(json three.json received) datagrams"
