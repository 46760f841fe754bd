# Sourced by tests/xen/run: what a test machine is made of. Each part stands in $XEN_DIR under its name beside a file
# .NAME.key, and is made again when the recipe or what it is made of has changed.
# shellcheck shell=bash disable=SC2154 # here, top, target: of tests/xen/run

SUITE=bookworm
TOOLS=(xl xenstored xen-init-dom0 xenconsoled libxl-save-helper xenctx)
# What xl and xenstored need, to be found by nobody but them; `dom0` checks that nothing is missing.
PACKAGES=(
    busybox-static xen-utils-4.17 xenstore-utils
    libxenmisc4.17 libxencall1 libxendevicemodel1 libxenevtchn1 libxenforeignmemory1 libxengnttab1 libxenhypfs1
    libxenstore4 libxentoolcore1 libxentoollog1 libyajl2 libuuid1 liblzma5 libzstd1 zlib1g libc6 libgcc-s1
)
# In the order of their loading. The last is for tests with a network.
MODULES=(drivers/xen/xen-privcmd drivers/xen/xen-evtchn drivers/xen/xen-gntdev drivers/xen/xen-gntalloc drivers/xen/xenfs/xenfs
    drivers/net/ethernet/intel/e1000/e1000)
XEN_CONFIG='
CONFIG_EXPERT=y
CONFIG_UNSUPPORTED=y
CONFIG_MEM_PAGING=y
# CONFIG_DEBUG is not set
# CONFIG_LIVEPATCH is not set
# CONFIG_PV_SHIM is not set
# CONFIG_PVH_GUEST is not set
# CONFIG_XEN_GUEST is not set
# CONFIG_HYPERV_GUEST is not set
# CONFIG_TBOOT is not set
# CONFIG_ARGO is not set
# CONFIG_XSM is not set
# CONFIG_SHADOW_PAGING is not set
'

