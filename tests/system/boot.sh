#!/usr/bin/env bash
# boot.sh ROOT PACKAGES: become systemd as process 1 of a small system. Run in new namespaces.
# /usr is this machine's, read-only; everything else is new and in memory. PACKAGES is read-only too.
set -euo pipefail
root=$1 packages=$2
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs "$root"
cd "$root"
mkdir -p usr etc/systemd/system var/lib run tmp proc sys dev opt/packages root home srv old
for name in bin sbin lib lib32 lib64 libx32; do
    if [ -L "/$name" ]; then ln -s "$(readlink "/$name")" "$name"; fi
done
mount --bind /usr usr && mount -o remount,bind,ro usr
mount --bind "$packages" opt/packages && mount -o remount,bind,ro opt/packages

: > etc/machine-id # an empty file: neither a first boot nor this machine
cp /etc/ld.so.cache etc/
printf 'root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/usr/sbin/nologin\n' > etc/passwd
printf 'root:x:0:\nnogroup:x:65534:\n' > etc/group
printf 'passwd: files systemd\ngroup: files systemd\nhosts: files\n' > etc/nsswitch.conf
ln -s /usr/lib/systemd/system/basic.target etc/systemd/system/default.target

mount -t proc proc proc
mount --bind proc/sys proc/sys && mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro sysfs sys
mount -t tmpfs -o mode=755 tmpfs dev
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts dev/pts
ln -s pts/ptmx dev/ptmx
for name in null zero full random urandom tty; do
    touch "dev/$name" && mount --bind "/dev/$name" "dev/$name"
done
mount -t tmpfs -o mode=1777 tmpfs dev/shm
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=1777 tmpfs tmp
mount -t tmpfs -o mode=755 tmpfs sys/fs/cgroup
for name in memory cpu cpuacct pids devices freezer blkio; do
    mkdir "sys/fs/cgroup/$name" && mount -t cgroup -o "$name" cgroup "sys/fs/cgroup/$name"
done
mkdir sys/fs/cgroup/systemd sys/fs/cgroup/unified
mount -t cgroup -o none,name=systemd cgroup sys/fs/cgroup/systemd
mount -t cgroup2 cgroup2 sys/fs/cgroup/unified

ip link set lo up
pivot_root . old
umount -l old
exec env -i container=edge-sdk PATH=/usr/sbin:/usr/bin /lib/systemd/systemd
