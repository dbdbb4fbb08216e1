#!/usr/bin/env bash
# Runs tests/rdma/suite.sh, or the command given, in a virtual machine with a software RDMA device
# (Soft-RoCE), so that the fabric's verbs are real on a host that has no adapter.
#
# The machine is qemu without hardware support, the kernel of the distribution's package, an initramfs
# of busybox and a few modules, and the host's own file system, read-only under a layer in memory:
# what is built and installed here runs there as it is. It needs no privileges but to install
# packages, which happens only where some are missing; Debian and its derivatives on x86-64 are known.
#
#   STEP3RT_VM_CACHE       where kernel and initramfs are kept (~80 MB); default ~/.cache/step3rt-vm
#   STEP3RT_VM_MEMORY_MB   default 3072
#   STEP3RT_VM_TIMEOUT_S   default 1800
#   STEP3RT_PYTHON         the suite's Python; default .venv/bin/python
set -euo pipefail
repository=$(cd "$(dirname "$0")/../.." && pwd)
here=$repository/tests/rdma
cache=${STEP3RT_VM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/step3rt-vm}
memory_mb=${STEP3RT_VM_MEMORY_MB:-3072}
timeout_s=${STEP3RT_VM_TIMEOUT_S:-1800}
# Of the device; in a network that is for benchmarks and so nobody's.
address=198.18.0.1

die() {
    echo "$0: $1" >&2
    exit 1
}

install_missing() {
    local -A packages=(
        [qemu-system-x86_64]=qemu-system-x86 [busybox]=busybox-static [cpio]=cpio [rdma]=iproute2
        [modprobe]=kmod [xz]=xz-utils [ibv_devinfo]="ibverbs-utils ibverbs-providers rdma-core"
    )
    local missing=() command
    for command in "${!packages[@]}"; do
        # shellcheck disable=SC2206 # several packages are several words
        PATH=$PATH:/usr/sbin:/sbin command -v "$command" >/dev/null || missing+=(${packages[$command]})
    done
    [ ${#missing[@]} -eq 0 ] && return
    command -v apt-get >/dev/null || die "needs ${missing[*]}. Install them"
    [ "$(id -u)" -eq 0 ] || die "needs ${missing[*]}. Install them: apt-get install ${missing[*]}"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

# Downloads the kernel's package and takes what is needed out of it; installs nothing.
make_kernel() {
    [ -e "$cache/vmlinuz" ] && return
    local work package
    work=$(mktemp -d)
    package=$(apt-cache depends linux-image-amd64 2>/dev/null | awk '$1 == "Depends:" { print $2; exit }')
    if [ -z "$package" ]; then
        apt-get update -qq
        package=$(apt-cache depends linux-image-amd64 | awk '$1 == "Depends:" { print $2; exit }')
    fi
    [ -n "$package" ] || die "no kernel package was found. See that apt-get update works"
    (cd "$work" && apt-get download -qq -o APT::Sandbox::User=root "$package")
    mkdir "$work/kernel"
    # All of its drivers would be 400 MB.
    dpkg-deb --fsys-tarfile "$work"/*.deb | tar -x -C "$work/kernel" --wildcards \
        './boot/vmlinuz-*' './lib/modules/*/modules.*' './lib/modules/*/kernel/fs/*' \
        './lib/modules/*/kernel/net/9p/*' './lib/modules/*/kernel/net/ipv4/*' \
        './lib/modules/*/kernel/net/ipv6/*' './lib/modules/*/kernel/lib/*' \
        './lib/modules/*/kernel/crypto/*' './lib/modules/*/kernel/drivers/virtio/*' \
        './lib/modules/*/kernel/drivers/net/dummy*' './lib/modules/*/kernel/drivers/infiniband/*'
    mkdir -p "$cache"
    rm -rf "$cache/kernel"
    mv "$work/kernel" "$cache/kernel"
    cp "$cache"/kernel/boot/vmlinuz-* "$cache/vmlinuz"
    rm -rf "$work"
}

# Packs busybox, the modules and guest_init.sh; anew when one of them has changed.
make_initramfs() {
    local version work wanted module path name count=0
    version=$(ls "$cache/kernel/lib/modules")
    initramfs=$cache/initramfs-$(cat "$here/guest_init.sh" "$here/run_in_vm.sh" | cksum | cut -d' ' -f1)
    [ -e "$initramfs" ] && return
    work=$(mktemp -d)
    mkdir -p "$work"/{bin,modules,proc,sys,dev,host,layer,view}
    cp "$(command -v busybox)" "$work/bin/busybox"
    cp "$here/guest_init.sh" "$work/init"
    PATH=$PATH:/usr/sbin:/sbin depmod -b "$cache/kernel" "$version" 2>/dev/null || true
    # Soft-RoCE asks the crypto layer for crc32 by name, so no dependency tells of that module.
    for wanted in virtio_pci 9pnet_virtio 9p overlay dummy crc32_generic ib_uverbs rdma_rxe; do
        PATH=$PATH:/usr/sbin:/sbin modprobe -d "$cache/kernel" -S "$version" --show-depends "$wanted"
    done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }' >"$work/paths"
    while read -r path; do
        module=$(basename "$path")
        name=$(printf '%02d-%s' $((count++)) "${module%.xz}")
        case $path in
        *.xz) xz -dc "$path" ;;
        *) cat "$path" ;;
        esac >"$work/modules/$name"
        echo "$name" >>"$work/modules/order"
    done <"$work/paths"
    rm "$work/paths"
    rm -f "$cache"/initramfs-*
    (cd "$work" && find . | cpio -o -H newc --quiet | gzip -1) >"$initramfs.new"
    mv "$initramfs.new" "$initramfs"
    rm -rf "$work"
}

# Boots, runs "$@" in the repository, and returns its status.
boot() {
    local status
    job=$(mktemp -d)
    trap 'rm -rf "$job"' EXIT
    {
        echo "export STEP3RT_IN_VM=1 STEP3RT_RDMA_HOST=$address"
        [ -z "${STEP3RT_PYTHON:-}" ] || printf 'export STEP3RT_PYTHON=%q\n' "$STEP3RT_PYTHON"
        printf 'cd %q\nulimit -l unlimited\nexec' "$repository"
        printf ' %q' "$@"
        echo
    } >"$job/script"
    echo "$address" >"$job/address"
    # TCG: the same everywhere, and nested hardware support is often there and broken.
    timeout -k 5 "$timeout_s" qemu-system-x86_64 -accel tcg,thread=multi -cpu max -smp 2 \
        -m "$memory_mb" -M q35 -nodefaults -no-reboot -display none -serial stdio \
        -kernel "$cache/vmlinuz" -initrd "$initramfs" \
        -append "console=ttyS0 quiet loglevel=3 panic=-1 mitigations=off nokaslr audit=0" \
        -virtfs local,path=/,mount_tag=root,security_model=none,readonly=on,multidevs=remap \
        -virtfs "local,path=$job,mount_tag=job,security_model=none,readonly=on" \
        </dev/null 2>&1 | sed -u 's|\r$||' | tee "$job/output" || true
    status=$(sed -n 's/^guest: status //p' "$job/output" | tail -n 1)
    [ -n "$status" ] || die "the virtual machine did not finish within $timeout_s s"
    return "$status"
}

install_missing
make_kernel
make_initramfs
if [ $# -eq 0 ]; then
    "$here/suite.sh" build
    set -- tests/rdma/suite.sh
fi
boot "$@"