build() {
    local needed missing=()
    [ "$(uname -m)" = x86_64 ] || skip "the test machine is for x86-64 hosts, this is $(uname -m)"
    for needed in apt-get:apt dpkg-source:dpkg-dev make:make gcc:gcc flex:flex bison:bison cpio:cpio xz:xz-utils readelf:binutils; do
        command -v "${needed%%:*}" >/dev/null || missing+=("${needed##*:}")
    done
    [ -x /usr/bin/python3 ] || missing+=(python3)
    [ ${#missing[@]} -eq 0 ] || skip "missing here: apt-get install ${missing[*]}"
    "$top/tests/lab" guest qemu-7.2 || skip "tests/lab has no guest or no QEMU"
    mkdir -p "$XEN_DIR"
    part packages "${PACKAGES[*]}"
    part kernel ""
    part vmlinux "$(key kernel)"
    part hypervisor "$XEN_CONFIG"
    part dom0 "$(key packages)$(key kernel)${TOOLS[*]}${MODULES[*]}$(cat "$here/dom0/init")"
    part tiny "$(cat "$here"/guest/tiny*)"
    snowflock_command
}

# part NAME INPUTS: makes the part by the function make_NAME in an empty folder, unless it is there from the same recipe and inputs.
part() {
    local name=$1 dir=$XEN_DIR/$1 wanted started=$SECONDS code
    wanted=$({ declare -f "make_$name"; echo "$SUITE $2"; } | sha256sum)
    if [ -e "$dir" ] && [ "$(key "$name")" = "$wanted" ]; then return; fi
    say "making $name"
    rm -rf "$dir" "$dir.making"
    mkdir "$dir.making"
    # Not `if ! (...)`: within a condition bash ignores `set -e`.
    set +e
    (
        set -e
        cd "$dir.making"
        "make_$name"
    ) >"$XEN_DIR/$name.log" 2>&1
    code=$?
    set -e
    if [ $code -ne 0 ]; then
        tail -n 30 "$XEN_DIR/$name.log" >&2
        # Without Debian's archive there is no test; what was fetched must build.
        case $name in packages | kernel) skip "$name could not be fetched; see $XEN_DIR/$name.log" ;; esac
        if grep -q '^E: ' "$XEN_DIR/$name.log"; then skip "$name could not be fetched; see $XEN_DIR/$name.log"; fi
        die "$name could not be made; see $XEN_DIR/$name.log"
    fi
    mv "$dir.making" "$dir"
    echo "$wanted" >"$XEN_DIR/.$name.key"
    say "$name: made in $((SECONDS - started)) s"
}

key() { cat "$XEN_DIR/.$1.key" 2>/dev/null || true; }

make_packages() {
    "$top/tests/lab" unpack "$SUITE" "$PWD/root" "${PACKAGES[@]}"
}

# The stock kernel, for dom0 and the guest.
make_kernel() { "$top/tests/lab" unpack "$SUITE" "$PWD/root" linux-image; }

# Unpacked and without symbols, since neither QEMU's multiboot nor xl in a slow dom0 should have to do that.
# Offsets of Linux's boot protocol: setup_sects at 0x1f1, payload_offset at 0x248.
make_vmlinux() {
    local image setup offset
    image=$(echo "$XEN_DIR"/kernel/root/boot/vmlinuz-*)
    setup=$(od -An -tu1 -j $((0x1f1)) -N 1 "$image")
    offset=$(od -An -tu4 -j $((0x248)) -N 4 "$image")
    tail -c +$(((setup + 1) * 512 + offset + 1)) "$image" | xz --decompress --single-stream >vmlinux.full || [ -s vmlinux.full ]
    strip -o vmlinux vmlinux.full
    rm vmlinux.full
}

# Debian's Xen, with the option that paging needs. Debian leaves it off.
make_hypervisor() {
    "$top/tests/lab" source "$SUITE" "$PWD/source" xen
    local make=(make -s -C source/xen XEN_TARGET_ARCH=x86_64 PYTHON=/usr/bin/python3)
    "${make[@]}" x86_64_defconfig
    echo "$XEN_CONFIG" >>source/xen/.config
    "${make[@]}" olddefconfig
    "${make[@]}" -j "$(nproc)"
    grep -q '^CONFIG_MEM_PAGING=y' source/xen/.config
    cp source/xen/xen xen.elf
    rm -rf source
}

# The initramfs of dom0: busybox, xl and what it needs, kernel modules.
make_dom0() {
    local from=$XEN_DIR/packages/root modules name file
    mkdir -p root/{bin,sbin,dev,proc,sys,run,tmp,root,test,lib64,lib/modules,lib/x86_64-linux-gnu} \
        root/etc/xen root/var/{log,lib}/xen root/var/lib/xenstored root/usr/bin root/usr/lib/xen-4.17
    ln -s /run root/var/run
    cp "$from/bin/busybox" root/bin/
    for name in $(root/bin/busybox --list); do
        [ "$name" = busybox ] || ln -sf busybox "root/bin/$name"
    done
    # xl looks for its helper at this very place.
    mkdir root/usr/lib/xen-4.17/bin
    for name in "${TOOLS[@]}"; do cp "$from/usr/lib/xen-4.17/bin/$name" root/usr/lib/xen-4.17/bin/; done
    for name in read write ls list rm watch; do cp "$from/usr/bin/xenstore" "root/usr/bin/xenstore-$name"; done
    # Opened by name, when a thread ends.
    cp "$from"/lib/x86_64-linux-gnu/libgcc_s.so.1 root/lib/x86_64-linux-gnu/
    libraries
    modules=$(echo "$XEN_DIR"/kernel/root/lib/modules/*/kernel)
    for name in "${MODULES[@]}"; do
        cp "$modules/$name.ko" root/lib/modules/
        basename "$name"
    done >root/lib/modules/order
    echo 'autoballoon="off"' >root/etc/xen/xl.conf
    cp "$here/dom0/init" root/init
    archive root >base.cpio
    rm -rf root
}

# Every library that something in root names, from the packages; and what these name.
libraries() {
    local from=$XEN_DIR/packages/root wanted name file
    while true; do
        wanted=$(find root -type f \( -path '*/bin/xen*' -o -path '*/bin/xl' -o -path '*/bin/libxl*' -o -name '*.so*' \) -exec readelf -d {} + |
            sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p' | sort -u)
        for name in $wanted; do
            if [ -e "root/lib/x86_64-linux-gnu/$name" ]; then wanted=${wanted/"$name"/}; fi
        done
        if [ -z "${wanted//[[:space:]]/}" ]; then break; fi
        for name in $wanted; do
            file=$(find "$from"/lib "$from"/usr/lib -name "$name" -path '*x86_64-linux-gnu*' | head -n 1)
            [ -n "$file" ] || { echo "no package brought $name"; return 1; }
            cp -L "$file" root/lib/x86_64-linux-gnu/
        done
    done
    cp -L "$from"/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2 root/lib64/
}

# A kernel of some kilobytes that checks its own memory.
make_tiny() {
    rustc --edition 2024 --target x86_64-unknown-linux-gnu -O -D warnings -C panic=abort -C relocation-model=static \
        -C target-feature=+crt-static -C strip=symbols -C link-arg=-nostdlib -C link-arg=-nostartfiles -C link-arg=-static \
        -C "link-arg=-T$here/guest/tiny.ld" -C link-arg=-Wl,--build-id=none -o tiny.elf "$here/guest/tiny.rs"
}

# archive DIR: its files in the format of an initramfs
archive() { (cd "$1" && find . -mindepth 1 | cpio --quiet -o -H newc -R 0:0); }

# The command under test, static: dom0 has no more than it must. Only its last crate is compiled for this; the
# others are those of an ordinary build of the same profile.
snowflock_command() {
    local profile=$XEN_PROFILE dir=$target/$XEN_PROFILE
    if [ "${SNOWFLOCK:-}" ]; then
        cp "$SNOWFLOCK" "$XEN_DIR/snowflock"
        return
    fi
    if [ "$profile" = dev ]; then dir=$target/debug; fi
    say "building snowflock, profile $profile"
    (cd "$top" && cargo rustc --quiet --profile "$profile" -p toolstack --bin snowflock -- -C target-feature=+crt-static) ||
        die "snowflock does not build"
    strip -o "$XEN_DIR/snowflock" "$dir/snowflock"
    "$XEN_DIR/snowflock" --version >/dev/null
}
