#!/bin/busybox sh
# The first and only program of the virtual machine that run_in_vm.sh boots: makes a software RDMA
# device, shows the host's file system with a writable layer in memory, runs the job, powers off.
# Says the job's exit status as "guest: status N"; nothing else that it says is for machines.
bb=/bin/busybox

fail() {
    echo "guest: $1"
    $bb poweroff -f
}

$bb mount -t proc proc /proc
$bb mount -t sysfs sysfs /sys
$bb mount -t devtmpfs devtmpfs /dev
while read -r module; do
    $bb insmod "/modules/$module" || fail "cannot load $module"
done </modules/order

share=trans=virtio,version=9p2000.L,msize=512000
$bb mount -t 9p -o "ro,cache=loose,$share" root /host || fail "cannot mount the host's root"
$bb mount -t tmpfs tmpfs /layer
$bb mkdir /layer/upper /layer/work
$bb mount -t overlay -o lowerdir=/host,upperdir=/layer/upper,workdir=/layer/work overlay /view ||
    fail "cannot lay a writable layer over the host's root"
for directory in proc sys dev; do
    $bb mount --bind "/$directory" "/view/$directory"
done
$bb mkdir -p /view/dev/shm /view/dev/pts
$bb mount -t tmpfs tmpfs /view/dev/shm
$bb mount -t devpts devpts /view/dev/pts
$bb mount -t tmpfs tmpfs /view/run
$bb mkdir /view/run/job
$bb mount -t 9p -o "ro,$share" job /view/run/job || fail "cannot mount the job"

# Soft-RoCE over an interface that goes nowhere: packets to its own address are turned around within
# the driver. The address becomes a RoCE v2 GID; 4200 bytes carry packets of 4096 and their headers.
$bb ip link set lo up
$bb ip link add roce0 type dummy || fail "cannot make an interface"
$bb ip address add "$($bb cat /view/run/job/address)/24" dev roce0
$bb ip link set roce0 mtu 4200 up
inside() {
    $bb chroot /view /usr/bin/env -i HOME=/tmp LANG=C.UTF-8 PATH=/usr/sbin:/usr/bin:/sbin:/bin "$@"
}
inside rdma link add rxe0 type rxe netdev roce0 || fail "cannot make the RDMA device"

inside /bin/bash /run/job/script </dev/null
echo "guest: status $?"
$bb poweroff -f
