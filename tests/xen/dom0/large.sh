# How long it takes, and how much it needs, to begin a clone of a larger guest.
# shellcheck shell=dash source=tests/xen/dom0/kit.sh
. /test/kit.sh
cd /tmp || exit 1

parent big 512 32
capture big big
figure descriptor_bytes_512 "$(stat -c %s big.snow)"
small big
xl pause big
serve big

since=$(now)
paused linux clone 512 32
restored=$(now)
page clone big
first_line=$(began_after clone) || exit 1
figure first_line_ms "$first_line"
checked clone
destroyed clone "$pager"
restore=$(awk -v a="$since" -v b="$restored" 'BEGIN { printf "%d", (b - a) * 1000 }')
page_out=$(($(json clone.json prepare_us) / 1000))
figure restore_ms_512 "$restore"
figure page_out_ms_512 "$page_out"
figure restore_and_page_out_ms_512 $((restore + page_out))
figure page_out_us_per_page "$(json clone.json evict_us_per_page | awk '{ printf "%.1f", $1 }')"
figure fault_handler_us "$(json clone.json median | awk '{ printf "%.1f", $1 }')"
xl unpause big
checked big
